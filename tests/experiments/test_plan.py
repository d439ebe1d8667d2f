"""Plans for TPUs: search, table, refusals; a compiled one is slow."""

import dataclasses
import importlib.util
import json
import shlex
import subprocess
import sys

import jax
import pytest

from configs import quickstart
from experiments import plan as command
from experiments import plan_search, report
from longnet_jax import checked, plan
from longnet_jax.analysis import topology as topology_lib
from longnet_jax.training import config as config_lib

FOUND = plan.Plan(
  topology="v5e:2x2",
  devices=4,
  fits=True,
  peak_bytes=3 * 2**30,
  limit_bytes=16 * 2**30,
  host_bytes=2**30,
  parameter_bytes=2**30,
  optimizer_bytes=2**31,
  model_flops=8 * 10**12,
  computed_flops=12 * 10**12,
  collectives={("all-gather", "bf16", 4): 2**21},
  unknown_loops=1,
  seconds={"compiler": 0.25, "kernels": 0.05, "links": 0.01, "step": 0.31},
  share_of_peak=0.4,
  compile_seconds=100.0,
)


@pytest.mark.parametrize("start", [2048, 8192, 65536])
def test_the_search_ends_at_the_longest_window_that_fits(start):
  settings = quickstart.get_config()
  settings.data.window = start
  settings.model.position = "rope"

  def make(settings):
    config = config_lib.build(settings)
    assert config.model.segment_lengths[-1] >= config.data.window
    return {"fits": config.data.window <= 8192, "window": config.data.window}

  assert plan_search.longest(settings, make)["window"] == 8192
  assert plan_search.near(settings, make).data.window == 8192
  refuse = lambda settings: {"fits": False}
  with pytest.raises(checked.RefusedError, match="more devices"):
    plan_search.longest(settings, refuse)
  assert plan_search.near(settings, refuse).data.window == start


def test_the_search_ends_where_a_longer_window_is_refused(capsys):
  settings = quickstart.get_config()
  settings.model.position = "xpos"

  def make(settings):
    return {"fits": True, "window": config_lib.build(settings).data.window}

  assert plan_search.near(settings, make).data.window == 2**15
  assert not capsys.readouterr().out
  assert plan_search.longest(settings, make)["window"] == 2**15
  said = capsys.readouterr().out
  assert said.startswith("not 65,536: model.position='xpos' holds up to")


@pytest.mark.parametrize(
  "message",
  [
    "Ran out of memory in memory space hbm. Used 25.05G of 15.75G hbm.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(25.05G) exceeds available HBM (15.75G).",
  ],
)
def test_a_refusal_says_how_much_is_too_much(message):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

  compiled, (used, limit) = plan._compile(Lowered())
  assert compiled is None
  assert (used, limit) == (int(25.05 * 2**30), int(15.75 * 2**30))


def test_what_is_printed():
  text = "\n".join(command.table(FOUND))
  for part in (
    "fits: 3.00 GiB of 16.00 GiB a device, 13.00 GiB free",
    "the rest is activations; on the host 1.00 GiB",
    "model 2, computed 3",
    "all-gather of bf16 among 4: 2.0 MiB received",
    "compiler 250, kernels 50, links 10, step 310; 40% of peak",
    "1 loops are counted once",
  ):
    assert part in text
  refused = FOUND.to_dict() | {
    "fits": False,
    "peak_bytes": 17 * 2**30,
    "collectives": {},
    "seconds": None,
  }
  text = "\n".join(command.table(plan.Plan(**refused)))
  assert text.startswith("DOES NOT FIT: 17.00 GiB of 16.00 GiB a device, 1.00")
  assert "estimated" not in text


def test_an_estimate_and_a_gpu_say_what_they_are():
  found = dataclasses.replace(FOUND, compile_seconds=None)
  text = "\n".join(command.table(found))
  assert text.startswith("fits: 3.00 GiB of 16.00 GiB")
  assert "(products at 70% of peak, arrays" in text
  assert "free; by arithmetic, nothing was compiled\n" in text
  found = dataclasses.replace(FOUND, seconds=None, share_of_peak=None)
  text = "\n".join(command.table(found))
  assert "its compiler expects no times; --estimate does" in text


