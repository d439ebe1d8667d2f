"""Speed and memory of decoding against the context, LongNet beside others.

The cores share one model and one process and take turns, token by token, so
that what a shared machine does to one it does to all. A cache is not filled by
reading a prompt: it is set to a position, as neither its bytes nor the time of
a step depend on what it holds. The timed steps are the last ones up to the
context. Where every segment length divides the context, these are the slowest
that LongNet has, as all of its segments are full.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time

import jax
from jax import numpy as jnp
from matplotlib import figure as mpl_figure

from experiments import attention_speed, command, hardware, progress
from longnet_jax import analysis, storage
from longnet_jax.inference import cache as cache_lib
from longnet_jax.inference import decode
from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer

_VOCAB_SIZE = 264  # of bytes
# Name, colour and marker of each core.
_STYLES = {
  "dilated": ("LongNet", "#d55e00", "o"),
  "dense": ("dense", "#0072b2", "s"),
  "sparse": ("Sparse Transformer", "#009e73", "^"),
}


def run(
  setting: attention_speed.Setting,
  contexts: Sequence[int],
  *,
  num_layers: int,
  repeats: int,
  out: pathlib.Path,
) -> None:
  """Measures, prints a table and writes decode_BACKEND.json and .png to `out`.

  The model has the setting's heads and branches, RoPE, and a feed-forward
  network four times as wide as the heads together.
  """
  width = setting.num_heads * setting.head_dim
  config = config_lib.LongNetConfig(
    vocab_size=_VOCAB_SIZE,
    num_layers=num_layers,
    model_dim=width,
    num_heads=setting.num_heads,
    ffn_dim=4 * width,
    segment_lengths=setting.segment_lengths,
    dilation_rates=setting.dilation_rates,
    position="rope",
    dtype=setting.dtype,
  )
  title = (
    f"decoding, {num_layers} layers, {setting.num_heads} heads of"
    f" {setting.head_dim}, {setting.dtype}, {setting.batch} at once"
  )
  print(f"\n{title}\n{'context':>10}  {'core':<9}{'ms/step':>10}", end="")
  print(f"{'tokens/s':>10}{'cache MiB':>12}")
  records = []
  measured_on = hardware.describe()
  stem = out / f"decode_{measured_on['backend']}"
  document = {
    "command": command.line(),
    "hardware": measured_on,
    "title": title,
    "setting": vars(setting) | {"num_layers": num_layers},
    "records": records,
  }
  shown = progress.Progress()
  for context in contexts:
    reach = analysis.reach_line(setting.pattern(context), num_layers)
    print(f"{context:>10}  LongNet's {reach}", flush=True)
    shown.show(f"context {context:,}: compiling and timing")
    found = measure(config, [context], batch=setting.batch, repeats=repeats)
    shown.clear()
    print("\n".join(map(_line, found)), flush=True)
    records += command.rounded(found)
    text = json.dumps(document, indent=1) + "\n"
    storage.write_whole(stem.with_suffix(".json"), text)
    draw(records, stem.with_suffix(".png"), title)
  print(f"wrote {stem}.json and {stem}.png")


def measure(
  config: config_lib.LongNetConfig,
  contexts: Sequence[int],
  *,
  batch: int = 1,
  repeats: int = 50,
  max_cache_bytes: int = 2**33,
) -> list[dict]:
  """Times one decoding step of each core at each context, in tokens.

  Args:
    config: of the model; its `attention` is replaced.
    contexts: tokens that have been read after the last timed step.
    batch: examples.
    repeats: timed steps; medians are reported.
    max_cache_bytes: a core whose cache would be larger is left out; its record
      has `skipped`, the reason, in place of the times.

  Returns:
    A record of each core and context: core, context, cache_bytes, and seconds
    (of one step), tokens_per_second (of all examples).
  """
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(transformer.LongNetLM(config).init)
  params = init(jax.random.key(0), tokens)["params"]
  records = []
  for context in contexts:
    records += _measure_one(
      config, params, context, batch, repeats, max_cache_bytes
    )
  return records


def draw(records: Sequence[dict], path: str | os.PathLike, title: str) -> None:
  """Draws time of a token and bytes of the cache against the context."""
  picture = mpl_figure.Figure(figsize=(9, 4.2), layout="constrained")
  panels = picture.subplots(1, 2)
  for axes, (key, unit, label) in zip(
    panels,
    (
      ("seconds", 1e-3, "time of a step (ms)"),
      ("cache_bytes", 2**20, "cache (MiB)"),
    ),
    strict=True,
  ):
    for core, (name, colour, marker) in _STYLES.items():
      points = [
        (r["context"], r[key] / unit)
        for r in records
        if r["core"] == core and key in r
      ]
      if points:
        axes.plot(*zip(*points, strict=True), marker, ls="-", c=colour)
        axes.lines[-1].set_label(name)
    axes.set(xlabel="context (tokens)", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend()
  picture.suptitle(title, fontsize=10)
  picture.savefig(path, dpi=120)


def _measure_one(config, params, context, batch, repeats, max_cache_bytes):
  """Returns the records of one context."""
  records, steps = [], {}
  # The first step warms up.
  start = max(context - repeats - 1, 0)
  for core in _STYLES:
    changed = dataclasses.replace(config, attention=core)
    make = functools.partial(
      cache_lib.make_cache, changed, batch, max_length=start + repeats + 1
    )
    record = {"core": core, "context": context}
    record["cache_bytes"] = jax.eval_shape(make).nbytes
    records.append(record)
    if record["cache_bytes"] > max_cache_bytes:
      record["skipped"] = f"its cache is larger than {max_cache_bytes} bytes"
      continue
    cache = make().replace(position=jnp.full(batch, start, jnp.int32))
    steps[core] = _Steps(changed, params, cache, jnp.zeros(batch, jnp.int32))
  times = {core: [] for core in steps}
  for repeat in range(repeats + 1):
    for core, step in steps.items():
      seconds = step.seconds()
      if repeat:
        times[core].append(seconds)
  for record in records:
    if record["core"] in times:
      seconds = statistics.median(times[record["core"]])
      record.update(seconds=seconds, tokens_per_second=batch / seconds)
  return records


def _line(record):
  start = f"{record['context']:>10}  {record['core']:<9}"
  mebibytes = f"{record['cache_bytes'] / 2**20:>12.1f}"
  if "skipped" in record:
    return f"{start}{'-':>10}{'-':>10}{mebibytes}  {record['skipped']}"
  return (
    f"{start}{1e3 * record['seconds']:>10.2f}"
    f"{record['tokens_per_second']:>10.1f}{mebibytes}"
  )


@dataclasses.dataclass
class _Steps:
  """Decoding that goes on from its last step."""

  config: config_lib.LongNetConfig
  params: dict
  cache: cache_lib.Cache
  token: jax.Array

  def seconds(self) -> float:
    """Returns how long the next step takes."""
    start = time.perf_counter()
    logits, self.cache = decode.decode_step(
      self.config, self.params, self.cache, self.token
    )
    jax.block_until_ready(logits)
    return time.perf_counter() - start
