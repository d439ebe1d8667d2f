import types

import jax
import pytest

from longnet_jax.analysis import chips


def test_an_unknown_chip_has_no_peak():
  assert chips.peak_flops(jax.devices()[0]) is None


@pytest.mark.usefixtures("unchecked")  # for what stands for a device
@pytest.mark.parametrize(
  ("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU v5p", 459e12)]
)
def test_the_first_name_that_fits_is_the_chip(kind, peak):
  assert chips.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
