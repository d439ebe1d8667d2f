"""Every key of an experiment with its meaning; the other configs change some.

These are the sizes, the optimizer and the attention of LongNet's first
language model (arXiv 2307.02486, section 4.1) on the text of the running
Python's standard library.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0  # of initial parameters and dropout; data has its own
  config.model = get_model()
  config.data = get_data()
  config.training = get_training()
  config.optimizer = get_optimizer(config.training.get_oneway_ref("steps"))
  config.mesh = config_dict.ConfigDict()
  config.mesh.data = 1  # devices that share the batch
  config.mesh.seq = 1  # devices that share each sequence
  config.mesh.model = 1  # devices that share heads and feed-forward width
  return config


def get_model() -> config_dict.ConfigDict:
  model = config_dict.ConfigDict()
  model.vocab_size = 264  # at least the ids of the tokenizer; bytes have 264
  model.num_layers = 12
  model.model_dim = 768
  model.num_heads = 12
  model.num_kv_heads = config_dict.placeholder(int)  # None: as many as heads
  model.ffn_dim = 3072
  model.attention = "dilated"  # or "dense", "sparse"
  model.segment_lengths = (2048, 4096, 8192, 16384, 32768)  # w of each branch
  model.dilation_rates = (1, 2, 4, 6, 12)  # r of each branch
  model.head_phase = "interleaved"  # or "blocked", as torchscale
  model.padding = "mask"  # or "zeros", as torchscale
  model.mixing_gradient = True  # False detaches the mixing weights
  model.sparse_block = 2048  # of attention="sparse"
  model.sparse_summary = 128  # columns of each block that later blocks see
  model.position = "xpos"  # or "rope", "none"
  model.max_positions = 32768  # longest sequence meant; xPos is centred on half
  model.rotary_base = 10000.0
  model.xpos_scale_base = 512.0
  model.norm_position = "pre"  # or "post"
  model.sub_layernorm = True
  model.deepnorm = False
  model.tie_embeddings = False
  model.dropout_rate = 0.0
  model.attention_dropout_rate = 0.0
  model.drop_path_rate = 0.0
  model.layernorm_epsilon = 1e-5
  model.dtype = "bfloat16"  # of activations; parameters are float32
  model.remat = "full"  # what the backward pass recomputes; "none", "dots"
  model.scan_layers = True  # one compiled block for all layers
  return model


def get_data() -> config_dict.ConfigDict:
  data = config_dict.ConfigDict()
  data.dataset = "source_code"  # or "needle", or a tfds dataset's name
  data.folder = ""  # of source files; "" is Python's standard library
  data.include = ("*.py",)
  data.exclude = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    ".*",
  )
  data.level = "file"  # or "repository": files of a package joined
  data.validation_fraction = 0.05
  data.test_fraction = 0.05
  data.text_feature = "text"  # of a tfds dataset
  data.data_dir = ""  # of tfds datasets; "" is tfds' default
  data.cache_dir = ""  # of tokenized text; "" is data_dir
  data.tokenizer = "bytes"  # or "bpe"
  data.bpe_vocab_size = 8192
  data.window = 32768  # positions of a sequence
  data.layout = "packed"  # or "long": one document a window
  data.seed = 0  # of the order of windows
  data.needle_distances = (64, 256, 1024)  # of dataset="needle"
  data.needle_digits = 4
  data.needle_windows = 256
  return data


def get_training() -> config_dict.ConfigDict:
  training = config_dict.ConfigDict()
  training.steps = 300_000
  training.batch_size = 16  # windows a step, over all devices: 0.5M tokens
  training.accumulation_steps = 1  # parts of a batch, computed one by one
  training.loss_chunk = 2048  # positions whose logits exist at once
  training.log_every = 50
  training.eval_every = 1000
  training.eval_batches = 16
  training.checkpoint_every = 1000
  training.max_to_keep = 3  # latest, beside the best by validation
  return training


def get_optimizer(steps) -> config_dict.ConfigDict:
  optimizer = config_dict.ConfigDict()
  optimizer.learning_rate = 6e-4  # peak
  optimizer.schedule = "polynomial"  # or "cosine", "constant"
  optimizer.warmup_steps = 750
  optimizer.decay_steps = steps  # follows training.steps unless set
  optimizer.decay_power = 1.0  # of the polynomial; 1 is linear
  optimizer.final_learning_rate = 0.0
  optimizer.beta1 = 0.9
  optimizer.beta2 = 0.98
  optimizer.epsilon = 1e-8
  optimizer.weight_decay = 0.01
  optimizer.clip_norm = 1.0  # 0 turns it off
  return optimizer
