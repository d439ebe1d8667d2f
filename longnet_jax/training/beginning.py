"""From which step a start goes on, and what it changes from there."""

import dataclasses
from typing import NamedTuple

from longnet_jax import checked
from longnet_jax.training import config as config_lib
from longnet_jax.training import initial, optimizer, workdir


class Beginning(NamedTuple):
  """Where a start begins: at step 0, or where an earlier one has stopped.

  step: updates that are done.
  changed: dotted key -> (old, new) of settings that differ since.
  origin: whose parameters a new run starts from, if not random ones.
  """

  step: int
  changed: dict[str, tuple]
  origin: initial.Origin | None

  def describe(self, config: config_lib.ExperimentConfig) -> list[str]:
    """Lines on all of that for a person; none where a new run draws them."""
    if not self.step:
      return self.origin.describe() if self.origin else []
    listed = ", ".join(
      f"{key} was {checked.shown(old)} and is now {checked.shown(new)}"
      for key, (old, new) in self.changed.items()
    )
    resuming = f"resuming from step {self.step}"
    lines = [f"{resuming}: {listed}" if listed else resuming]
    return lines + self._rate(config)

  def notes(self) -> dict:
    """The same for the records of a start, JSON-ready."""
    if not self.step:
      return {"init_from": str(self.origin)} if self.origin else {}
    return {"step": self.step, "changed": self.changed}

  def _rate(self, config) -> list[str]:
    """A line on another learning rate, and on steps that would do nothing."""
    old = {
      key.partition(".")[2]: value
      for key, (value, _) in self.changed.items()
      if workdir.is_among(key, workdir.SCHEDULE)
    }
    step, last = self.step, config.training.steps
    if step >= last:
      return []
    schedule = optimizer.make_schedule(config.optimizer)
    lines = []
    if old:
      before = optimizer.make_schedule(
        dataclasses.replace(config.optimizer, **old)
      )
      lines.append(
        f"learning rate from here on: {float(schedule(step)):.3g} at step "
        f"{step + 1}, where it was {float(before(step)):.3g}, to "
        f"{float(schedule(last - 1)):.3g} at step {last}"
      )
    if schedule(step) == schedule(last - 1) == 0:
      lines.append(
        "warning: the learning rate of all steps that are left is 0; to train, "
        f"give --config.optimizer.decay_steps={last}"
      )
    return lines
