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

from collections.abc import Callable
import dataclasses
import functools
import json

from absl import flags
import jax

from experiments import command, hardware, plan_search
from longnet_jax import checked, estimate, plan, storage
from longnet_jax.analysis import topology as topology_lib
from longnet_jax.estimate import seconds
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
    found = plan_search.fastest(settings, topology, make)
  elif _SEARCH.value == "window":
    quiet = functools.partial(guess, quiet=True)
    found = plan_search.longest(plan_search.near(settings, quiet), make)
    changed = plan_search.with_window(settings, found["window"])
    print(f"the longest window that fits: {found['window']:,}")
    print(plan_search.as_flags(changed, plan_search.OF_WINDOW))
  else:
    found = make(settings)
  if _JSON.value:
    measured_on = {"command": command.line(), "hardware": hardware.describe()}
    record = {**measured_on, **found}
    text = json.dumps(record, indent=2) + "\n"
    storage.write_whole(storage.path(_JSON.value), text)


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
    "mesh": dataclasses.asdict(mesh),
    "remat": config.model.remat,
  }


def table(found: plan.Plan) -> list[str]:
  """Returns the lines that say what was found."""
  is_estimate = found.compile_seconds is None
  how = "; by arithmetic, nothing was compiled" * is_estimate
  lines = [_verdict(found) + how]
  lines.append(
    f"  parameters {plan_search.gib(found.parameter_bytes)}, optimizer "
    f"{plan_search.gib(found.optimizer_bytes)}, the rest is activations"
    + f"; on the host {plan_search.gib(found.host_bytes)}"
    * bool(found.host_bytes)
  )
  model, computed = (
    plan_search.number(flops / found.devices / 1e12)
    for flops in (found.model_flops, found.computed_flops)
  )
  lines.append(f"  TFLOP a device and step: model {model}, computed {computed}")
  for (kind, dtype, group), size in sorted(found.collectives.items()):
    lines.append(
      f"  {kind} of {dtype} among {group}: {size / 2**20:,.1f} MiB received"
    )
  if found.seconds is not None:
    lines += _times(found, is_estimate)
  elif found.fits:
    lines.append("  its compiler expects no times; --estimate does")
  if found.unknown_loops:
    lines.append(f"  {found.unknown_loops} loops are counted once")
  if not is_estimate:
    lines.append(f"  {found.compile_seconds:.0f} CPU seconds to compile")
  return lines


def _verdict(found):
  verdict = "fits" if found.fits else "DOES NOT FIT"
  limit = f"{plan_search.gib(found.limit_bytes)} a device"
  if found.peak_bytes is None:
    return f"{verdict}: {limit}"
  rest = found.limit_bytes - found.peak_bytes
  return (
    f"{verdict}: {plan_search.gib(found.peak_bytes)} of {limit}, "
    f"{plan_search.gib(abs(rest))} {'free' if rest >= 0 else 'too much'}"
  )


def _times(found, is_estimate):
  parts = (
    f"{name} {plan_search.number(1e3 * x)}" for name, x in found.seconds.items()
  )
  counted = "the compiler's cycles at the chip's clock"
  if is_estimate:
    counted = (
      f"products at {seconds.PRODUCT_SHARE:.0%} of peak, arrays at the "
      "memory's rate"
    )
  return [
    f"  estimated ms: {', '.join(parts)}; {found.share_of_peak:.0%} of peak",
    f"  ({counted}; kernels at {plan.KERNEL_SHARE:.0%} of peak; links one "
    "ring at a time; nothing overlaps; copies to the host are not counted; "
    "nothing was run)",
  ]


if __name__ == "__main__":
  command.run(main)
