"""LongNet of 125M parameters at a context of 1M tokens, on a host of 8 GPUs.

  python -m experiments.train --config=configs/gpu_8.py --workdir=DIR \
    --config.data.folder=CODE

The text is one stream of documents, which see one another: cuDNN needs no mask.
One window a step lies on all GPUs, 131,072 tokens on each, and its longest
segment is the whole window. The model's work is 0.94 PFLOP a step, 117 TFLOP a
GPU. docs/plans/gpu_8.json says what a step takes, as compiled for eight H100s.
"""

from ml_collections import config_dict

from configs import paper
from longnet_jax.models import sizes

DEVICES = 8
_WINDOW = 2**20


def get_config() -> config_dict.ConfigDict:
  config = paper.get_config("125M")
  # The last factor is 2, not 4: so long is the window.
  branches = sizes.geometric_branches(_WINDOW)
  config.model.segment_lengths = (*branches["segment_lengths"][:-1], _WINDOW)
  config.model.dilation_rates = (
    *branches["dilation_rates"][:-1],
    _WINDOW // 2048,
  )
  config.model.remat = "dots"
  config.model.position = "rope"  # xPos ends at some tens of thousands
  config.model.max_positions = _WINDOW
  config.data.layout = "stream"
  config.data.window = _WINDOW
  config.training.batch_size = 1
  config.training.loss_chunk = 2048 * 8  # 2048 positions a device
  config.training.steps = 150_000
  config.mesh.seq = 8
  return config
