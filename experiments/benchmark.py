"""Speed and memory: python -m experiments.benchmark [--mode=decode].

Sweeps the length, forward and forward+backward, LongNet beside dense attention
in one process, and writes DIR/NAME_BACKEND.json and .png, anew after each
length, so that they hold what was measured whenever it ends. A core leaves the
sweep where memory ends or where one run would pass --max_seconds, and the
table says so. --mode=decode measures a decoding step instead, against the
context that was read, and writes DIR/decode_BACKEND.json and .png.
"""

import json
import pathlib

from absl import flags

from experiments import (
  attention_speed,
  command,
  decode_speed,
  hardware,
  progress,
)
from longnet_jax import analysis, checked, storage
from longnet_jax.models import sizes

_PAPER = {name: list(map(str, x)) for name, x in sizes.BRANCHES.items()}
_LENGTHS = flags.DEFINE_list(
  "lengths", ["2048", "4096", "8192", "16384", "32768"], "lengths in tokens"
)
_MODE = flags.DEFINE_enum(
  "mode", "attention", ["attention", "decode"], "what is measured"
)
_PASSES = flags.DEFINE_list(
  "passes", list(attention_speed.MODES), "of --mode=attention: which are timed"
)
_LAYERS = flags.DEFINE_integer(
  "layers", 4, "layers of --mode=decode", lower_bound=1
)
_HEADS = flags.DEFINE_integer("heads", 12, "attention heads", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer(
  "head_dim", 64, "width of a head", lower_bound=1
)
_SEGMENTS = flags.DEFINE_list(
  "segment_lengths", _PAPER["segment_lengths"], "w of branches"
)
_RATES = flags.DEFINE_list(
  "dilation_rates", _PAPER["dilation_rates"], "r of branches"
)
_CAUSAL = flags.DEFINE_bool("causal", True, "whether a row sees its past only")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16", "float16"], "type of the inputs"
)
_BATCH = flags.DEFINE_integer("batch", 1, "sequences at once", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs", lower_bound=1)
_MAX_SECONDS = flags.DEFINE_float(
  "max_seconds",
  60.0,
  "a core whose next run would take longer is left out",
  lower_bound=0,
)
_DENSE = flags.DEFINE_bool("dense", True, "measure dense attention beside it")
_OUT = flags.DEFINE_string("out", "runs/benchmark", "folder to write to")
_NAME = flags.DEFINE_string(
  "name", "benchmark", "files are NAME_BACKEND.json and .png"
)


def main(_) -> None:
  """Sweeps, prints a table, writes JSON and a picture."""
  setting = attention_speed.Setting(
    _HEADS.value,
    _HEAD_DIM.value,
    _ints("segment_lengths", _SEGMENTS.value),
    _ints("dilation_rates", _RATES.value),
    _CAUSAL.value,
    _DTYPE.value,
    _BATCH.value,
  )
  lengths = sorted(set(_ints("lengths", _LENGTHS.value)))
  for mode in _PASSES.value:
    if mode not in attention_speed.MODES:
      raise checked.RefusedError(
        f"--passes holds {checked.shown(mode)}; use some of "
        f"{attention_speed.MODES}"
      )
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  if _MODE.value == "decode":
    decode_speed.run(
      setting,
      lengths,
      num_layers=_LAYERS.value,
      repeats=_REPEATS.value,
      out=out,
    )
    return
  measured_on = hardware.describe()
  stem = out / f"{_NAME.value}_{measured_on['backend']}"
  document = {
    "command": command.line(),
    "hardware": measured_on,
    "setting": vars(setting),
    "records": [],
  }
  for mode in _PASSES.value:
    for found in _sweep(setting, lengths, mode):
      document["records"] += command.rounded(found)
      text = json.dumps(document, indent=1) + "\n"
      storage.write_whole(stem.with_suffix(".json"), text)
      attention_speed.draw(document, stem.with_suffix(".png"))
  print(f"wrote {stem}.json and {stem}.png")


def _sweep(setting, lengths, mode):
  """Yields the records of one mode, length by length, and prints them."""
  print(f"\n{mode}, {setting.num_heads} heads of {setting.head_dim}, ", end="")
  print(f"{setting.dtype}, {'causal' if setting.is_causal else 'full'}")
  print(
    f"{'length':>9}  {'core':<17}{'seconds':>9}{'us/token':>10}"
    f"{'GFLOP/s':>9}{'of matmul':>11}{'of peak':>9}{'temp KB/token':>15}"
  )
  cores = attention_speed.cores(setting, 1) if _DENSE.value else ("LongNet",)
  expected = dict.fromkeys(cores, 0.0)
  shown = progress.Progress()
  for length in lengths:
    print(
      f"{length:>9}  LongNet's {analysis.reach_line(setting.pattern(length))}"
    )
    names = [n for n, s in expected.items() if s <= _MAX_SECONDS.value]
    found = attention_speed.measure(
      setting,
      length,
      names=names,
      mode=mode,
      repeats=_REPEATS.value,
      say=shown.show,
    )
    shown.clear()
    for record in found:
      print(_line(record, setting.batch), flush=True)
      if "skipped" in record:
        expected.pop(record["core"])
        continue
      power = 1 if record["core"] == "LongNet" else 2
      following = min((n for n in lengths if n > length), default=0)
      expected[record["core"]] = (
        record["seconds"] * (following / length) ** power
      )
    for name in [n for n, s in expected.items() if s > _MAX_SECONDS.value]:
      print(
        f"{'':>9}  {name:<17}stops here: the next length would take "
        f"{expected.pop(name):.0f} s a run (--max_seconds)"
      )
    yield found


def _line(record, batch):
  start = f"{record['length']:>9}  {record['core']:<17}"
  if "skipped" in record:
    return f"{start}stops here: {record['skipped']}"
  tokens = batch * record["length"]
  peak = record["share_of_peak"]
  return (
    f"{start}{record['seconds']:>9.3f}{record['microseconds_per_token']:>10.1f}"
    f"{record['useful_flops_per_second'] / 1e9:>9.0f}"
    f"{record['share_of_matmul']:>11.0%}"
    f"{f'{peak:.0%}' if peak else '-':>9}"
    f"{record['temporary_bytes'] / tokens / 1000:>15.1f}"
  )


def _ints(name, texts):
  if not texts or not all(t.isdigit() and int(t) for t in texts):
    checked.refuse(f"--{name}", ",".join(texts), "positive, such as 2048,4096")
  return tuple(int(t) for t in texts)


if __name__ == "__main__":
  command.run(main)
