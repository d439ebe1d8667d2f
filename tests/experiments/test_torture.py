"""A small part of the torture, and that it would see a failure."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from experiments import torture
from experiments.faults import damage, idle, sandbox, trial
from longnet_jax import checked

ROOT = pathlib.Path(__file__).parent.parent.parent
_NOW = [
  "settings/settings",
  "files/model.pth",
  "files/golden.npz",
  "files/slide.npz",
  "files/model.safetensors",
  "files/model.safetensors.index.json",
]


@pytest.fixture
def box(tmp_path):
  return sandbox.Sandbox(tmp_path)


@pytest.mark.parametrize("name", _NOW)
def test_nothing_is_wrong_without_a_word(box, name):
  record = torture.Record()
  torture.run(box, name, record, end=time.monotonic() + 3600, trials=40)
  assert not record.failures
  (counts,) = record.rows.values()
  assert sum(counts.values()) == 40
  assert counts[trial.REFUSED]


def _raise(error):
  raise error


@pytest.mark.parametrize(
  "call, outcome",
  [
    (lambda: 1, trial.UNDISTURBED),
    (lambda: 2, trial.WRONG),
    (lambda: _raise(checked.RefusedError("a line")), trial.REFUSED),
    (lambda: _raise(checked.RefusedError("two\nlines")), trial.TRACEBACK),
    (lambda: _raise(FileNotFoundError(2, "gone")), trial.REFUSED),
    (lambda: _raise(KeyError("x")), trial.TRACEBACK),
    (lambda: time.sleep(5), trial.HANG),
  ],
)
def test_each_end_of_a_call_has_its_outcome(monkeypatch, call, outcome):
  monkeypatch.setattr(trial, "_SECONDS", 1)
  found = trial.attempt("row", call, lambda value: value == 1)
  assert found.outcome == outcome


@pytest.mark.parametrize(
  "code, err, outcome",
  [
    (1, "error: no such\n", trial.REFUSED),
    (1, "Traceback (most recent call last)\nerror: x\n", trial.TRACEBACK),
    (1, "", trial.WRONG),
    (-11, "error: no such\n", trial.WRONG),
    (0, "", trial.WRONG),
  ],
)
def test_each_end_of_a_process_has_its_outcome(code, err, outcome):
  assert trial.of_process("row", code, err, (1, 4)).outcome == outcome


def test_counts_go_on_and_failures_are_repeatable(
  monkeypatch, tmp_path, capsys
):
  seeds = []

  def fail_third(_, seed):
    seeds.append(seed)
    return [trial.Trial("row", trial.LOST if seed == 9 else trial.REFUSED)]

  monkeypatch.setitem(torture.JOBS, "files/model.pth", (4, fail_third))
  path = tmp_path / "counts.json"
  end = time.monotonic() + 3600
  for trials in (2, 4):
    record = torture.Record(path)
    torture.run(None, "files/model.pth", record, end=end, seed=7, trials=trials)
  assert seeds == [7, 8, 9, 10]
  stored = json.loads(path.read_text())
  assert stored["rows"] == {"row": {trial.REFUSED: 3, trial.LOST: 1}}
  again = "torture --trials=1 --seed=9 --faults=files/model.pth"
  assert again in stored["failures"][0]["again"]
  assert again in capsys.readouterr().out


def test_a_change_is_that_of_its_seed():
  content = bytes(range(256))
  change = lambda seed: damage.mutated(content, damage.random.Random(seed))
  assert change(3) == change(3)
  assert sum(change(seed) != content for seed in range(50)) > 45


@pytest.mark.slow
def test_one_trial_of_everything(tmp_path):
  path = tmp_path / "counts.json"
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.torture"),
      *("--trials=1", f"--json={path}"),
      "--faults=kills,checkpoints,settings,files,disks,processes",
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert len(json.loads(path.read_text())["rows"]) >= 15


@pytest.mark.slow
@pytest.mark.parametrize(
  "work, hangs", [("time.sleep(99)", True), ("9", False)]
)
def test_a_process_hangs_if_it_neither_runs_nor_waits_to(work, hangs):
  program = f"import time\nprint(flush=True)\nwhile True: {work}"
  with subprocess.Popen(
    [sys.executable, "-c", program], stdout=subprocess.PIPE
  ) as process:
    process.stdout.readline()
    watch = idle.Watch(process.pid)
    found = []
    for _ in range(60):
      found.append(watch.hangs(3))
      time.sleep(0.1)
    process.kill()
  assert found[0] is False
  assert found[-1] is hangs
