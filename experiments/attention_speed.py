"""Speed and memory of attention cores, measured side by side in one process.

A run is interleaved: each repetition times every core once and, before each, a
plain matrix product, so that what a shared machine does to one it does to
all. Reported are medians, and "useful" FLOP/s: 4 H for each pair that a head
scores forward, 14 H forward and backward, over the time.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import os
import statistics
import time

import jax
from jax import numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np

from longnet_jax import analysis
from longnet_jax.analysis import chips
from longnet_jax.ops import dilated_attention as op
from longnet_jax.ops import kernels
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sequence

MODES = ("forward", "forward+backward")
# Rows of the matrix product that is the yardstick: milliseconds of it, beside
# which the microseconds of a launch are nothing.
_MATMUL = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
# Colour and marker of each core.
_STYLES = {
  "LongNet": ("#d55e00", "o"),
  "dense, blockwise": ("#0072b2", "s"),
  "dense, jax.nn": ("#56b4e9", "^"),
  "dense, cuDNN": ("#009e73", "v"),
  "dense, Pallas": ("#009e73", "v"),
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is measured: one attention layer without its projections."""

  num_heads: int
  head_dim: int
  segment_lengths: tuple[int, ...]
  dilation_rates: tuple[int, ...]
  is_causal: bool = True
  dtype: str = "float32"
  batch: int = 1

  def pattern(self, length: int) -> analysis.Pattern:
    """Returns the pattern of LongNet at a length."""
    return analysis.Pattern(
      length,
      self.num_heads,
      self.segment_lengths,
      self.dilation_rates,
      is_causal=self.is_causal,
    )


def cores(setting: Setting, length: int) -> dict[str, Callable]:
  """Returns the attention functions (query, key, value) -> out by name.

  Those of the platform: LongNet takes its fastest kernel, and dense attention
  is that of the vendor as well.
  """
  platform, is_causal = kernels.platform(), setting.is_causal
  dilated = longnet = op.dilated_attention
  if platform == "tpu":
    # No compiler may split the kernel, as on a host of several chips it could.
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    longnet = sequence.over_mesh(mesh)
  jax_dense = functools.partial(
    jax.nn.dot_product_attention, is_causal=is_causal
  )
  found = {
    "LongNet": functools.partial(
      longnet,
      segment_lengths=setting.segment_lengths,
      dilation_rates=setting.dilation_rates,
      is_causal=is_causal,
    ),
    "dense, blockwise": functools.partial(
      dilated,
      segment_lengths=(length,),
      dilation_rates=(1,),
      is_causal=is_causal,
      implementation="xla",
    ),
    "dense, jax.nn": jax_dense,
  }
  if platform == "gpu":
    found["dense, cuDNN"] = functools.partial(jax_dense, implementation="cudnn")
  if platform == "tpu":
    found["dense, Pallas"] = functools.partial(_splash, is_causal=is_causal)
  return found


def _splash(query, key, value, *, is_causal):
  """Returns dense attention (B, T, N, H) by the TPU kernel that JAX ships.

  It refuses a length that is no multiple of 128.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention

  length, heads, width = query.shape[1:]
  kind = splash_attention.CausalMask if is_causal else splash_attention.FullMask
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([kind((length, length))] * heads),
    # Of queries and of keys, forward and in both programs backward.
    block_sizes=splash_attention.BlockSizes(*[math.gcd(length, 512)] * 8),
    head_shards=1,
    q_seq_shards=1,
  )
  query = query * jnp.asarray(width**-0.5, query.dtype)
  rows = (x.swapaxes(1, 2) for x in (query, key, value))
  return jax.vmap(kernel)(*rows).swapaxes(1, 2)


def measure(
  setting: Setting,
  length: int,
  *,
  names: Sequence[str],
  mode: str,
  repeats: int,
  say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
  """Measures some cores at one length; a record each. `say` gets what it does.

  A core that does not fit into memory gets a record with `skipped`, the
  reason, in place of the times.
  """
  shape = (setting.batch, length, setting.num_heads, setting.head_dim)
  records, compiled = [], {}
  for name, core in cores(setting, length).items():
    if name not in names:
      continue
    say(f"{mode}, {length:,}: compiling {name}")
    records.append({"core": name, "length": length, "mode": mode})
    try:
      compiled[name] = _compile(core, shape, setting.dtype, mode, records[-1])
    except MemoryError as error:
      records[-1]["skipped"] = str(error)
    except (ValueError, RuntimeError) as e:
      records[-1]["skipped"] = f"does not compile: {str(e).splitlines()[0]}"
  tensors = [
    jax.random.normal(jax.random.key(i), shape, setting.dtype)
    for i in range(3 if mode == "forward" else 4)
  ]
  size = _MATMUL[jax.default_backend()]
  matrices = [
    jax.random.normal(jax.random.key(i), (size, size), setting.dtype)
    for i in range(2)
  ]
  matmul = functools.partial(jax.jit(jnp.matmul), *matrices)
  _seconds(matmul)
  times = {name: [] for name in compiled}
  rates = []
  for repeat in range(repeats + 1):  # the first warms up
    for name, run in compiled.items():
      say(f"{mode}, {length:,}: run {repeat} of {repeats}, {name}")
      # The best of a few: the first finds processors asleep.
      rate = 2 * size**3 / min(_seconds(matmul) for _ in range(3))
      seconds = _seconds(functools.partial(run, *tensors))
      if repeat:
        rates.append(rate)
        times[name].append(seconds)
  for record in records:
    if record["core"] in times:
      seconds = statistics.median(times[record["core"]])
      record.update(_rates(setting, length, record, seconds, rates))
  return records


def draw(document: dict, path: str | os.PathLike) -> mpl_figure.Figure:
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


def _compile(core, shape, dtype, mode, record):
  """Returns the compiled core, or raises MemoryError if it would not fit."""
  tensor = jax.ShapeDtypeStruct(shape, dtype)
  if mode == "forward":
    lowered = jax.jit(core).lower(tensor, tensor, tensor)
  else:

    def backward(query, key, value, dout):
      return jax.vjp(core, query, key, value)[1](dout)

    lowered = jax.jit(backward).lower(tensor, tensor, tensor, tensor)
  start = time.process_time()
  compiled = lowered.compile()
  record["compile_cpu_seconds"] = time.process_time() - start
  memory = compiled.memory_analysis()
  record["temporary_bytes"] = memory.temp_size_in_bytes
  needed = (
    memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
  )
  free = _free_bytes()
  if needed > 0.9 * free:
    raise MemoryError(
      f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    )
  return compiled


def _rates(setting, length, record, seconds, matmul_rates):
  """Returns the figures of one core at one length."""
  pattern = setting.pattern(length)
  if record["core"] != "LongNet":
    pattern = analysis.dense(pattern)
  cost = analysis.cost(pattern, head_dim=setting.head_dim)
  work = cost.forward_flops
  if record["mode"] != "forward":
    work += cost.backward_flops
  rate = setting.batch * work / seconds
  matmul = statistics.median(matmul_rates)
  peak = chips.peak_flops()
  return {
    "seconds": seconds,
    "microseconds_per_token": 1e6 * seconds / (setting.batch * length),
    "useful_flops_per_second": rate,
    "matmul_flops_per_second": matmul,
    "share_of_matmul": rate / matmul,
    "share_of_peak": rate / peak if peak else None,
  }


def _free_bytes():
  stats = jax.devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _seconds(run):
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


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
