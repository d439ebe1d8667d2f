"""What a study plans, measures and shows; a study that is killed ends alike."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from configs import reach as reach_config
from configs import study as study_config
from experiments import command
from experiments.studies import catalogue, reach, runs, text
from longnet_jax import checked
from longnet_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
SMALL = {
  "training.steps": 2,
  "training.batch_size": 2,
  "training.eval_batches": 1,
  "optimizer.warmup_steps": 1,
  "data.window": 64,
  "model.sparse_block": 8,
  "model.sparse_summary": 1,
}


def _config():
  return config_lib.build(study_config.get_config())


def _plan(name, seeds=2):
  return {
    run.name: run for run in catalogue.STUDIES[name].plan(_config(), seeds)
  }


def test_runs_of_a_study_differ_in_what_they_are_named_for():
  found = _plan("lengths")
  assert list(found)[:4] == [
    "dense_32_seed0",
    "dilated_512_seed0",
    "dense_512_seed0",
    "sparse_512_seed0",
  ]
  assert len(found) == 16
  tokens = {
    run.config.training.batch_size * run.config.data.window
    for run in found.values()
  }
  assert len(tokens) == 1
  for run in found.values():
    assert run.config.model.attention == run.core
    assert run.config.data.window == run.context
    assert run.config.seed == run.config.data.seed == run.seed


def test_runs_that_studies_share_are_the_same():
  shared = set()
  found = {}
  for name in ("lengths", "flops", "sizes", "ablations"):
    for run in _plan(name).values():
      if run.name in found:
        assert found[run.name] == run.config
        shared.add(run.name)
      found[run.name] = run.config
  assert {"dilated_512_seed0", "dense_32_seed1"} <= shared
  settings = [dataclasses.asdict(config) for config in found.values()]
  assert len({json.dumps(each) for each in settings}) == len(found)


def test_a_record_counts_flops_as_the_plan_does():
  run = _plan("ablations")["dilated_512_seed0"]
  others = _plan("ablations")
  base = runs.describe(run)
  for variant in ("one_branch", "six_branches", "gaps"):
    other = runs.describe(others[f"dilated_512_{variant}_seed0"])
    assert other["attention_pairs"] == pytest.approx(
      base["attention_pairs"], rel=0.05
    )
  assert base["tokens"] == 2048 * run.config.training.steps
  assert 0 < base["attention_flops"] < 0.2 * base["train_flops"]


def test_the_hops_of_recall():
  config = config_lib.build(reach_config.get_config())
  by_variant = {run.name: run.config for run in reach.STUDY.plan(config, 1)}
  hops = {
    name: {
      d: reach._hops(each.model, 256, 256 - d, 255)
      for d in each.data.needle_distances
    }
    for name, each in by_variant.items()
  }
  near = {d for d in config.data.needle_distances if d <= 32}
  one = {d for d, n in hops["dilated_256_seed0"].items() if n == 1}
  assert one == near | {
    d for d in config.data.needle_distances if (d - 1) % 4 == 0
  }
  assert set(hops["dilated_256_seed0"].values()) == {1, 2}
  assert set(hops["dense_256_seed0"].values()) == {1}
  assert set(hops["sparse_256_seed0"].values()) == {1, 2}
  assert set(hops["dilated_256_gaps_seed0"].values()) == {1, 2, 3, None}


def test_recall_needs_its_own_data():
  with pytest.raises(checked.RefusedError, match="data.dataset is 'source_cod"):
    reach.STUDY.plan(_config(), 1)


def test_a_window_that_has_no_sixteenth_is_refused():
  config = _config()
  data = dataclasses.replace(config.data, window=1000)
  with pytest.raises(checked.RefusedError, match="data.window is 1000"):
    runs.contexts(dataclasses.replace(config, data=data))


def _toy(config_file, **settings):
  """The config of a file with `settings` by dotted key, steps and all."""
  spec = importlib.util.spec_from_file_location("toy", config_file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  loose = module.get_config()
  loose.update_from_flattened_dict({**SMALL, **settings})
  return config_lib.build(loose)


@pytest.fixture
def few(monkeypatch):
  """Leaves of a study the runs whose names are given."""

  def leave(name, *names):
    whole = catalogue.STUDIES[name]
    plan = lambda *args: [run for run in whole.plan(*args) if run.name in names]
    less = whole._replace(plan=plan)
    monkeypatch.setitem(catalogue.STUDIES, name, less)
    return less

  monkeypatch.setattr(command, "line", lambda: "a command")
  return leave


@pytest.fixture
def standard_promotion():
  """optax's bias correction mixes float32 and int32."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.usefixtures("standard_promotion")
def test_a_toy_is_trained_scored_and_shown_once(
  config_file, tmp_path, few, monkeypatch
):
  config = _toy(config_file)
  toy = few("lengths", "dilated_32_seed0")
  record = catalogue.complete("lengths", config, 1, tmp_path)
  (made,) = record["measured"]
  assert text.lengths(record) == [4, 16, 32, 64]
  assert made["tokens"] == 2 * 2 * 64
  (head, rows), (_, worth) = toy.table(record)
  assert head[-1] == "read at 64"
  assert rows[0][:2] == ("LongNet, trained on 32", "1")
  assert worth == [("0 to 63",)]
  assert float(rows[0][-1]) == pytest.approx(text.bits(made, 64), abs=1e-4)
  assert (tmp_path / "lengths.png").stat().st_size > 5000
  assert json.loads((tmp_path / "lengths.json").read_text()) == record
  monkeypatch.setattr(runs.loop, "train", None)
  assert catalogue.complete("lengths", config, 1, tmp_path) == record
  few("flops", "dilated_32_seed0")
  again = catalogue.complete("flops", config, 1, tmp_path)
  assert again["measured"] == record["measured"]
  longer = _toy(config_file, **{"training.steps": 3})
  assert runs.known(longer, "dilated_32_seed0", tmp_path) is None


