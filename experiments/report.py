"""Rebuilds every page's tables and pictures: python -m experiments.report.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md or
a page of docs/; its figures come from the JSON in docs/ that the command named
beneath it wrote. With --check nothing is written, and a page that differs is an
error.
"""

import json
import pathlib
import re

from absl import flags

from experiments import command, parallel_tables
from longnet_jax import decode_speed
from longnet_jax.analysis import pictures, speed_pictures
from longnet_jax.training import curves, metrics

_CHECK = flags.DEFINE_bool("check", False, "only compare the tables")
ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(_) -> None:
  """Rewrites the pages and the pictures, or checks the tables."""
  for path in pages():
    text = path.read_text()
    rebuilt = rebuild(text)
    if not _CHECK.value:
      path.write_text(rebuilt)
    elif rebuilt != text:
      raise ValueError(
        f"{path.name} differs from docs/; run python -m experiments.report"
      )
  if _CHECK.value:
    return
  pictures.draw_overview(DOCS / "pattern.png")
  for path in sorted(DOCS.glob("benchmark_*.json")):
    speed_pictures.draw_speed(_read(path.stem), path.with_suffix(".png"))
  for path in sorted(DOCS.glob("decode_*.json")):
    record = _read(path.stem)
    decode_speed.draw(
      record["records"], path.with_suffix(".png"), record["title"]
    )
  runs = {
    path.parent.name: metrics.read_metrics(path.parent)
    for path in _comparison()
  }
  if runs:
    curves.draw_losses(runs, DOCS / "comparison.png")
  names = ", ".join(path.name for path in pages())
  print(f"wrote {names} and the pictures in {DOCS}")


def pages() -> list[pathlib.Path]:
  """Returns the pages that may hold tables."""
  return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def rebuild(text: str) -> str:
  """Returns a page's text with every table made anew."""

  def table(match):
    name = match[2]
    if name not in TABLES:
      raise ValueError(f"no table {name!r}; a page may have {sorted(TABLES)}")
    return f"{match[1]}\n{TABLES[name]()}\n\n{match[3]}"

  return _TABLE.sub(table, text)


def _read(stem):
  return json.loads((DOCS / f"{stem}.json").read_text())


def _comparison():
  return sorted((DOCS / "comparison").glob("*/metrics.jsonl"))


def _quickstart():
  """Bits per byte of the quickstart model beside a byte trigram."""
  record = _read("quickstart")
  rows = [
    (f"LongNet, context {score['length']:,}", f"{score['bits_per_byte']:.3f}")
    for score in record["lengths"]
  ]
  rows.append(("byte trigram", f"{record['trigram_bits_per_byte']:.3f}"))
  head = ("model", f"bits per byte, {record['split']} split")
  return _markdown(head, rows) + _source(record)


def _benchmark():
  """Time and memory of attention at each length."""
  record = _read("benchmark_cpu")
  rows = []
  for r in record["records"]:
    start = (f"{r['length']:,}", r["mode"], r["core"])
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
  head = ("length", "mode", "core", "seconds", "µs a token")
  head += ("of matmul FLOP/s", "temporary KB a token")
  return _markdown(head, rows) + _source(record)


def _decoding():
  """Time of a step and bytes of the cache at each context, core beside core."""
  record = _read("decode_cpu")
  found = {(r["context"], r["core"]): r for r in record["records"]}
  cores = {"dilated": "LongNet", "dense": "dense", "sparse": "Sparse"}
  rows = []
  for context in sorted({context for context, _ in found}):
    records = [found[context, core] for core in cores]
    steps = (
      f"{1e3 * r['seconds']:.1f}" if "seconds" in r else "-" for r in records
    )
    caches = (f"{r['cache_bytes'] / 2**20:.1f}" for r in records)
    rows.append((f"{context:,}", *steps, *caches))
  head = ("context", *(f"{name}, ms a step" for name in cores.values()))
  head += tuple(f"{name}, cache MiB" for name in cores.values())
  return _markdown(head, rows) + _source(record)


def _sample():
  """A text of the quickstart model, after the command that made it."""
  return f"```\n{(DOCS / 'sample.txt').read_text().rstrip()}\n```"


def _slides():
  """Time and memory of the slide encoder."""
  rows = []
  for tiles in ("10k", "100k"):
    r = _read(f"slide_{tiles}_tiles")
    rows.append(
      (
        f"{r['tiles']:,}",
        f"{r['parameters']:,}",
        f"{r['seconds_run']:.0f}",
        f"{r['peak_gigabytes']:.1f}",
        f"{r['device']}, {r['cores']} cores",
      )
    )
  head = ("tiles", "parameters", "seconds", "peak GB", "hardware")
  return _markdown(head, rows)


def _parallel(make, stem="parallel"):
  """Tables of sequence parallelism."""
  record = _read(stem)
  found = [_markdown(head, rows) for head, rows in make(record)]
  return "\n\n".join(found) + _source(record)


TABLES = {
  "benchmark": _benchmark,
  "bytes": lambda: _parallel(parallel_tables.received),
  "bytes_pod": lambda: _parallel(parallel_tables.received_pod, "parallel_v5e"),
  "decoding": _decoding,
  "equality": lambda: _parallel(parallel_tables.equality),
  "quickstart": _quickstart,
  "sample": _sample,
  "scaling": lambda: _parallel(parallel_tables.scaling),
  "slides": _slides,
}


def _markdown(head, rows):
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(record):
  hardware = record["hardware"]
  return (
    f"\n\n`{record['command']}` on {hardware['device']}, "
    f"{hardware['cpu_cores']} CPU cores, jax {hardware['jax']}."
  )


if __name__ == "__main__":
  command.run(main)
