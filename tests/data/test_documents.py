import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from longnet_jax import checked
from longnet_jax.data import config as config_lib
from longnet_jax.data import documents as documents_lib


class _Texts(tfds.core.GeneratorBasedBuilder):
  """A text dataset with a chosen set of splits."""

  name = "tiny_texts"
  VERSION = tfds.core.Version("1.9.0")
  SPLITS = ("train", "test")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"body": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in self.SPLITS}

  def _generate_examples(self, split):
    for i in range(60):
      # Texts 0..29 occur twice; invalid UTF-8 is text too.
      body = b"" if i == 59 else b"%s %d \xff" % (split.encode(), i % 30)
      yield i, {"body": body, "n": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  for name, version, splits in (
    ("tiny_texts", "1.9.0", ("train", "test")),
    ("tiny_texts", "1.10.0", ("train", "validation", "test")),
    ("test_only", "1.0.0", ("test",)),
  ):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(_Texts, "name", name)
      patch.setattr(_Texts, "VERSION", tfds.core.Version(version))
      patch.setattr(_Texts, "SPLITS", splits)
      builder = _Texts(data_dir=root, file_format="array_record")
      builder.download_and_prepare()
  return str(root)


def _documents(data_dir, dataset="tiny_texts:1.9.0", **settings):
  settings = {"text_feature": "body", "test_fraction": 0.2} | settings
  return documents_lib.Documents(
    config_lib.DataConfig(dataset=dataset, data_dir=data_dir, **settings)
  )


def test_reads_a_dataset_by_name_and_carves_what_is_missing(data_dir):
  documents = _documents(data_dir, validation_fraction=0.3)
  train, validation = documents.read("train"), documents.read("validation")
  train, validation = list(train), list(validation)
  assert len(train) + len(validation) == 59  # the empty one is nothing to read
  assert set(train).isdisjoint(validation)
  assert set(train) | set(validation) == {
    b"train %d \xff" % i for i in range(30)
  }
  assert all(text.startswith(b"test") for text in documents.read("test"))


def test_the_highest_version_is_meant_and_keeps_its_splits(data_dir):
  documents = _documents(data_dir, "tiny_texts")
  assert documents.name == "tiny_texts/1.10.0"
  assert len(list(documents.read("train"))) == 59
  assert len(list(documents.read("validation"))) == 59


def test_the_fingerprint_knows_dataset_and_split(data_dir):
  fingerprints = [
    _documents(data_dir, "tiny_texts").fingerprint,
    _documents(data_dir).fingerprint,
    _documents(data_dir, validation_fraction=0.3).fingerprint,
  ]
  assert len(set(fingerprints)) == 3
  assert _documents(data_dir).fingerprint == fingerprints[1]


@pytest.mark.parametrize(
  "dataset, settings, message",
  [
    ("tiny_text", {}, "dataset is 'tiny_text'; it must be source_code, needle"),
    ("tiny_text", {}, "test_only:1.0.0, tiny_texts:1.10.0, tiny_texts:1.9.0"),
    ("tiny_texts:2.0.0", {}, "dataset is 'tiny_texts:2.0.0'"),
    (
      "tiny_texts",
      {"text_feature": "n"},
      "the text features of tiny_texts are: body",
    ),
    ("test_only", {}, "has splits test; it must have one named train"),
  ],
)
def test_what_is_not_there_is_named(data_dir, dataset, settings, message):
  with pytest.raises(ValueError) as error:
    _documents(data_dir, dataset, **settings)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_an_empty_data_dir_says_how_to_prepare(tmp_path):
  with pytest.raises(ValueError, match="holds: none. Prepare one with"):
    _documents(str(tmp_path))


def test_other_file_formats_are_refused(tmp_path):
  builder = _Texts(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  info = builder.data_path / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match="stored as tfrecord; prepare it again"):
    _documents(str(tmp_path))


def test_a_split_that_is_not_asked_for_is_refused(data_dir):
  documents = _documents(data_dir, validation_fraction=0.0)
  assert len(list(documents.read("train"))) == 59
  with pytest.raises(ValueError, match="no split 'validation'.*train, test"):
    next(documents.read("validation"))


@pytest.mark.parametrize(
  "name, change",
  [
    ("tiny_texts-train.array_record-00000-of-00001", lambda data: b""),
    ("tiny_texts-train.array_record-00000-of-00001", lambda data: data[:-9]),
    # Just what makes every record read as an empty one, without an error.
    (
      "tiny_texts-train.array_record-00000-of-00001",
      lambda data: data[: len(data) // 2],
    ),
    (
      "tiny_texts-train.array_record-00000-of-00001",
      lambda data: data.replace(b"train 7", b"train 8", 1),
    ),
    ("tiny_texts-train.array_record-00000-of-00001", None),
    ("features.json", lambda data: data[:-9]),
    ("dataset_info.json", lambda data: b"[1]"),
  ],
)
def test_a_damaged_file_is_named_in_one_line(data_dir, tmp_path, name, change):
  shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "tiny_texts" / "1.9.0"
  path = folder / name
  if change is None:
    path.unlink()
  else:
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    assert path.read_bytes() != whole
  with pytest.raises(checked.RefusedError) as caught:
    list(_documents(str(tmp_path)).read("train"))
  named = path if "array_record" in name else folder
  assert str(caught.value).startswith(f"'{named}' is damaged: ")
  assert str(caught.value).count("\n") == 0
