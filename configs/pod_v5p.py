"""LongNet of 125M parameters at a context of 33M tokens, on a v5p-256 pod.

On every host of a 4 x 4 x 8 slice, 128 chips (docs/pods.md has the commands):

  python -m experiments.train --config=configs/pod_v5p.py \
    --workdir=/SHARED/RUN --config.data.folder=CODE

One window a step lies on all chips, 262,144 tokens on each, and its longest
segment is the whole window. The text needs to be several windows long in each
split. Heads are 128 wide, as the matrix unit is. The model's work is
30 PFLOP a step, 234 TFLOP a chip. docs/plans/pod_v5p.json says what a step
takes, as compiled for such a pod.
"""

from ml_collections import config_dict

from configs import paper
from longnet_jax.models import sizes

DEVICES = 128
_WINDOW = 2**25


def get_config() -> config_dict.ConfigDict:
  config = paper.get_config("125M")
  config.model.update(sizes.geometric_branches(_WINDOW))
  config.model.num_heads = 6
  config.model.remat = "dots"
  config.model.position = "rope"  # xPos ends at some tens of thousands
  config.model.max_positions = _WINDOW
  config.data.level = "repository"  # files are shorter than a window
  config.data.window = _WINDOW
  config.training.batch_size = 1
  config.training.loss_chunk = 2048 * 128  # 2048 positions a device
  config.training.steps = 5_000
  config.mesh.seq = 128
  return config
