"""Plans a run: python -m experiments.plan --config=FILE --topology=v5p:8x8x16.

Compiles the train step of that config for TPUs or GPUs that need not be there,
and says whether it fits, what fills the memory, what the devices send one
another and, for TPUs, how long a step is expected to take. With --estimate
arithmetic says so in seconds instead, and no compiler is needed.

--search=window doubles or halves the window, its longest segment with it, until
it has the longest that fits. --search=mesh estimates every mesh of all devices
with every `model.remat`, and takes the fastest that fits. Both begin with
estimates, and compile what these have found.

--json keeps the record. The compilers: pip install -e '.[tpu]' or '.[cuda]'.
"""

from collections.abc import Callable, Iterator
import copy
import functools
import json
import typing

from absl import flags
import jax
import ml_collections

from experiments import command, hardware
from longnet_jax import checked, estimate, plan, storage
from longnet_jax.analysis import topology as topology_lib
from longnet_jax.estimate import seconds
from longnet_jax.models import config as model_config
from longnet_jax.models import sizes
from longnet_jax.training import config as config_lib

_CONFIG = command.define_config()
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  f"what to plan for, such as {', '.join(topology_lib.EXAMPLES)}",
)
_JSON = flags.DEFINE_string("json", None, "file to write the record into")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "only estimate; fast")
_SEARCH = flags.DEFINE_enum(
  "search", None, ["window", "mesh"], "what to change until it fits best"
)
_LONGEST = 2**31  # positions are int32
_SHOWN = 5  # of the meshes that were estimated
_REMAT = typing.get_args(
  typing.get_type_hints(model_config.LongNetConfig)["remat"]
)


def main(_) -> None:
  """Plans the config of the flags and prints what was found."""
  # No device of this machine takes part.
  jax.config.update("jax_platforms", "cpu")
  if not _TOPOLOGY.value:
    raise checked.RefusedError(
      "--topology is missing; give one such as "
      f"{', '.join(topology_lib.EXAMPLES)}"
    )
  topology = topology_lib.parse(_TOPOLOGY.value)
  guess = functools.partial(_make, topology=topology, make=estimate.make)
  make = functools.partial(_make, topology=topology, make=plan.make)
  if _ESTIMATE.value:
    make = guess
  settings = _CONFIG.value
  if _SEARCH.value == "mesh":
    found = search_mesh(settings, topology, make)
  elif _SEARCH.value == "window":
    found = search(_near(settings, guess), make)
  else:
    found = make(settings)
  if _JSON.value:
    measured_on = {"command": command.line(), "hardware": hardware.describe()}
    record = {**measured_on, **found}
    text = json.dumps(record, indent=2) + "\n"
    storage.write_whole(storage.path(_JSON.value), text)


def _near(settings, guess):
  """Returns settings with the longest window that fits by estimates."""
  try:
    found = search(settings, functools.partial(guess, quiet=True))
  except checked.RefusedError:  # the compiler will say
    return settings
  return with_window(settings, found["window"])


def search_mesh(
  settings: ml_collections.ConfigDict, topology: topology_lib.Topology, make
) -> dict:
  """Returns the record of the fastest mesh and remat that fit.

  Args:
    settings: of the experiment; its mesh and remat do not matter.
    topology: whose devices are all used.
    make: settings -> record of `_make`; gets what is fastest by estimate first.

  Raises RefusedError where nothing fits.
  """
  estimates = list(_estimates(settings, topology))
  if not estimates:
    raise checked.RefusedError(
      f"no mesh of {topology.devices} devices divides the batch, the window "
      "and the heads; change one of these or the topology"
    )
  fitting = [pair for pair in estimates if pair[1].fits]
  if not fitting:
    least = min(found.peak_bytes for _, found in estimates)
    raise checked.RefusedError(
      f"nothing fits by estimate, the least being {_gib(least)} a device; use "
      "more devices or a shorter window"
    )
  fitting.sort(key=lambda pair: pair[1].seconds["step"])
  print(f"{len(fitting)} of {len(estimates)} fit by estimate; the fastest:")
  print("\n".join(_lines(fitting[:_SHOWN])), flush=True)
  for changed, _ in fitting:
    record = make(changed)
    if record["fits"]:
      print(f"as flags of experiments.train: {flags_of(changed)}")
      return record
  raise checked.RefusedError(
    "nothing fits that does by estimate; use more devices or a shorter window"
  )


def _lines(fitting):
  """Yields a line of each pair of settings and their estimate."""
  yield f"  {'data x seq x model':18}  remat    {'step':>9}  {'peak':>10}"
  for settings, found in fitting:
    mesh = settings.mesh
    shape = f"{mesh.data} x {mesh.seq} x {mesh.model}"
    step = f"{1e3 * found.seconds['step']:,.0f} ms"
    peak = _gib(found.peak_bytes)
    yield f"  {shape:18}  {settings.model.remat:7}  {step:>9}  {peak:>10}"


def flags_of(settings: ml_collections.ConfigDict) -> str:
  """Returns the flags that set what a search of meshes changes."""
  keys = ("mesh.data", "mesh.seq", "mesh.model", "model.remat")
  flat = config_lib.flatten(settings.to_dict())
  return " ".join(f"--config.{key}={flat[key]}" for key in keys)


