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


def _raw(path, data, storages=()):
  """Writes a file with this pickle and these storages."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    for key, array in dict(storages).items():
      archive.writestr(f"archive/data/{key}", array.tobytes())
  return path


def _text(value):
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def _set(attribute):
  """The instruction that sets an attribute of what was made last."""
  return b"(N}" + _text(attribute) + b"K\x08K\x04\x86stb"


_PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
_NAMESPACE = b"cargparse\nNamespace\n"


@pytest.mark.parametrize(
  "made, attribute",
  [
    (_PARAMETER, "__defaults__"),
    (_PARAMETER, "__class__"),
    (_NAMESPACE, "__setstate__"),
    (b"ctorch\nSize\n", "_value"),
    (b"ctorch\nFloatStorage\n", "_value"),
    (b"ccollections\nOrderedDict\n", "__init__"),
    (b"tensor", "strides"),
    (b"tensor", "_value"),
  ],
)
def test_nothing_of_this_process_can_be_changed(tmp_path, made, attribute):
  whole = _whole(np.ones((2, 2), np.float32))
  data, storages = _pickle({"w": whole})
  good = interop.read_pth(_raw(tmp_path / "good.pth", data, storages))
  if made == b"tensor":
    made = _pickle(whole)[0][2:-1]
  hostile = b"\x80\x02}" + _text("w") + made + _set(attribute) + b"s."
  with pytest.raises(ValueError, match=f"is damaged: .*{attribute}"):
    interop.read_pth(_raw(tmp_path / "bad.pth", hostile, storages))
  again = interop.read_pth(tmp_path / "good.pth")
  np.testing.assert_array_equal(again["w"], good["w"])


def test_a_view_is_no_storage(tmp_path):
  # The view has as many entries as the storage and ends before it does.
  view = (np.ones(4, np.float32), 3, (2, 2), (0, 0))
  tensor, storages = _pickle(view)
  hostile = b"".join(
    [
      b"\x80\x02}",
      _text("w"),
      b"ctorch._utils\n_rebuild_tensor_v2\n(",
      tensor[2:-1],
      b"K\x00K\x04\x85K\x01\x85\x89}tRs.",
    ]
  )
  with pytest.raises(ValueError, match="a _Tensor where a _Storage belongs"):
    interop.read_pth(_raw(tmp_path / "a.pth", hostile, storages))


@pytest.mark.parametrize(
  "data, message",
  [
    # Hashing a tuple recurses through all that is in it.
    (b"}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "nests a tuple"),
    (b"}" + b")" + b"2\x86" * 60 + b"K\x01s.", "nests a tuple"),
    (b"}" + b"ctorch\nSize\n])a\x85R" + b"K\x01s.", "else than integers"),
    (b"\x82\x01.", "the instruction EXT1"),
    (b"\x8e" + b"\xff" * 7 + b"\x00.", "is damaged"),
    (b"r\xff\xff\xff\xff.", "is damaged"),
    (b"X\xff\xff\xff\x7f.", "is damaged"),
    (b"", "is damaged"),
    (b"\x8c\x02os\x8c\x07sys\ntem\x93.", r"names os.sys\\ntem"),
    # An attribute in front of a method of the dictionary.
    (
      b"ccollections\nOrderedDict\n)R"
      + b"(N}"
      + _text("items")
      + _PARAMETER
      + b"stb.",
      "no state dict; it is empty",
    ),
    (b"}" + _text("w") + b"K\x01s.", "no state dict; its keys are w"),
    (b"(U\x04fileK\x01K\x02K\x03K\x04tQ.", "no storage"),
    (
      b"(" + _text("storage") + b"K\x01K\x02K\x03K\x04tQ.",
      "a int where a _StorageType",
    ),
  ],
)
def test_refuses_hostile_instructions(tmp_path, data, message):
  path = _raw(tmp_path / "a.pth", b"\x80\x04" + data)
  with pytest.raises(ValueError, match=message):
    interop.read_pth(path)


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
  single, storages = _pickle(whole["w"])
  single = single[2:-1]
  double = single.replace(b"FloatStorage", b"IntStorage")
  data = b"(" + _text("a") + single + _text("b") + double + b"u."
  _raw(path, b"\x80\x02}" + data, storages)
  with pytest.raises(ValueError, match="storage 0 is both float32 and int32"):
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
