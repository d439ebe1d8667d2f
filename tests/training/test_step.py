import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.data import pipeline
from longnet_jax.ops import kernels
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop
from longnet_jax.training import run as run_lib
from longnet_jax.training import step as step_lib

pytestmark = pytest.mark.usefixtures("standard_promotion")


def _one_step(settings):
  run = run_lib.make_run(config_lib.build(settings), "no tokenizer yet")
  batch = run.train_source.batch(0, run.config.training.batch_size)
  # The last row does not count: parts of a batch differ in weight.
  batch["weights"][-1] = 0
  state, metrics = run.train_step(run.init(), run.place(batch))
  return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def whole(tiny_settings, standard_promotion):
  return _one_step(tiny_settings())


@pytest.mark.parametrize(
  "changes",
  [
    {"training__accumulation_steps": 2},
    {"training__loss_chunk": 5},
    {"mesh__data": 2, "mesh__model": 2},
    {"model__remat": "dots", "model__scan_layers": False},
  ],
  ids=str,
)
def test_how_a_batch_is_computed_does_not_matter(whole, tiny_settings, changes):
  state, metrics = _one_step(tiny_settings(**changes))
  for name, value in whole[1].items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
  # Moments rather than parameters: Adam's first step is the gradient's sign.
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(
      got, want, rtol=1e-4, atol=2e-6
    ),
    state.opt_state,
    whole[0].opt_state,
  )


def test_parameters_are_sharded_over_the_mesh(tiny_settings):
  settings = tiny_settings(mesh__data=2, mesh__model=2)
  run = run_lib.make_run(config_lib.build(settings), "no tokenizer yet")
  kernel = run.abstract_state.params["layers"]["ffn"]["fc1"]["kernel"]
  assert kernel.shape == (2, 16, 32)
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 16)


def test_mixing_weights_sum_to_one(tiny_settings):
  run = run_lib.make_run(config_lib.build(tiny_settings()), "none")
  batch = run.place(run.train_source.batch(0, 4))
  weights = run.mixing_step(run.init().params, batch)
  assert weights.shape == (2,)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


def test_documents_of_a_stream_see_one_another(tiny_settings):
  settings = tiny_settings(data__layout="stream")
  run = run_lib.make_run(config_lib.build(settings), "none")
  batch, params = run.train_source.batch(1, 4), run.init().params
  ones = np.ones_like(batch["tokens"])
  found, same, cut = (
    run.eval_step(params, run.place(b))["nats"]
    for b in (
      batch,
      {**batch, "segment_ids": ones},
      {**batch, "segment_ids": np.cumsum(ones, 1) // 8},
    )
  )
  np.testing.assert_allclose(found, same, rtol=1e-6)
  assert abs(found - cut) > 1e-3
  with kernels.compiling_for("gpu"):
    assert run.describe_kernel() is None
    packed = dataclasses.replace(run, config=config_lib.build(tiny_settings()))
    assert "data.layout='stream'" in packed.describe_kernel()


def test_dropout_differs_by_step_and_repeats_by_seed(tiny_settings):
  config = config_lib.build(tiny_settings(model__dropout_rate=0.5))
  run = run_lib.make_run(config, "none")
  batch = run.place(run.train_source.batch(0, 4))
  losses = [
    float(run.train_step(state, batch)[1]["loss"])
    for state in (
      run.init(),
      run.init(),
      run.init()._replace(step=jnp.asarray(1, jnp.int32)),
    )
  ]
  assert losses[0] == losses[1] != losses[2]


def test_parts_hold_every_row_once():
  rows = jnp.arange(6)[:, None]
  parts = step_lib._parts(rows, 3)
  assert parts.shape == (3, 2, 1)
  assert sorted(parts.ravel().tolist()) == list(range(6))


def test_every_key_is_read(tiny_settings, tmp_path, monkeypatch):
  """Runs train on a few configs and fails on a key that nothing read."""
  read = set()
  configs = [
    config_lib.build(tiny_settings(training__steps=2)),
    config_lib.build(
      tiny_settings(
        training__steps=2,
        model__attention="sparse",
        data__dataset="needle",
        data__window=64,
        data__needle_distances=(8,),
        data__needle_windows=8,
      )
    ),
  ]
  classes = {type(configs[0])}
  for field in dataclasses.fields(configs[0]):
    classes.add(type(getattr(configs[0], field.name)))
  classes.discard(int)
  for cls in classes:
    monkeypatch.setattr(cls, "__getattribute__", _recorder(cls, read))
  for i, config in enumerate(configs):
    loop.train(config, tmp_path / str(i), stream=sys.stderr)
  # A dataset by name needs one on this disk: opening it is enough to read.
  for changes in ({"dataset": "no_such_set"}, {"tokenizer": "bpe"}):
    data = dataclasses.replace(configs[0].data, **changes)
    with pytest.raises(ValueError):
      pipeline.make_source(data, pipeline.make_tokenizer(data), "train")
  monkeypatch.undo()
  unread = {
    f"{cls.__name__}.{field.name}"
    for cls in classes - {type(configs[0])}
    for field in dataclasses.fields(cls)
  } - read
  assert not unread


def _recorder(cls, read):
  """A __getattribute__ that notes reads, but not those of dataclasses."""

  def get(self, name):
    reader = sys._getframe(1).f_code
    generated = reader.co_filename.endswith(("dataclasses.py", "<string>"))
    if not generated and reader.co_name != "__post_init__":
      read.add(f"{cls.__name__}.{name}")
    return object.__getattribute__(self, name)

  return get
