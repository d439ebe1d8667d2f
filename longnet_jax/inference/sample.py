"""Text from a language model: prompts in, drawn tokens out."""

from collections.abc import Callable, Sequence
import functools
import operator
from typing import Any, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from longnet_jax import checked
from longnet_jax.inference import decode, prefill
from longnet_jax.models import config as config_lib
from longnet_jax.parallel import sharding


def generate(
  config: config_lib.LongNetConfig,
  params: dict[str, Any],
  prompts: Sequence[Sequence[int] | Int[np.ndarray, " _n"]],
  *,
  max_new_tokens: SupportsIndex,
  temperature: SupportsFloat = 1.0,
  top_k: SupportsIndex | None = None,
  top_p: SupportsFloat = 1.0,
  stop_tokens: Sequence[int] | Int[np.ndarray, " _s"] = (),
  seed: SupportsIndex = 0,
  callback: Callable[[int, int], None] | None = None,
  chunk: SupportsIndex = 512,
  mesh: jax.sharding.Mesh | None = None,
) -> list[np.ndarray]:
  """Continues prompts, of any lengths, token by token.

  Args:
    config: of the model.
    params: of the model.
    prompts: token ids of each, at least one.
    max_new_tokens: most tokens to add to each.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draws among the k likeliest tokens only.
    top_p: draws among the likeliest tokens that together have this probability.
    stop_tokens: any of them ends its example and is not returned.
    seed: of the draws; example b draws the same whatever the others are.
    callback: called with (example, token) as soon as a token is there.
    chunk: see `prefill.prefill`.
    mesh: of `parallel.mesh.make_mesh`; many devices read the prompts and write
      together, see `prefill.prefill`.

  Returns:
    The new tokens of each prompt.

  Raises:
    ValueError: a setting is out of range, or the positions cannot number the
      longest prompt and its continuation.
  """
  prompts = _checked_prompts(config, prompts)
  lengths = [len(prompt) for prompt in prompts]
  # Python integers: those of NumPy lack methods, and overflow.
  max_new_tokens = _whole("max_new_tokens", max_new_tokens, 1)
  seed = _whole("seed", seed, 0, 2**31 - 1)
  top_k = config.vocab_size if top_k is None else top_k
  top_k = _whole("top_k", top_k, 1, config.vocab_size)
  stop_tokens = _checked_stops(stop_tokens)
  _check_temperature(temperature, top_p)
  needed = _check_room(config, max(lengths), max_new_tokens)
  tokens = np.zeros((len(prompts), max(lengths)), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  # Powers of two, so that prompts of many lengths share one compilation.
  room = min(1 << (needed - 1).bit_length(), config.position_limit)
  if mesh is not None:
    params = sharding.place_for_reading(params, mesh)
  logits, cache = prefill.prefill(
    config, params, tokens, lengths, max_length=room, chunk=chunk, mesh=mesh
  )
  draw = functools.partial(
    _draw,
    seed=seed,
    temperature=float(temperature),
    top_k=top_k,
    top_p=float(top_p),
  )
  new = [[] for _ in prompts]
  active = set(range(len(prompts)))
  for step in range(max_new_tokens):
    token = draw(logits, cache.position)
    if step + 1 < max_new_tokens:
      # Launched before the token is looked at, so that the device never waits.
      logits, cache = decode.decode_step(config, params, cache, token)
    found = np.asarray(token).tolist()
    active -= {i for i in active if found[i] in stop_tokens}
    for i in sorted(active):
      new[i].append(found[i])
      if callback:
        callback(i, found[i])
    if not active:
      break
  return [np.array(ids, np.int32) for ids in new]


@jax.jit
def _draw(logits, position, *, seed, temperature, top_k, top_p):
  """Returns a token (B,) of each row of logits (B, V)."""

  def draw_one(example, logits, position):
    key = jax.random.fold_in(jax.random.key(seed), example)
    key = jax.random.fold_in(key, position)
    order = jnp.argsort(logits, descending=True)
    ranked = logits[order] / jnp.where(temperature > 0, temperature, 1.0)
    shares = jax.nn.softmax(ranked)
    before = jnp.cumsum(shares) - shares
    kept = jnp.arange(len(ranked)) < top_k
    kept &= (before < top_p) | (top_p >= 1)
    rank = jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf))
    return order[jnp.where(temperature > 0, rank, 0)]

  return jax.vmap(draw_one)(jnp.arange(len(logits)), logits, position)


