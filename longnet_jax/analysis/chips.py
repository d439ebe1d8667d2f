"""What chips can do by their data sheets."""

import jax

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by a part
# of `device_kind`. First match wins.
_PEAKS = (
  ("TPU v4", 275e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v6", 918e12),
  ("TPU7x", 2307e12),
  ("B200", 2250e12),
  ("H200", 989e12),
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L4", 121e12),
  ("V100", 125e12),
)


def peak_flops(device: jax.Device | None = None) -> float | None:
  """bfloat16 FLOP/s of a device by its data sheet; None where not known."""
  kind = (device or jax.devices()[0]).device_kind
  return next((peak for name, peak in _PEAKS if name in kind), None)
