"""Models that two cores train in minutes, for python -m experiments.study.

Python's standard library at repository level: the files of a package, joined,
repeat names that a model can copy from far. `data.window` is the longest
context of a study; the others are parts of it, with as many tokens a batch.

On so little text a model learns faster from short windows than from long ones,
and after as many tokens knows more, whatever the long ones could tell it. So
the runs of a study go on from a dense one of the shortest context:

  for seed in 0 1; do
    python -m experiments.train --config=configs/study.py \
      --workdir=runs/short/dense_32_seed$seed --config.seed=$seed \
      --config.data.seed=$seed --config.model.attention=dense \
      --config.data.window=32 --config.training.batch_size=128 \
      --config.optimizer.learning_rate=6e-3 --config.optimizer.warmup_steps=100
  done
  python -m experiments.study --study=lengths --workdir=runs/study \
    --config.training.init_from='runs/short/dense_32_seed{seed}'

That model has 0.2M parameters. configs/study.py:1.3M is one of six layers that
reads twice as far; its shortest context is 64, and its first runs have
--config.data.window=64 --config.training.batch_size=64
--config.training.steps=640 --config.training.eval_every=640.
"""

from ml_collections import config_dict

from configs import base
from longnet_jax import checked

_VOCABULARY = 512


def get_config(size: str = "0.2M") -> config_dict.ConfigDict:
  if size not in ("0.2M", "1.3M"):
    checked.refuse("the size", size, "one of 0.2M, 1.3M")
  config = base.get_config()
  config.model.vocab_size = _VOCABULARY
  config.model.num_layers = 2
  config.model.model_dim = 64
  config.model.num_heads = 4
  config.model.ffn_dim = 256
  config.model.segment_lengths = (32, 128, 512)
  config.model.dilation_rates = (1, 2, 4)
  config.model.sparse_block = 32
  config.model.sparse_summary = 4
  config.model.max_positions = 512
  config.model.dtype = "float32"
  config.data.level = "repository"
  # Tables of characters and a dump of the documentation are no code.
  config.data.exclude += ("encodings", "pydoc_data", "_sysconfigdata*")
  config.data.test_fraction = 0.1
  config.data.tokenizer = "bpe"
  config.data.bpe_vocab_size = _VOCABULARY
  config.data.window = 512
  config.training.steps = 640
  config.training.batch_size = 4
  config.training.log_every = 40
  config.training.eval_every = 640
  config.training.eval_batches = 32
  config.training.checkpoint_every = 160
  config.training.max_to_keep = 1
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 50
  if size == "1.3M":
    _enlarge(config)
  return config


def _enlarge(config):
  config.model.num_layers = 6
  config.model.model_dim = 128
  config.model.ffn_dim = 512
  config.model.segment_lengths = (64, 256, 1024)
  config.model.sparse_block = 64
  config.model.sparse_summary = 8
  config.model.max_positions = 1024
  config.data.window = 1024
  config.training.steps = 320
  config.training.batch_size = 8
  config.training.eval_every = 320
  config.training.checkpoint_every = 80
  config.optimizer.learning_rate = 3e-3
