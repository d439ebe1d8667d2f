"""The benchmark: its figures, its JSON and picture, and where it stops."""

import json
import re

from absl import flags
from absl.testing import flagsaver
import jax
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from experiments import attention_speed, benchmark, tables
from longnet_jax import analysis
from longnet_jax.analysis import chips
from longnet_jax.ops import kernels

SMALL = {
  "lengths": ["32", "64"],
  "heads": 2,
  "head_dim": 8,
  "segment_lengths": ["16", "32"],
  "dilation_rates": ["1", "2"],
  "repeats": 1,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """What a product reaches at best is measured with a small one."""
  flags.FLAGS.mark_as_parsed()
  monkeypatch.setitem(attention_speed._MATMUL, "cpu", 64)


@pytest.fixture
def undrawn(monkeypatch):
  monkeypatch.setattr(attention_speed, "draw", lambda *_: None)


def run(tmp_path, **changes):
  with flagsaver.flagsaver(out=str(tmp_path), **{**SMALL, **changes}):
    benchmark.main([])
  return json.loads((tmp_path / "benchmark_cpu.json").read_text())


def test_sweep_writes_figures_that_fit_together(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(chips, "peak_flops", lambda: 1e9)
  document = run(tmp_path, passes=["forward"])
  assert (tmp_path / "benchmark_cpu.png").stat().st_size > 10_000
  assert document["hardware"]["backend"] == "cpu"
  longnet = [r for r in document["records"] if r["core"] == "LongNet"]
  assert [r["length"] for r in longnet] == [32, 64]
  for record in longnet:
    pattern = analysis.Pattern(record["length"], 2, (16, 32), (1, 2))
    work = analysis.cost(pattern, head_dim=8).forward_flops
    rate = record["useful_flops_per_second"]
    assert rate * record["seconds"] == pytest.approx(work, rel=1e-4)
    assert record["share_of_peak"] == pytest.approx(rate / 1e9, rel=1e-4)
    assert record["temporary_bytes"] > 0
  printed = capsys.readouterr().out
  assert f"{record['share_of_peak']:.0%}" in printed
  assert "64  LongNet's reach: the window of 64 is longer than the" in printed
  ((_, rows),) = tables.benchmark(document)
  connected = f"{analysis.coverage(pattern)[-1]:.1%}"
  reaches = {row[:5] for row in rows if row[0] == "64"}
  assert reaches == {
    ("64", "forward", "LongNet", "32", connected),
    ("64", "forward", "dense, blockwise", "64", "100%"),
    ("64", "forward", "dense, jax.nn", "64", "100%"),
  }


# The kernels of each core, by platform.
CORES = {
  "gpu": {
    "LongNet": "__cudnn$fmhaSoftmax",
    "dense, cuDNN": "__cudnn$fmhaSoftmax",
  },
  "tpu": {"LongNet": "longnet_forward", "dense, Pallas": "splash_mha_fwd"},
}


@pytest.mark.parametrize("platform", CORES)
def test_longnet_stands_beside_the_dense_kernel_of_the_vendor(
  platform, monkeypatch
):
  """Lowered, not compiled: that needs neither a GPU nor a TPU."""
  library = jax._src.cudnn.fused_attention_stablehlo
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91200)
  target = {"gpu": "cuda"}.get(platform, platform)
  setting = attention_speed.Setting(2, 64, (64, 128), (1, 2), dtype="bfloat16")
  rows = jax.ShapeDtypeStruct((1, 256, 2, 64), setting.dtype)
  found = {}
  with (
    kernels.compiling_for(platform),
    jax.numpy_dtype_promotion("standard"),  # for jax.nn
  ):
    for name, core in attention_speed.cores(setting, 256).items():
      traced = jax.jit(core).trace(rows, rows, rows)
      text = traced.lower(lowering_platforms=(target,)).as_text()
      kernel = re.search(
        r"__cudnn\$fmhaSoftmax|longnet_forward|splash_mha_fwd", text
      )
      found[name] = kernel and kernel[0]
  plain = dict.fromkeys(("dense, blockwise", "dense, jax.nn"))
  assert found == {**CORES[platform], **plain}
  assert set(found) <= set(attention_speed._STYLES)


def test_the_dense_kernel_for_tpu_is_dense_attention():
  rng = np.random.default_rng(0)
  tensors = rng.normal(size=(3, 1, 128, 2, 8)).astype(np.float32)
  with pltpu.force_tpu_interpret_mode(), jax.numpy_rank_promotion("allow"):
    found = attention_speed._splash(*tensors, is_causal=True)
  wanted = jax.nn.dot_product_attention(*tensors, is_causal=True)
  np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.usefixtures("undrawn")
def test_a_core_stops_where_a_run_would_take_too_long(tmp_path, capsys):
  document = run(tmp_path, passes=["forward"], max_seconds=0.0)
  assert {r["length"] for r in document["records"]} == {32}
  assert "(--max_seconds)" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_what_was_measured_before_a_stop_is_kept(tmp_path, monkeypatch):
  measure = attention_speed.measure

  def stopped(setting, length, **kwargs):
    if length == 64:
      raise KeyboardInterrupt
    return measure(setting, length, **kwargs)

  monkeypatch.setattr(attention_speed, "measure", stopped)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, passes=["forward"], dense=False)
  document = json.loads((tmp_path / "benchmark_cpu.json").read_text())
  assert [r["length"] for r in document["records"]] == [32]


@pytest.mark.usefixtures("undrawn")
def test_a_core_stops_where_memory_ends(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(attention_speed, "_free_bytes", lambda: 1000)
  document = run(tmp_path, passes=["forward"])
  assert all("needs" in r["skipped"] for r in document["records"])
  assert "stops here: needs" in capsys.readouterr().out


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lengths": ["64", "x"]}, "--lengths is '64,x'"),
    ({"passes": ["sideways"]}, "--passes holds 'sideways'"),
    ({"dilation_rates": ["1"]}, "dilation_rates has 1 entries"),
  ],
)
def test_bad_flags_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, **changes)
