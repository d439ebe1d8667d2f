import functools
import json
import pathlib
import sys
import types

from absl import flags
import jax
from ml_collections import config_flags
import pytest

from experiments import command
from longnet_jax import storage
from longnet_jax.parallel import hosts
from longnet_jax.training import checkpoint, report
from longnet_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent


def _run(monkeypatch, main):
  """Runs a command's main as absl would, without its flags."""
  monkeypatch.setattr(command.app, "run", lambda main, **_: main([]))
  monkeypatch.setattr(command.logging, "set_verbosity", lambda _: None)
  command.run(main)


@pytest.fixture
def leaving(monkeypatch):
  """Lets a test outlive the end of the process."""
  monkeypatch.setattr(command.hosts.os, "_exit", sys.exit)


@pytest.mark.parametrize(
  "refuse",
  [
    lambda _: config_lib.build({"modl": 1}),
    lambda _: pathlib.Path("/nowhere/x").read_text(),
    lambda _: bytearray(2**62),
  ],
)
def test_what_we_or_the_system_refuse_has_no_traceback(
  leaving, monkeypatch, capsys, refuse
):
  with pytest.raises(SystemExit):
    _run(monkeypatch, refuse)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch):
  with pytest.raises(json.JSONDecodeError):
    _run(monkeypatch, lambda _: json.loads("{"))


def test_reads_that_were_given_up_say_nothing():
  async def given_up():
    raise ValueError("no such array")

  coroutine, said = given_up(), []
  quiet = command._quiet_loop(lambda unraisable: said.append(unraisable.object))
  for error, owner in (
    (ValueError("no such array"), coroutine),
    (RuntimeError("Event loop is closed"), None),
    (ValueError("of a finalizer"), "a finalizer"),
  ):
    quiet(types.SimpleNamespace(exc_value=error, object=owner))
  coroutine.close()
  assert said == ["a finalizer"]


@pytest.mark.parametrize(
  "kind, code",
  [
    (ValueError, 1),
    (checkpoint.CheckpointError, 1),
    (report.DivergedError, 3),
    (checkpoint.WriteError, 4),
    (storage.StorageError, 4),
    (storage.NoRoomError, 4),
    (hosts.LostError, 5),
  ],
)
def test_a_refusal_is_one_line_and_a_code(leaving, capsys, kind, code):
  with pytest.raises(SystemExit) as caught:
    command.fail(kind("first\n  second"))
  assert caught.value.code == code
  assert capsys.readouterr().err == "error: first second\n"


@pytest.fixture
def cache_dir():
  """Gives back where compiled code is kept."""
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_code_is_kept(cache_dir, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  command._keep_compiled()
  folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert folder.parent == tmp_path / "longnet_jax"


def test_compiled_code_is_kept_where_it_was_told(cache_dir):
  jax.config.update("jax_compilation_cache_dir", "/elsewhere")
  command._keep_compiled()
  assert jax.config.jax_compilation_cache_dir == "/elsewhere"


@pytest.fixture
def parse(monkeypatch, leaving):
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
    ("--config.model.num_layers=" + "x" * 99, "x" * 77 + "...: it must be a"),
    ("--config.model.num_layers=1" + "0" * 5000, "s=1" + "0" * 76 + "...: "),
    ("--" + "x" * 200, "Unknown command line flag '" + "x" * 77 + "...'"),
    ("--" + "x" * 5000, "there is no flag --" + "x" * 75 + "..."),
    ("--config=" + "x" * 5000, "config --config=" + "x" * 77 + "...: no such"),
    ("--config.model.dropout_rate=x", "=x: it must be a number such as 0.1"),
    ("--config.model.deepnorm=maybe", "=maybe: it must be True or False"),
    ("--training.init_from=x", "did you mean --config.training.init_from?"),
    ("--config.model.num_layer=1", "did you mean config.model.num_layers?"),
    (
      f"--config={ROOT}/configs/paper.py:1B",
      "py:1B: the size is '1B'; it must",
    ),
    (f"--config={ROOT}/configs/base.py:x", "get_config() takes 0 positional"),
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
  assert "Traceback" not in line and len(line) < 400
