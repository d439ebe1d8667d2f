"""What zipfile leaves unchecked of an archive."""

import struct
import zipfile

_END = struct.Struct("<4s4H2LH")
_MANY = 0xFFFF  # of archives whose count stands elsewhere


def check_directory(archive: zipfile.ZipFile) -> None:
  """Raises ValueError where entries are missing of those that were written.

  In a damaged directory one entry can claim the bytes of those behind it.
  """
  archive.fp.seek(-_END.size - len(archive.comment), 2)
  count = _END.unpack(archive.fp.read(_END.size))[4]
  found = len(archive.infolist())
  if count not in (found, _MANY):
    raise ValueError(f"it says that it has {count} entries, and has {found}")
