"""Plans a run: python -m experiments.plan --config=FILE --topology=v5p:8x8x16.

Compiles the train step of that config for TPUs that need not be there, and says
whether it fits, what fills the memory, what the devices send one another and
how long a step is expected to take. --search=window doubles or halves the
window, its longest segment with it, until it has the longest that fits. --json
keeps the record. Needs the TPU compiler: pip install -e '.[tpu]'.
"""

import copy
import json

from absl import flags
import jax
import ml_collections

from experiments import command, hardware
from longnet_jax import checked, plan, storage
from longnet_jax.models import sizes
from longnet_jax.training import config as config_lib

_CONFIG = command.define_config()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, f"what to compile for, such as {', '.join(plan.EXAMPLES)}"
)
_JSON = flags.DEFINE_string("json", None, "file to write the record into")
_SEARCH = flags.DEFINE_enum(
  "search", None, ["window"], "what to change until it just fits"
)
_LONGEST = 2**31  # positions are int32


def main(_) -> None:
  """Plans the config of the flags and prints what was found."""
  # No device of this machine takes part.
  jax.config.update("jax_platforms", "cpu")
  if not _TOPOLOGY.value:
    raise checked.RefusedError(
      f"--topology is missing; give one such as {', '.join(plan.EXAMPLES)}"
    )
  settings = _CONFIG.value
  make = lambda settings: _make(settings, _TOPOLOGY.value)
  found = search(settings, make) if _SEARCH.value else make(settings)
  if _JSON.value:
    measured_on = {"command": command.line(), "hardware": hardware.describe()}
    record = {**measured_on, **found}
    text = json.dumps(record, indent=2) + "\n"
    storage.write_whole(storage.path(_JSON.value), text)


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


def _make(settings, topology):
  """Returns the record of one plan, and prints it."""
  config = config_lib.build(settings)
  print(
    f"window {config.data.window:,}, batch {config.training.batch_size}, mesh "
    f"{config.mesh.data} x {config.mesh.seq} x {config.mesh.model} of "
    f"{topology}: compiling, which takes minutes",
    flush=True,
  )
  found = plan.make(config, topology)
  print("\n".join(table(found)), flush=True)
  return {
    **found.to_dict(),
    "window": config.data.window,
    "branches": list(
      zip(
        config.model.segment_lengths, config.model.dilation_rates, strict=True
      )
    ),
  }


def table(found: plan.Plan) -> list[str]:
  """Returns the lines that say what was found."""
  peak = "" if found.peak_bytes is None else f"{_gib(found.peak_bytes)} of "
  spare = ""
  if found.peak_bytes is not None:
    rest = found.limit_bytes - found.peak_bytes
    spare = f", {_gib(abs(rest))} {'free' if rest >= 0 else 'too much'}"
  lines = [
    f"{'fits' if found.fits else 'DOES NOT FIT'}: {peak}"
    f"{_gib(found.limit_bytes)} a device{spare}",
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
    lines.append(
      "  (the compiler's cycles at the chip's clock; kernels at "
      f"{plan.KERNEL_SHARE:.0%} of peak; links one ring at a time; nothing "
      "overlaps; copies to the host are not counted; nothing was run)"
    )
  if found.unknown_loops:
    lines.append(f"  {found.unknown_loops} loops are counted once")
  lines.append(f"  {found.compile_seconds:.0f} CPU seconds to compile")
  return lines


def _tera(flops, found):
  return f"{flops / found.devices / 1e12:.1f}"


def _gib(size):
  return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
  command.run(main)
