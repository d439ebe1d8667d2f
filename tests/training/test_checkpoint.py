import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longnet_jax.training import checkpoint
from longnet_jax.training import state as state_lib

_RECORDS = {"config": {"model": {}}, "tokenizer": {}, "data": {"train": "ab"}}


def _state(step):
  params = {
    "layers": {"kernel": jnp.arange(64.0).reshape(8, 8) + step},
    "bias": jnp.ones(3),
  }
  return state_lib.TrainState(
    step=jnp.asarray(step, jnp.int32),
    rng=jax.random.key_data(jax.random.key(7)),
    params=params,
    opt_state=jax.tree.map(
      lambda moment: moment + step, optax.adamw(1e-3).init(params)
    ),
  )


@pytest.fixture(scope="module")
def series(tmp_path_factory):
  """Steps 1 to 5 with losses 3, 1, 2, none, 5; two are kept and the best."""
  workdir = tmp_path_factory.mktemp("series")
  with checkpoint.Checkpoints(workdir, max_to_keep=2) as checkpoints:
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 5.0), 1):
      validation = None if loss is None else {"loss": loss}
      checkpoints.save(
        step, _state(step), records=_RECORDS, validation=validation
      )
  return workdir


def test_latest_and_best_are_kept(series):
  with checkpoint.open_to_read(series) as checkpoints:
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.find() == 5
    assert checkpoints.find("best") == 2
    assert checkpoints.metrics(2) == {"loss": 1.0}
    with pytest.raises(checkpoint.CheckpointError, match="no step 3; .* 2, 4"):
      checkpoints.find(3)


def test_multiples_are_kept_for_ever(tmp_path):
  with checkpoint.Checkpoints(
    tmp_path, max_to_keep=1, keep_every=2
  ) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, _state(step), records=_RECORDS)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]


def test_restore_is_exact_on_other_devices(series):
  devices = np.array(jax.devices()[:4])
  mesh = jax.sharding.Mesh(devices, ("x",))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def target(leaf):
    where = spread if leaf.shape == (8, 8) else whole
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  with checkpoint.open_to_read(series) as checkpoints:
    got = checkpoints.restore(4, jax.tree.map(target, _state(4)))
    assert checkpoints.restore_json(4, "data") == {"train": "ab"}
  assert got.params["layers"]["kernel"].sharding == spread
  jax.tree.map(np.testing.assert_array_equal, got, _state(4))


def test_parameters_alone(series, caplog):
  with checkpoint.open_to_read(series) as checkpoints:
    params = checkpoints.restore_params(2)
  assert not caplog.records
  np.testing.assert_array_equal(
    params["layers"]["kernel"], _state(2).params["layers"]["kernel"]
  )
  assert len(params["bias"].devices()) == 1


