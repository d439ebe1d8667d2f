"""What a hostile pickle cannot do."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from longnet_jax import interop
from tests.interop import torch_files


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
  hostile = torch_files.Global(module, name, (command,))
  content = {
    "model": {"w": torch_files.whole(np.ones(2, np.float32))},
    "x": hostile,
  }
  path = torch_files.write(tmp_path / "a.pth", content)
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


def _set(attribute):
  """The instruction that sets an attribute of what was made last."""
  return b"(N}" + torch_files.text(attribute) + b"K\x08K\x04\x86stb"


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
  whole = torch_files.whole(np.ones((2, 2), np.float32))
  data, storages = torch_files.make_pickle({"w": whole})
  good = interop.read_pth(
    torch_files.write_raw(tmp_path / "good.pth", data, storages)
  )
  if made == b"tensor":
    made = torch_files.make_pickle(whole)[0][2:-1]
  hostile = (
    b"\x80\x02}" + torch_files.text("w") + made + _set(attribute) + b"s."
  )
  with pytest.raises(ValueError, match=f"is damaged: .*{attribute}"):
    interop.read_pth(
      torch_files.write_raw(tmp_path / "bad.pth", hostile, storages)
    )
  again = interop.read_pth(tmp_path / "good.pth")
  np.testing.assert_array_equal(again["w"], good["w"])


def test_a_view_is_no_storage(tmp_path):
  # The view has as many entries as the storage and ends before it does.
  view = (np.ones(4, np.float32), 3, (2, 2), (0, 0))
  tensor, storages = torch_files.make_pickle(view)
  hostile = b"".join(
    [
      b"\x80\x02}",
      torch_files.text("w"),
      b"ctorch._utils\n_rebuild_tensor_v2\n(",
      tensor[2:-1],
      b"K\x00K\x04\x85K\x01\x85\x89}tRs.",
    ]
  )
  with pytest.raises(ValueError, match="a _Tensor where a _Storage belongs"):
    interop.read_pth(
      torch_files.write_raw(tmp_path / "a.pth", hostile, storages)
    )


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
      + torch_files.text("items")
      + _PARAMETER
      + b"stb.",
      "no state dict; it is empty",
    ),
    (
      b"}" + torch_files.text("w") + b"K\x01s.",
      "no state dict; its keys are w",
    ),
    (b"(U\x04fileK\x01K\x02K\x03K\x04tQ.", "no storage"),
    (
      b"(" + torch_files.text("storage") + b"K\x01K\x02K\x03K\x04tQ.",
      "a int where a _StorageType",
    ),
  ],
)
def test_refuses_hostile_instructions(tmp_path, data, message):
  path = torch_files.write_raw(tmp_path / "a.pth", b"\x80\x04" + data)
  with pytest.raises(ValueError, match=message):
    interop.read_pth(path)
