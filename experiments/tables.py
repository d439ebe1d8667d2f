"""Tables of the pages from docs/*.json: lists of (head, rows), cells text."""

import functools

from experiments import attention_speed, baselines
from experiments.faults import trial
from longnet_jax import analysis
from longnet_jax.analysis import report

_REACH = ("longest segment", "pairs that layers connect")


def lengths(record: dict) -> list[tuple]:
  """Returns bits per byte of the quickstart model at each context length."""
  rows = [
    (f"LongNet, context {score['length']:,}", f"{score['bits_per_byte']:.4f}")
    for score in record["lengths"]
  ]
  rows.append(("byte trigram", f"{record['trigram_bits_per_byte']:.4f}"))
  return [(("model", f"bits per byte, {record['split']} split"), rows)]


def positions(record: dict) -> list[tuple]:
  """Returns those, and the same tokens with more and with less context."""
  longest = max(score["length"] for score in record["lengths"])
  head = (
    f"position in windows of {longest:,}",
    "bits per byte",
    f"the same tokens in windows of {record['cut_to']:,}",
    "context is worth",
  )
  rows = [
    (
      f"{row['from']:,} to {row['to'] - 1:,}",
      f"{row['bits_per_byte']:.4f}",
      f"{row['cut_bits_per_byte']:.4f}",
      f"{row['context_worth']:.4f}",
    )
    for row in record["positions"]
  ]
  return [*lengths(record), (head, rows)]


def comparison(record: dict) -> list[tuple]:
  """Returns what models that differ in their attention have learned."""
  rows = [
    (
      baselines.LABELS[core],
      f"{model['parameters']:,}",
      f"{model['validation_bits_per_byte']:.3f}",
    )
    for core, model in record["models"].items()
  ]
  steps = f"validation bits per byte after {record['steps']} steps"
  return [(("model", "parameters", steps), rows)]


def benchmark(record: dict) -> list[tuple]:
  """Returns time, memory and reach of attention at each length."""
  rows = []
  setting = attention_speed.Setting(**record["setting"])
  for r in record["records"]:
    pattern = setting.pattern(r["length"])
    if r["core"] != "LongNet":
      pattern = analysis.dense(pattern)
    start = (f"{r['length']:,}", r["mode"], r["core"], *_reach(pattern))
    if "skipped" in r:
      rows.append((*start, r["skipped"], "", "", ""))
      continue
    temporary = r["temporary_bytes"] / r["length"] / record["setting"]["batch"]
    rows.append(
      (
        *start,
        f"{r['seconds']:.2f}",
        f"{r['microseconds_per_token']:.0f}",
        f"{r['share_of_matmul']:.0%}",
        f"{temporary / 1000:.1f}",
      )
    )
  head = ("length", "mode", "core", *_REACH, "seconds", "µs a token")
  return [(head + ("of matmul FLOP/s", "temporary KB a token"), rows)]


def million(record: dict) -> list[tuple]:
  """Returns the same without the yardstick, of which one run has one sample."""
  head, rows = benchmark(record)[0]
  drop = lambda cells: (*cells[:-2], cells[-1])
  return [(drop(head), list(map(drop, rows)))]


def speed(*records: dict) -> list[tuple]:
  """Returns time and reach of attention, forward and backward, beside dense.

  Of the lengths that the longest segment holds: elsewhere no time is that of
  reading the sequence.
  """
  rows = []
  for record in records:
    setting = attention_speed.Setting(**record["setting"])
    found = {
      (r["core"], r["length"]): r.get("seconds")
      for r in record["records"]
      if r["mode"] == "forward+backward"
    }
    longest = max(setting.segment_lengths)
    for length in sorted({n for _, n in found if n <= longest}):
      seconds = found["LongNet", length]
      dense = found.get(("dense, blockwise", length))
      rows.append(
        (
          f"{length:,}",
          f"{setting.num_heads} x {setting.head_dim}",
          *_reach(setting.pattern(length)),
          f"{seconds:.1f}",
          f"{dense:.1f}" if dense else "",
          f"{1e6 * seconds / length / setting.batch:.0f}",
        )
      )
  head = ("length", "heads", *_REACH, "LongNet, s", "dense, blockwise, s")
  return [(head + ("LongNet, µs a token",), rows)]


@functools.cache
def _reach(pattern):
  """Returns the longest segment, whether heads leave gaps, and pairs joined."""
  longest = min(max(pattern.segment_lengths), pattern.length)
  gaps = " (gaps)" if any(analysis.gaps(pattern)) else ""
  shares = analysis.estimated_coverage(pattern)
  joined = "" if shares is None else report.percent(shares[-1])
  return f"{longest:,}{gaps}", joined


