"""The picture of a benchmark: time and memory against the length."""

import os

from matplotlib import figure as mpl_figure
import numpy as np

_STYLES = {
  "LongNet": ("#d55e00", "o"),
  "dense, blockwise": ("#0072b2", "s"),
  "dense, jax.nn": ("#56b4e9", "^"),
  "dense, cuDNN": ("#009e73", "v"),
}


def draw_speed(document: dict, path: str | os.PathLike) -> mpl_figure.Figure:
  """Draws what `experiments.benchmark` measured and writes it to `path`.

  The legend gives each slope of the time over the last two lengths: 1 is
  linear, 2 quadratic.
  """
  records = [r for r in document["records"] if "seconds" in r]
  modes = list(dict.fromkeys(r["mode"] for r in document["records"]))
  columns = 2 * len(modes)
  figure = mpl_figure.Figure(figsize=(4.2 * columns, 4.2), layout="constrained")
  panels = iter(figure.subplots(1, columns, squeeze=False)[0])
  for mode in modes:
    chosen = [r for r in records if r["mode"] == mode]
    _draw(next(panels), chosen, "seconds", 1.0, f"{mode}: time (s)")
    _draw(
      next(panels),
      chosen,
      "temporary_bytes",
      2.0**30,
      f"{mode}: temporary memory (GiB)",
    )
  setting, hardware = document["setting"], document["hardware"]
  figure.suptitle(
    f"{setting['num_heads']} heads of {setting['head_dim']}, "
    f"{setting['dtype']}, {'causal' if setting['is_causal'] else 'full'}, "
    f"w = {tuple(setting['segment_lengths'])}, "
    f"r = {tuple(setting['dilation_rates'])}\n"
    f"{hardware['device']}, {hardware['cpu_cores']} CPU cores, "
    f"jax {hardware['jax']}",
    fontsize=10,
  )
  figure.savefig(path, dpi=120)
  return figure


def _draw(axes, records, key, unit, title):
  for name, (color, marker) in _STYLES.items():
    points = sorted(
      (r["length"], r[key] / unit) for r in records if r["core"] == name
    )
    if not points:
      continue
    lengths, values = np.array(points).T
    label = name
    if key == "seconds" and len(points) > 1:
      slope = np.diff(np.log(values[-2:])) / np.diff(np.log(lengths[-2:]))
      label = f"{name} (slope {slope[0]:.2f})"
    axes.plot(lengths, values, color=color, marker=marker, label=label)
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("length (tokens)")
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.grid(True, which="major", alpha=0.3)
  if axes.lines:
    axes.legend(fontsize=8)
