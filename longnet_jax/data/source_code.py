"""A tfds dataset made of the files of a folder, named by their content."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import logging
import os
import pathlib
import shutil
import sys
import sysconfig

import tensorflow_datasets as tfds

from longnet_jax import checked, storage
from longnet_jax.data import cache, mirror, records
from longnet_jax.data import config as config_lib


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file as the scan saw it; `path` is relative, with forward slashes."""

  path: str
  digest: str
  is_blank: bool


@dataclasses.dataclass(frozen=True)
class Document:
  """Files that are read as one text."""

  name: str
  files: tuple[SourceFile, ...]

  @property
  def digest(self) -> str:
    """Hash of the contents, whatever the names."""
    return _hash(file.digest for file in self.files)


@dataclasses.dataclass
class SourceCodeConfig(tfds.core.BuilderConfig):
  """Which documents of a folder go into which split."""

  folder: str = ""
  splits: dict[str, list[Document]] = dataclasses.field(
    default_factory=dict, repr=False
  )


class SourceCode(tfds.core.GeneratorBasedBuilder):
  """Source files as documents; `builder(config)` makes an instance."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Source files of a folder, split by content.",
      features=tfds.features.FeaturesDict(
        {"path": tfds.features.Text(), "text": tfds.features.Text()}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {
      split: self._generate_examples(documents)
      for split, documents in self.builder_config.splits.items()
    }

  def _generate_examples(self, documents):
    folder = storage.path(self.builder_config.folder)
    for document in documents:
      text = _joined(_read(folder, file) for file in document.files)
      name = os.fsencode(document.name)
      yield name, {"path": name, "text": text}


def builder(config: config_lib.DataConfig) -> tfds.core.DatasetBuilder:
  """The dataset of `config.folder`, built now unless it was before.

  Its name holds a hash of every name and byte, so another folder or a changed
  file is another dataset. Raises ValueError for a folder without usable files.
  """
  folder = config.folder or sysconfig.get_path("stdlib")
  files = scan(folder, config.include, config.exclude)
  documents = group(files, config.level)
  held_out = (config.validation_fraction, config.test_fraction)
  content = _hash([*(f"{f.path} {f.digest}" for f in files), repr(held_out)])
  settings = SourceCodeConfig(
    name=f"{config.level}-{content[:16]}",
    version=SourceCode.VERSION,
    description=f"{len(documents)} documents at {config.level} level",
    folder=folder,
    splits=split_documents(documents, *held_out),
  )
  data_dir = cache.data_root(config)
  path = data_dir / SourceCode.name / settings.name / str(SourceCode.VERSION)
  if not path.exists():
    _build(settings, path, data_dir)
  return records.open_builder(path)


def scan(
  folder: str, include: Sequence[str], exclude: Sequence[str]
) -> list[SourceFile]:
  """Files below `folder` in path order whose name matches `include`.

  A file or folder whose name matches `exclude` is left out; so are empty
  files, which have nothing to read, and links to folders, which may lead in a
  circle or to the same files twice: a line on stderr says so.
  """
  root = storage.path(folder)
  if not storage.is_dir(root):
    raise checked.RefusedError(
      f"folder is {folder!r}; it must be an existing folder"
    )
  files, links = [], []
  for path in _walk(root, include, exclude, links):
    content = storage.read(path)
    name = path.relative_to(root).as_posix()
    if b"\0" in content:
      raise checked.RefusedError(
        f"{name!r} in folder {folder!r} is a binary file (zero byte at "
        f"{content.index(0)}); add {path.name!r} to exclude, or narrow include"
      )
    if content:
      blank = not content.strip()
      files.append(SourceFile(name, _digest(content), blank))
  left_out = ""
  if links:
    left_out = (
      f"{len(links)} links to folders are left out, the first is "
      f"{os.fspath(links[0])!r}"
    )
  if not files:
    raise checked.RefusedError(
      f"folder {folder!r} holds no file that is not empty and matches include "
      f"{tuple(include)}; choose another folder or pattern, such as ('*.c',)"
      + (f" ({left_out})" if left_out else "")
    )
  if left_out:
    print(f"folder {folder!r}: {left_out}", file=sys.stderr, flush=True)
  return files


def group(files: Sequence[SourceFile], level: str) -> list[Document]:
  """One document a file, or one for all files of a top-level folder.

  At repository level a file outside any folder is a document of its own.
  """
  members = {}
  for file in files:
    name = file.path.split("/")[0] if level == "repository" else file.path
    members.setdefault(name, []).append(file)
  return [Document(name, tuple(inside)) for name, inside in members.items()]


def split_documents(
  documents: Sequence[Document],
  validation_fraction: float,
  test_fraction: float,
) -> dict[str, list[Document]]:
  """Splits by content hash; documents that share a file stay together.

  A held-out split that no hash falls into gets the documents of the lowest
  hash of the fullest split, so that small folders work too.
  """
  groups = {}
  for document, key in zip(documents, _keys(documents), strict=True):
    groups.setdefault(key, []).append(document)
  splits = {"train": []}
  splits |= {"validation": []} if validation_fraction else {}
  splits |= {"test": []} if test_fraction else {}
  if len(groups) < len(splits):
    raise checked.RefusedError(
      f"the folder makes {len(groups)} different document(s), fewer than the "
      f"{len(splits)} splits ({', '.join(splits)}); add files, choose level "
      "'file', or set validation_fraction or test_fraction to 0"
    )
  for key in sorted(groups):
    splits[split_of(key, validation_fraction, test_fraction)].append(key)
  for keys in splits.values():
    if not keys:
      keys.append(max(splits.values(), key=len).pop(0))
  return {
    split: [document for key in keys for document in groups[key]]
    for split, keys in splits.items()
  }


def split_of(
  digest: str, validation_fraction: float, test_fraction: float
) -> str:
  """The split of a content hash (hex), as if its digits were random."""
  draw = int(digest[:13], 16) / 16**13
  if draw < validation_fraction:
    return "validation"
  return "test" if draw < validation_fraction + test_fraction else "train"


def _keys(documents: Sequence[Document]) -> list[str]:
  """The lowest digest among the documents linked by shared files, for each."""
  parent = list(range(len(documents)))

  def root(i: int) -> int:
    while parent[i] != i:
      parent[i] = parent[parent[i]]
      i = parent[i]
    return i

  owner = {}
  for i, document in enumerate(documents):
    for file in document.files:
      # Blank files are everywhere (__init__.py) and give nothing away.
      if not file.is_blank or len(document.files) == 1:
        parent[root(i)] = root(owner.setdefault(file.digest, i))
  lowest = {}
  for i, document in enumerate(documents):
    lowest[root(i)] = min(lowest.get(root(i), "g"), document.digest)
  return [lowest[root(i)] for i in range(len(documents))]


def _build(
  settings: SourceCodeConfig, path: pathlib.Path, data_dir: pathlib.Path
):
  """Builds beside `path` and renames, in one process at a time."""
  with cache.locked(path), _quiet():
    if path.exists():  # another process held the lock and built it
      return
    if mirror.fetch(path):
      return
    for left_by_a_killed_process in path.parent.glob("incomplete.*"):
      shutil.rmtree(left_by_a_killed_process)
    builder = SourceCode(
      config=settings, data_dir=data_dir, file_format="array_record"
    )
    advice = "make room, or set data_dir to a folder of another disk"
    with storage.written_by_library(data_dir, advice):
      builder.download_and_prepare()
    mirror.publish(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides what tfds says of downloads, of which there are none."""
  tfds.disable_progress_bar()
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.setLevel(level)


