"""Every key of an experiment with its default; the other configs change some.

Keys are fields of dataclasses, whose docstrings say what each means and whose
annotations say what it may be:

  config.model      LongNetConfig in longnet_jax/models/config.py
  config.data       DataConfig in longnet_jax/data/config.py
  config.seed, config.training, config.optimizer, config.mesh
                    longnet_jax/training/config.py

What has no default there is that of LongNet's first language model (arXiv
2307.02486, section 4.1), over bytes.
"""

import dataclasses

from ml_collections import config_dict

from longnet_jax.data import config as data_config
from longnet_jax.data import tokenizers
from longnet_jax.models import config as model_config
from longnet_jax.models import sizes
from longnet_jax.training import config as config_lib


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = config_lib.ExperimentConfig.seed
  config.model = _group(
    model_config.LongNetConfig,
    vocab_size=tokenizers.ByteTokenizer().vocab_size,
    num_kv_heads=config_dict.placeholder(int),  # None has no type to parse
    **sizes.SIZES["125M"],
    **sizes.BRANCHES,
  )
  config.data = _group(data_config.DataConfig)
  config.training = _group(config_lib.TrainingConfig)
  config.optimizer = _group(
    config_lib.OptimizerConfig,
    decay_steps=config.training.get_oneway_ref("steps"),  # unless set
  )
  config.mesh = _group(config_lib.MeshConfig)
  return config


def _group(cls, **values) -> config_dict.ConfigDict:
  """The defaults of a dataclass, and values in their place."""
  defaults = {field.name: field.default for field in dataclasses.fields(cls)}
  return config_dict.ConfigDict(defaults | values)
