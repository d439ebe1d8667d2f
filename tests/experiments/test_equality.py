"""What the check of sharding reports is an error if there is one."""

import numpy as np

from experiments import equality
from longnet_jax.parallel import mesh as mesh_lib


def test_the_largest_error_is_relative_to_the_largest_entry():
  wanted = {"a": np.array([1.0, -4.0]), "b": np.array([0.5])}
  found = {"a": np.array([1.0, -3.0]), "b": np.array([0.5])}
  assert equality.largest_error(found, wanted) == 0.25
  assert equality.largest_error(wanted, wanted) == 0


def test_a_mesh_of_all_axes_changes_no_masked_case():
  mesh = mesh_lib.make_mesh(data=2, seq=2, model=2)
  assert equality.attention_error("documents, lengths", True, mesh) < 2e-6
