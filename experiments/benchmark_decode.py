"""The decode mode of experiments.benchmark: speed and memory by context."""

from collections.abc import Sequence
import json
import pathlib

from experiments import command
from longnet_jax import decode_speed, speed
from longnet_jax.models import config as config_lib

_VOCAB_SIZE = 264  # of bytes


def run(
  setting: speed.Setting,
  contexts: Sequence[int],
  *,
  num_layers: int,
  repeats: int,
  out: pathlib.Path,
) -> None:
  """Measures, prints a table and writes decode_BACKEND.json and .png to `out`.

  The model has the setting's heads and branches, RoPE, and a feed-forward
  network four times as wide as the heads together.
  """
  width = setting.num_heads * setting.head_dim
  config = config_lib.LongNetConfig(
    vocab_size=_VOCAB_SIZE,
    num_layers=num_layers,
    model_dim=width,
    num_heads=setting.num_heads,
    ffn_dim=4 * width,
    segment_lengths=setting.segment_lengths,
    dilation_rates=setting.dilation_rates,
    position="rope",
    dtype=setting.dtype,
  )
  title = (
    f"decoding, {num_layers} layers, {setting.num_heads} heads of"
    f" {setting.head_dim}, {setting.dtype}, {setting.batch} at once"
  )
  print(f"\n{title}\n{'context':>10}  {'core':<9}{'ms/step':>10}", end="")
  print(f"{'tokens/s':>10}{'cache MiB':>12}")
  records = []
  for context in contexts:
    found = decode_speed.measure(
      config, [context], batch=setting.batch, repeats=repeats
    )
    print("\n".join(map(_line, found)), flush=True)
    records += found
  hardware = speed.hardware()
  stem = out / f"decode_{hardware['backend']}"
  document = {
    "command": command.line(),
    "hardware": hardware,
    "title": title,
    "setting": vars(setting) | {"num_layers": num_layers},
    "records": records,
  }
  stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
  decode_speed.draw(records, stem.with_suffix(".png"), title)
  print(f"wrote {stem}.json and {stem}.png")


def _line(record):
  start = f"{record['context']:>10}  {record['core']:<9}"
  mebibytes = f"{record['cache_bytes'] / 2**20:>12.1f}"
  if "skipped" in record:
    return f"{start}{'-':>10}{'-':>10}{mebibytes}  {record['skipped']}"
  return (
    f"{start}{1e3 * record['seconds']:>10.2f}"
    f"{record['tokens_per_second']:>10.1f}{mebibytes}"
  )
