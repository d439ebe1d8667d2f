"""The cycles of the TPU kernel, as the compiler schedules them."""

import importlib.util
import json

import pytest

from experiments import kernel_cycles, report
from longnet_jax.ops.kernels import pallas_tpu


def test_the_record_is_of_these_sizes_and_reaches_what_it_should():
  record = json.loads((report.DOCS / "tpu_kernel.json").read_text())
  assert record["sizes"] == pallas_tpu.SIZES._asdict()
  assert "not run on a TPU" in record["note"]
  for row in record["records"]:
    assert row["temporary_bytes"] == 0
    if row["width"] == 128:
      least = {"forward": 0.8, "backward": 0.95}[row["pass"]]
      assert row["block_need"] > least * row["block"]


def test_bundles_are_counted_by_the_loops_around_them():
  lines = ["= control target key start", "LB: loop body", "   0 : { x }"]
  lines += ["  0x1 LB: > { y }", "  0x2   : > { y }", " 0x3 LB: >> { z }"]
  lines += [" 0x1a LB: >>> { w }"] * 3
  assert kernel_cycles._bundles("\n".join(lines)) == (2, 1, 3)
  with pytest.raises(ValueError, match="nested 2 deep, not 3"):
    kernel_cycles._bundles("\n".join(lines[:6]))


def test_needs_the_tpu_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
    kernel_cycles.main([])
