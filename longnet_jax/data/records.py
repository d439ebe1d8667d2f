"""Prepared tfds datasets: opened and read, or the damaged file is named."""

from collections.abc import Iterator
import os

from array_record.python import array_record_module
import tensorflow_datasets as tfds

from longnet_jax import checked


def open_builder(folder: str | os.PathLike) -> tfds.core.DatasetBuilder:
  """The dataset prepared in a folder; RefusedError where that is damaged."""
  try:
    builder = tfds.builder_from_directory(folder)
    _ = builder.info.features, list(builder.info.splits)
  except Exception as error:  # what is damaged can raise anything
    raise checked.RefusedError(_damaged(folder, error, folder)) from error
  return builder


def read(
  builder: tfds.core.DatasetBuilder, split: str, feature: str
) -> Iterator[bytes]:
  """A text of each record of a split, in order.

  Raises RefusedError that names the file where one is damaged.
  """
  count = 0
  try:
    for record in builder.as_data_source(split=split):
      if record[feature] is None:  # what a file cut short may read as
        raise ValueError(f"record {count} is empty")
      count += 1
      yield record[feature]
    expected = builder.info.splits[split].num_examples
    if count != expected:
      raise ValueError(f"it has {count} records instead of {expected}")
  except Exception as error:  # what is damaged can raise anything
    file = _damaged_file(builder.info.splits[split]) or builder.data_dir
    raise checked.RefusedError(
      _damaged(file, error, builder.data_dir)
    ) from error


def _damaged(path, error, folder):
  reason = " ".join(str(error).split())[:200] or type(error).__name__
  return (
    f"{os.fspath(path)!r} is damaged: {reason}; delete {os.fspath(folder)!r}"
    " and prepare the dataset again (source_code does it by itself)"
  )


def _damaged_file(info: tfds.core.SplitInfo) -> os.PathLike | None:
  """The first file of a split that cannot be read by itself."""
  for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
    try:
      reader = array_record_module.ArrayRecordReader(os.fspath(path))
      records = reader.read_all()
      if len(records) != length or not all(records):
        return path
    except Exception:  # whatever it is, it has been said
      return path
  return None
