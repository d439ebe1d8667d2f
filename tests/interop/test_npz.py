"""Arrays in files, and files that are none."""

import io
import warnings
import zipfile

import numpy as np
import pytest

from longnet_jax import checked
from longnet_jax.interop import npz


def _write(path, content, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, data in content.items():
      archive.writestr(f"{name}.npy", data)


def _npy(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_wrote(tmp_path, save):
  arrays = {
    "a": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "none": np.zeros((0, 4), np.float16),
    "text": np.array("{}"),
    "zeros": np.zeros(10**6, np.float32),
  }
  save(tmp_path / "a.npz", **arrays)
  found = npz.read(tmp_path / "a.npz")
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array)
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert found[name].flags.writeable


@pytest.mark.parametrize("kind", ["text", "truncated", "one array", "objects"])
def test_refuses_other_files(tmp_path, kind):
  path = tmp_path / "a.npz"
  if kind == "text":
    path.write_text("no arrays")
  elif kind == "truncated":
    np.savez(path, w=np.ones(100))
    path.write_bytes(path.read_bytes()[:300])
    assert not zipfile.is_zipfile(path)
  elif kind == "one array":
    with path.open("wb") as file:
      np.save(file, np.ones(3))
  else:
    np.savez(path, w=np.array([{}], object))
  with pytest.raises(
    checked.RefusedError, match="a.npz is no .npz file of plain arrays"
  ):
    npz.read(path)


def test_an_empty_archive_is_refused(tmp_path):
  np.savez(tmp_path / "a.npz")
  with pytest.raises(checked.RefusedError, match="it has no arrays"):
    npz.read(tmp_path / "a.npz")


def test_helps_with_the_usual_other_format(tmp_path):
  path = tmp_path / "slide.h5"
  path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
  with pytest.raises(
    checked.RefusedError, match="is an HDF5 file and no .npz file"
  ):
    npz.read(path)


def test_a_header_cannot_ask_for_memory(tmp_path):
  path = tmp_path / "a.npz"
  honest = _npy(np.zeros(100))
  claim = honest.replace(
    b"(100,), }" + b" " * 10, b"(1000000000000,), }"[:19], 1
  )
  assert claim != honest and len(claim) == len(honest)
  _write(path, {"w": claim})
  with pytest.raises(
    checked.RefusedError, match=r"its shape \(1000000000000,\) needs"
  ):
    npz.read(path)
  # A directory that claims more than deflate can make of so few bytes.
  _write(path, {"w": honest}, zipfile.ZIP_DEFLATED)
  data = path.read_bytes()
  size = len(honest).to_bytes(4, "little")
  path.write_bytes(data.replace(size, (2**31).to_bytes(4, "little")))
  with pytest.raises(
    checked.RefusedError, match="claims more bytes than it can hold"
  ):
    npz.read(path)


def test_damage_anywhere_is_one_line(tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / "a.npz"
  arrays = {"tiles": rng.normal(size=(3, 4)), "coords": np.arange(6)}
  outcomes = set()
  for save in (np.savez, np.savez_compressed):
    save(path, **arrays)
    whole = path.read_bytes()
    for i in range(150):
      data = bytearray(whole)
      if i % 3 == 0:
        data = data[: rng.integers(len(data))]
      for _ in range(1 + i % 2):
        if data:
          data[rng.integers(len(data))] = rng.integers(256)
      path.write_bytes(data)
      try:
        with warnings.catch_warnings():
          warnings.simplefilter("error")
          npz.read(path)
        outcomes.add("read")
      except ValueError as error:
        assert str(error).startswith(f"{path} is no .npz file")
        assert "\n" not in str(error)
        outcomes.add("refused")
  assert outcomes == {"read", "refused"}


def test_a_damaged_name_is_no_array_less(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, w=np.ones(3), x=np.ones(3))
  data = path.read_bytes()
  place = data.rindex(b"x.npy")  # in the directory at the end
  path.write_bytes(data[:place] + b"x.nqy" + data[place + 5 :])
  with pytest.raises(checked.RefusedError, match="its entry 'x.nqy' is no arr"):
    npz.read(path)


def test_an_entry_cannot_hide_those_behind_it(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, a=np.ones(3), b=np.zeros(3), c=np.ones(2))
  content = bytearray(path.read_bytes())
  first = content.index(b"PK\1\2")  # in the directory
  second = content.index(b"PK\1\2", first + 1)
  third = content.index(b"PK\1\2", second + 1)
  content[first + 32] = third - second  # bytes of a comment: all of b
  path.write_bytes(content)
  with zipfile.ZipFile(path) as archive:
    assert archive.namelist() == ["a.npy", "c.npy"]
  with pytest.raises(checked.RefusedError, match="has 3 entries, and has 2"):
    npz.read(path)
