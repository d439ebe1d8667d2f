import dataclasses
import json

import pytest

from longnet_jax import storage
from longnet_jax.training import config as config_lib
from longnet_jax.training import workdir


@pytest.fixture
def settings(tiny_settings):
  return dataclasses.asdict(config_lib.build(tiny_settings()))


def _store(folder, settings):
  workdir.config_path(folder).write_text(json.dumps(settings))


def test_the_same_settings_may_go_on(settings, tmp_path):
  _store(tmp_path, settings)
  workdir.check(tmp_path, settings)
  assert workdir.read_config(tmp_path) == config_lib.build(settings)


@pytest.mark.parametrize(
  "group, key, value",
  [
    ("training", "steps", 99),
    ("training", "log_every", 7),
    ("training", "checkpoint_every", 7),
    ("training", "eval_every", 7),
    ("training", "eval_batches", 7),
    ("mesh", "seq", 2),
    ("data", "cache_dir", "x"),
    ("data", "folder", "x"),
    ("optimizer", "decay_steps", 200),
    ("optimizer", "learning_rate", 0.5),
  ],
)
def test_what_may_change(settings, tmp_path, group, key, value):
  _store(tmp_path, settings)
  settings[group][key] = value
  workdir.check(tmp_path, settings)


def test_a_key_that_is_younger_than_the_run_had_its_default(settings, tmp_path):
  old = json.loads(json.dumps(settings))
  del old["training"]["init_from"]
  _store(tmp_path, old)
  workdir.check(tmp_path, settings)
  settings["training"]["init_from"] = "x"
  with pytest.raises(ValueError, match="init_from was '' and is now 'x'"):
    workdir.check(tmp_path, settings)


@pytest.mark.parametrize(
  "group, key, value",
  [("data", "seed", 9), ("training", "batch_size", 8), ("model", "ffn_dim", 8)],
)
def test_what_may_not(settings, tmp_path, group, key, value):
  _store(tmp_path, settings)
  old = settings[group][key]
  settings[group][key] = value
  message = f"{group}.{key} was {old} and is now {value}; choose another"
  with pytest.raises(ValueError, match=message):
    workdir.check(tmp_path, settings)


def test_checking_creates_nothing(settings, tmp_path):
  workdir.check(tmp_path / "a" / "b", settings)
  assert not list(tmp_path.iterdir())


def test_a_folder_that_refuses_is_named(settings, tmp_path, monkeypatch):
  def full(**_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(storage.tempfile, "TemporaryFile", full)
  with pytest.raises(
    ValueError, match="cannot write .*No space left"
  ) as caught:
    workdir.check(tmp_path, settings)
  assert storage.failed(caught.value)


def test_a_file_is_no_workdir(settings, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file; choose a folder"):
    workdir.check(tmp_path / "file", settings)


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{"seed": ', "is not JSON"),
    (b'{"seed": "\xff"}', "is not JSON"),
    (b"[1]", "does not hold settings"),
    (b"null", "does not hold settings"),
  ],
)
def test_a_damaged_config_is_named(settings, tmp_path, content, message):
  workdir.config_path(tmp_path).write_bytes(content)
  with pytest.raises(ValueError, match=f"config.json {message}"):
    workdir.check(tmp_path, settings)
