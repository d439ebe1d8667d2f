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

from experiments import (
  attention_speed,
  baselines,
  command,
  decode_speed,
  parallel_tables,
  tables,
)
from experiments.studies import catalogue, lengths
from longnet_jax import checked
from longnet_jax.analysis import pictures

_CHECK = flags.DEFINE_bool("check", False, "only compare the tables")
ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Records in docs/studies/, each of which names its study.
_STUDIES = (
  "ablations",
  "flops",
  "lengths",
  "lengths_1m",
  "reach",
  "runtime",
  "sizes",
)
# name: what makes lists of (head, rows), of which records in docs/.
TABLES = {
  "benchmark": (tables.benchmark, "benchmark_cpu"),
  "bytes": (parallel_tables.received, "parallel"),
  "bytes_pod": (parallel_tables.received_pod, "parallel_v5e"),
  "comparison": (tables.comparison, "comparison"),
  "decoding": (tables.decoding, "decode_cpu"),
  "compiled_gpu": (tables.compiled_gpu, "gpu_h100"),
  "equality": (parallel_tables.equality, "parallel"),
  "million": (tables.million, "million_cpu"),
  "plan_paper": (tables.plans, "plans/paper_125m"),
  "plans": (
    tables.plans,
    "plans/pod_v5e",
    "plans/pod_v5e_longest",
    "plans/pod_v5p",
    "plans/longnet_1b_tokens",
    "plans/gpu_8",
  ),
  "positions": (tables.positions, "quickstart"),
  "positions_before": (tables.positions, "quickstart_8192"),
  "positions_longer": (tables.positions, "longer_8192"),
  "quickstart": (tables.lengths, "quickstart"),
  "reliability": (tables.reliability, "reliability"),
  "scaling": (parallel_tables.scaling, "parallel"),
  "slide_10k": (tables.slide, "slide_10k_tiles"),
  "slide_100k": (tables.slide, "slide_100k_tiles"),
  "speed": (tables.speed, "benchmark_cpu", "million_cpu"),
  "study_worth": (lambda record: [lengths.worth(record)], "studies/lengths"),
  **{
    f"study_{name}": (
      lambda record: catalogue.STUDIES[record["study"]].table(record),
      f"studies/{name}",
    )
    for name in _STUDIES
  },
}


def main(_) -> None:
  """Rewrites the pages and the pictures, or checks the tables."""
  for path in pages():
    text = path.read_text()
    rebuilt = rebuild(text)
    if not _CHECK.value:
      path.write_text(rebuilt)
    elif rebuilt != text:
      raise checked.RefusedError(
        f"{path.name} differs from docs/; run python -m experiments.report"
      )
  if _CHECK.value:
    return
  pictures.draw_overview(path=DOCS / "pattern.png")
  attention_speed.draw(_read("benchmark_cpu"), DOCS / "benchmark_cpu.png")
  decode = _read("decode_cpu")
  decode_speed.draw(decode["records"], DOCS / "decode_cpu.png", decode["title"])
  baselines.draw(_read("comparison"), DOCS / "comparison.png")
  for name in _STUDIES:
    record = _read(f"studies/{name}")
    study = catalogue.STUDIES[record["study"]]
    study.draw(record, DOCS / "studies" / f"{name}.png")
  names = ", ".join(path.name for path in pages())
  print(f"wrote {names} and the pictures in {DOCS}")


def pages() -> list[pathlib.Path]:
  """Returns the pages that may hold tables."""
  return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def rebuild(text: str) -> str:
  """Returns a page's text with every table made anew."""

  def made(match):
    return f"{match[1]}\n{_make(match[2])}\n\n{match[3]}"

  return _TABLE.sub(made, text)


def _make(name):
  """Returns a table as Markdown, with the command that it comes from."""
  if name == "sample":
    return f"```\n{(DOCS / 'sample.txt').read_text().rstrip()}\n```"
  if name not in TABLES:
    raise checked.RefusedError(
      f"no table {name!r}; a page may have sample, {', '.join(sorted(TABLES))}"
    )
  make, *stems = TABLES[name]
  records = list(map(_read, stems))
  found = [_markdown(head, rows) for head, rows in make(*records)]
  return "\n\n".join(found) + "".join(map(_source, records))


def _read(stem):
  return json.loads((DOCS / f"{stem}.json").read_text())


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
