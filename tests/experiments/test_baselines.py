import json

import pytest

from configs import base
from experiments import baselines
from longnet_jax.analysis import costs
from longnet_jax.training import config as config_lib


def _config():
  settings = base.get_config()
  settings.model.update(num_layers=2, model_dim=32, num_heads=4, ffn_dim=64)
  return config_lib.build(settings)


def _models(**data):
  return {
    core: {
      "parameters": 7,
      "validation_bits_per_byte": 2.5,
      "data": data.get(core, {"train": "ab"}),
      "curves": [
        {"step": 1, "bits_per_byte": 3.0},
        {"step": 2, "bits_per_byte": 2.0, "validation_bits_per_byte": 2.5},
      ],
    }
    for core in baselines.LABELS
  }


def test_the_three_differ_in_their_core_alone():
  configs = baselines.variants(_config())
  assert [c.model.attention for c in configs.values()] == list(configs)
  assert list(configs) == ["dilated", "dense", "sparse"]
  counts = {baselines.num_parameters(c) for c in configs.values()}
  assert len(counts) == 1 and counts.pop() > 10_000
  assert len({repr(c.data) for c in configs.values()}) == 1


def test_sparse_has_the_flops_of_longnet():
  config = _config()
  flops = {
    core: costs.train_flops(each.model, config.data.window)
    for core, each in baselines.variants(config).items()
  }
  # The core is most of so narrow a model, and one column of its keys is little.
  assert flops["sparse"] == pytest.approx(flops["dilated"], rel=2e-3)
  assert flops["dense"] > 3 * flops["dilated"]


def test_other_parameters_are_refused(monkeypatch):
  counts = iter((1, 1, 2))
  monkeypatch.setattr(baselines, "num_parameters", lambda _: next(counts))
  with pytest.raises(ValueError, match="'sparse': 2"):
    baselines.variants(_config())


def test_json_table_and_picture(tmp_path):
  made = baselines.write(tmp_path, _models(), command="c")
  assert json.loads((tmp_path / "comparison.json").read_text()) == made
  assert made["command"] == "c"
  assert len(baselines.table(made).splitlines()) == 4
  assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_other_data_is_refused_and_nothing_written(tmp_path):
  with pytest.raises(ValueError, match="different data"):
    baselines.write(tmp_path, _models(dense={"train": "cd"}))
  assert not list(tmp_path.iterdir())
