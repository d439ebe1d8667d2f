import json

import pytest

from longnet_jax.training import beginning, config


@pytest.fixture
def make_config(tiny_settings):
  def make(decay_steps=10):
    settings = tiny_settings(training__steps=10)
    settings.optimizer.update(
      learning_rate=1.0, warmup_steps=0, decay_steps=decay_steps
    )
    return config.build(settings)

  return make


def test_another_learning_rate_is_said_with_the_old_one(make_config):
  changed = {"optimizer.decay_steps": (5, 10), "training.steps": (5, 10)}
  start = beginning.Beginning(5, changed, None)
  resuming, rate = start.describe(make_config())
  assert resuming == (
    "resuming from step 5: optimizer.decay_steps was 5 and is now 10, "
    "training.steps was 5 and is now 10"
  )
  assert rate == (
    "learning rate from here on: 0.5 at step 6, where it was 0, to 0.1 at "
    "step 10"
  )
  assert json.loads(json.dumps(start.notes()))["step"] == 5


def test_steps_that_would_do_nothing_are_warned_of(make_config):
  start = beginning.Beginning(5, {"training.steps": (5, 10)}, None)
  _, warning = start.describe(make_config(decay_steps=5))
  assert warning.endswith("to train, give --config.optimizer.decay_steps=10")


def test_a_new_run_says_nothing(make_config):
  start = beginning.Beginning(0, {}, None)
  assert start.describe(make_config()) == [] and start.notes() == {}
