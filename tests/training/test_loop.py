import io
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds

from longnet_jax.training import checkpoint, loop, metrics, report, stopping
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures("standard_promotion")

_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def _train(settings, workdir, **options):
  stream = io.StringIO()
  config = config_lib.build(settings)
  return loop.train(config, workdir, stream=stream, **options), stream


@pytest.fixture(scope="module")
def straight(tiny_settings, tmp_path_factory, standard_promotion):
  """A run of four steps without a break, watched in every way there is."""
  workdir = tmp_path_factory.mktemp("straight")
  watched = {"profile": "3:1", "tracker": "tests.training.tracked:track"}
  return workdir, *_train(tiny_settings(), workdir, **watched)


def _state(workdir, settings, step):
  run = run_lib.make_run(
    config_lib.build(settings), workdir_lib.tokenizer_path(workdir)
  )
  with checkpoint.open_to_read(workdir) as checkpoints:
    return jax.device_get(checkpoints.restore(step, run.abstract_state))


def test_two_and_two_steps_are_four(straight, tiny_settings, tmp_path):
  workdir, result, _ = straight
  first, _ = _train(tiny_settings(training__steps=2), tmp_path)
  assert (first.step, result.step) == (2, 4)
  second, stream = _train(tiny_settings(), tmp_path)
  assert "step 3/4" in stream.getvalue()
  assert second.fingerprint == result.fingerprint
  jax.tree.map(
    np.testing.assert_array_equal,
    _state(tmp_path, tiny_settings(), 4),
    _state(workdir, tiny_settings(), 4),
  )
  times = ("second", "attempt", "goodput")
  drop = lambda r: {
    k: v for k, v in r.items() if not any(t in k for t in times)
  }
  records = metrics.read_metrics(tmp_path)
  assert [drop(r) for r in records] == [
    drop(r) for r in metrics.read_metrics(workdir)
  ]
  assert [r["attempt"] for r in records] == [1, 1, 2, 2]
  assert all(0 <= r["goodput"] < 1 for r in records)
  assert records[3]["goodput"] > 0


def test_a_finished_run_only_reports_itself(straight, tiny_settings):
  workdir, result, _ = straight
  again, _ = _train(tiny_settings(), workdir)
  assert again == result


def test_what_a_run_leaves(straight, tiny_settings):
  workdir, result, stream = straight
  records = metrics.read_metrics(workdir)
  assert [r["step"] for r in records] == [1, 2, 3, 4]
  assert {
    "loss",
    "bits_per_byte",
    "gradient_norm",
    "learning_rate",
    "mixing_weight_0",
  } <= set(records[0])
  assert "validation_bits_per_byte" in records[1]
  assert records[3]["tokens_per_second"] > 0
  said = stream.getvalue()
  assert "left" in said
  assert said.count("reach: the longest segment holds the window of") == 1
  assert workdir_lib.loss_picture_path(workdir).stat().st_size > 5000
  assert (workdir / "tokenizer.json").exists()
  model, params = checkpoint.load_checkpoint(workdir)
  config = config_lib.build(tiny_settings())
  assert model == config.model
  assert workdir_lib.read_config(workdir) == config
  assert result.validation["loss"] == records[3]["validation_loss"]
  assert params["embedding"].shape == (264, 16)


def test_a_loss_is_the_mean_since_the_record_before(
  straight, tiny_settings, tmp_path
):
  workdir, *_ = straight
  each = metrics.read_metrics(workdir)
  changes = {"training__log_every": 3, "training__eval_every": 9}
  _train(tiny_settings(**changes), tmp_path)
  first, last = metrics.read_metrics(tmp_path)
  assert (first["step"], last["step"]) == (3, 4)
  # Almost: windows at the end of the text have fewer tokens.
  for name in ("loss", "bits_per_byte"):
    mean = np.mean([r[name] for r in each[:3]])
    assert first[name] == pytest.approx(mean, rel=1e-2)
    assert last[name] == pytest.approx(each[3][name], rel=1e-6)


def test_records_say_what_the_host_did_beside_the_steps(straight):
  workdir, *_ = straight
  records = metrics.read_metrics(workdir)
  assert all(r["input_seconds"] > 0 for r in records)
  # Validation belongs to the record that has its results; a save of step 2 and
  # its time to that of step 3.
  assert [r["evaluation_seconds"] > 0 for r in records] == [0, 1, 0, 1]
  assert [r["save_seconds"] > 0 for r in records] == [0, 0, 1, 0]
  walls = [r["wall_seconds"] for r in records]
  assert walls == sorted(walls)
  assert sum(r["step_seconds"] for r in records) < walls[-1]


