"""One sequence of 2^30 tokens: LongNet of 125M parameters on a v5p-2048 pod.

On every host of an 8 x 8 x 16 slice, 1,024 chips (docs/pods.md has the
commands):

  python -m experiments.train --config=configs/longnet_1b_tokens.py \
    --workdir=gs://BUCKET/RUN --config.data.folder=gs://BUCKET/TEXT

The text is one stream of documents, which see one another; a step reads 2^30
tokens of it, a million on each chip, and the longest segment is all of them.
docs/plans/longnet_1b_tokens.json says what a step takes, as compiled for such a
pod, which nobody has run yet.
"""

from ml_collections import config_dict

from configs import pod_v5p
from longnet_jax.models import sizes

DEVICES = 1024
_WINDOW = 2**30


def get_config() -> config_dict.ConfigDict:
  config = pod_v5p.get_config()
  # The last factor is 2, not 4: so long is the sequence.
  branches = sizes.geometric_branches(_WINDOW)
  config.model.segment_lengths = (*branches["segment_lengths"][:-1], _WINDOW)
  config.model.dilation_rates = (
    *branches["dilation_rates"][:-1],
    _WINDOW // 2048,
  )
  config.model.max_positions = _WINDOW
  # Of a million tokens a chip memory holds one block, and the host the rest.
  config.model.remat = "offload"
  config.model.ffn_chunk = 65_536 * DEVICES
  config.data.layout = "stream"
  config.data.window = _WINDOW
  config.training.loss_chunk = 2048 * DEVICES
  config.mesh.seq = DEVICES
  return config
