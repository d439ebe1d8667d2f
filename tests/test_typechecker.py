"""The annotations of longnet_jax are checked while tests run."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from longnet_jax.models import transformer
from longnet_jax.training import curves


def _multiply(width):
  return transformer.unembed(jnp.ones((1, 2, 3)), jnp.ones((width, 5)))


def test_axes_of_one_letter_must_agree():
  assert _multiply(3).shape == (1, 2, 5)
  with pytest.raises(jaxtyping.TypeCheckError, match="matrix"):
    _multiply(4)


def test_results_are_checked(monkeypatch):
  monkeypatch.setattr(jnp, "einsum", lambda *_, **__: jnp.ones((1, 2)))
  with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
    _multiply(3)


def test_an_int_is_a_float_and_a_list_is_no_array():
  assert curves.smooth(np.arange(4), share=0).tolist() == [0, 1, 2, 3]
  with pytest.raises(jaxtyping.TypeCheckError, match="values"):
    curves.smooth([0, 1, 2, 3])


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused_in_words_can_be_tested():
  assert curves.smooth([0, 1, 2, 3], share=0).tolist() == [0, 1, 2, 3]
