"""What chips can do by their data sheets."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
  """One device by its data sheet.

  kind: a part of JAX's `device_kind`.
  peak_flops: dense bfloat16 FLOP/s.
  hbm: bytes of memory.
  clock: cycles a second of a TPU's cores; None of others.
  links: bytes a second that a device receives in a ring, both directions used,
    along one axis of a torus, or over NVLink.
  bandwidth: bytes a second that its memory moves.
  """

  kind: str
  peak_flops: float
  hbm: int | None = None
  clock: float | None = None
  links: float | None = None
  bandwidth: float | None = None


# First match wins.
_CHIPS = (
  Chip("TPU v4", 275e12, 32 * 2**30, 1.05e9, 90e9, 1228e9),
  Chip("TPU v5 lite", 197e12, 16 * 2**30, 1.5e9, 90e9, 819e9),
  Chip("TPU v5e", 197e12, 16 * 2**30, 1.5e9, 90e9, 819e9),
  Chip("TPU v5", 459e12, 95 * 2**30, 1.75e9, 180e9, 2765e9),
  Chip("TPU v6", 918e12, 32 * 2**30, 1.75e9, 180e9, 1640e9),
  Chip("TPU7x", 2307e12),
  Chip("B200", 2250e12),
  Chip("H200", 989e12, 141 * 10**9, None, 450e9, 4800e9),
  Chip("H100 PCIe", 756e12, 80 * 10**9),
  Chip("H100", 989e12, 80 * 10**9, None, 450e9, 3352e9),
  Chip("A100", 312e12),
  Chip("L40S", 362e12),
  Chip("L4", 121e12),
  Chip("V100", 125e12),
)


def find(device: jax.Device | None = None) -> Chip | None:
  """Returns what is known of a device; by default of the first there is."""
  return named((device or jax.devices()[0]).device_kind)


def named(kind: str) -> Chip | None:
  """Returns what is known of a device of that `device_kind`."""
  return next((chip for chip in _CHIPS if chip.kind in kind), None)


def peak_flops(device: jax.Device | None = None) -> float | None:
  """bfloat16 FLOP/s of a device by its data sheet; None where not known."""
  chip = find(device)
  return chip.peak_flops if chip else None
