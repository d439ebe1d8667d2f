"""Moves named torch tensors into a parameter tree and back, all or nothing."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import numpy as np

from longnet_jax import checked

State = dict[str, np.ndarray]
_WRAPPERS = frozenset(
  (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
  )
)


class Tensor(NamedTuple):
  """One torch tensor and the parameter that holds its numbers.

  Attributes:
    name: torch's; {} stands for the number of a layer.
    path: ours, with "/" between names. Where `name` has a {} the parameter has
      the layers as its first axis.
    kind: "vector" (axes flattened), "matrix" (outputs first, inputs second),
      "convolution" (outputs first), or "array" (the same axes).
    inputs: number of leading axes of our matrix that are its inputs.
    ones: leading axes of size 1 that torch has and we have not.
  """

  name: str
  path: str
  kind: str = "vector"
  inputs: int = 1
  ones: int = 0

  @property
  def stacked(self) -> bool:
    """Whether the parameter holds this tensor of every layer."""
    return "{}" in self.name

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Torch's shape of a parameter of ours (without the axis of layers)."""
    rest = math.prod(shape[self.inputs :])
    return (1,) * self.ones + {
      "vector": (math.prod(shape),),
      "matrix": (rest, math.prod(shape[: self.inputs])),
      "convolution": (shape[-1], *shape[:-1]),
      "array": shape,
    }[self.kind]

  def from_torch(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our parameter of the given shape."""
    if self.kind in ("matrix", "convolution"):
      array = array.reshape(array.shape[0], -1).T
    return array.reshape(shape)

  def to_torch(self, array: np.ndarray) -> np.ndarray:
    """Torch's tensor of our parameter."""
    shape = self.torch_shape(array.shape)
    if self.kind in ("matrix", "convolution"):
      array = array.reshape(-1, shape[0]).T
    return np.ascontiguousarray(array.reshape(shape))


def convert(
  state: Mapping[str, np.ndarray], tensors: Sequence[Tensor], abstract: Any
) -> dict[str, Any]:
  """Returns the parameters that `tensors` finds in a torch state.

  Args:
    state: name -> array; every entry must be used.
    tensors: where each parameter of `abstract` comes from.
    abstract: the parameter tree as shapes.

  Raises:
    ValueError: names the missing, the unused and the misshapen tensors, or one
      with numbers that are not finite.
  """
  shapes = _shapes(abstract)
  _check(state, tensors, shapes)
  flat = {}
  for tensor in tensors:
    shape = shapes[tensor.path]
    if not tensor.stacked:
      flat[tensor.path] = tensor.from_torch(_float32(state, tensor.name), shape)
      continue
    flat[tensor.path] = np.stack(
      [
        tensor.from_torch(_float32(state, tensor.name.format(i)), shape[1:])
        for i in range(shape[0])
      ]
    )
  return traverse_util.unflatten_dict(flat, sep="/")


def export(params: Mapping[str, Any], tensors: Sequence[Tensor]) -> State:
  """Returns the torch state that `convert` turns into `params`."""
  flat = traverse_util.flatten_dict(params, sep="/")
  paths = {tensor.path for tensor in tensors}
  problems = _listed("missing", paths - flat.keys())
  problems += _listed("unknown", flat.keys() - paths)
  if problems:
    raise checked.RefusedError(
      f"the parameters do not fit the config: {problems}"
    )
  state = {}
  for tensor in tensors:
    array = np.asarray(flat[tensor.path])
    if not tensor.stacked:
      state[tensor.name] = tensor.to_torch(array)
      continue
    for i, layer in enumerate(array):
      state[tensor.name.format(i)] = tensor.to_torch(layer)
  return state


def abstract_params(model, *inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
  """The parameter tree of a Flax model as shapes, at no cost."""
  return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def unwrapped(
  state: Mapping[str, np.ndarray], anchor: str
) -> dict[str, np.ndarray]:
  """Takes away what programs around a model put before its tensors' names.

  That is what DataParallel, torch.compile, FSDP and activation checkpoints add,
  and what stands before `anchor`, a name that a model has once.
  """
  names = {
    name: ".".join(p for p in name.split(".") if p not in _WRAPPERS)
    for name in state
  }
  found = [
    name
    for name in names.values()
    if name == anchor or name.endswith(f".{anchor}")
  ]
  prefix = found[0].removesuffix(anchor) if len(found) == 1 else ""
  bare = {
    names[name].removeprefix(prefix): array for name, array in state.items()
  }
  if len(bare) < len(state):
    raise checked.RefusedError(
      "the state has tensors that differ in nothing but a prefix, such as"
      f" {prefix or 'module.'}; leave out those of other models"
    )
  return bare


def count_layers(state: Mapping[str, np.ndarray], prefix: str) -> int:
  """How many layers PREFIX0., PREFIX1., ... a state has, without gaps.

  Raises:
    ValueError: there are none, or one is missing.
  """
  numbers = {
    int(number)
    for name in state
    if name.startswith(prefix)
    and (number := name[len(prefix) :].partition(".")[0]).isdecimal()
  }
  if not numbers:
    raise checked.RefusedError(
      f"the state has no tensor {prefix}0...; it begins with"
      f" {', '.join(sorted(state)[:3]) or 'nothing'}"
    )
  gaps = set(range(len(numbers))) - numbers
  if gaps:
    raise checked.RefusedError(
      f"the state has {prefix}{max(numbers)} and no {prefix}{min(gaps)}"
    )
  return len(numbers)


def shape_of(
  state: Mapping[str, np.ndarray], name: str, rank: int
) -> tuple[int, ...]:
  """The shape of a tensor that sizes are read from."""
  if name not in state:
    raise checked.RefusedError(f"the state has no tensor {name}")
  shape = np.shape(state[name])
  if len(shape) != rank or 0 in shape:
    raise checked.RefusedError(
      f"{name} has shape {shape}; it must have {rank} axes, none of them empty"
    )
  return shape


def _shapes(abstract):
  flat = traverse_util.flatten_dict(abstract, sep="/")
  return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _check(state, tensors, shapes):
  """Raises ValueError unless state and parameters cover each other."""
  paths = {tensor.path for tensor in tensors}
  if paths != shapes.keys():
    raise checked.RefusedError(
      f"the table of tensors differs in {sorted(paths ^ shapes.keys())}"
    )
  expected = {}
  for tensor in tensors:
    shape = shapes[tensor.path]
    if tensor.stacked:
      torch_shape = tensor.torch_shape(shape[1:])
      names = [tensor.name.format(i) for i in range(shape[0])]
      expected.update(dict.fromkeys(names, torch_shape))
    else:
      expected[tensor.name] = tensor.torch_shape(shape)
  wrong = [
    f"{name} is {np.shape(state[name])} instead of {expected[name]}"
    for name in expected
    if name in state and np.shape(state[name]) != expected[name]
  ]
  problems = _listed("missing", expected.keys() - state.keys())
  problems += _listed("not used", state.keys() - expected.keys())
  problems += _listed("of another shape", wrong)
  if problems:
    raise checked.RefusedError(f"the state does not fit the config: {problems}")


def _listed(what, names):
  names = sorted(names)
  return f"[{len(names)} {what}: {', '.join(names)}]" if names else ""


def _float32(state, name):
  array = np.asarray(state[name])
  if array.dtype.kind not in "fV":  # V: bfloat16 is a type of its own
    raise checked.RefusedError(
      f"{name} has type {array.dtype}; it must be a float type"
    )
  with np.errstate(over="ignore"):
    numbers = array.astype(np.float32)
  if not np.isfinite(numbers).all():
    raise checked.RefusedError(
      f"{name} has numbers that are not finite in float32; import weights of a"
      " run that did not diverge"
    )
  return numbers
