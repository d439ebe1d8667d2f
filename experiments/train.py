"""Trains a LongNet: python -m experiments.train --config=FILE --workdir=DIR.

With neither flag it runs configs/quickstart.py into runs/quickstart. Started
again it goes on from the last checkpoint in the workdir, exactly.

Exit codes: 0 all steps are done; 1 refused; 3 diverged; 4 storage failed; 5
another process ended; 6 the watchdog ended it; 128 + n stopped by signal n
(143 SIGTERM, 129 SIGHUP, 130 Ctrl-C) after saving.

On many hosts start the same command on each, with a --workdir that all share.
A TPU pod and SLURM (srun) need nothing else; elsewhere each process gets
--coordinator=HOST:PORT --num_processes=N --process_id=I. A signal to one stops
all; when one dies the others end, too.
"""

import sys

from absl import flags

from experiments import command
from longnet_jax import checked
from longnet_jax.parallel import hosts
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop

_QUICKSTART = "configs/quickstart.py"
_CONFIG = command.define_config(_QUICKSTART)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder of the run; an earlier run in it goes on"
)
_FALLBACK = flags.DEFINE_bool(
  "fallback", False, "go on from the last checkpoint that can be read"
)
_PROFILE = flags.DEFINE_string(
  "profile", None, "STEP:COUNT, steps to trace into WORKDIR/profile"
)
_TRACKER = flags.DEFINE_string(
  "tracker", None, "module:function that gets the metrics, too"
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for processes that join by flags",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "how many processes join; 1 alone runs by itself"
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "number of this process, from 0"
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
  "join_timeout",
  hosts.JOIN_TIMEOUT,
  "seconds until a process that has not come is given up",
)
_FAKE_DEVICES = flags.DEFINE_integer(
  "fake_devices", None, "CPU devices a process, to try out a mesh"
)


def main(_) -> int:
  """Trains as the flags say."""
  workdir = _WORKDIR.value
  if workdir is None:
    if flags.FLAGS["config"].present:
      raise checked.RefusedError(
        "--config without --workdir; add --workdir=runs/NAME"
      )
    workdir = "runs/quickstart"
    given = "no --workdir" if sys.argv[1:] else "no flags"
    print(f"{given}: {_QUICKSTART} into {workdir}", flush=True)
  if not workdir:
    raise checked.RefusedError("--workdir is empty; give one such as runs/NAME")
  config = config_lib.build(_CONFIG.value)
  hosts.start(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    fake_devices=_FAKE_DEVICES.value,
    join_timeout=_JOIN_TIMEOUT.value,
  )
  result = loop.train(
    config,
    workdir,
    fallback=_FALLBACK.value,
    profile=_PROFILE.value,
    tracker=_TRACKER.value,
  )
  if hosts.is_first():
    print(f"{workdir}: step {result.step}, parameters {result.fingerprint}")
  return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
  command.run(main)
