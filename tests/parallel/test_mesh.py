import jax
import pytest

from longnet_jax.parallel import mesh


def test_axes_and_sizes():
  made = mesh.make_mesh(data=2, seq=1, model=4)
  assert dict(made.shape) == {"data": 2, "seq": 1, "model": 4}
  assert made.axis_names == mesh.AXES


def test_fewer_devices_than_there_are():
  devices = jax.devices()[2:4]
  made = mesh.make_mesh(seq=2, devices=devices)
  assert set(made.devices.flat) == set(devices)


def test_too_many_devices_are_refused():
  with pytest.raises(ValueError, match="2 x 3 x 2 needs 12 devices and .* 8"):
    mesh.make_mesh(data=2, seq=3, model=2)
