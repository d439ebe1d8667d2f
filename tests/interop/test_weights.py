"""Files of weights: what is read, and what is damaged."""

import collections
import json
import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from longnet_jax import checked, interop
from tests.interop import torch_files

_GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def test_reads_what_torch_wrote():
  state = interop.read_pth(_GOLDEN / "gigapath_small.pth")
  with np.load(_GOLDEN / "gigapath_small.npz") as golden:
    given = {
      name.removeprefix("param/"): array
      for name, array in golden.items()
      if name.startswith("param/")
    }
  assert state.keys() == given.keys()
  for name, array in given.items():
    np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64])
def test_types_views_and_keys(tmp_path, dtype):
  array = np.arange(24).reshape(4, 6).astype(dtype)
  content = {
    "epoch": {"x": torch_files.whole(array + array.dtype.type(1))},
    "model": {
      "whole": torch_files.whole(array),
      "transposed": (array.reshape(-1), 0, (6, 4), (1, 6)),
      "part": (array.reshape(-1), 7, (2, 3), (6, 1)),
    },
    "args": torch_files.Global("argparse", "Namespace", ()),
  }
  path = torch_files.write(tmp_path / "a.pth", content)
  state = interop.read_pth(path)
  assert state["whole"].dtype == dtype
  np.testing.assert_array_equal(state["whole"], array)
  np.testing.assert_array_equal(state["transposed"], array.T)
  np.testing.assert_array_equal(state["part"], array[1:3, 1:4])
  other = interop.read_pth(path, key="epoch")
  np.testing.assert_array_equal(other["x"], array + array.dtype.type(1))
  with pytest.raises(ValueError, match="no key 'ema'; its keys are epoch, mod"):
    interop.read_pth(path, key="ema")


@pytest.mark.parametrize(
  "tensor",
  [
    (np.ones(4, np.float32), 0, (5,), (1,)),
    (np.ones(4, np.float32), 3, (2,), (1,)),
    (np.ones(4, np.float32), 3, (2,), (-1,)),
    (np.ones(4, np.float32), 0, (10**9,), (0,)),
    (np.ones(4, np.float32), -1, (2,), (1,)),
    (np.ones(4, np.float32), 0, (2, 2), (1,)),
  ],
)
def test_refuses_tensors_outside_their_storage(tmp_path, tensor):
  path = torch_files.write(tmp_path / "a.pth", {"w": tensor})
  with pytest.raises(ValueError, match="a.pth is damaged"):
    interop.read_pth(path)


def test_refuses_damaged_files(tmp_path):
  path = tmp_path / "a.pth"
  path.write_bytes(b"no zip archive")
  with pytest.raises(
    ValueError, match="no zip archive, or a part of one; if PyTorch"
  ):
    interop.read_pth(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/version", "3")
  with pytest.raises(ValueError, match="no data.pkl"):
    interop.read_pth(path)
  path.write_bytes(b"")
  with pytest.raises(ValueError, match="no zip archive, or a part of one"):
    interop.read_pth(path)
  whole = {"w": torch_files.whole(np.ones(4, np.float32))}
  torch_files.write(path, whole, [("byteorder", "big")])
  with pytest.raises(ValueError, match="big-endian"):
    interop.read_pth(path)
  torch_files.write(path, whole, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="compressed entry"):
    interop.read_pth(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02r\xff\xff\xff\xff.")
  with pytest.raises(ValueError, match="damaged: memo index 4294967295"):
    interop.read_pth(path)
  single, storages = torch_files.make_pickle(whole["w"])
  single = single[2:-1]
  double = single.replace(b"FloatStorage", b"IntStorage")
  data = (
    b"("
    + torch_files.text("a")
    + single
    + torch_files.text("b")
    + double
    + b"u."
  )
  torch_files.write_raw(path, b"\x80\x02}" + data, storages)
  with pytest.raises(ValueError, match="storage 0 is both float32 and int32"):
    interop.read_pth(path)
  torch_files.write(path, {"lr": "0.1"})
  with pytest.raises(ValueError, match="no state dict; its keys are lr"):
    interop.read_pth(path)


def test_safetensors_by_their_own_library(tmp_path):
  state = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
  path = tmp_path / "a.safetensors"
  safetensors_numpy.save_file(state, path)
  found = interop.read_safetensors(path)
  np.testing.assert_array_equal(found["w"], state["w"])
  path.write_bytes(json.dumps(collections.OrderedDict()).encode())
  with pytest.raises(ValueError, match="is no safetensors file"):
    interop.read_safetensors(path)


def test_damage_anywhere_is_one_kind_of_error(tmp_path):
  whole = (_GOLDEN / "gigapath_small.pth").read_bytes()
  path, rng = tmp_path / "a.pth", np.random.default_rng(0)
  for i in range(60):
    data = bytearray(whole)
    if i % 3 == 0:
      data = data[: rng.integers(len(data))]
    for _ in range(3):
      # The directory, which has no checksum, is at the end.
      place = len(data) - 1 - rng.integers(min(len(data), 4000))
      data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
      interop.read_pth(path)
    except ValueError as error:
      assert str(path) in str(error)


def _sharded(folder, parts):
  """Writes safetensors files and their index, which it returns."""
  for part, state in parts.items():
    safetensors_numpy.save_file(state, folder / part)
  index = folder / "model.safetensors.index.json"
  names = {name: part for part, state in parts.items() for name in state}
  index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
  return index


def test_shards_are_read_by_their_index(tmp_path):
  parts = {
    f"model-0000{i}-of-00002.safetensors": {
      name: np.full(3, i, np.float32) for name in names
    }
    for i, names in ((1, "ab"), (2, "c"))
  }
  index = _sharded(tmp_path, parts)
  found = interop.read_sharded(index)
  assert {name: x[0] for name, x in found.items()} == {"a": 1, "b": 1, "c": 2}
  torch_files.write(
    tmp_path / "a.bin", {"w": torch_files.whole(np.ones(4, np.float32))}
  )
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text('{"weight_map": {"w": "a.bin"}}')
  np.testing.assert_array_equal(interop.read_sharded(index)["w"], np.ones(4))


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "is no index of weights"),
    ("[1]", "is no index of weights"),
    ('{"weight_map": 3}', "is no index of weights"),
    ('{"weight_map": "ab"}', "is no index of weights"),
    ("[" * 100_000, "is no index of weights"),
    (
      '{"weight_map": {"w": "../a.bin"}}',
      "'../a.bin', which is no file beside",
    ),
    ('{"weight_map": {"w": ""}}', "'', which is no file beside"),
    (r'{"weight_map": {"w": "a.bin\u0000"}}', "00', which is no file beside"),
    (r'{"weight_map": {"w": "\ud800"}}', "ud800', which is no file beside"),
    ('{"weight_map": {"w": "/a.bin"}}', "'/a.bin', which is no file beside"),
    ('{"weight_map": {"w": 3}}', "'3', which is no file beside|/3"),
    ('{"weight_map": {"v": "a.safetensors"}}', "a.safetensors has no tensor v"),
  ],
)
def test_an_index_that_misleads_is_refused(tmp_path, text, message):
  index = _sharded(tmp_path, {"a.safetensors": {"w": np.ones(1, np.float32)}})
  index.write_text(text)
  with pytest.raises((checked.RefusedError, FileNotFoundError), match=message):
    interop.read_sharded(index)