def test_every_number_of_a_record_is_documented(straight):
  workdir, *_ = straight
  page = pathlib.Path(__file__).parent.parent.parent / "docs" / "training.md"
  documented = set(re.findall(r"`(\w+)`", page.read_text()))
  found = {name for r in metrics.read_metrics(workdir) for name in r}
  found -= {"step", "mixing_weight_1"}
  assert found <= documented
  assert set(report._MEMORY) <= documented


def test_the_fullest_device_is_on_record(monkeypatch):
  device = lambda used: types.SimpleNamespace(
    memory_stats=lambda: {"bytes_in_use": used, "bytes_limit": 9}
  )
  monkeypatch.setattr(
    report.jax, "local_devices", lambda: [device(2), device(3)]
  )
  assert report._memory() == {"device_bytes": 3, "device_limit_bytes": 9}


def test_steps_are_traced(straight):
  workdir, _, stream = straight
  (trace,) = (workdir / "profile").rglob("*.xplane.pb")
  assert b"train_step" in trace.read_bytes()
  assert "profile: steps 3 to 3 go to" in stream.getvalue()


def test_a_tracker_gets_every_record(straight):
  workdir, *_ = straight
  lines = (workdir / "tracked.jsonl").read_text().splitlines()
  settings, *tracked = map(json.loads, lines)
  assert settings["training"]["steps"] == 4
  assert tracked == metrics.read_metrics(workdir)


def test_another_config_is_refused_with_both_values(straight, tiny_settings):
  workdir, *_ = straight
  changed = tiny_settings(optimizer__beta1=0.8, model__ffn_dim=64)
  with pytest.raises(ValueError) as caught:
    _train(changed, workdir)
  assert "model.ffn_dim was 32 and is now 64" in str(caught.value)
  assert "optimizer.beta1 was 0.9 and is now 0.8" in str(caught.value)


def test_other_text_is_refused(straight, tiny_settings, text_folder):
  workdir, *_ = straight
  try:
    for i in range(20):
      (text_folder / f"new{i}.py").write_text(f"x = {i}\n" * 50)
    with pytest.raises(ValueError, match="the train of this run was"):
      _train(tiny_settings(), workdir)
  finally:
    for path in text_folder.glob("new*.py"):
      path.unlink()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_settings, tmp_path):
  settings = tiny_settings(
    training__steps=9,
    training__checkpoint_every=1,
    optimizer__learning_rate=1e38,
    optimizer__warmup_steps=0,
    optimizer__schedule="constant",
  )
  with pytest.raises(
    report.DivergedError, match=r"step \d+: .* is (nan|inf); .* of step"
  ):
    _train(settings, tmp_path)
  with checkpoint.open_to_read(tmp_path) as checkpoints:
    step = checkpoints.find("latest")
  assert step < 9
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_a_signal_saves_and_stops(
  straight, tiny_settings, tmp_path, monkeypatch, request, number
):
  # Under nohup some are ignored, and then stay so.
  inherited = signal.signal(number, signal.SIG_DFL)
  request.addfinalizer(lambda: signal.signal(number, inherited))
  _, result, _ = straight
  hold = report.Report.hold

  def kill_after_one(self, step, values):
    hold(self, step, values)
    if step == 1:
      os.kill(os.getpid(), number)

  monkeypatch.setattr(report.Report, "hold", kill_after_one)
  early, stream = _train(tiny_settings(), tmp_path)
  assert early.signal == number
  assert early.step in (1, 2)
  assert f"{number.name}: stopped after step" in stream.getvalue()
  assert signal.getsignal(number) is not signal.SIG_IGN
  if number != signal.SIGTERM:
    return
  monkeypatch.undo()
  late, _ = _train(tiny_settings(), tmp_path)
  assert late.fingerprint == result.fingerprint


def test_a_damaged_checkpoint_is_passed_over_when_asked(
  straight, tiny_settings, tmp_path
):
  workdir, result, _ = straight
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "4" / "opt_state")
  with pytest.raises(
    checkpoint.CheckpointError, match="--fallback to go on from step 2"
  ):
    _train(tiny_settings(), copy)
  config = config_lib.build(tiny_settings())
  again = loop.train(config, copy, stream=io.StringIO(), fallback=True)
  assert again == result
  assert len(list(copy.glob("damaged-4-*"))) == 1


@pytest.mark.parametrize("item", ["config", "tokenizer", "data"])
def test_no_damaged_item_is_gone_on_from(
  straight, tiny_settings, tmp_path, item
):
  copy = tmp_path / "run"
  shutil.copytree(straight[0], copy)
  path = copy / "checkpoints" / "4" / item / "metadata"
  path.write_text(path.read_text().replace("e", "f", 1))
  run = run_lib.make_run(
    config_lib.build(tiny_settings()), workdir_lib.tokenizer_path(copy)
  )
  with checkpoint.Checkpoints(copy) as checkpoints:
    with pytest.raises(
      checkpoint.CheckpointError, match="--fallback .* step 2"
    ):
      loop.begin(run, checkpoints)
    _, beginning = loop.begin(run, checkpoints, fallback=True)
    assert beginning.step == 2 and checkpoints.steps() == [2]


