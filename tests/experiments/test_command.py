import json

import pytest

from experiments import command
from longnet_jax.training import config as config_lib


def _error(function):
  with pytest.raises(ValueError) as caught:
    function()
  return caught.value


def test_our_refusals_are_told_from_library_errors():
  assert command.is_refusal(_error(lambda: config_lib.build({"modl": 1})))
  assert not command.is_refusal(_error(lambda: json.loads("{")))


def test_the_system_may_refuse():
  assert command.is_refusal(FileNotFoundError("x"))


def test_a_refusal_is_one_line(capsys):
  with pytest.raises(SystemExit) as caught:
    command.fail(ValueError("first\n  second"))
  assert caught.value.code == 1
  assert capsys.readouterr().err == "error: first second\n"
