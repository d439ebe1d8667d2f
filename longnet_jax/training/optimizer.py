"""AdamW with the paper's constants, its schedule and gradient clipping."""

import jax
import optax

from longnet_jax.training import config as config_lib

# Names of parameters that weight decay leaves alone.
_UNDECAYED = ("scale", "bias")


def make_schedule(config: config_lib.OptimizerConfig) -> optax.Schedule:
  """Learning rate by step: linear warmup, then the named decay.

  With u = (step - warmup) / (decay_steps - warmup) clipped to [0, 1], peak p
  and final rate f: polynomial f + (p - f)(1 - u)^power, cosine
  f + (p - f)(1 + cos(pi u)) / 2, constant p.
  """
  peak, final = config.learning_rate, config.final_learning_rate
  length = config.decay_steps - config.warmup_steps
  if config.schedule == "polynomial":
    decay = optax.polynomial_schedule(peak, final, config.decay_power, length)
  elif config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(peak, length, alpha=final / peak)
  else:
    decay = optax.constant_schedule(peak)
  if not config.warmup_steps:
    return decay
  # peak (step + 1) / warmup: the first update already moves.
  warmup = optax.linear_schedule(
    peak / config.warmup_steps, peak, config.warmup_steps - 1
  )
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
  config: config_lib.OptimizerConfig,
) -> optax.GradientTransformation:
  """Clipping by global norm, Adam, decoupled weight decay, learning rate."""
  clip = (
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  adamw = optax.adamw(
    make_schedule(config),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  return optax.chain(clip, adamw)


def decayed(params) -> dict:
  """True for each parameter that weight decay acts on."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in _UNDECAYED, params
  )
