import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.training import config as config_lib
from longnet_jax.training import optimizer

pytestmark = pytest.mark.usefixtures("standard_promotion")


def _config(**changes):
  return config_lib.OptimizerConfig(
    **{"warmup_steps": 4, "decay_steps": 12, **changes}
  )


def test_defaults_are_those_of_the_paper():
  config = config_lib.OptimizerConfig()
  assert (config.beta1, config.beta2) == (0.9, 0.98)
  assert config.learning_rate == 6e-4
  assert config.weight_decay == 0.01
  assert config.schedule == "polynomial"


@pytest.mark.parametrize(
  "schedule, middle", [("polynomial", 0.5), ("cosine", 0.5), ("constant", 1)]
)
def test_schedules(schedule, middle):
  rate = optimizer.make_schedule(_config(schedule=schedule, learning_rate=1.0))
  got = [float(rate(step)) for step in (0, 1, 3, 4, 8)]
  np.testing.assert_allclose(got, [0.25, 0.5, 1, 1, middle], rtol=1e-6)
  end = 1.0 if schedule == "constant" else 0.0
  np.testing.assert_allclose(float(rate(12)), end, atol=1e-6)


def test_no_warmup_starts_at_the_peak():
  rate = optimizer.make_schedule(_config(warmup_steps=0, learning_rate=1.0))
  assert float(rate(0)) == 1


def test_first_step_is_adamw_by_hand():
  config = _config(clip_norm=0.0, warmup_steps=0, schedule="constant")
  params = {"kernel": jnp.array([2.0, -3.0]), "bias": jnp.array([1.0])}
  grads = {"kernel": jnp.array([0.5, -0.1]), "bias": jnp.array([0.2])}
  transform = optimizer.make_optimizer(config)
  updates, _ = transform.update(grads, transform.init(params), params)
  rate = config.learning_rate
  # After bias correction the first step is the sign of the gradient.
  expected = -rate * (np.sign(grads["kernel"]) + 0.01 * params["kernel"])
  np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)
  np.testing.assert_allclose(updates["bias"], -rate, rtol=1e-5)


def test_clipping_limits_the_global_norm():
  config = _config(clip_norm=1.0)
  params = {"kernel": jnp.zeros(4)}
  transform = optimizer.make_optimizer(config)
  state = transform.init(params)
  big = {"kernel": jnp.full(4, 100.0)}
  _, after = transform.update(big, state, params)
  first = next(
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(after)
    if "mu" in jax.tree_util.keystr(path)
  )
  np.testing.assert_allclose(jnp.linalg.norm(first), 0.1, rtol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"schedule": "linear"}, "'linear'; it must be one of polynomial"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"beta2": 1.0}, "beta2 is 1.0"),
    ({"decay_steps": 3}, "decay_steps is 3; it must be above warmup_steps"),
  ],
)
def test_bad_values_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    _config(**change)
