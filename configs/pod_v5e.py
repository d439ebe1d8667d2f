"""LongNet of 125M parameters at a context of 2M tokens, on a v5e-256 pod.

On every host of a 16 x 16 slice, 256 chips (docs/pods.md has the commands):

  python -m experiments.train --config=configs/pod_v5e.py \
    --workdir=/SHARED/RUN --config.data.folder=CODE

Each window lies on 64 chips, 32,768 tokens on each, four windows a step: 8.4M
tokens. The longest segment is the whole window. Heads are 128 wide, as the
matrix unit is. The model's work is 7.5 PFLOP a step, 29 TFLOP a chip.
docs/plans/pod_v5e.json says what a step takes, as compiled for such a pod.
"""

from ml_collections import config_dict

from configs import paper
from longnet_jax.models import sizes

DEVICES = 256
_WINDOW = 2**21


def get_config() -> config_dict.ConfigDict:
  config = paper.get_config("125M")
  config.model.update(sizes.geometric_branches(_WINDOW))
  config.model.num_heads = 6
  config.model.remat = "dots"
  config.model.position = "rope"  # xPos ends at some tens of thousands
  config.model.max_positions = _WINDOW
  config.data.level = "repository"  # files are shorter than a window
  config.data.window = _WINDOW
  config.training.batch_size = 4
  config.training.loss_chunk = 2048 * 64  # 2048 positions a device
  config.training.steps = 20_000
  config.mesh.data = 4
  config.mesh.seq = 64
  return config
