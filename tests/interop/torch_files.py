"""Files as torch.save writes them, and files as it never would."""

import struct
import zipfile

import numpy as np

_STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}


class Global:
  """A name that the pickle asks for, and what it is called with."""

  def __init__(self, module, name, arguments):
    self.module, self.name, self.arguments = module, name, arguments


def write(path, content, entries=(), compression=zipfile.ZIP_STORED):
  """Writes what torch.save would: `content` holds arrays and Globals."""
  data, storages = make_pickle(content)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", data)
    for key, array in storages.items():
      archive.writestr(f"archive/data/{key}", array.tobytes())
    for name, entry in entries:
      archive.writestr(f"archive/{name}", entry)
  return path


def make_pickle(content):
  """A protocol 2 pickle, opcode by opcode, and its storages."""
  out, storages = [b"\x80\x02"], {}

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
        out.append(text(key))
        put(entry)
      out.append(b"u")
    elif isinstance(value, str):
      out.append(text(value))
    elif isinstance(value, Global):
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
      out.append(text("storage"))
      name("torch", _STORAGES[array.dtype.name])
      out.append(text(key) + text("cpu"))
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


def whole(array):
  """A tensor that is all of its storage."""
  strides = np.array(array.strides) // array.itemsize
  return array.reshape(-1), 0, array.shape, strides.tolist()


def write_raw(path, data, storages=()):
  """Writes a file with this pickle and these storages."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", data)
    for key, array in dict(storages).items():
      archive.writestr(f"archive/data/{key}", array.tobytes())
  return path


def text(value):
  """The instruction that pushes a string."""
  return b"X" + struct.pack("<I", len(value)) + value.encode()
