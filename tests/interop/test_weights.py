"""Files of weights: what is read, and what a hostile file cannot do."""

import collections
import json
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from longnet_jax import interop

_GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
_STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}


class _Global:
  """A name that the pickle asks for, and what it is called with."""

  def __init__(self, module, name, arguments):
    self.module, self.name, self.arguments = module, name, arguments


def _write_pth(path, content, entries=(), compression=zipfile.ZIP_STORED):
  """Writes what torch.save would: `content` holds arrays and _Globals."""
  data, storages = _pickle(content)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", data)
    for key, array in storages.items():
      archive.writestr(f"archive/data/{key}", array.tobytes())
    for name, text in entries:
      archive.writestr(f"archive/{name}", text)
  return path


def _pickle(content):
  """A protocol 2 pickle, opcode by opcode, and its storages."""
  out, storages = [b"\x80\x02"], {}

  def text(value):
    value = value.encode()
    out.append(b"X" + struct.pack("<I", len(value)) + value)

  def integers(values):
    out.append(b"(")
    for value in values:
      out.append(b"\x8a\x08" + struct.pack("<q", value))
    out.append(b"t")

  def name(module, attribute):
    out.append(f"c{module}\n{attribute}\n".encode())

  def put(value):
    if isinstance(value, dict):
      out.append(b"}(")
      for key, entry in value.items():
        text(key)
        put(entry)
      out.append(b"u")
    elif isinstance(value, str):
      text(value)
    elif isinstance(value, _Global):
      name(value.module, value.name)
      out.append(b"(")
      for argument in value.arguments:
        put(argument)
      out.append(b"tR")
    else:
      array, offset, shape, strides = value
      key = str(len(storages))
      storages[key] = array
      name("torch._utils", "_rebuild_tensor_v2")
      out.append(b"((")
      text("storage")
      name("torch", _STORAGES[array.dtype.name])
      text(key)
      text("cpu")
      out.append(b"\x8a\x08" + struct.pack("<q", array.size))
      out.append(b"tQ")
      out.append(b"\x8a\x08" + struct.pack("<q", offset))
      integers(shape)
      integers(strides)
      out.append(b"\x89")
      name("collections", "OrderedDict")
      out.append(b")RtR")

  put(content)
  return b"".join(out) + b".", storages


def _whole(array):
  strides = np.array(array.strides) // array.itemsize
  return array.reshape(-1), 0, array.shape, strides.tolist()


def test_reads_what_torch_wrote():
  state = interop.read_pth(_GOLDEN / "gigapath_small.pth")
  golden = np.load(_GOLDEN / "gigapath_small.npz")
  names = [name for name in golden.files if name.startswith("param/")]
  assert sorted(state) == sorted(name.removeprefix("param/") for name in names)
  for name in names:
    np.testing.assert_array_equal(
      state[name.removeprefix("param/")], golden[name]
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64])
def test_types_views_and_keys(tmp_path, dtype):
  array = np.arange(24).reshape(4, 6).astype(dtype)
  content = {
    "epoch": {"x": _whole(array + array.dtype.type(1))},
    "model": {
      "whole": _whole(array),
      "transposed": (array.reshape(-1), 0, (6, 4), (1, 6)),
      "part": (array.reshape(-1), 7, (2, 3), (6, 1)),
    },
    "args": _Global("argparse", "Namespace", ()),
  }
  path = _write_pth(tmp_path / "a.pth", content)
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
  "module, name",
  [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("subprocess", "Popen"),
    ("torch", "load"),
    ("collections", "namedtuple"),
  ],
)
def test_refuses_hostile_names_and_runs_nothing(tmp_path, module, name):
  mark = tmp_path / "mark"
  command = f"touch {mark}"
  if name in ("eval", "exec"):
    command = f"open({str(mark)!r}, 'w')"
  hostile = _Global(module, name, (command,))
  content = {"model": {"w": _whole(np.ones(2, np.float32))}, "x": hostile}
  path = _write_pth(tmp_path / "a.pth", content)
  with pytest.raises(ValueError, match=f"refused: its pickle names {module}."):
    interop.read_pth(path)
  assert not mark.exists()


class _Shell:
  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_refuses_what_pickle_itself_writes(tmp_path, protocol):
  mark = tmp_path / "mark"
  data = pickle.dumps({"model": _Shell(f"touch {mark}")}, protocol)
  path = tmp_path / "a.bin"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
  with pytest.raises(ValueError, match="nothing was executed"):
    interop.read_pth(path)
  assert not mark.exists()
  pickle.loads(data)  # the same bytes do run where they are not refused
  assert mark.exists()


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
  path = _write_pth(tmp_path / "a.pth", {"w": tensor})
  with pytest.raises(ValueError, match="a.pth is damaged"):
    interop.read_pth(path)


def test_refuses_damaged_files(tmp_path):
  path = tmp_path / "a.pth"
  path.write_bytes(b"no zip archive")
  with pytest.raises(ValueError, match="no zip archive; load it in PyTorch"):
    interop.read_pth(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/version", "3")
  with pytest.raises(ValueError, match="no data.pkl"):
    interop.read_pth(path)
  whole = {"w": _whole(np.ones(4, np.float32))}
  _write_pth(path, whole, [("byteorder", "big")])
  with pytest.raises(ValueError, match="big-endian"):
    interop.read_pth(path)
  _write_pth(path, whole, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="compressed entry"):
    interop.read_pth(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02r\xff\xff\xff\xff.")
  with pytest.raises(ValueError, match="damaged: memo index 4294967295"):
    interop.read_pth(path)
  _write_pth(path, {"lr": "0.1"})
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
