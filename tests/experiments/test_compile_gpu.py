"""What attention moves on a GPU, by the committed record and as compiled."""

import importlib.util
import json
import subprocess
import sys

import pytest

from experiments import report

# GB moved and MiB between inputs and outputs at 32,768 tokens.
BOUNDS = {"forward": (1.1, 130), "forward+backward": (2.8, 300)}


def check(path):
  records = json.loads(path.read_text())["records"]
  assert max(r["length"] for r in records) == 2**20
  for record in records:
    moved, temporary = BOUNDS[record["mode"]]
    assert record["of_cudnn"] > 0
    # The same a token at every length.
    assert record["bytes"] < moved * 1e9 * record["length"] / 32768
    if record["length"] == 32768:
      assert record["temporary_bytes"] < temporary * 2**20


def test_the_committed_record_keeps_to_the_bounds():
  check(report.DOCS / "gpu_h100.json")


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs the extra `cuda`, but no GPU",
)
def test_what_is_compiled_keeps_to_the_bounds(tmp_path):
  path = tmp_path / "gpu.json"
  command = [sys.executable, "-m", "experiments.compile_gpu"]
  subprocess.run([*command, f"--output={path}"], check=True, cwd=report.ROOT)
  check(path)
