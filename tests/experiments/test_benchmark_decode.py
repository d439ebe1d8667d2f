import json

from experiments import benchmark_decode
from longnet_jax import speed


def test_a_sweep_is_printed_and_written(tmp_path, capsys):
  setting = speed.Setting(2, 4, (8, 16), (1, 2))
  benchmark_decode.run(setting, [16, 64], num_layers=1, repeats=3, out=tmp_path)
  printed = capsys.readouterr().out
  (path,) = tmp_path.glob("decode_*.json")
  assert path.with_suffix(".png").stat().st_size > 5000
  records = json.loads(path.read_text())["records"]
  assert len(records) == 6
  for record in records:
    assert f"{record['tokens_per_second']:.1f}" in printed
  cache_bytes = {(r["core"], r["context"]): r["cache_bytes"] for r in records}
  assert cache_bytes["dilated", 16] == cache_bytes["dilated", 64]
  assert cache_bytes["dense", 16] < cache_bytes["dense", 64]
