"""Names of topologies; a compiler that is missing is named."""

import types

import jax
from jax.experimental import topologies
import pytest

from longnet_jax import checked
from longnet_jax.analysis import topology


@pytest.mark.parametrize(
  "name, platform, peak, devices",
  [
    ("v4:4x4x8", "tpu", 275e12, 128),
    ("v5e:16x16", "tpu", 197e12, 256),
    ("v5p:8x8x16", "tpu", 459e12, 1024),
    ("v6e:16x16", "tpu", 918e12, 256),
    ("h100:8", "gpu", 989e12, 8),
  ],
)
def test_a_name_says_which_devices_and_how_many(name, platform, peak, devices):
  assert name in topology.EXAMPLES
  found = topology.parse(name)
  assert (found.platform, found.devices) == (platform, devices)
  assert found.chip.peak_flops == peak
  # What an estimate needs.
  assert found.chip.hbm and found.chip.links and found.chip.bandwidth


@pytest.mark.parametrize(
  "name, why",
  [
    ("v9:2x2", "no such topology"),
    ("v5e", "no such topology"),
    ("v5e:0x4", "no such topology"),
    ("v5e:4x4x4", "v5e has 2 axes"),
    ("v5p:4x4", "v5p has 3 axes"),
  ],
)
def test_an_unknown_name_lists_known_ones(name, why):
  with pytest.raises(checked.RefusedError, match=f"'{name}': {why}; .*v5e:16"):
    topology.parse(name)


@pytest.mark.parametrize(
  "name, error, match",
  [
    ("v5e:2x2", RuntimeError("not installed"), "pip install -e '.*tpu"),
    (
      "v5e:2x2",
      jax.errors.JaxRuntimeError("INVALID_ARGUMENT: bad"),
      "'v5e:2x2': bad; use .*v5e",
    ),
    ("h100:8", NotImplementedError("no plugin"), "pip install -e '.*cuda"),
  ],
)
def test_a_compiler_that_refuses(name, error, match, monkeypatch):
  def fail(**_):
    raise error

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(checked.RefusedError, match=match):
    topology.find_devices(name)


def test_a_v4_is_asked_for_as_one_device_a_chip(monkeypatch):
  asked = {}

  def describe(*, topology_name, platform, **options):
    asked[topology_name] = platform, options
    return types.SimpleNamespace(devices=jax.devices("cpu")[:1])

  monkeypatch.setattr(topologies, "get_topology_desc", describe)
  for name in ("v4:2x2x1", "v5e:2x2"):
    assert len(topology.find_devices(name)) == 1
  megacore = {"chip_config_name": "megacore"}
  assert asked == {"v4:2x2x1": ("tpu", megacore), "v5e:2x2": ("tpu", {})}
