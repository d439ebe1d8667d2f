"""What studies of text share: how a run is scored, and how seeds are shown."""

from collections.abc import Iterable
import statistics

from experiments import baselines
from experiments.studies import runs
from longnet_jax import evaluate, storage
from longnet_jax.training import checkpoint
from longnet_jax.training import config as config_lib
from longnet_jax.training import workdir as workdir_lib

_TEST_TOKENS = 2**17  # of the split, evenly spread


def measure(
  config: config_lib.ExperimentConfig, run: runs.Run, workdir: storage.Path
) -> dict:
  """Trains a run and scores the test split at each context of the study.

  Windows longer than the run was trained on are read block by block.
  """
  runs.train(run, workdir)
  model, params = checkpoint.load_checkpoint(workdir)
  result = evaluate.evaluate(
    model,
    params,
    run.config.data,
    workdir_lib.load_tokenizer(workdir),
    runs.contexts(config),
    max_tokens=_TEST_TOKENS,
    trained_window=run.context,
  )
  return {**runs.describe(run), **result.to_dict()}


def lengths(record: dict) -> list[int]:
  """At which the runs of a record were scored."""
  return [row["length"] for row in record["measured"][0]["lengths"]]


def bits(made: dict, length: int) -> float:
  """Bits per byte of a run at a length."""
  found = {row["length"]: row["bits_per_byte"] for row in made["lengths"]}
  return found[length]


def alike(record: dict, *keys: str) -> dict[tuple, list[dict]]:
  """The runs that differ in their seed alone, by the values of `keys`."""
  found = {}
  for made in record["measured"]:
    found.setdefault(tuple(made[key] for key in keys), []).append(made)
  return dict(sorted(found.items(), key=lambda pair: core_first(pair[1][0])))


def core_first(made: dict) -> tuple[int, int]:
  """Sorts runs by core, then context, as a table shows them."""
  return ("dense", "sparse", "dilated").index(made["core"]), made["context"]


def label(core: str, context: int) -> str:
  """A model and what it was trained on, in words."""
  return f"{baselines.LABELS[core]}, trained on {context:,}"


def cell(values: Iterable[float]) -> str:
  """The mean over seeds and, of several, half of what lies between them."""
  values = list(values)
  mean = f"{statistics.fmean(values):.4f}"
  if len(values) == 1:
    return mean
  return f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def plot(axes, places, series: list[list[float]], **style) -> None:
  """Draws means over seeds at each place, with bars from least to most."""
  means = [statistics.fmean(values) for values in series]
  below = [m - min(v) for m, v in zip(means, series, strict=True)]
  above = [max(v) - m for m, v in zip(means, series, strict=True)]
  axes.errorbar(places, means, yerr=(below, above), capsize=2, **style)


def number_lengths(axes, lengths: list[int]) -> None:
  """A logarithmic axis of lengths in tokens, each written out."""
  axes.set_xscale("log", base=2)
  axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
