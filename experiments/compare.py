"""Trains LongNet, dense and sparse alike: python -m experiments.compare.

With --config=FILE and --workdir=DIR it trains one config three times, into
DIR/dilated, DIR/dense and DIR/sparse, changing nothing but model.attention:
the three have the same number of parameters and read the same windows in the
same order. The sparse one gets the summary columns that give it the FLOPs of
LongNet. Started again it goes on where it was, as experiments.train does.
It prints a table and writes comparison.json and comparison.png into DIR.

Exit codes are those of experiments.train.
"""

from absl import flags

from experiments import baselines, command, hardware
from longnet_jax import checked, storage
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop

_CONFIG = command.define_config("configs/quickstart.py")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder of the three runs; earlier runs in it go on"
)


def main(_) -> int:
  """Trains the three and sets them side by side."""
  if _WORKDIR.value is None:
    raise checked.RefusedError(
      "--workdir is missing; give a folder such as runs/compare"
    )
  folder = storage.path(_WORKDIR.value)
  config = config_lib.build(_CONFIG.value)
  models = {}
  for core, variant in baselines.variants(config).items():
    print(f"{folder / core}:", flush=True)
    result = loop.train(variant, folder / core)
    if result.signal:
      return 128 + result.signal
    models[core] = baselines.record(folder / core, result)
  made = baselines.write(
    folder,
    models,
    command=command.line(),
    hardware=hardware.describe(),
    steps=config.training.steps,
  )
  print(baselines.table(made))
  print(f"wrote {folder / 'comparison.json'} and {folder / 'comparison.png'}")
  return 0


if __name__ == "__main__":
  command.run(main)
