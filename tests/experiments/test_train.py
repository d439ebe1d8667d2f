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
TINY = """
from configs import base


def get_config():
  config = base.get_config()
  config.model.update(
    num_layers=1, model_dim=16, num_heads=2, ffn_dim=32, dtype="float32",
    segment_lengths=(8, 32), dilation_rates=(1, 2), remat="none",
    max_positions=64)
  config.data.update(
    folder={folder!r}, cache_dir={cache!r}, window=32,
    validation_fraction=0.2, test_fraction=0.2)
  config.training.update(
    steps=40, batch_size=4, loss_chunk=32, log_every=1, eval_every=20,
    eval_batches=2, checkpoint_every=5)
  config.optimizer.update(warmup_steps=5)
  return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(40):
    (folder / f"m{i}.py").write_text(f"def f(x):\n  return x + {i}\n" * 9)
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  cache = tmp_path_factory.mktemp("cache")
  path.write_text(TINY.format(folder=str(folder), cache=str(cache)))
  return path


def _start(*flags, cwd=ROOT):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.train", *map(str, flags)],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  out, err = process.communicate()
  return process.returncode, out, err


def test_refusals_are_one_line_and_leave_nothing(config_file, tmp_path):
  workdir = tmp_path / "run"
  read_only = tmp_path / "file"
  read_only.write_text("")
  cases = [
    (["--config.model.num_layer=4"], "did you mean config.model.num_layers?"),
    (["--config.modl.num_layers=4"], "no key config.modl.num_layers"),
    (["--config.model.num_layers=4.5"], "4.5"),
    (["--config.model.segment_lengths=(8, 2.5)"], "segment_lengths[1] is 2.5"),
    (["--config.data.folder=/nowhere"], "/nowhere"),
    ([f"--workdir={read_only}/run"], "is a file; choose a folder"),
  ]
  started = [
    (_start(f"--config={config_file}", f"--workdir={workdir}", *flags), text)
    for flags, text in cases
  ]
  for process, text in started:
    code, _, err = _finish(process)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0
    assert len(lines) == 1, err
    assert text in lines[0]
    assert "Traceback" not in err
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
