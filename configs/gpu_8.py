"""LongNet of 125M parameters at a context of 131K tokens, on a host of 8 GPUs.

  python -m experiments.train --config=configs/gpu_8.py --workdir=DIR \
    --config.data.folder=CODE

The text is one stream of documents, which see one another: cuDNN needs no mask.
Each window lies on four GPUs, 32,768 tokens on each, and two are computed at a
time; a step of 0.5M tokens has four. The model's work is
0.47 PFLOP a step, 58 TFLOP a GPU: 0.15 s at 40% of the peak of an H100.
"""

from ml_collections import config_dict

from configs import paper
from longnet_jax.models import sizes

DEVICES = 8
_WINDOW = 2**17


def get_config() -> config_dict.ConfigDict:
  config = paper.get_config("125M")
  config.model.update(sizes.geometric_branches(_WINDOW))
  config.model.position = "rope"  # xPos ends at some tens of thousands
  config.model.max_positions = _WINDOW
  config.data.layout = "stream"
  config.data.window = _WINDOW
  config.training.batch_size = 4
  config.training.accumulation_steps = 2
  config.training.loss_chunk = 2048 * 4  # 2048 positions a device
  config.mesh.data = 2
  config.mesh.seq = 4
  return config