def test_an_update_that_is_not_finite_may_be_left_out(
  tiny_settings, tmp_path, monkeypatch
):
  settings = tiny_settings(
    training__checkpoint_every=1,
    training__eval_every=9,
    training__max_skipped=1,
  )
  place = run_lib.Run.place
  placed = []

  def poisoned(self, batch):
    placed.append(None)
    if len(placed) in (2, 3):
      batch = batch | {"weights": batch["weights"] * np.float32("nan")}
    return place(self, batch)

  monkeypatch.setattr(run_lib.Run, "place", poisoned)
  with pytest.raises(report.DivergedError, match="step 3: .* nan; .*step 2 is"):
    _train(settings, tmp_path)
  first, second = metrics.read_metrics(tmp_path)
  assert "loss" in first and "skipped" not in first
  assert "loss" not in second and second["skipped"] == 1
  before, after = (_state(tmp_path, settings, step) for step in (1, 2))
  assert (before.step, after.step) == (1, 2)
  jax.tree.map(np.testing.assert_array_equal, before._replace(step=2), after)


def test_steps_go_on_while_a_save_is_written(
  tiny_settings, tmp_path, monkeypatch
):
  """And what minutes ask for meanwhile waits for its end."""
  settings = tiny_settings(
    training__checkpoint_every=100,
    training__checkpoint_minutes=1e-9,
    training__eval_every=100,
    training__max_to_keep=9,
  )
  handler, hold = ocp.StandardCheckpointHandler, report.Report.hold
  finalize = handler.finalize
  third, came = threading.Event(), []

  def slow(self, *args, **kwargs):
    came.append(third.wait(60))
    finalize(self, *args, **kwargs)

  def tell(self, step, values):
    hold(self, step, values)
    if step == 3:
      third.set()

  monkeypatch.setattr(handler, "finalize", slow)
  monkeypatch.setattr(report.Report, "hold", tell)
  _train(settings, tmp_path)
  assert came and all(came)
  with checkpoint.open_to_read(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1, 4]


class Snippets(tfds.core.GeneratorBasedBuilder):
  """Any text dataset that somebody has prepared."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(40):
      yield i, {"text": f"the text of document {i} " * 4}


def test_any_prepared_text_dataset_trains_by_its_name(tiny_settings, tmp_path):
  Snippets(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  settings = tiny_settings(
    data__dataset="snippets",
    data__data_dir=str(tmp_path),
    data__folder="/nowhere",
    training__steps=2,
  )
  result, stream = _train(settings, tmp_path / "run")
  assert result.step == 2
  assert "step 2/2" in stream.getvalue()


def test_signals_are_given_back():
  assert threading.current_thread() is threading.main_thread()
  before = signal.getsignal(signal.SIGTERM)
  with stopping.catch_signals() as caught:
    assert signal.getsignal(signal.SIGTERM) is not before
  assert not caught
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model__vocab_size": 100}, "vocab_size is 100 and the bytes tokenizer"),
    ({"mesh__data": 16}, "needs 16 devices and there are 8"),
    ({"mesh__data": 8}, "mesh.data is 8 and must divide the 4 rows"),
    ({"mesh__model": 4}, "mesh.model is 4 and must divide the 2 heads"),
    (
      {"training__batch_size": 2**31 - 1},
      "batch_size is 2147483647 windows of",
    ),
    ({"data__window": 80_000}, "data.window is 80000 and position='xpos'"),
    ({"data__folder": "/nowhere"}, "/nowhere"),
  ],
  ids=str,
)
def test_what_cannot_work_leaves_nothing(
  tiny_settings, tmp_path, changes, message
):
  workdir = tmp_path / "run"
  with pytest.raises((ValueError, OSError), match=message):
    _train(tiny_settings(**changes), workdir)
  assert not workdir.exists()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"profile": "5:1"}, "profile is '5:1'; it must be STEP:COUNT such as 4:1"),
    ({"tracker": "nowhere:track"}, "tracker nowhere:track: ModuleNotFound"),
  ],
  ids=str,
)
def test_watching_that_cannot_work_leaves_nothing(
  tiny_settings, tmp_path, options, message
):
  with pytest.raises(ValueError, match=message):
    _train(tiny_settings(), tmp_path / "run", **options)
  assert not (tmp_path / "run").exists()
