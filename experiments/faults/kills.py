"""kill -9 at random moments of a run, which must end as if it never was."""

import random

from experiments.faults import child, sandbox, trial

# Seconds after the beginning of a phase within which it is killed.
_SPANS = {
  child.DATA: 1.0,
  child.COMPILATION: 3.0,
  child.STEPS: 0.3,
  child.SAVE: 0.15,
  child.EVALUATION: 0.1,
}
_A_RUN = 10


def run(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """One run, killed up to ten times; each kill is a trial of its phase."""
  rng = random.Random(seed)
  fingerprint, records = box.undisturbed
  folder = box.fresh("killed")
  workdir = folder / "run"
  # Its data is not built yet, and every other run has nothing compiled.
  config = box.write_config(f"{folder.name}/config")
  options = {} if seed % 2 else {"compiled": str(folder / "compiled")}
  flags = [f"--config={config}"]
  late = [child.STEPS, child.SAVE, child.EVALUATION]
  plan = [child.DATA] * 2 + [child.COMPILATION] * 2
  plan += rng.choices(late, weights=(1, 2, 1), k=_A_RUN - len(plan))
  killed, lost = [], ""
  for phase in plan:
    before = max(sandbox.checkpoints(workdir), default=0)
    process = box.start(workdir, *flags, **options)
    occurrence = rng.randint(1, 2) if phase in late else 1
    reached = all(process.wait_for(phase) for _ in range(occurrence))
    if reached:
      process.join(rng.uniform(0, _SPANS[phase]))
      process.kill()
    code, _, err = process.finish()
    if code is None:
      return [trial.Trial(f"kill -9: {phase}", trial.HANG, err[-300:])]
    if code == -9:
      killed.append(phase)
    if max(sandbox.checkpoints(workdir), default=0) < before:
      lost = f"the checkpoint of step {before}"
    if code != -9:
      break
  code, out, err = box.start(workdir, *flags, **options).finish()
  outcome, said = _outcome(code, out, err, fingerprint)
  if outcome == trial.UNDISTURBED:
    if lost or sandbox.records(workdir) != records:
      outcome, said = trial.LOST, lost or "records"
  return [trial.Trial(f"kill -9: {phase}", outcome, said) for phase in killed]


def _outcome(code, out, err, fingerprint):
  """How the last start of a killed run has ended."""
  if code is None:
    return trial.HANG, err[-300:]
  if code:
    kind = trial.TRACEBACK if "Traceback" in err else trial.LOST
    return kind, f"exit {code}: {err[-300:]}"
  if out.split()[-1] != fingerprint:
    return trial.WRONG, out[-100:]
  return trial.UNDISTURBED, ""


JOBS = {"kills": (200, run)}
