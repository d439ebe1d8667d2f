"""What to read, how to cut it into tokens and windows: one frozen record."""

import dataclasses

SPLITS = ("train", "validation", "test")


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
      "long" cuts each document by itself and pads its last window.
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
  level: str = "file"
  validation_fraction: float = 0.05
  test_fraction: float = 0.05
  text_feature: str = "text"
  data_dir: str = ""
  cache_dir: str = ""
  tokenizer: str = "bytes"
  bpe_vocab_size: int = 8192
  window: int = 2048
  layout: str = "packed"
  seed: int = 0
  needle_distances: tuple[int, ...] = (64, 256, 1024)
  needle_digits: int = 4
  needle_windows: int = 256

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check_type(field.name, getattr(self, field.name), field.default)
      if isinstance(field.default, tuple):
        object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
    _choose("level", self.level, ("file", "repository"))
    _choose("layout", self.layout, ("packed", "long"))
    _choose("tokenizer", self.tokenizer, ("bytes", "bpe"))
    for name in ("window", "needle_digits", "needle_windows"):
      _require(
        name, getattr(self, name), getattr(self, name) >= 1, "at least 1"
      )
    _require("seed", self.seed, 0 <= self.seed < 2**32, "in 0..2**32 - 1")
    _require(
      "bpe_vocab_size",
      self.bpe_vocab_size,
      258 <= self.bpe_vocab_size <= 2**31,
      "at least 258: 256 bytes, one merge, the separator",
    )
    for name in ("validation_fraction", "test_fraction"):
      fraction = getattr(self, name)
      _require(name, fraction, 0 <= fraction < 1, "in [0, 1), such as 0.05")
    held_out = self.validation_fraction + self.test_fraction
    _require(
      "validation_fraction + test_fraction",
      held_out,
      held_out < 1,
      "below 1, so that documents are left to train on",
    )
    _require("dataset", self.dataset, self.dataset, "source_code, say")
    _require(
      "include", self.include, self.include, "patterns such as ('*.py',)"
    )
    if self.dataset == "needle":
      self._check_needle()

  def _check_needle(self):
    _require(
      "tokenizer",
      self.tokenizer,
      self.tokenizer == "bytes",
      "bytes for the needle task",
    )
    low, high = self.needle_digits + 1, self.window - self.needle_digits
    _require(
      "needle_distances",
      self.needle_distances,
      self.needle_distances
      and all(low <= d <= high for d in self.needle_distances),
      f"numbers in {low}..{high} (needle_digits + 1 .. window - needle_digits)",
    )


def _check_type(name: str, value, default):
  """Raises ValueError unless `value` is of the type of `default`."""
  if isinstance(default, tuple):
    legal = isinstance(value, (tuple, list))
    _require(name, value, legal, f"a tuple such as {default}")
    kind = type(default[0])
    for i, entry in enumerate(value):
      _require(f"{name}[{i}]", entry, type(entry) is kind, _KINDS[kind])
  elif isinstance(default, float):
    legal = type(value) in (int, float)
    _require(name, value, legal, _KINDS[float])
  else:
    _require(name, value, type(value) is type(default), _KINDS[type(default)])


_KINDS = {
  int: "a whole number such as 4",
  float: "a number such as 0.1",
  str: "a string",
}


def _require(name: str, value, condition, legal: str):
  if not condition:
    raise ValueError(f"{name} is {value!r}; it must be {legal}")


def _choose(name: str, value: str, choices: tuple[str, ...]):
  _require(name, value, value in choices, f"one of {', '.join(choices)}")
