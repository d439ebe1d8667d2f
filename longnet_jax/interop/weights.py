"""Reads files of weights without torch and without running their code.

A .pth file is a zip archive of a pickle and of raw storages; `pickles` says how
the pickle is read. What it says of tensors is believed only where they lie
inside their storages.
"""

import functools
import math
import os
import pathlib
from typing import Any
import zipfile

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

from longnet_jax import checked, storage
from longnet_jax.interop import pickles, zips

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
  with path.open("rb") as file:
    content = _load(file, path)
  return _find_state(content, key, path)


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the tensors in a .safetensors file."""
  try:
    return safetensors_numpy.load_file(path)
  except Exception as error:  # the library's own error derives from Exception
    if isinstance(error, OSError):
      raise
    raise checked.RefusedError(
      f"{path} is no safetensors file: {error}"
    ) from error


def read_sharded(
  path: str | os.PathLike, *, key: str | None = None
) -> dict[str, np.ndarray]:
  """Returns the tensors of all files that a .index.json file names.

  Args:
    path: such as model.safetensors.index.json, beside its .safetensors or torch
      files.
    key: see `read_pth`.

  Raises:
    ValueError: it is no such file, a name leads out of its folder, or a tensor
      is not in its file.
  """
  path = storage.path(path)
  try:
    files = dict(storage.read_json(path)["weight_map"])
    parts = {str(name): [] for name in files.values()}
  except (KeyError, TypeError, ValueError) as error:
    raise checked.RefusedError(
      f"{path} is no index of weights: it has no dictionary weight_map of names"
      " of tensors and files"
    ) from error
  for name, part in files.items():
    parts[str(part)].append(name)
  state = {}
  for part, names in parts.items():
    is_beside = part == pathlib.PurePath(part).name and part not in ("..", ".")
    if not (is_beside and storage.is_name(part)):
      raise checked.RefusedError(
        f"{path} names {checked.shown(part)}, which is no file beside it"
      )
    file = path.with_name(part)
    with storage.on_this_machine(file) as local:
      if local.suffix == ".safetensors":
        found = read_safetensors(local)
      else:
        found = read_pth(local, key=key)
    missing = sorted(set(names) - found.keys())
    if missing:
      raise checked.RefusedError(
        f"{file} has no tensor {missing[0]}, as {path} says"
      )
    state.update(found)
  return state


class _StorageType(pickles.Opaque):
  """Stands for torch.FloatStorage and its like: a dtype."""

  __slots__ = ()


class _Storage(pickles.Opaque):
  """A flat array."""

  __slots__ = ()


class _Tensor(pickles.Opaque):
  """An array."""

  __slots__ = ()


def _load(file, path):
  """Returns what the file holds, with _Tensors inside."""
  try:
    with zipfile.ZipFile(file) as archive:
      zips.check_directory(archive)
      return _Archive(archive, path).load()
  except checked.RefusedError:
    raise
  except zipfile.BadZipFile as error:
    raise checked.RefusedError(
      f"{path} is no zip archive, or a part of one; if PyTorch loads it, write"
      " it again with torch.save of version 1.6 or later"
    ) from error
  except Exception as error:  # what is damaged can raise anything
    reason = str(error)[:300] or type(error).__name__
    raise checked.RefusedError(f"{path} is damaged: {reason}") from error


class _Archive:
  """The pickle and the storages of a file."""

  def __init__(self, archive: zipfile.ZipFile, path: pathlib.Path):
    self._archive = archive
    self._path = path
    found = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(found) != 1:
      raise checked.RefusedError(
        f"{path} has {len(found) or 'no'} data.pkl: it is no file of torch.save"
      )
    # Entries that overlap would make a small file a large one.
    stored = sum(entry.compress_size for entry in archive.infolist())
    if stored > path.stat().st_size:
      raise checked.RefusedError(f"{path} is damaged: its entries overlap")
    self._pickle = found[0]
    self._folder = self._pickle.removesuffix("data.pkl")
    self._storages: dict[str, np.ndarray] = {}

  def load(self) -> Any:
    """Returns what the pickle describes, with _Tensors inside."""
    order = self._folder + "byteorder"
    if order in self._archive.namelist() and self._read(order) != b"little":
      raise checked.RefusedError(
        f"{self._path} was written on a big-endian machine; load it there and"
        " write it as .safetensors"
      )
    try:
      return pickles.load(
        self._read(self._pickle), _known_names(), self._storage
      )
    except pickles.RefusedNameError as error:
      raise checked.RefusedError(
        f"{self._path} is refused: its pickle names {error}, which is no"
        " tensor; nothing was executed. If you trust the file, load it in"
        " PyTorch and write its state dict alone with torch.save"
      ) from error

  def _storage(self, pid):
    """The flat array that a persistent id names."""
    kind, storage_type, key, _, count = pid
    if kind != "storage":
      raise ValueError("it names something outside that is no storage")
    dtype = pickles.reveal(storage_type, _StorageType)
    if key not in self._storages:
      data = self._read(f"{self._folder}data/{key}")
      if len(data) != count * dtype.itemsize:
        raise ValueError(
          f"storage {key} has {len(data)} bytes instead of"
          f" {count * dtype.itemsize}"
        )
      self._storages[key] = np.frombuffer(data, dtype)
    storage = self._storages[key]
    if storage.dtype != dtype:
      raise ValueError(f"storage {key} is both {storage.dtype} and {dtype}")
    return _Storage(storage)

  def _read(self, name):
    entry = self._archive.getinfo(name)
    # torch stores without compression, so sizes are honest.
    if entry.compress_type != zipfile.ZIP_STORED:
      raise checked.RefusedError(f"{self._path} has a compressed entry {name}")
    try:
      return self._archive.read(entry)
    except zipfile.BadZipFile as error:
      raise checked.RefusedError(f"{self._path} is damaged: {error}") from error


@functools.cache
def _known_names():
  """What the names in a pickle of tensors stand for."""
  names = {
    ("torch", name): _StorageType(np.dtype(kind))
    for name, kind in _TYPES.items()
  }
  functions = {
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
  }
  return names | {k: pickles.Function(f) for k, f in functions.items()}


def _size(sizes=()):
  if not all(type(size) is int for size in sizes):
    raise TypeError("a torch.Size of something else than integers")
  return tuple(sizes)


def _rebuild_tensor(
  storage, offset, shape, strides, grad=False, hooks=None, metadata=None
):
  """Returns a view of a storage, after checking that it lies inside."""
  # A plain array: a view, whose size says nothing of where it ends, is refused.
  storage = pickles.reveal(storage, _Storage)
  shape, strides = _size(shape), _size(strides)
  del grad, hooks
  if metadata:
    raise ValueError("a tensor is marked as conjugate or negative")
  smallest = min((offset, *shape, *strides), default=0)
  count = math.prod(shape)
  last = offset + sum(
    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
  )
  if smallest < 0 or count > storage.size or (count and last >= storage.size):
    raise ValueError(
      f"a tensor of shape {shape}, strides {strides} and offset {offset} is not"
      f" inside its {storage.size} numbers or repeats them"
    )
  step = storage.itemsize
  view = np.lib.stride_tricks.as_strided(
    storage[offset:],
    shape,
    [stride * step for stride in strides],
    writeable=False,
  )
  return _Tensor(view)


def _find_state(content, key, path):
  """Returns the dictionary of arrays in what a file holds."""
  if key is not None:
    if not isinstance(content, dict) or key not in content:
      raise checked.RefusedError(
        f"{path} has no key {key!r}; {_described(content)}"
      )
    content = dict.get(content, key)
  elif isinstance(content, dict) and not _is_state(content):
    found = [k for k in _STATE_KEYS if _is_state(dict.get(content, k))]
    if not found:
      raise checked.RefusedError(
        f"{path} holds no state dict; {_described(content)}"
      )
    content = dict.get(content, found[0])
  if not _is_state(content):
    raise checked.RefusedError(
      f"{path} holds no state dict; {_described(content)}"
    )
  return {k: pickles.reveal(x, _Tensor) for k, x in dict.items(content)}


def _is_state(content):
  # dict.items, because a pickle may put an attribute in front of a method.
  return (
    isinstance(content, dict)
    and bool(content)
    and all(
      isinstance(name, str) and isinstance(x, _Tensor)
      for name, x in dict.items(content)
    )
  )


def _described(content):
  if isinstance(content, dict):
    keys = ", ".join(str(key)[:100] for key in list(dict.keys(content))[:10])
    return f"its keys are {keys}" if keys else "it is empty"
  return f"it holds a {type(content).__name__}"
