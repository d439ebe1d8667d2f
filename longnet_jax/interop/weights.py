"""Reads files of weights without torch and without running their code.

A .pth file is a zip archive of a pickle and of raw storages. The pickle is
read by an unpickler that knows a handful of harmless names; any other name is
refused before it is looked up.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import pickletools
from typing import Any, NamedTuple
import zipfile

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

_TYPES = {
  "FloatStorage": np.float32,
  "DoubleStorage": np.float64,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# Keys under which training programs put a model's state, best first.
_STATE_KEYS = ("model", "state_dict", "module", "teacher")


def read_pth(
  path: str | os.PathLike, *, key: str | None = None
) -> dict[str, np.ndarray]:
  """Returns the state dict in a torch .pth, .pt or .bin file.

  Args:
    path: a file that torch.save of PyTorch 1.6 or later wrote.
    key: where the state is in a dictionary of several things; by default the
      whole file, or else its "model", "state_dict", "module" or "teacher".

  Raises:
    ValueError: the file is no such file, is damaged, or its pickle names
      anything but tensors; nothing of it is executed.
  """
  path = pathlib.Path(path)
  try:
    with zipfile.ZipFile(path) as archive:
      content = _Archive(archive, path).load()
  except zipfile.BadZipFile as error:
    raise ValueError(
      f"{path} is no zip archive; load it in PyTorch 1.6 or later and write it"
      " again with torch.save"
    ) from error
  return _find_state(content, key, path)


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the tensors in a .safetensors file."""
  try:
    return safetensors_numpy.load_file(path)
  except Exception as error:  # the library's own error derives from Exception
    if isinstance(error, OSError):
      raise
    raise ValueError(f"{path} is no safetensors file: {error}") from error


class _RefusedError(ValueError):
  """A file that is not read, and why."""


class _StorageType(NamedTuple):
  """Stands for torch.FloatStorage and its like."""

  dtype: np.dtype


class _Namespace:
  """Stands for argparse.Namespace, the arguments that training was given."""


class _Archive:
  """The pickle and the storages of a file."""

  def __init__(self, archive: zipfile.ZipFile, path: pathlib.Path):
    self._archive = archive
    self._path = path
    pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise _RefusedError(
        f"{path} has no data.pkl: it is no file of torch.save"
      )
    self._pickle = pickles[0]
    self._folder = self._pickle.removesuffix("data.pkl")
    self._storages: dict[str, np.ndarray] = {}

  def load(self) -> Any:
    """Returns what the pickle describes, tensors as NumPy arrays."""
    order = self._folder + "byteorder"
    if order in self._archive.namelist() and self._read(order) != b"little":
      raise _RefusedError(f"{self._path} was written on a big-endian machine")
    data = self._read(self._pickle)
    try:
      _check_memo(data)
      return _Unpickler(io.BytesIO(data), self).load()
    except _RefusedError:
      raise
    except Exception as error:  # a damaged pickle can raise anything
      raise _RefusedError(f"{self._path} is damaged: {error}") from error

  def storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
    """The flat array of a storage."""
    if key not in self._storages:
      data = self._read(f"{self._folder}data/{key}")
      if len(data) != count * dtype.itemsize:
        raise _RefusedError(
          f"{self._path} is damaged: storage {key} has {len(data)} bytes"
          f" instead of {count * dtype.itemsize}"
        )
      self._storages[key] = np.frombuffer(data, dtype)
    return self._storages[key]

  def refuse(self, name: str):
    """Raises for a name that no state dict needs."""
    raise _RefusedError(
      f"{self._path} is refused: its pickle names {name}, which is no tensor;"
      " nothing was executed"
    )

  def _read(self, name):
    try:
      entry = self._archive.getinfo(name)
      # torch stores without compression, so sizes are honest.
      if entry.compress_type != zipfile.ZIP_STORED:
        raise _RefusedError(f"{self._path} has a compressed entry {name}")
      return self._archive.read(entry)
    except (KeyError, zipfile.BadZipFile) as error:
      raise _RefusedError(f"{self._path} is damaged: {error}") from error


class _Unpickler(pickle.Unpickler):
  """Builds tensors and containers of them, and nothing else."""

  def __init__(self, file, archive: _Archive):
    super().__init__(file, encoding="utf-8")
    self._archive = archive

  def find_class(self, module: str, name: str) -> Any:
    """Returns our stand-in for a listed name; imports nothing."""
    if module == "torch" and name in _TYPES:
      return _StorageType(np.dtype(_TYPES[name]))
    known = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch", "Size"): tuple,
      ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
      ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
      ("argparse", "Namespace"): _Namespace,
    }
    if (module, name) not in known:
      self._archive.refuse(f"{module}.{name}")
    return known[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    """Returns a storage."""
    kind, storage_type, key, _, count = pid
    if kind != "storage" or not isinstance(storage_type, _StorageType):
      self._archive.refuse(str(kind))
    return self._archive.storage(key, storage_type.dtype, count)


def _rebuild_tensor(storage, offset, shape, strides, *_):
  """Returns a view of a storage, after checking that it lies inside."""
  smallest = min((offset, *shape, *strides), default=0)
  count = math.prod(shape)
  last = offset + sum(
    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
  )
  if smallest < 0 or count > storage.size or (count and last >= storage.size):
    raise ValueError(
      f"a tensor of shape {shape}, strides {strides} and offset {offset} is not"
      f" inside its {storage.size} numbers"
    )
  step = storage.itemsize
  return np.lib.stride_tricks.as_strided(
    storage[offset:],
    shape,
    [stride * step for stride in strides],
    writeable=False,
  )


def _check_memo(data):
  """Raises if a memo index, which unpicklers allocate up to, is absurd."""
  for opcode, argument, _ in pickletools.genops(data):
    if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
      raise ValueError(f"memo index {argument} in {len(data)} bytes")


def _rebuild_parameter(data, *_):
  return data


def _find_state(content, key, path):
  """Returns the dictionary of arrays in what a file holds."""
  if key is not None:
    if not isinstance(content, dict) or key not in content:
      raise ValueError(f"{path} has no key {key!r}; {_described(content)}")
    content = content[key]
  elif isinstance(content, dict) and not _is_state(content):
    found = [k for k in _STATE_KEYS if _is_state(content.get(k))]
    if not found:
      raise ValueError(f"{path} holds no state dict; {_described(content)}")
    content = content[found[0]]
  if not _is_state(content):
    raise ValueError(f"{path} holds no state dict; {_described(content)}")
  return dict(content)


def _is_state(content):
  return (
    isinstance(content, dict)
    and bool(content)
    and all(isinstance(x, np.ndarray) for x in content.values())
  )


def _described(content):
  if isinstance(content, dict):
    return f"its keys are {', '.join(map(str, list(content)[:10]))}"
  return f"it holds a {type(content).__name__}"
