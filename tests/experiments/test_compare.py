"""The command trains three models in its own process, and only once."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import baselines

ROOT = pathlib.Path(__file__).parent.parent.parent
FEW = (
  "--config.training.steps=2",
  "--config.training.batch_size=2",
  "--config.optimizer.warmup_steps=1",
  "--config.model.sparse_block=8",
  "--config.model.sparse_summary=1",
)


def _compare(*arguments):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, "-m", "experiments.compare", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_three_runs_make_one_record(config_file, tmp_path):
  arguments = (f"--config={config_file}", f"--workdir={tmp_path}", *FEW)
  first = _compare(*arguments)
  assert first.returncode == 0, first.stderr
  assert "step 2/2" in first.stdout
  record = json.loads((tmp_path / "comparison.json").read_text())
  models = record["models"]
  assert set(models) == set(baselines.LABELS)
  assert "--config.model.sparse_block=8" in record["command"]
  assert [r["step"] for r in models["sparse"]["curves"]] == [1, 2]
  ends = [m["validation_bits_per_byte"] for m in models.values()]
  assert len(set(ends)) == 3 and all(0 < end < 20 for end in ends)
  (tmp_path / "comparison.png").unlink()
  again = _compare(*arguments)
  assert again.returncode == 0, again.stderr
  assert "step 2/2" not in again.stdout
  assert json.loads((tmp_path / "comparison.json").read_text()) == record
  assert (tmp_path / "comparison.png").stat().st_size > 5000
