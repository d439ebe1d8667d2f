"""The command as a user meets it: in its own process."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def _start(*flags, cwd=ROOT, program=("-m", "experiments.train")):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, *program, *map(str, flags)],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  out, err = process.communicate()
  return process.returncode, out, err


# ml_collections loads the file in a way that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_refusals_are_one_line_and_leave_nothing(config_file, run, tmp_path):
  workdir = tmp_path / "run"
  read_only = tmp_path / "file"
  read_only.write_text("")
  cases = [
    (["--config.model.num_layer=4"], "did you mean config.model.num_layers?"),
    (["--config.modl.num_layers=4"], "no key config.modl.num_layers"),
    (["--config.model.num_layers=4.5"], "4.5"),
    (["--config.model.segment_lengths=(8, 2.5)"], "segment_lengths[1] is 2.5"),
    (["--config.data.folder=/nowhere"], "/nowhere"),
    (["--workdir="], "--workdir is empty; give one such as runs/NAME"),
    ([f"--workdir={read_only}/run"], "is a file; choose a folder"),
  ]
  for flags, text in cases:
    flags = [f"--config={config_file}", f"--workdir={workdir}", *flags]
    code, _, err = run("train", *flags)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0
    assert len(lines) == 1, err
    assert text in lines[0]
    assert "Traceback" not in err
  # And so they are in a process of their own.
  assert _finish(_start(*flags)) == (code, "", err)
  assert not workdir.exists()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(
  config_file, tmp_path
):
  flags = [f"--config={config_file}"]
  whole = tmp_path / "whole"
  code, out, err = _finish(_start(*flags, f"--workdir={whole}"))
  assert code == 0, err
  fingerprint = out.split()[-1]
  assert len(fingerprint) == 64
  workdir = tmp_path / "killed"
  random.seed(0)
  kills = 0
  while True:
    process = _start(*flags, f"--workdir={workdir}")
    reached = _wait_for_record(process, workdir, random.randrange(3, 12))
    if reached:
      time.sleep(random.uniform(0, 0.3))
      process.send_signal(signal.SIGKILL)
    code, out, err = _finish(process)
    if code == 0:
      break
    assert code == -signal.SIGKILL, err
    kills += 1
  assert kills >= 2
  assert out.split()[-1] == fingerprint
  records = (workdir / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(r)["step"] for r in records] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_say_so(config_file, tmp_path, number):
  flags = [f"--config={config_file}", "--config.training.steps=100000"]
  process = _start(*flags, f"--workdir={tmp_path}")
  assert _wait_for_record(process, tmp_path, 3)
  process.send_signal(number)
  code, out, err = _finish(process)
  assert code == 128 + number, err
  assert f"{number.name}: stopped after step" in out
  stopped = int(out.split("stopped after step ")[1].split()[0])
  assert (tmp_path / "checkpoints" / str(stopped)).is_dir()


def _wait_for_record(process, workdir, count):
  """True once `count` more records are there, False if the process ended."""
  path = workdir / "metrics.jsonl"
  lines = lambda: len(path.read_text().splitlines()) if path.exists() else 0
  before = None
  while process.poll() is None:
    found = lines()
    before = found if before is None else min(before, found)
    if found >= before + count:
      return True
    time.sleep(0.02)
  return False


def test_a_failed_save_ends_the_process_at_once(config_file, tmp_path):
  limited = (
    "import resource, runpy, sys\n"
    "from longnet_jax.training import checkpoint\n"
    "save = checkpoint.Checkpoints.save\n"
    "def limit(self, step, *args, **kwargs):\n"
    "  # More than the records have, less than the parameters.\n"
    "  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    "  save(self, step, *args, **kwargs)\n"
    "checkpoint.Checkpoints.save = limit\n"
    "runpy.run_module('experiments.train', run_name='__main__')\n"
  )
  flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
  process = _start(*flags, program=["-c", limited])
  code, _, err = _finish(process)
  assert code == 4, err
  assert "size of a file is reached" in err
  assert "Traceback" not in err
  assert not list((tmp_path / "run" / "checkpoints").iterdir())
