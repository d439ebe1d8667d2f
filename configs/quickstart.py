"""A small LongNet that learns to read Python's own source code on a CPU.

  python -m experiments.train --config=configs/quickstart.py --workdir=DIR

One window of 1,024 bytes a step: on so few tokens, many small steps learn more
than few large ones.
"""

from ml_collections import config_dict

from configs import base


def get_config() -> config_dict.ConfigDict:
  config = base.get_config()
  config.model.num_layers = 4
  config.model.model_dim = 128
  config.model.num_heads = 4
  config.model.ffn_dim = 512
  config.model.segment_lengths = (128, 512, 1024)
  config.model.dilation_rates = (1, 2, 4)
  config.model.sparse_block = 128
  config.model.sparse_summary = 8
  config.model.max_positions = 1024
  config.model.dtype = "float32"
  config.data.window = 1024
  config.training.steps = 2000
  config.training.batch_size = 1
  config.training.loss_chunk = 1024
  config.training.log_every = 25
  config.training.eval_every = 500
  config.training.eval_batches = 64
  config.training.checkpoint_every = 250
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 200
  return config
