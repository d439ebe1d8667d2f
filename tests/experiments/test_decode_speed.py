import json

from experiments import attention_speed, decode_speed, tables
from longnet_jax.models import config as config_lib


def test_a_cache_that_does_not_fit_is_left_out():
  config = config_lib.LongNetConfig(
    vocab_size=8,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    ffn_dim=8,
    segment_lengths=(8,),
    dilation_rates=(2,),
    position="rope",
    sparse_block=8,
    sparse_summary=0,
    dtype="float32",
  )
  # Four rows of each head, eight of the local block, and far more if dense.
  records = decode_speed.measure(
    config, [1000], repeats=2, max_cache_bytes=1000
  )
  found = {record["core"]: record for record in records}
  assert found["dilated"]["cache_bytes"] == 4 * 2 * 4 * 2 * 4
  assert found["sparse"]["cache_bytes"] == 8 * 2 * 4 * 2 * 4
  assert found["dense"]["skipped"] == "its cache is larger than 1000 bytes"
  assert "seconds" not in found["dense"]
  for core in ("dilated", "sparse"):
    rate = found[core]["tokens_per_second"]
    assert abs(rate * found[core]["seconds"] - 1) < 1e-9


def test_a_sweep_is_printed_and_written(tmp_path, capsys):
  setting = attention_speed.Setting(2, 4, (8, 16), (1, 2))
  decode_speed.run(setting, [16, 64], num_layers=1, repeats=3, out=tmp_path)
  printed = capsys.readouterr().out
  (path,) = tmp_path.glob("decode_*.json")
  assert path.with_suffix(".png").stat().st_size > 5000
  document = json.loads(path.read_text())
  records = document["records"]
  assert len(records) == 6
  assert "64  LongNet's reach: the window of 64 is longer than the" in printed
  ((_, rows),) = tables.decoding(document)
  assert [row[1] for row in rows] == ["16", "16"]
  assert rows[0][2] > rows[1][2]
  for record in records:
    assert f"{record['tokens_per_second']:.1f}" in printed
  cache_bytes = {(r["core"], r["context"]): r["cache_bytes"] for r in records}
  assert cache_bytes["dilated", 16] == cache_bytes["dilated", 64]
  assert cache_bytes["dense", 16] < cache_bytes["dense", 64]
