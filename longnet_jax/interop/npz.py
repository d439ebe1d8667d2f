"""Reads .npz files of plain arrays that may be damaged or made to harm.

What a header claims is believed only where the bytes are there: neither a
number of elements nor a compressed entry can ask for more memory than its file
can fill.
"""

import math
import os
import pathlib
import warnings
import zipfile

import numpy as np

from longnet_jax import checked
from longnet_jax.interop import zips

# Deflate makes at most 1032 bytes of one.
_LARGEST_RATIO = 1032
_HDF5 = b"\x89HDF\r\n\x1a\n"
_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the arrays in an .npz file by name.

  Raises:
    RefusedError: one line; the file is no such file, is damaged, or has objects
      or an array larger than its bytes.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    start = file.read(len(_HDF5))
    file.seek(0)
    if start == _HDF5:
      raise checked.RefusedError(
        f"{path} is an HDF5 file and no .npz file of plain arrays; write its"
        " arrays with np.savez, tile embeddings as tiles (often called"
        " features there) and upper left corners as coords"
      )
    try:
      with zipfile.ZipFile(file) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that old versions wrote
        return _arrays(archive, path.stat().st_size)
    except Exception as error:  # what is damaged can raise anything
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise checked.RefusedError(
        f"{path} is no .npz file of plain arrays: {reason}"
      ) from error


def _arrays(archive, file_size):
  zips.check_directory(archive)
  entries = archive.infolist()
  # Entries that overlap would make a small file a large one.
  if sum(entry.compress_size for entry in entries) > file_size:
    raise ValueError("its entries overlap")
  if not entries:
    raise ValueError("it has no arrays")
  for entry in entries:  # NumPy writes no others: its name is damaged
    if not entry.filename.endswith(".npy"):
      raise ValueError(f"its entry {entry.filename!r} is no array")
  return {
    entry.filename.removesuffix(".npy"): _array(archive, entry)
    for entry in entries
  }


def _array(archive, entry):
  if entry.file_size > _LARGEST_RATIO * entry.compress_size:
    raise ValueError(f"{entry.filename} claims more bytes than it can hold")
  with archive.open(entry) as stream:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
      raise ValueError(f"{entry.filename} has version {version}")
    shape, is_fortran, dtype = _HEADERS[version](stream)
    if dtype.hasobject or dtype.kind == "V":
      raise ValueError(f"{entry.filename} has type {dtype}")
    expected = math.prod(shape) * dtype.itemsize
    left = entry.file_size - stream.tell()
    if left != expected:
      raise ValueError(
        f"{entry.filename} has {left} bytes, its shape {shape} needs {expected}"
      )
    data = bytearray(stream.read())  # to the end, where the checksum is
  array = np.frombuffer(data, dtype)
  return array.reshape(shape, order="F" if is_fortran else "C")
