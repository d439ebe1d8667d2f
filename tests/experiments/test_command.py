import functools
import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from experiments import command
from longnet_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent


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


@pytest.fixture
def parse(monkeypatch):
  values = flags.FlagValues()
  define = functools.partial(
    config_flags.DEFINE_config_file, flag_values=values
  )
  monkeypatch.setattr(command.config_flags, "DEFINE_config_file", define)
  monkeypatch.setattr(command.flags, "FLAGS", values)

  def run(argument):
    arguments = ["train", *argument.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    command.define_config("configs/base.py")
    command._parse(arguments)
    return values["config"].value

  return run


# ml_collections loads the file in a way that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_key_is_changed(parse, monkeypatch, tmp_path):
  # The default config is found from anywhere.
  monkeypatch.chdir(tmp_path)
  assert parse("--config.model.num_layers=3").model.num_layers == 3


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
  "argument, message",
  [
    ("--config.model.num_layers=1.5", "1.5: it must be a whole number"),
    ("--config.model.dropout_rate=x", "=x: it must be a number such as 0.1"),
    ("--config.model.deepnorm=maybe", "=maybe: it must be True or False"),
    ("--config.model.num_layer=1", "did you mean config.model.num_layers?"),
    ("--config=/nowhere.py", "--config=/nowhere.py: no such file; use one"),
    ("--config /nowhere.py", "config --config /nowhere.py: no such file; use"),
  ],
)
def test_flags_that_do_not_parse_are_one_line(parse, capsys, argument, message):
  with pytest.raises(SystemExit) as caught:
    parse(argument)
  (line,) = capsys.readouterr().err.splitlines()
  assert caught.value.code == 1
  assert line.startswith("error: ") and message in line