def decoding(record: dict) -> list[tuple]:
  """Returns a step's time and the cache's bytes, core beside core.

  Beside them is what of the context reaches a position of LongNet.
  """
  setting = dict(record["setting"])
  del setting["num_layers"]
  setting = attention_speed.Setting(**setting)
  found = {(r["context"], r["core"]): r for r in record["records"]}
  cores = baselines.LABELS
  rows = []
  for context in sorted({context for context, _ in found}):
    records = [found[context, core] for core in cores]
    steps = (
      f"{1e3 * r['seconds']:.1f}" if "seconds" in r else "-" for r in records
    )
    caches = (f"{r['cache_bytes'] / 2**20:.1f}" for r in records)
    reach = _reach(setting.pattern(context))
    rows.append((f"{context:,}", *reach, *steps, *caches))
  head = ("context", *(f"LongNet, {text}" for text in _REACH))
  head += tuple(f"{name}, ms a step" for name in cores.values())
  return [(head + tuple(f"{name}, MiB" for name in cores.values()), rows)]


def slide(record: dict) -> list[tuple]:
  """Returns time and memory of a slide encoder at its released size."""
  row = (
    f"{record['tiles']:,}",
    f"{record['parameters']:,}",
    f"{record['seconds_compile']:.0f}",
    f"{record['seconds_run']:.0f}",
    f"{record['peak_gigabytes']:.1f}",
  )
  head = ("tiles", "parameters", "seconds to compile", "to run", "peak GB")
  return [(head, [row])]


def compiled_gpu(record: dict) -> list[tuple]:
  """Returns what attention moves on a GPU, as compiled for one."""
  rows = [
    (
      f"{r['length']:,}",
      f"{r['heads']} x {r['head_dim']}",
      "causal" if r["is_causal"] else "bidirectional",
      r["mode"],
      f"{r['kernels']}",
      f"{r['of_cudnn']}",
      f"{r['bytes'] / 1e9:.2f}",
      f"{r['bytes'] / r['length'] / 1e3:.1f}",
      f"{r['temporary_bytes'] / 2**20:.0f}",
    )
    for r in record["records"]
  ]
  head = ("tokens", "heads", "", "mode", "kernels", "of them cuDNN's")
  return [(head + ("GB moved", "KB a token", "temporary MiB"), rows)]


def reliability(record: dict) -> list[tuple]:
  """Returns what became of each fault, and what a long run held."""
  kind = lambda row: row.partition(":")[0]
  kinds = list(dict.fromkeys(map(kind, record["rows"])))
  rows = [
    (row, f"{sum(found.values()):,}")
    + tuple(f"{found.get(outcome, 0):,}" for outcome in trial.OUTCOMES)
    for row, found in record["rows"].items()
    if row not in record["measured"]
  ]
  rows.sort(key=lambda row: kinds.index(kind(row[0])))
  held = [
    (row, f"{numbers['from']:,g}", f"{numbers['to']:,g}")
    for row, numbers in record["measured"].items()
  ]
  return [
    (("fault", "trials", *trial.OUTCOMES), rows),
    (("held by a run of 5,000 steps", "near step 1,000", "at the end"), held),
  ]


def plans(*records: dict) -> list[tuple]:
  """Returns what a training step takes of pods, of one device of each."""
  columns = [_plan(record) for record in records]
  rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
  return [(("of one device", *(r["topology"] for r in records)), rows)]


def _plan(record):
  gib = lambda size: f"{size / 2**30:.2f} GiB"
  tera = lambda flops: f"{flops / record['devices'] / 1e12:.0f} TFLOP"
  received = sum(found["bytes"] for found in record["collectives"])
  seconds = record["seconds"]
  return {
    "tokens a window": f"{record['window']:,}",
    "peak memory": gib(record["peak_bytes"]),
    "memory there is": gib(record["limit_bytes"]),
    "in the memory of the host": gib(record["host_bytes"]),
    "parameters and optimizer": gib(
      record["parameter_bytes"] + record["optimizer_bytes"]
    ),
    "work of the model": tera(record["model_flops"]),
    "work with what is computed again": tera(record["computed_flops"]),
    "received from other devices": f"{received / 2**20:,.0f} MiB",
    # Compilers for GPUs expect no times.
    **{
      f"estimate: {name}": f"{1e3 * seconds[name]:,.0f} ms" if seconds else "-"
      for name in ("compiler", "kernels", "links", "step")
    },
    "estimate: device-hours of 1,000 steps": (
      f"{record['devices'] * seconds['step'] / 3.6:,.1f}" if seconds else "-"
    ),
    "estimate: share of peak": (
      f"{record['share_of_peak']:.0%}" if seconds else "-"
    ),
    "CPU seconds to compile": f"{record['compile_seconds']:.0f}",
  }