def _walk(
  root: storage.Path,
  include: Sequence[str],
  exclude: Sequence[str],
  links: list[storage.Path],
) -> Iterator[storage.Path]:
  """Paths of regular files in path order; `links` gets those to folders."""
  for entry in sorted(root.iterdir(), key=lambda path: path.name):
    if any(fnmatch.fnmatchcase(entry.name, name) for name in exclude):
      continue
    is_link = not storage.is_remote(entry) and entry.is_symlink()
    if entry.is_dir() and is_link:
      links.append(entry)
    elif entry.is_dir():
      yield from _walk(entry, include, exclude, links)
    elif entry.is_file():
      if any(fnmatch.fnmatchcase(entry.name, name) for name in include):
        yield entry


def _read(folder: storage.Path, file: SourceFile) -> bytes:
  content = storage.read(folder / file.path)
  if _digest(content) != file.digest:
    raise checked.RefusedError(
      f"{os.fspath(folder / file.path)!r} changed while read"
    )
  return content


def _joined(contents: Iterator[bytes]) -> bytes:
  """The contents in order, each ended by a line break before the next."""
  parts = []
  for content in contents:
    if parts and not parts[-1].endswith(b"\n"):
      parts.append(b"\n")
    parts.append(content)
  return b"".join(parts)


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _hash(lines: Iterable[str]) -> str:
  return _digest("\n".join(lines).encode("utf-8", "surrogateescape"))
