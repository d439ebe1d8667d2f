"""The studies by name, and how one is completed."""

import json

from experiments import command, hardware
from experiments.studies import (
  ablations,
  flops,
  lengths,
  reach,
  runs,
  runtime,
  sizes,
)
from longnet_jax import storage
from longnet_jax.training import config as config_lib

STUDIES = {
  "lengths": lengths.STUDY,
  "flops": flops.STUDY,
  "sizes": sizes.STUDY,
  "runtime": runtime.STUDY,
  "ablations": ablations.STUDY,
  "reach": reach.STUDY,
}


def complete(
  name: str,
  config: config_lib.ExperimentConfig,
  seeds: int,
  folder: storage.Path,
) -> dict:
  """Measures what is missing; writes record and picture as they grow."""
  study = STUDIES[name]
  plan = study.plan(config, seeds)
  known = lambda each: runs.known(config, each.name, folder)
  missing = [each for each in plan if not known(each)]
  for number, each in enumerate(missing, 1):
    _write(name, list(filter(None, map(known, plan))), folder)
    print(f"{folder / each.name}: {number} of {len(missing)}", flush=True)
    made = study.measure(config, each, folder / each.name)
    runs.keep(config, each.name, folder, made)
  return _write(name, list(map(known, plan)), folder)


def _write(name, measured, folder) -> dict:
  """Writes the record of what is known so far, and its picture."""
  record = command.rounded(
    {
      "study": name,
      "command": command.line(),
      "hardware": hardware.describe(),
      "measured": measured,
    }
  )
  if measured:
    text = json.dumps(record, indent=1) + "\n"
    storage.write_whole(folder / f"{name}.json", text)
    STUDIES[name].draw(record, folder / f"{name}.png")
  return record
