"""Recall at a distance, for python -m experiments.study --study=reach.

  python -m experiments.study --study=reach --config=configs/reach.py \
    --workdir=DIR

A window of letters holds one digit, and asks for it at its end. Distances are
of every remainder by the longest branch's rate: some take one hop, some two.
"""

from ml_collections import config_dict

from configs import base


def get_config() -> config_dict.ConfigDict:
  config = base.get_config()
  config.model.num_layers = 2
  config.model.model_dim = 64
  config.model.num_heads = 4
  config.model.ffn_dim = 256
  config.model.segment_lengths = (32, 512)
  config.model.dilation_rates = (1, 4)
  config.model.sparse_block = 32
  config.model.sparse_summary = 1
  config.model.max_positions = 512
  config.model.dtype = "float32"
  config.data.dataset = "needle"
  config.data.needle_digits = 1
  config.data.needle_distances = tuple(range(5, 256, 7))
  config.data.window = 256
  config.training.steps = 1500
  config.training.batch_size = 16
  config.training.log_every = 100
  config.training.eval_every = 1500
  config.training.eval_batches = 16
  config.training.checkpoint_every = 500
  config.training.max_to_keep = 1
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  return config
