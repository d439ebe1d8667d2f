import io
import json
import shutil

import jax
import numpy as np
import pytest

from longnet_jax.training import checkpoint, config, loop
from longnet_jax.training import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def source(tiny_settings, tmp_path_factory, standard_promotion):
  """A model that was trained for a step."""
  folder = tmp_path_factory.mktemp("source")
  changes = {"training__eval_every": 9, "training__log_every": 9}
  settings = tiny_settings(training__steps=1, **changes)
  loop.train(config.build(settings), folder, stream=io.StringIO())
  return folder


def _train(settings, workdir):
  stream = io.StringIO()
  result = loop.train(config.build(settings), workdir, stream=stream)
  return result, stream.getvalue()


def test_other_segments_and_windows_take_the_parameters(
  source, tiny_settings, tmp_path
):
  gone, workdir = tmp_path / "gone", tmp_path / "run"
  shutil.copytree(source, gone)
  # What a run has beside its checkpoints is not needed.
  (gone / "config.json").unlink()
  (gone / "tokenizer.json").unlink()
  settings = tiny_settings(
    training__init_from=str(gone),
    training__steps=1,
    training__eval_every=9,
    model__segment_lengths=(16, 64),
    model__dilation_rates=(1, 4),
    data__window=64,
  )
  first, said = _train(settings, workdir)
  assert f"parameters of {gone}, step 1; settings that differ" in said
  assert "  model.segment_lengths  (8, 32) -> (16, 64)\n" in said
  assert "  data.window            32 -> 64\n" in said
  assert "resuming" not in said
  (start,) = json.loads((workdir / "attempts.json").read_text())
  assert start["init_from"] == f"{gone}, step 1"
  _, before = checkpoint.load_checkpoint(source)
  _, taken = checkpoint.load_checkpoint(workdir, step=0)
  jax.tree.map(np.testing.assert_array_equal, taken, before)
  # It goes on, and starts again from its first step, without the origin.
  shutil.rmtree(gone)
  again, said = _train(settings, workdir)
  assert again == first and "resuming from step 1\n" in said
  shutil.rmtree(workdir / "checkpoints" / "1")
  again, said = _train(settings, workdir)
  assert again == first and "parameters of" not in said


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"model__ffn_dim": 64},
      r"parameter layers/ffn/fc1/bias is float32 \(2, 32\) in .*, step 1 and "
      r"float32 \(2, 64\) here; .* differ: model.ffn_dim",
    ),
    (
      {"model__tie_embeddings": True},
      r"parameter output is float32 \(16, 264\) in .* and absent here",
    ),
    (
      {"data__tokenizer": "bpe"},
      "are of 'bytes'; give --config.data.tokenizer=bytes",
    ),
  ],
)
def test_what_does_not_fit_is_named(
  source, tiny_settings, tmp_path, changes, message
):
  settings = tiny_settings(training__init_from=str(source), **changes)
  with pytest.raises(ValueError, match=message):
    _train(settings, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(source, tiny_settings, tmp_path):
  for name, message in (
    (tmp_path, "training.init_from: .* holds no checkpoints"),
    (source / "checkpoints" / "7", "has no step 7; it has 1"),
  ):
    settings = tiny_settings(training__init_from=str(name))
    with pytest.raises(ValueError, match=message):
      _train(settings, tmp_path / "run")
  with checkpoint.Checkpoints(tmp_path / "slides") as checkpoints:
    _, params = checkpoint.load_checkpoint(source)
    checkpoints.save_params(params, {"config": {"slide_encoder": {}}})
  settings = tiny_settings(training__init_from=str(tmp_path / "slides"))
  with pytest.raises(ValueError, match="which holds no language model"):
    _train(settings, tmp_path / "run")


def test_a_checkpoint_alone_has_settings_and_tokenizer(source, tmp_path):
  shutil.copytree(source / "checkpoints", tmp_path / "checkpoints")
  assert workdir_lib.read_config(tmp_path) == workdir_lib.read_config(source)
  alone, beside = map(workdir_lib.load_tokenizer, (tmp_path, source))
  assert alone.fingerprint == beside.fingerprint == "bytes"
