"""Two owners of one workdir; two processes of a run, of which one fails."""

import functools
import random
import signal

from experiments.faults import child, idle, sandbox, trial
from longnet_jax.parallel import hosts, liveness

# A process notices in a minute that the other one is frozen.
_SECONDS = idle.IDLE + liveness.PATIENCE


def run_owners(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """A second run in a workdir, while the first one is in some phase."""
  rng = random.Random(seed)
  workdir = box.fresh("owned") / "run"
  first = box.start(workdir)
  if seed % 3:  # else both come at once
    phase = rng.choice((child.COMPILATION, child.STEPS, child.SAVE))
    first.wait_for(phase)
    first.send(signal.SIGSTOP)  # or it would be done before
  second = box.start(workdir)
  ends = {}
  if seed % 3:
    ends["second"] = second.finish()
    first.send(signal.SIGCONT)
    ends["first"] = first.finish()
  else:
    for name, process in (("first", first), ("second", second)):
      ends[name] = process.finish()
  row = "two runs in one workdir"
  fingerprint = box.undisturbed[0]
  done = [end for end in ends.values() if end[0] == 0]
  if not done or any(out.split()[-1] != fingerprint for _, out, _ in done):
    return [trial.Trial(row, trial.WRONG, trial.shown(ends))]
  refused = [end for end in ends.values() if end[0] != 0]
  if not refused:  # one after the other
    return [trial.Trial(row, trial.UNDISTURBED)]
  ((code, _, err),) = refused
  return [trial.of_process(row, code, err, (1,))]


def _join(port: int, *, number: int, seconds: int = 60) -> list[str]:
  """Flags of one of two processes."""
  return [
    f"--coordinator=localhost:{port}",
    "--num_processes=2",
    "--config.mesh.data=2",
    f"--join_timeout={seconds}",
    f"--process_id={number}",
  ]


class _Pair:
  """Two processes of one run, the second one `late` by seconds."""

  def __init__(self, box: sandbox.Sandbox, workdir, *, late: float = 0.0):
    port = sandbox.free_port()
    self.all = [box.start(workdir, *_join(port, number=0))]
    self.all[0].join(late)
    self.all.append(box.start(workdir, *_join(port, number=1)))

  def finish(self) -> list[tuple]:
    """How both end."""
    return [process.finish(_SECONDS) for process in self.all]


@functools.cache
def _undisturbed_pair(box) -> str:
  """The fingerprint of a run of two processes, whose sums round otherwise."""
  ends = _Pair(box, box.fresh("pair") / "run").finish()
  if any(code for code, _, _ in ends):
    raise RuntimeError(f"the undisturbed pair ends with {ends}")
  return ends[0][1].split()[-1]


def run_pair(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """One of two processes is killed, frozen, late or missing."""
  what = ("killed", "frozen", "late", "missing")[seed // 2 % 4]
  row = f"one of two processes {what}"
  workdir = box.fresh("pair") / "run"
  fingerprint = _undisturbed_pair(box)
  if what == "missing":
    flags = _join(sandbox.free_port(), number=seed % 2, seconds=5)
    ended = box.start(workdir, *flags).finish(5 + idle.IDLE)
    if ended[0] is None:
      return [trial.Trial(row, trial.HANG)]
    return [trial.of_process(row, ended[0], ended[2], (hosts.LOST,))]
  if what != "late":
    result = _disturb(box, workdir, seed, row, freezes=what == "frozen")
    if result.outcome in trial.FAILURES:
      return [result]
  ends = _Pair(box, workdir, late=2.0 if what == "late" else 0.0).finish()
  if any(code for code, _, _ in ends):
    return [trial.Trial(row, trial.LOST, trial.shown(ends))]
  is_right = ends[0][1].split()[-1] == fingerprint
  outcome = trial.UNDISTURBED if is_right else trial.WRONG
  return [trial.Trial(row, outcome, "" if is_right else trial.shown(ends))]


def _disturb(box, workdir, seed, row, *, freezes) -> trial.Trial:
  """Kills or freezes one of a pair; the trial of how the other one ends."""
  rng = random.Random(seed)
  pair = _Pair(box, workdir)
  pair.all[0].wait_for(rng.choice((child.STEPS, child.SAVE)))
  pair.all[0].join(rng.uniform(0, 0.1))
  victim, other = pair.all[seed % 2], pair.all[1 - seed % 2]
  victim.send(signal.SIGSTOP if freezes else signal.SIGKILL)
  code, _, err = other.finish(_SECONDS)
  victim.kill()
  victim.finish()
  if code is None:
    return trial.Trial(row, trial.HANG, err[-300:])
  if code in (0, -signal.SIGABRT) and "Traceback" not in err:
    return trial.Trial(row, trial.UNDISTURBED)  # done before, or aborted by JAX
  return trial.of_process(row, code, err, (hosts.LOST,))


JOBS = {"owners": (12, run_owners), "pair": (16, run_pair)}