def _checked_prompts(config, prompts):
  """Returns each prompt as an array of ids, or raises RefusedError."""
  if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
    raise checked.RefusedError(
      f"prompts is {checked.shown(prompts)}; give a list of prompts, each a"
      " sequence of token ids (text becomes ids by a tokenizer's encode)"
    )
  if not len(prompts):
    raise checked.RefusedError("prompts is empty; give at least one prompt")
  return [
    _checked_prompt(config, i, prompt) for i, prompt in enumerate(prompts)
  ]


def _checked_prompt(config, i, prompt):
  try:
    ids = np.asarray(prompt)
  except ValueError:  # nested, and of several lengths
    ids = np.empty((0, 0))
  if ids.ndim == 1 and not len(ids):
    raise checked.RefusedError(
      f"prompt {i} is empty; begin it with the separator"
    )
  if ids.ndim != 1 or ids.dtype.kind not in "iu":
    raise checked.RefusedError(
      f"prompt {i} is {checked.shown(prompt)}; give a list of prompts, each a"
      " sequence of token ids (text becomes ids by a tokenizer's encode)"
    )
  lowest, highest = ids.min(), ids.max()
  if lowest < 0 or highest >= config.vocab_size:
    raise checked.RefusedError(
      f"prompt {i} has ids from {lowest} to {highest}; the vocabulary is 0 to"
      f" {config.vocab_size - 1}"
    )
  return ids


def _checked_stops(stop_tokens):
  """Returns the ids as a set, or raises RefusedError."""
  try:
    return {operator.index(token) for token in stop_tokens}
  except TypeError:
    raise checked.RefusedError(
      f"stop_tokens is {checked.shown(stop_tokens)}; give a sequence of token"
      " ids"
    ) from None


def _check_room(config, longest, max_new_tokens):
  """Returns the positions that are read: the last new token is not."""
  limit = config.position_limit
  numbers = f"position={config.position!r} of this model numbers {limit}"
  if longest > limit:
    raise checked.RefusedError(
      f"the longest prompt has {longest} tokens; {numbers}: shorten it"
    )
  needed = longest + max_new_tokens - 1
  if needed > limit:
    raise checked.RefusedError(
      f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need"
      f" {needed} positions; {numbers}: use max_new_tokens of at most"
      f" {limit - longest + 1}"
    )
  return needed


def _whole(name, value, lowest, highest=np.inf):
  """Returns an integer, NumPy's too, as Python's; or raises RefusedError."""
  try:
    number = operator.index(value)
  except TypeError:
    raise checked.RefusedError(
      f"{name} is {checked.shown(value)}; use a whole number"
    ) from None
  if not lowest <= number <= highest:
    bounded = highest < np.inf
    legal = f"use {lowest} to {highest}" if bounded else "it must be at least 1"
    raise checked.RefusedError(f"{name} is {checked.shown(number)}; {legal}")
  return number


def _check_temperature(temperature, top_p):
  try:
    temperature, top_p = float(temperature), float(top_p)
  except (TypeError, ValueError):
    raise checked.RefusedError(
      f"temperature is {checked.shown(temperature)} and top_p is"
      f" {checked.shown(top_p)}; both must be numbers"
    ) from None
  if not 0 <= temperature < np.inf:
    raise checked.RefusedError(
      f"temperature is {temperature}; use 0 for the likeliest token or more"
    )
  if not 0 < top_p <= 1:
    raise checked.RefusedError(
      f"top_p is {top_p}; use more than 0 and at most 1"
    )
