"""A model that two cores train in minutes, for python -m experiments.study.

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
"""

from ml_collections import config_dict

from configs import base

_VOCABULARY = 512


def get_config() -> config_dict.ConfigDict:
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
  return config
