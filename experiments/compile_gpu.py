"""What attention moves on an H100 that nobody has to own.

  python -m experiments.compile_gpu

Compiles attention in bfloat16 with XLA's compiler for that GPU and writes
docs/gpu_h100.json: kernels that run, bytes that they read and write, and the
memory between inputs and outputs. Nothing runs, so nothing is timed, and what
cuDNN takes for itself is not known. It needs `pip install 'jax[cuda13]'`.
"""

from importlib import metadata
import json
import pathlib

from absl import flags
import jax

from experiments import attention_speed, command, hardware
from longnet_jax.analysis import topology, traffic
from longnet_jax.models import sizes
from longnet_jax.ops import kernels

_OUTPUT = flags.DEFINE_string(
  "output", "docs/gpu_h100.json", "where to write what was found"
)

# Heads and their width, length, whether causal.
CASES = (
  (12, 64, 32768, True),
  (12, 64, 131072, True),
  (12, 64, 1048576, True),
  (6, 128, 32768, True),
  (12, 64, 32768, False),
)


def main(_) -> None:
  """Compiles all cases, prints a line for each, and writes them."""
  jax.config.update("jax_platforms", "cpu")
  (device,) = topology.find_devices("h100:1")
  records = []
  for heads, width, length, is_causal in CASES:
    setting = attention_speed.Setting(
      heads, width, **sizes.BRANCHES, is_causal=is_causal, dtype="bfloat16"
    )
    for mode in attention_speed.MODES:
      records.append(measure(setting, length, mode, device))
      print(records[-1], flush=True)
  document = {
    "command": command.line(),
    "hardware": hardware.describe(),
    "compiled_for": device.device_kind,
    "plugin": metadata.version("jax-cuda13-plugin"),
    "records": records,
  }
  path = pathlib.Path(_OUTPUT.value)
  path.write_text(json.dumps(document, indent=1) + "\n")
  print(f"wrote {path}")


def measure(
  setting: attention_speed.Setting, length: int, mode: str, device: jax.Device
) -> dict:
  """Returns what a pass over one sequence moves on a device, as compiled."""
  attend = attention_speed.cores(setting, length)["LongNet"]
  rows = jax.ShapeDtypeStruct(
    (setting.batch, length, setting.num_heads, setting.head_dim),
    setting.dtype,
    sharding=jax.sharding.SingleDeviceSharding(device),
  )

  def both(query, key, value, dout):
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(dout)

  with kernels.compiling_for("gpu"):
    if mode == "forward":
      lowered = jax.jit(attend).lower(rows, rows, rows)
    else:
      lowered = jax.jit(both).lower(rows, rows, rows, rows)
    compiled = lowered.compile()
  found = traffic.kernels(compiled.as_text())
  return {
    "heads": setting.num_heads,
    "head_dim": setting.head_dim,
    "length": length,
    "is_causal": setting.is_causal,
    "mode": mode,
    "kernels": sum(x.times for x in found),
    "of_cudnn": sum(x.times for x in found if x.name.startswith("__cudnn")),
    "bytes": sum(x.times * x.size for x in found),
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


if __name__ == "__main__":
  command.run(main)