@pytest.mark.usefixtures("standard_promotion")
def test_a_toy_recalls_by_chance(config_file, tmp_path, few):
  config = _toy(
    config_file,
    **{
      "data.dataset": "needle",
      "data.needle_digits": 1,
      "data.needle_distances": (3, 30, 50),
      "model.max_positions": 128,
    },
  )
  few("reach", "dilated_64_one_layer_seed0")
  record = catalogue.complete("reach", config, 1, tmp_path)
  (made,) = record["measured"]
  assert [row["distance"] for row in made["inside"]] == [3, 30, 50]
  assert [row["distance"] for row in made["beyond"]] == [67, 94, 114]
  for row in made["inside"] + made["beyond"]:
    assert 0 <= row["recalled"] < 0.3
  ((_, rows),) = catalogue.STUDIES["reach"].table(record)
  assert {row[0] for row in rows} == {"LongNet, 1 layer"}
  assert sum(int(row[3]) for row in rows) == 3
  assert (tmp_path / "reach.png").stat().st_size > 5000


def _measured(variant="", seed=0, **more):
  """A record's entry with figures that follow from its seed."""
  lengths = [
    {"length": n, "bits_per_byte": 2.0 + 0.1 * seed} for n in (4, 16, 32, 64)
  ]
  made = dict(core="dilated", context=64, variant=variant, seed=seed)
  counts = dict(train_flops=2e12, attention_flops=5e11, attention_pairs=640)
  size = dict(width=16 * (1 + len(variant)), parameters=100 * len(variant))
  positions = [{"from": 0, "to": 64, "context_worth": 0.5 - 0.1 * seed}]
  scores = {"lengths": lengths, "positions": positions}
  return {**made, **counts, **size, **scores, **more}


@pytest.mark.parametrize("name", ["lengths", "flops", "sizes", "ablations"])
def test_seeds_are_a_mean_and_a_spread(name, tmp_path):
  found = [_measured(seed=0), _measured(seed=1)]
  if name != "lengths":
    found.append(_measured("gaps" if name == "ablations" else "", 0))
  if name in ("sizes", "flops"):
    found[-1] |= dict(width=32, parameters=400, context=16)
  record = {"measured": found}
  head, rows = catalogue.STUDIES[name].table(record)[0]
  assert all(len(row) == len(head) for row in rows)
  cells = [cell for row in rows for cell in row]
  assert "2.0500 ± 0.0500" in cells
  if name == "lengths":
    assert catalogue.STUDIES[name].table(record)[1][1] == [
      ("0 to 63", "0.4500 ± 0.0500")
    ]
  if name == "ablations":
    assert rows[1][-1] == "0.0000"
  catalogue.STUDIES[name].draw(record, tmp_path / "p.png")
  assert (tmp_path / "p.png").stat().st_size > 5000


def test_runtime_is_a_row_a_length(tmp_path):
  record = {
    "measured": [
      {
        "length": n,
        "batch": 2**17 // n,
        "branches": [[2048, 1]],
        "seconds": {"LongNet": 1.5}
        | ({"dense, blockwise": 2.0} if n < 5000 else {}),
      }
      for n in (2048, 4096, 131072)
    ]
  }
  ((_, rows),) = catalogue.STUDIES["runtime"].table(record)
  assert [row[-2:] for row in rows] == [("1.50", "2.00")] * 2 + [("1.50", "")]
  catalogue.STUDIES["runtime"].draw(record, tmp_path / "p.png")
  assert (tmp_path / "p.png").stat().st_size > 5000


def _start(config_file, workdir):
  flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
  command = [sys.executable, "-m", "experiments.study", "--study=lengths"]
  return subprocess.Popen(
    [*command, f"--config={config_file}", f"--workdir={workdir}", *flags],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_a_study_killed_twice_ends_with_the_same_table(config_file, tmp_path):
  whole = _start(config_file, tmp_path / "whole")
  expected, errors = whole.communicate()
  assert whole.returncode == 0, errors
  killed = tmp_path / "killed"
  # In the middle of training one run, and of measuring another.
  for mark in ("dilated_64_seed0/metrics.jsonl", "dense_64_seed0/loss.png"):
    process = _start(config_file, killed)
    while not (killed / mark).exists():
      assert process.poll() is None, process.communicate()
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  process = _start(config_file, killed)
  found, errors = process.communicate()
  assert process.returncode == 0, errors
  table = lambda out: [x for x in out.splitlines() if "trained on" in x]
  assert len(table(expected)) == 8 and table(found) == table(expected)
  read = lambda folder: json.loads((folder / "lengths.json").read_text())
  assert read(killed)["measured"] == read(tmp_path / "whole")["measured"]
