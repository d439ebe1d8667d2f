import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax import checked, evaluate, scores
from longnet_jax.data import config as data_config
from longnet_jax.data import pipeline
from longnet_jax.models import attention, transformer
from longnet_jax.models import config as model_config
from longnet_jax.ops import blockwise
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(30):
    (folder / f"m{i}.py").write_text(f"x{i} = {i} + 1\n" * 20)
  data = data_config.DataConfig(
    folder=str(folder),
    cache_dir=str(tmp_path_factory.mktemp("cache")),
    window=16,
    validation_fraction=0.3,
    test_fraction=0.3,
  )
  config = model_config.LongNetConfig(
    vocab_size=264,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    ffn_dim=16,
    segment_lengths=(8, 16),
    dilation_rates=(1, 2),
    max_positions=64,
    dtype="float32",
  )
  model = transformer.LongNetLM(config)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = model.init(jax.random.key(0), tokens)["params"]
  return config, params, data, pipeline.make_tokenizer(data)


@pytest.fixture(scope="module")
def evaluation(parts):
  return evaluate.evaluate(*parts, [16, 128], batch_tokens=512, loss_chunk=32)


def test_every_token_of_the_split_counts_once_at_each_length(parts, evaluation):
  _, _, data, tokenizer = parts
  source = pipeline.make_source(data, tokenizer, "test")
  batches = [
    source.batch(i, 4, shuffled=False) for i in range(source.num_batches(4))
  ]
  tokens = sum(int(b["weights"].sum()) for b in batches)
  for score in evaluation.by_length.values():
    assert score.tokens == tokens
  assert evaluation.by_position.keys() == evaluation.by_position_cut.keys()
  for by_position in (evaluation.by_position, evaluation.by_position_cut):
    assert sum(s.tokens for s in by_position.values()) == tokens
  for span, score in evaluation.by_position.items():
    cut = evaluation.by_position_cut[span]
    assert (cut.tokens, cut.bytes) == (score.tokens, score.bytes)
  nats = sum(s.nats for s in evaluation.by_position_cut.values())
  assert nats == pytest.approx(evaluation.by_length[16].nats)


def test_a_mesh_changes_no_score(parts, evaluation):
  config, params, *rest = parts
  mesh = mesh_lib.make_mesh(data=2, seq=2, model=2)
  params = jax.device_put(params, sharding.shardings_for(params, mesh))
  found = evaluate.evaluate(
    config, params, *rest, [128], batch_tokens=512, loss_chunk=32, mesh=mesh
  )
  for span, score in evaluation.by_position.items():
    got = found.by_position[span]
    assert (got.tokens, got.bytes) == (score.tokens, score.bytes)
    assert got.nats == pytest.approx(score.nats, rel=1e-5)
  with pytest.raises(checked.RefusedError, match="mesh.seq is 2 and must div"):
    evaluate.evaluate(config, params, *rest, [33], mesh=mesh)


def test_what_was_read_before_a_stop_is_scored(parts, evaluation):
  asked = []
  stop = lambda length, share: asked.append((length, share)) or True
  found = evaluate.evaluate(
    *parts, [16, 128], batch_tokens=512, loss_chunk=32, stop=stop
  )
  ((length, share),) = asked
  assert length == 16 and 0 < share < 1
  (score,) = found.by_length.values()
  assert 0 < score.tokens < evaluation.by_length[16].tokens
  assert not found.by_position and found.trigram_bits_per_byte is None


def _nats(apply, params, batch):
  """The loss of a batch, from all of its logits, in float64."""
  inputs = (batch[key] for key in ("tokens", "positions", "segment_ids"))
  logits = apply({"params": params}, *inputs)
  logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  chosen = np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]
  return -np.sum(chosen * batch["weights"])


def test_scores_are_those_of_the_logits(parts, evaluation):
  config, params, data, tokenizer = parts
  source = pipeline.make_source(data, tokenizer, "test")
  apply = jax.jit(transformer.LongNetLM(config).apply)
  nats = 0.0
  for i in range(source.num_batches(4)):
    batch = source.batch(i, 4, shuffled=False)
    nats += _nats(apply, params, batch)
  score = evaluation.by_length[16]
  np.testing.assert_allclose(score.nats, nats, rtol=1e-5)
  np.testing.assert_allclose(
    score.perplexity, np.exp(nats / score.tokens), rtol=1e-5
  )
  np.testing.assert_allclose(
    score.bits_per_byte, nats / np.log(2) / score.bytes, rtol=1e-5
  )


def test_beyond_the_trained_window_it_reads_in_blocks(parts, evaluation):
  config, params, data, tokenizer = parts
  found = evaluate.evaluate(
    *parts, [16, 128], batch_tokens=512, loss_chunk=32, trained_window=24
  )
  assert found.by_length[16] == evaluation.by_length[16]
  attend = attention.make_attention_fn(config)
  model = transformer.LongNetLM(config, blockwise.over_blocks(attend, 24))
  longest = dataclasses.replace(data, window=128)
  batch = pipeline.make_source(longest, tokenizer, "test").batch(
    0, 64, shuffled=False
  )
  nats = _nats(jax.jit(model.apply), params, batch)
  np.testing.assert_allclose(found.by_length[128].nats, nats, rtol=1e-5)
  assert abs(nats / evaluation.by_length[128].nats - 1) > 1e-6