def _estimates(
  settings: ml_collections.ConfigDict, topology: topology_lib.Topology
) -> Iterator[tuple[ml_collections.ConfigDict, plan.Plan]]:
  """Yields (settings, estimate) of all meshes of all devices and all remat."""
  for data in checked.divisors(topology.devices):
    for seq in checked.divisors(topology.devices // data):
      changed = copy.deepcopy(settings)
      model = topology.devices // data // seq
      changed.mesh.update({"data": data, "seq": seq, "model": model})
      try:
        estimate.make_mesh(config_lib.build(changed), topology)
      except checked.RefusedError:
        continue  # it does not divide
      for remat in _REMAT:
        changed = copy.deepcopy(changed)
        changed.model.remat = remat
        yield changed, estimate.make(config_lib.build(changed), topology.name)


def search(settings: ml_collections.ConfigDict, make) -> dict:
  """Returns the record of the longest window that fits, by doubling.

  Args:
    settings: of the experiment; its window is where the search begins.
    make: settings -> record of `_make`.

  Raises RefusedError where not even one segment of the shortest branch fits.
  """
  window, shortest = settings.data.window, min(settings.model.segment_lengths)
  record = make(with_window(settings, window))
  if record["fits"]:
    while 2 * window <= _LONGEST:
      window *= 2
      longer = make(with_window(settings, window))
      if not longer["fits"]:
        break
      record = longer
    return record
  while window // 2 >= shortest:
    window //= 2
    record = make(with_window(settings, window))
    if record["fits"]:
      return record
  raise checked.RefusedError(
    f"a window of {window} does not fit; use more devices or a smaller model"
  )


def with_window(
  settings: ml_collections.ConfigDict, window: int
) -> ml_collections.ConfigDict:
  """Returns settings of another window, whose longest segment is all of it."""
  changed = copy.deepcopy(settings)
  changed.model.update(sizes.geometric_branches(window))
  changed.model.max_positions = window
  changed.data.window = window
  return changed


def _make(settings, *, topology, make: Callable, quiet: bool = False):
  """Returns the record of one plan, and prints it."""
  config = config_lib.build(settings)
  mesh = config.mesh
  is_estimate = make is estimate.make
  if not quiet:
    print(
      f"window {config.data.window:,}, batch {config.training.batch_size}, "
      f"mesh {mesh.data} x {mesh.seq} x {mesh.model} of {topology.name}, remat "
      f"{config.model.remat}: "
      + ("estimated" if is_estimate else "compiling, which takes minutes"),
      flush=True,
    )
  found = make(config, topology.name)
  if not quiet:
    print("\n".join(table(found)), flush=True)
  lengths, rates = config.model.segment_lengths, config.model.dilation_rates
  return {
    **found.to_dict(),
    "window": config.data.window,
    "branches": list(zip(lengths, rates, strict=True)),
  }


def table(found: plan.Plan) -> list[str]:
  """Returns the lines that say what was found."""
  is_estimate = found.compile_seconds is None
  peak = "" if found.peak_bytes is None else f"{_gib(found.peak_bytes)} of "
  spare = ""
  if found.peak_bytes is not None:
    rest = found.limit_bytes - found.peak_bytes
    spare = f", {_gib(abs(rest))} {'free' if rest >= 0 else 'too much'}"
  lines = [
    f"{'fits' if found.fits else 'DOES NOT FIT'}"
    + " by estimate" * is_estimate
    + f": {peak}{_gib(found.limit_bytes)} a device{spare}",
    f"  parameters {_gib(found.parameter_bytes)}, optimizer "
    f"{_gib(found.optimizer_bytes)}, the rest is activations"
    + f"; on the host {_gib(found.host_bytes)}"
    * bool(found.host_bytes),
    f"  TFLOP a device and step: model {_tera(found.model_flops, found)}, "
    f"computed {_tera(found.computed_flops, found)}",
  ]
  for (kind, dtype, group), size in sorted(found.collectives.items()):
    lines.append(
      f"  {kind} of {dtype} among {group}: {size / 2**20:,.1f} MiB received"
    )
  if found.seconds is not None:
    parts = (f"{name} {1e3 * x:,.0f}" for name, x in found.seconds.items())
    lines.append(
      f"  estimated ms: {', '.join(parts)}; {found.share_of_peak:.0%} of peak"
    )
    counted = "the compiler's cycles at the chip's clock"
    if is_estimate:
      counted = f"products at {seconds.PRODUCT_SHARE:.0%} of peak, arrays at "
      counted += "the memory's rate"
    lines.append(
      f"  ({counted}; kernels at {plan.KERNEL_SHARE:.0%} of peak; links one "
      "ring at a time; nothing overlaps; copies to the host are not counted; "
      "nothing was run)"
    )
  elif found.fits:
    lines.append("  its compiler expects no times; --estimate does")
  if found.unknown_loops:
    lines.append(f"  {found.unknown_loops} loops are counted once")
  if is_estimate:
    lines.append("  by arithmetic: nothing was compiled")
  else:
    lines.append(f"  {found.compile_seconds:.0f} CPU seconds to compile")
  return lines


def _tera(flops, found):
  return f"{flops / found.devices / 1e12:.1f}"


def _gib(size):
  return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
  command.run(main)
