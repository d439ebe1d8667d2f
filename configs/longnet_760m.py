"""LongNet of 760M parameters at a context of 32K and 0.5M tokens a step.

  python -m experiments.train --config=configs/longnet_760m.py --workdir=DIR \
    --config.data.folder=CODE --config.mesh.data=DEVICES

The paper trains on The Stack with cl100k_base; any folder of text will do, with
a byte-level BPE made from it.
"""

from ml_collections import config_dict

from configs import base
from longnet_jax.models import sizes


def get_config() -> config_dict.ConfigDict:
  config = base.get_config()
  config.model.update(sizes.SIZES["760M"])
  config.model.update(sizes.BRANCHES)
  config.data.tokenizer = "bpe"
  config.data.bpe_vocab_size = 50_304
  config.model.vocab_size = 50_304
  config.model.tie_embeddings = True
  return config
