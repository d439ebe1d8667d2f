"""The paper's LongNet at a context of 32K and 0.5M tokens a step, by its size.

  python -m experiments.train --config=configs/paper.py:125M --workdir=DIR \
    --config.data.folder=CODE --config.mesh.data=DEVICES

Sizes are 125M, 350M, 760M and 2.7B parameters. The paper trains on The Stack
with cl100k_base; any folder of text will do, with a byte-level BPE made from
it.
"""

from ml_collections import config_dict

from configs import base
from longnet_jax import checked
from longnet_jax.models import sizes

_VOCABULARY = 50_304


def get_config(size: str = "125M") -> config_dict.ConfigDict:
  if size not in sizes.SIZES:
    checked.refuse("the size", size, f"one of {', '.join(sizes.SIZES)}")
  config = base.get_config()
  config.model.update(sizes.SIZES[size])
  config.model.vocab_size = _VOCABULARY
  config.model.tie_embeddings = True
  config.model.remat = "full"  # or a window of 32K fills an accelerator
  config.data.tokenizer = "bpe"
  config.data.bpe_vocab_size = _VOCABULARY
  return config
