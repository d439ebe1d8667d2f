"""Encodes a slide: python -m experiments.encode_slide --workdir=DIR.

The workdir is that of experiments.import_weights; without one the weights are
random and of the released size (12 layers of width 768), or of --layers and
--width. --slide=FILE.npz has `tiles` (T, C) and `coords` (T, 2) in level-0
pixels; without one the slide is synthetic, of --num_tiles. Prints time and
memory; --out=FILE.npz gets the slide's embedding by both poolings and the
features of its tiles, --json=FILE the measurements. All may lie in a bucket.

Released size, measured: docs/slide_10k_tiles.json, docs/slide_100k_tiles.json.
"""

import io
import json
import resource
import time

from absl import flags
import jax
import numpy as np

from experiments import command, hardware
from longnet_jax import checked, storage
from longnet_jax.interop import gigapath, torchscale
from longnet_jax.models import slide_encoder, slides
from longnet_jax.training import checkpoint
from longnet_jax.training import state as state_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "of imported weights")
_SLIDE = flags.DEFINE_string("slide", None, ".npz with tiles and coords")
_NUM_TILES = flags.DEFINE_integer(
  "num_tiles", 100_000, "of a synthetic slide", lower_bound=1
)
_LAYERS = flags.DEFINE_integer("layers", 12, "of random weights", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 768, "of random weights", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, ".npz to write")
_JSON = flags.DEFINE_string("json", None, "JSON to write measurements into")


def main(_) -> None:
  """Encodes the slide that the flags name."""
  config, params = _model()
  slide = _slide(config)
  slides.check_slide(config, slide)
  # The class token stands before the tiles.
  if note := torchscale.misplaced(config, 1 + len(slide.tiles)):
    print(f"note: {note}")
  outputs, seconds = encode(config, params, slide)
  record = {
    "tiles": len(slide.tiles),
    "parameters": state_lib.num_parameters(params),
    "layers": config.num_layers,
    "width": config.model_dim,
    "dtype": config.dtype,
    "seconds_compile": round(seconds["compile"], 1),
    "seconds_run": round(seconds["run"], 1),
    "peak_gigabytes": round(_peak_bytes() / 1e9, 2),
  }
  for name, value in record.items():
    print(
      f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}"
    )
  record = {
    "command": command.line(),
    "hardware": hardware.describe(),
    **record,
  }
  if _OUT.value:
    written = io.BytesIO()
    np.savez(written, coords=slide.coords, **outputs)
    storage.write_whole(_out(), written.getvalue())
  if _JSON.value:
    text = json.dumps(record, indent=2) + "\n"
    storage.write_whole(storage.path(_JSON.value), text)


def encode(
  config: slide_encoder.SlideEncoderConfig, params, slide: slides.Slide
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Returns cls (D,), mean (D,) and features (T, D), and the seconds taken."""
  model = slide_encoder.SlideEncoder(config)
  tiles, coords, _ = slides.pad_slides([slide])

  @jax.jit
  def run(params, tiles, coords):
    variables = {"params": params}
    outputs = model.apply(variables, tiles, coords, method="outputs")
    return jax.tree.map(lambda x: x[0], outputs)

  start = time.perf_counter()
  compiled = run.lower(params, tiles, coords).compile()
  middle = time.perf_counter()
  outputs = jax.tree.map(np.asarray, compiled(params, tiles, coords))
  seconds = {"compile": middle - start, "run": time.perf_counter() - middle}
  return outputs, seconds


def synthetic_slide(num_tiles: int, tile_dim: int, tile_size: int, seed: int):
  """Returns a slide with round tissue of three kinds on a grid of tiles."""
  rng = np.random.default_rng(seed)
  edge = int(np.ceil(np.sqrt(num_tiles * 4 / np.pi))) + 2
  grid = np.stack(np.meshgrid(np.arange(edge), np.arange(edge)), -1)
  grid = grid.reshape(-1, 2)
  distance = np.linalg.norm(grid - (edge - 1) / 2, axis=1)
  inside = np.sort(np.argsort(distance, kind="stable")[:num_tiles])
  cells = grid[inside]
  kind = (distance[inside] < edge / 5) + (cells[:, 0] > 0.6 * edge).astype(int)
  centres = rng.normal(size=(3, tile_dim))
  tiles = centres[kind] + 0.5 * rng.normal(size=(num_tiles, tile_dim))
  return slides.Slide(tiles.astype(np.float32), cells * tile_size)


def _model():
  if _WORKDIR.value:
    config, params = checkpoint.load_checkpoint(_WORKDIR.value)
    if not isinstance(config, slide_encoder.SlideEncoderConfig):
      raise checked.RefusedError(
        f"{_WORKDIR.value} holds no slide encoder but a"
        f" {type(config).__name__}; import one with --kind=gigapath"
      )
    return config, params
  config = slide_encoder.SlideEncoderConfig(
    num_layers=_LAYERS.value,
    model_dim=_WIDTH.value,
    num_heads=16,
    ffn_dim=4 * _WIDTH.value,
    segment_lengths=gigapath.released_segment_lengths(262_144, 256),
    dilation_rates=(1, 2, 4, 8, 16),
    head_phase="blocked",
    padding="zeros",
    dtype="float32",
  )
  init = jax.jit(slide_encoder.SlideEncoder(config).init)
  tiles = np.zeros((1, 1, config.tile_dim), np.float32)
  coords = np.zeros((1, 1, 2), np.float32)
  return config, init(jax.random.key(0), tiles, coords)["params"]


def _slide(config):
  if _SLIDE.value is None:
    return synthetic_slide(
      _NUM_TILES.value, config.tile_dim, config.tile_size, seed=0
    )
  with storage.on_this_machine(storage.path(_SLIDE.value)) as file:
    return gigapath.read_slide(file)


def _out() -> storage.Path:
  """Where --out says, with the suffix that np.savez would add."""
  path = storage.path(_OUT.value)
  return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def _peak_bytes():
  """Most memory held: of the accelerator, or of this process."""
  stats = jax.devices()[0].memory_stats()
  if stats:
    return stats["peak_bytes_in_use"]
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
  command.run(main)
