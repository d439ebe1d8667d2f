"""What to read, how to cut it into tokens and windows: one frozen record."""

import dataclasses
from typing import Annotated, Literal

from longnet_jax import checked

SPLITS = ("train", "validation", "test")
_BpeSize = Annotated[
  int,
  checked.Range(
    at_least=258,
    at_most=2**31 - 1,
    why="256 bytes, one merge, the separator; ids are int32",
  ),
]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the data; the defaults read code that every machine has.

  Raises ValueError with one line that names the value and a legal choice.

  Attributes:
    dataset: where documents come from: "source_code" (a folder of files),
      "needle" (synthetic recall), or the name of a tfds dataset prepared in
      array_record, such as "wikipedia/20230601.simple" or "my_text:1.0.0".
    folder: source files; "" is the running Python's standard library.
    include: patterns of file names that are read.
    exclude: patterns of file and folder names that are left out.
    level: what a document is: a "file", or a "repository", which is all files
      below one top-level folder, joined in path order.
    validation_fraction: share of the documents that validate, chosen by content
      hash; a tfds dataset with a validation split keeps its own.
    test_fraction: likewise for testing.
    text_feature: name of the text in the records of a tfds dataset.
    data_dir: where tfds datasets lie; "" is tfds' default (TFDS_DATA_DIR, else
      ~/tensorflow_datasets).
    cache_dir: where tokens and trained tokenizers are kept; "" is data_dir.
    tokenizer: "bytes", or "bpe": byte-level BPE trained on the training split.
    bpe_vocab_size: ids of "bpe", its separator included.
    window: positions T of a window.
    layout: "packed" cuts all documents end to end, several in one window;
      "long" cuts each document by itself and pads its last window; "stream"
      takes the corpus as one sequence: each window is the next stretch of it,
      in order, and documents see one another, which is what the fastest
      kernels do.
    seed: of the order of windows, and of the needle task.
    needle_distances: tokens from a planted digit to its recall; each window
      draws one of them.
    needle_digits: digits to recall.
    needle_windows: windows in a held-out split of the needle task.
  """

  dataset: str = "source_code"
  folder: str = ""
  include: tuple[str, ...] = ("*.py",)
  exclude: tuple[str, ...] = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    ".*",
  )
  level: Literal["file", "repository"] = "file"
  validation_fraction: checked.Share = 0.05
  test_fraction: checked.Share = 0.05
  text_feature: str = "text"
  data_dir: str = ""
  cache_dir: str = ""
  tokenizer: Literal["bytes", "bpe"] = "bytes"
  bpe_vocab_size: _BpeSize = 8192
  window: checked.Count = 32_768
  layout: Literal["packed", "long", "stream"] = "packed"
  seed: checked.Seed = 0
  needle_distances: tuple[checked.Count, ...] = (64, 256, 1024)
  needle_digits: checked.Count = 4
  needle_windows: checked.Count = 256

  def __post_init__(self):
    checked.check_fields(self)
    held_out = self.validation_fraction + self.test_fraction
    if held_out >= 1:
      checked.refuse(
        "validation_fraction + test_fraction",
        held_out,
        "below 1, so that documents are left to train on",
      )
    if not self.dataset:
      checked.refuse("dataset", self.dataset, "a name such as source_code")
    if not self.include:
      checked.refuse("include", self.include, "patterns such as ('*.py',)")
    if self.dataset == "needle":
      self._check_needle()

  def _check_needle(self):
    if self.tokenizer != "bytes":
      checked.refuse("tokenizer", self.tokenizer, "bytes for the needle task")
    low, high = self.needle_digits + 1, self.window - self.needle_digits
    distances = self.needle_distances
    if not distances or not all(low <= d <= high for d in distances):
      checked.refuse(
        "needle_distances",
        distances,
        f"numbers in {low}..{high} (needle_digits + 1 .. window -"
        " needle_digits)",
      )