def test_imported_parameters_need_no_optimizer(tmp_path):
  params = _state(0).params
  model = {
    "vocab_size": 8,
    "num_layers": 1,
    "model_dim": 8,
    "num_heads": 1,
    "ffn_dim": 8,
    "segment_lengths": (4,),
    "dilation_rates": (1,),
  }
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save_params(params, {"config": {"model": model}})
  config, got = checkpoint.load_checkpoint(tmp_path)
  assert config.segment_lengths == (4,)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_no_checkpoint_is_said(tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoints"):
    checkpoint.load_checkpoint(tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_one_line_with_a_way_out(series):
  data = [
    path
    for path in (series / "checkpoints" / "5" / "params").rglob("d/*")
    if path.is_file()
  ]
  for path in data:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
  assert data
  with checkpoint.open_to_read(series) as checkpoints:
    with pytest.raises(checkpoint.CheckpointError) as caught:
      checkpoints.restore_params(5)
    assert "cannot read checkpoint" in str(caught.value)
    assert "go on from step 4" in str(caught.value)
    assert "\n" not in str(caught.value)
    checkpoints.restore_params(4)


def test_changed_bytes_are_refused(tmp_path):
  """Arrays that orbax restores without an error, and that are not ours."""
  state = _state(1)
  state.params["layers"]["kernel"] = jax.random.normal(
    jax.random.key(0), (64, 64)
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, records=_RECORDS)
  files = (tmp_path / "checkpoints" / "1" / "params").rglob("d/*")
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(b ^ 0x5A for b in data[middle:][:64])
  largest.write_bytes(data)
  with checkpoint.open_to_read(tmp_path) as checkpoints:
    with pytest.raises(checkpoint.CheckpointError, match="cannot read") as e:
      checkpoints.restore_params(1)
    assert "\n" not in str(e.value)
    with pytest.raises(checkpoint.CheckpointError, match="cannot read"):
      checkpoints.restore(1, jax.eval_shape(lambda: state))


@pytest.fixture
def copied(series, tmp_path):
  """The undamaged steps 2 and 4 of the series, to be damaged."""
  for step in ("2", "4"):
    source = series / "checkpoints" / step
    shutil.copytree(source, tmp_path / "checkpoints" / step)
  return tmp_path


def _swap(folder, item):
  """Exchanges an item of steps 2 and 4."""
  first, second = folder / "2" / item, folder / "4" / item
  first.rename(folder / "aside")
  second.rename(first)
  (folder / "aside").rename(second)


def _restore(workdir, step):
  with checkpoint.open_to_read(workdir) as checkpoints:
    checkpoints.restore(step, jax.eval_shape(lambda: _state(step)))


def test_an_undamaged_copy_restores(copied):
  _restore(copied, 4)


@pytest.mark.parametrize("item", ["params", "opt_state", "train", "checksums"])
def test_the_item_of_another_step_is_refused(copied, item):
  _swap(copied / "checkpoints", item)
  with pytest.raises(checkpoint.CheckpointError, match="step 4|step 2|changed"):
    _restore(copied, 4)


def test_a_renamed_step_is_refused(copied):
  (copied / "checkpoints" / "4").rename(copied / "checkpoints" / "3")
  with pytest.raises(checkpoint.CheckpointError, match="3: it .* of step 4;"):
    _restore(copied, 3)
  with pytest.raises(checkpoint.CheckpointError, match="of step 4"):
    checkpoint.load_checkpoint(copied)


def test_changed_json_is_refused(copied):
  (path,) = (copied / "checkpoints" / "4" / "data").glob("metadata")
  path.write_text(path.read_text().replace("ab", "ac"))
  with checkpoint.open_to_read(copied) as checkpoints:
    with pytest.raises(checkpoint.CheckpointError, match="data have changed"):
      checkpoints.restore_json(4, "data")


def test_the_best_is_not_lost_with_its_results(copied):
  shutil.rmtree(copied / "checkpoints" / "2" / "metrics")
  with checkpoint.open_to_read(copied) as checkpoints:
    with pytest.raises(
      checkpoint.CheckpointError, match="validation results .*2: .* changed"
    ):
      checkpoints.find("best")


def test_damaged_results_of_one_step_keep_no_other_from_being_read(copied):
  path = copied / "checkpoints" / "4" / "metrics"
  shutil.copytree(copied / "checkpoints" / "2" / "metrics", path)
  (path / "metrics").write_text('{"lo')
  with checkpoint.Checkpoints(copied, max_to_keep=1) as checkpoints:
    with pytest.raises(
      checkpoint.CheckpointError, match="results of .*4: .*--fallback .* step 2"
    ):
      checkpoints.metrics(4)
    checkpoints.restore_params(2)
    assert checkpoints.set_aside([4])[4].is_dir()
    assert checkpoints.steps() == [2]
    # The best of an earlier process is still known.
    for step in (5, 6):
      checkpoints.save(step, _state(step), records=_RECORDS)
  with checkpoint.open_to_read(copied) as checkpoints:
    assert checkpoints.steps() == [2, 6]


def test_processes_are_told_what_all_of_them_can_do(copied, monkeypatch):
  with checkpoint.open_to_read(copied) as checkpoints:
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    with pytest.raises(
      checkpoint.CheckpointError,
      match="/4: damaged; move that folder out of the workdir to .* step 2,",
    ):
      with checkpoints._reading(4):
        raise ValueError("damaged")
    monkeypatch.undo()


def test_where_no_checkpoints_can_lie_is_named(tmp_path):
  (tmp_path / "checkpoints").touch()
  for workdir, message in (
    (tmp_path, "checkpoints is a file; move it away or choose another"),
    (tmp_path / "\udcff", "arrays go to folders whose names are UTF-8"),
  ):
    with pytest.raises(checkpoint.CheckpointError, match=message):
      checkpoint.folder(workdir)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(
    checkpoint.CheckpointError, match="cannot write .* has 100 left"
  ):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, _state(1), records=_RECORDS)
  assert not list((tmp_path / "checkpoints").iterdir())
  with pytest.raises(
    checkpoint.WriteError, match="needs .* make room or choose"
  ):
    checkpoint.check_space(tmp_path, _state(1))


def test_a_bucket_that_takes_no_arrays_is_refused(monkeypatch):
  monkeypatch.setattr(
    checkpoint.storage.importlib.util, "find_spec", lambda _: True
  )
  with pytest.raises(checkpoint.CheckpointError, match="gs:// or to a file"):
    checkpoint.load_checkpoint("s3://bucket/run")


def test_an_unfinished_write_is_removed(tmp_path):
  with checkpoint.Checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
  assert not list((tmp_path / "checkpoints").iterdir())