def _settings():
  settings = quickstart.get_config()
  settings.model.update(num_layers=2, model_dim=128, num_heads=2, ffn_dim=256)
  settings.training.batch_size = 2
  return settings


def test_the_fastest_mesh_that_fits_is_found(capsys):
  asked = []

  def make(settings):
    asked.append(settings)
    return {"fits": len(asked) == 17}

  topology = topology_lib.parse("v5e:2x2")
  with jax.numpy_dtype_promotion("standard"):  # optax needs it
    with pytest.raises(checked.RefusedError, match="nothing fits that does"):
      plan_search.fastest(_settings(), topology, make)
    assert plan_search.fastest(_settings(), topology, make) == {"fits": True}
  # The batch and the heads are divided by 2 at most.
  meshes = {(s.mesh.data, s.mesh.seq, s.mesh.model) for s in asked[:16]}
  assert meshes == {(1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}
  # Sixteen were too large for the compiler; the second search has the first.
  flags = plan_search.as_flags(asked[0], plan_search.OF_MESH)
  start = "as flags of experiments.train: --config.mesh.data=2 "
  assert flags.startswith(f"{start}--config.mesh.seq=2")
  assert flags.endswith("--config.mesh.model=1 --config.model.remat=dots")
  shown = capsys.readouterr().out
  assert "16 of 16 fit by estimate; the fastest:" in shown
  assert flags in shown


def test_a_search_for_a_mesh_says_why_there_is_none(monkeypatch):
  topology = topology_lib.parse("v5e:1x7")
  with pytest.raises(checked.RefusedError, match="no mesh of 7 devices"):
    plan_search.fastest(_settings(), topology, None)
  large = dataclasses.replace(FOUND, fits=False)
  monkeypatch.setattr(plan_search, "_estimates", lambda *_: [(None, large)])
  with pytest.raises(checked.RefusedError, match="the least being 3.00 GiB"):
    plan_search.fastest(_settings(), topology, None)


@pytest.mark.slow
@pytest.mark.skipif(
  not importlib.util.find_spec("jax_cuda13_plugin"),
  reason="needs the extra `cuda`, but no GPU",
)
def test_a_committed_plan_is_what_is_compiled(tmp_path):
  record = json.loads((report.DOCS / "plans/gpu_8.json").read_text())
  _, *arguments, _ = shlex.split(record["command"])
  arguments = [sys.executable, *arguments, f"--json={tmp_path / 'plan.json'}"]
  subprocess.run(arguments, check=True, cwd=report.ROOT)
  found = json.loads((tmp_path / "plan.json").read_text())
  assert found["peak_bytes"] == pytest.approx(record["peak_bytes"], rel=0.02)
  changing = ("command", "hardware", "compile_seconds", "peak_bytes")
  same = lambda plan: {k: v for k, v in plan.items() if k not in changing}
  assert same(found) == same(record)


@pytest.mark.slow
@pytest.mark.skipif(
  not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler"
)
def test_a_step_is_compiled_for_a_pod():
  settings = quickstart.get_config()
  settings.model.update(num_layers=2, model_dim=128, num_heads=1, ffn_dim=128)
  settings.mesh.seq = 4
  settings.data.layout = "stream"
  with jax.numpy_dtype_promotion("standard"):  # optax needs it
    found = plan.make(config_lib.build(settings), "v5e:2x2")
  assert found.fits and 0 < found.peak_bytes < 2**30
  assert found.seconds["step"] > 0 and 0 < found.share_of_peak < 1
  kinds = {kind for kind, _, _ in found.collectives}
  assert "all-gather" in kinds and found.unknown_loops == 0
  settings.data.window = settings.model.max_positions = 2**22
  settings.model.position = "rope"
  with jax.numpy_dtype_promotion("standard"):
    refused = plan.make(config_lib.build(settings), "v5e:2x2")
  assert not refused.fits and refused.peak_bytes > refused.limit_bytes
