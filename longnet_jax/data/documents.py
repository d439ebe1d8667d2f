"""Documents of any prepared text dataset, split by split."""

from collections.abc import Iterator
import hashlib
import pathlib

import tensorflow_datasets as tfds

from longnet_jax import checked, storage
from longnet_jax.data import cache, mirror, records, source_code
from longnet_jax.data import config as config_lib


class Documents:
  """The texts of one dataset; `read(split)` yields them in a fixed order."""

  def __init__(self, config: config_lib.DataConfig):
    if config.dataset == "source_code":
      self._builder = source_code.builder(config)
    else:
      self._builder = _find(config)
    self._feature = config.text_feature
    self._check_feature(config.dataset)
    self._carved = _carved(config, set(self._builder.info.splits))
    self.name = self._builder.info.full_name
    sizes = [
      (split, info.shard_lengths, info.num_bytes)
      for split, info in sorted(self._builder.info.splits.items())
    ]
    identity = [self.name, sizes, self._feature, sorted(self._carved.items())]
    self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

  def read(self, split: str) -> Iterator[bytes]:
    """Documents of a split that are not empty."""
    own = set(self._builder.info.splits)
    if split not in own and not self._carved.get(split):
      legal = [s for s in config_lib.SPLITS if s in own or self._carved.get(s)]
      raise checked.RefusedError(
        f"{self.name} has no split {split!r}, and {split}_fraction is 0; it "
        f"has {', '.join(legal)}"
      )
    stored = split if split in own else "train"
    for text in records.read(self._builder, stored, self._feature):
      if text and (stored != "train" or self._split_of(text) == split):
        yield text

  def _split_of(self, text: bytes) -> str:
    """Where a document of the stored training split belongs."""
    if not self._carved:
      return "train"
    digest = hashlib.sha256(text).hexdigest()
    return source_code.split_of(
      digest,
      self._carved.get("validation", 0.0),
      self._carved.get("test", 0.0),
    )

  def _check_feature(self, dataset: str):
    features = self._builder.info.features
    texts = [
      name
      for name, feature in features.items()
      if isinstance(feature, tfds.features.Text)
    ]
    if self._feature not in texts:
      raise checked.RefusedError(
        f"text_feature is {checked.shown(self._feature)}; the text features "
        f"of {dataset} are: {', '.join(texts) or 'none'}"
      )


def prepared(data_dir: str) -> dict[str, pathlib.Path]:
  """Name -> folder of every tfds dataset below `data_dir`.

  Names read "name:version" or "name/config:version".
  """
  root = pathlib.Path(data_dir)
  found = {}
  for depth in ("*/*", "*/*/*"):
    for path in sorted(root.glob(f"{depth}/features.json")):
      *name, version = path.parent.relative_to(root).parts
      if tfds.core.Version.is_valid(version):
        found[f"{'/'.join(name)}:{version}"] = path.parent
  return found


def _carved(config: config_lib.DataConfig, own: set[str]) -> dict[str, float]:
  """Held-out split -> its share of "train", for those that are not stored."""
  if "train" not in own:
    raise checked.RefusedError(
      f"dataset {checked.shown(config.dataset)} has splits "
      f"{', '.join(sorted(own))}; it must have one named train"
    )
  shares = {
    "validation": config.validation_fraction,
    "test": config.test_fraction,
  }
  return {s: share for s, share in shares.items() if share and s not in own}


def _find(config: config_lib.DataConfig) -> tfds.core.DatasetBuilder:
  """The prepared dataset of that name, at its highest version."""
  if config.data_dir:
    name = config.dataset.partition("/")[0].partition(":")[0]
    mirror.fetch_tree(storage.path(config.data_dir) / name)
  data_dir = str(cache.data_root(config))
  found = prepared(data_dir)
  named = {
    name: path
    for name, path in found.items()
    if config.dataset in (name, name.split(":")[0], name.split("/")[0])
  }
  if len({name.split(":")[0] for name in named}) != 1:
    some = sorted(named or found)
    listed = ", ".join(some[:20]) + (", ..." if len(some) > 20 else "")
    raise checked.RefusedError(
      f"dataset is {checked.shown(config.dataset)}; it must be source_code, "
      f"needle or a tfds dataset prepared in {data_dir!r}, which holds: "
      f"{listed or 'none'}. Prepare one with tfds.builder(NAME, "
      "data_dir=..., file_format='array_record').download_and_prepare()"
    )
  path = max(named.values(), key=lambda p: tfds.core.Version(p.name))
  builder = records.open_builder(path)
  file_format = builder.info.file_format.value
  if file_format != "array_record":
    raise checked.RefusedError(
      f"dataset {checked.shown(config.dataset)} at {str(path)!r} is stored as "
      f"{file_format}; prepare it again with file_format='array_record'"
    )
  return builder