def test_less_text_is_the_same_text_at_each_length(parts):
  _, _, data, tokenizer = parts

  def covered(length):
    source = pipeline.make_source(
      dataclasses.replace(data, window=length), tokenizer, "test"
    )
    numbers = evaluate._windows(source, length, 128, 256)
    rows = [source.batch(n, 1, shuffled=False)["tokens"] for n in numbers]
    return np.concatenate(rows, axis=1)

  short, long = covered(16), covered(128)
  assert short.shape == (1, 256)
  np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize("length", [128, 16, 48])
def test_the_same_tokens_are_found_at_each_length(parts, length):
  _, _, data, tokenizer = parts
  cut = lambda window: pipeline.make_source(
    dataclasses.replace(data, window=window), tokenizer, "test"
  )
  longest, source = cut(128), cut(length)
  places = evaluate._Places(longest, 384)
  numbers = evaluate._windows(source, length, 128, 384)
  found = places.find(numbers, len(numbers) + 1, length)
  assert np.all(found[-1] == -1)  # padding
  spans = evaluate._windows(longest, 128, 128, 384)
  assert len(spans) == 3 < longest.num_windows
  whole = [longest.batch(n, 1, shuffled=False) for n in spans]
  chosen = [b["positions"][b["weights"] > 0] for b in whole]
  np.testing.assert_array_equal(found[found >= 0], np.concatenate(chosen))


def test_what_no_head_reads_is_worth_nothing_at_any_position(parts):
  config, params, data, tokenizer = parts
  short = dataclasses.replace(config, segment_lengths=(8,), dilation_rates=(1,))
  found = evaluate.evaluate(
    short, params, data, tokenizer, [16, 128], batch_tokens=512, loss_chunk=32
  )
  rows = found.to_dict()["positions"]
  bits = [row["bits_per_byte"] for row in rows]
  assert abs(bits[0] - bits[-1]) > 1e-3  # other text, not more context
  assert [row["context_worth"] for row in rows] == pytest.approx(
    [0, 0], abs=1e-6
  )


def test_buckets_double_up_to_the_length():
  assert evaluate.position_edges(300).tolist() == [0, 64, 128, 256, 300]
  assert evaluate.position_edges(10).tolist() == [0, 10]


def test_a_length_past_the_positions_is_refused(parts):
  with pytest.raises(ValueError, match="length is 99999999; position='xpos'"):
    evaluate.evaluate(*parts, [16, 99_999_999])


@pytest.mark.parametrize("name", ["max_tokens", "batch_tokens", "loss_chunk"])
def test_no_number_of_tokens_is_refused(parts, name):
  with pytest.raises(
    checked.RefusedError, match=f"{name} is -5: must be 1 or more"
  ):
    evaluate.evaluate(*parts, [16], **{name: -5})


def test_table_json_and_picture(evaluation, tmp_path):
  text = scores.table(evaluation)
  assert "a byte trigram reaches" in text
  assert len(text.splitlines()) == 6 + len(evaluation.by_position)
  record = scores.write(evaluation, tmp_path / "e.json", step=3)
  assert json.loads((tmp_path / "e.json").read_text()) == record
  assert record["step"] == 3
  assert record["cut_to"] == 16
  assert [row["length"] for row in record["lengths"]] == [16, 128]
  for row in record["positions"]:
    full, cut = row["bits_per_byte"], row["cut_bits_per_byte"]
    assert row["context_worth"] == pytest.approx(cut - full, abs=1e-9)
    assert f"{full:10.4f}  {cut:10.4f}  {cut - full:8.4f}" in text
  scores.draw({"one": record, "two": record}, tmp_path / "e.png")
  assert (tmp_path / "e.png").stat().st_size > 5000


def test_one_length_says_nothing_of_context(evaluation, tmp_path):
  alone = dataclasses.replace(evaluation, by_position_cut={})
  assert "a second, shorter context would show" in scores.table(alone)
  record = scores.write(alone, tmp_path / "e.json")
  assert record["cut_to"] is None
  assert "context_worth" not in record["positions"][0]
  scores.draw({"one": record}, tmp_path / "e.png")


def test_what_was_stopped_has_a_picture_without_positions(evaluation, tmp_path):
  stopped = dataclasses.replace(
    evaluation, by_position={}, by_position_cut={}, trigram_bits_per_byte=None
  )
  assert "context would show" not in scores.table(stopped)
  record = scores.write(stopped, tmp_path / "e.json")
  scores.draw({"one": record}, tmp_path / "e.png")
  assert (tmp_path / "e.png").stat().st_size > 5000
