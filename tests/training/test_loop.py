import io
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from longnet_jax.training import checkpoint, loop, metrics, report, stopping
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures("standard_promotion")

_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def _train(settings, workdir):
  stream = io.StringIO()
  return loop.train(config_lib.build(settings), workdir, stream=stream), stream


@pytest.fixture(scope="module")
def straight(tiny_settings, tmp_path_factory, standard_promotion):
  """A run of four steps without a break."""
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, *_train(tiny_settings(), workdir)


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
  drop = lambda r: {k: v for k, v in r.items() if "second" not in k}
  assert [drop(r) for r in metrics.read_metrics(tmp_path)] == [
    drop(r) for r in metrics.read_metrics(workdir)
  ]


def test_a_finished_run_only_reports_itself(straight, tiny_settings):
  workdir, result, _ = straight
  again, _ = _train(tiny_settings(), workdir)
  assert again == result


def test_what_a_run_leaves(straight, tiny_settings):
  workdir, result, stream = straight
  records = metrics.read_metrics(workdir)
  assert [r["step"] for r in records] == [1, 2, 3, 4]
  assert {"loss", "gradient_norm", "learning_rate", "mixing_weight_0"} <= set(
    records[0]
  )
  assert "validation_bits_per_byte" in records[1]
  assert records[3]["tokens_per_second"] > 0
  assert "left" in stream.getvalue()
  assert workdir_lib.loss_picture_path(workdir).stat().st_size > 5000
  assert (workdir / "tokenizer.json").exists()
  model, params = checkpoint.load_checkpoint(workdir)
  config = config_lib.build(tiny_settings())
  assert model == config.model
  assert workdir_lib.read_config(workdir) == config
  assert result.validation["loss"] == records[3]["validation_loss"]
  assert params["embedding"].shape == (264, 16)


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
  straight, tiny_settings, tmp_path, monkeypatch, number
):
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


def test_minutes_save_and_multiples_are_kept(tiny_settings, tmp_path):
  settings = tiny_settings(
    training__steps=5,
    training__checkpoint_every=100,
    training__checkpoint_minutes=1e-9,
    training__max_to_keep=1,
    training__keep_every=2,
    training__eval_every=5,
  )
  _train(settings, tmp_path)
  with checkpoint.open_to_read(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2, 4, 5]


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
