"""LongNet of 125M parameters at the longest context of a v5e-256 pod.

On every host of a 16 x 16 slice, 256 chips (docs/pods.md has the commands):

  python -m experiments.train --config=configs/pod_v5e_longest.py \
    --workdir=gs://BUCKET/RUN --config.data.folder=gs://BUCKET/TEXT

A step reads one sequence of 2^27 tokens of one stream of documents, 524,288 on
each chip, and the longest segment is all of them: twice as many do not fit.
docs/plans/pod_v5e_longest.json says what a step takes, as compiled for such a
pod.
"""

from ml_collections import config_dict

from configs import pod_v5e
from longnet_jax.models import sizes

DEVICES = 256
_WINDOW = 2**27


def get_config() -> config_dict.ConfigDict:
  config = pod_v5e.get_config()
  config.model.update(sizes.geometric_branches(_WINDOW))
  config.model.max_positions = _WINDOW
  # Memory holds one block, and the host the inputs of the others.
  config.model.remat = "offload"
  config.model.ffn_chunk = 65_536 * DEVICES
  config.data.layout = "stream"
  config.data.window = _WINDOW
  config.training.batch_size = 1
  config.training.loss_chunk = 2048 * DEVICES
  config.mesh.data = 1
  config.mesh.seq = DEVICES
  return config
