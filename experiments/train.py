"""Trains a LongNet: python -m experiments.train --config=FILE --workdir=DIR.

With neither flag it runs configs/quickstart.py into runs/quickstart. Started
again it goes on from the last checkpoint in the workdir, exactly.

Exit codes: 0 all steps are done; 1 refused or diverged, with the reason on
stderr; 128 + n stopped by signal n (143 SIGTERM, 130 Ctrl-C) after saving.
"""

from absl import flags

from experiments import command
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop

_QUICKSTART = "configs/quickstart.py"
_CONFIG = command.define_config(_QUICKSTART)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder of the run; an earlier run in it goes on"
)


def main(_) -> int:
  """Trains as the flags say."""
  workdir = _WORKDIR.value
  if workdir is None:
    if flags.FLAGS["config"].present:
      raise ValueError("--config without --workdir; add --workdir=runs/NAME")
    workdir = "runs/quickstart"
    print(f"no flags: {_QUICKSTART} into {workdir}", flush=True)
  result = loop.train(config_lib.build(_CONFIG.value), workdir)
  print(f"{workdir}: step {result.step}, parameters {result.fingerprint}")
  return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
  command.run(main)
