"""Searches for what fits a topology best: the window, or mesh and remat."""

from collections.abc import Callable, Iterator
import copy
import shlex
import typing

import ml_collections

from longnet_jax import checked, estimate, plan
from longnet_jax.analysis import topology as topology_lib
from longnet_jax.models import config as model_config
from longnet_jax.models import sizes
from longnet_jax.training import config as config_lib

# What each search changes.
OF_MESH = ("mesh.data", "mesh.seq", "mesh.model", "model.remat")
OF_WINDOW = (
  *("data.window", "model.max_positions"),
  *("model.segment_lengths", "model.dilation_rates"),
)
_LONGEST = 2**30  # a power of two below 2^31: positions are int32
_SHOWN = 5  # of the meshes that were estimated
_REMAT = typing.get_args(
  typing.get_type_hints(model_config.LongNetConfig)["remat"]
)


def longest(
  settings: ml_collections.ConfigDict,
  make,
  say: Callable[[str], None] = print,
) -> dict:
  """Returns the record of the longest window that fits, by doubling.

  Args:
    settings: of the experiment; its window is where the search begins.
    make: settings -> record of a plan.
    say: gets the line that says why there is no longer one, if not for memory.

  Raises RefusedError where not even one segment of the shortest branch fits.
  """
  window, shortest = settings.data.window, min(settings.model.segment_lengths)
  record = make(with_window(settings, window))
  if record["fits"]:
    while 2 * window <= _LONGEST:
      window *= 2
      try:
        longer = make(with_window(settings, window))
      except checked.RefusedError as error:
        say(f"not {window:,}: {error}")
        break
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


def near(
  settings: ml_collections.ConfigDict, guess
) -> ml_collections.ConfigDict:
  """Returns settings of the longest window that fits by estimates.

  Args:
    settings: of the experiment, returned as they are where none fits.
    guess: settings -> record of an estimate.
  """
  try:
    found = longest(settings, guess, say=lambda line: None)
  except checked.RefusedError:  # the compiler will say
    return settings
  return with_window(settings, found["window"])


def fastest(
  settings: ml_collections.ConfigDict, topology: topology_lib.Topology, make
) -> dict:
  """Returns the record of the fastest mesh and remat that fit.

  Args:
    settings: of the experiment; its mesh and remat do not matter.
    topology: whose devices are all used.
    make: settings -> record of a plan; gets what is fastest by estimate first.

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
      f"nothing fits by estimate, the least being {gib(least)} a device; use "
      "more devices or a shorter window"
    )
  fitting.sort(key=lambda pair: pair[1].seconds["step"])
  print(f"{len(fitting)} of {len(estimates)} fit by estimate; the fastest:")
  print("\n".join(_lines(fitting[:_SHOWN])), flush=True)
  for changed, _ in fitting:
    record = make(changed)
    if record["fits"]:
      print(as_flags(changed, OF_MESH))
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
    step = f"{number(1e3 * found.seconds['step'])} ms"
    peak = gib(found.peak_bytes)
    yield f"  {shape:18}  {settings.model.remat:7}  {step:>9}  {peak:>10}"


def as_flags(settings: ml_collections.ConfigDict, keys: tuple[str, ...]) -> str:
  """Returns the line of flags that set what a search has changed."""
  flat = config_lib.flatten(settings.to_dict())
  pairs = ((key, str(flat[key]).replace(" ", "")) for key in keys)
  flags = " ".join(f"--config.{key}={shlex.quote(x)}" for key, x in pairs)
  return f"as flags of experiments.train: {flags}"


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


def gib(size: float) -> str:
  """Returns bytes as they are printed."""
  return f"{size / 2**30:.2f} GiB"


def number(x: float) -> str:
  """Returns a number as it is printed, of two digits or more."""
  return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"
