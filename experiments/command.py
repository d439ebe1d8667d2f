"""How every command starts and fails: flags in, one clear line out."""

from collections.abc import Callable, Sequence
import contextlib
import pathlib
import shlex
import sys
import traceback

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from longnet_jax import checked
from longnet_jax.parallel import hosts
from longnet_jax.training import config as config_lib
from longnet_jax.training import report

_LOST = (
  "another process of this run has ended; see what it said, then start all "
  "again: they go on from the last checkpoint"
)
# How the library begins when a config file raises; a traceback follows.
_IN_CONFIG = "Error whilst parsing config file"
# How the parsers of flags begin to complain -> what they would take.
_LEGAL = {
  ": invalid literal for int()": "a whole number such as 4",
  ": could not convert string to float": "a number such as 0.1",
  ": ('Non-boolean argument": "True or False",
}


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Runs `main`; a refused input is one line on stderr and exit code 1.

  An error that is not about the input keeps its traceback.
  """

  def guarded(arguments):
    # What goes wrong in a library's threads is raised here too, and said once.
    logging.set_verbosity(logging.FATAL)
    try:
      return main(arguments)
    except (checked.RefusedError, OSError, report.DivergedError) as error:
      fail(error)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      hosts.leave(130)
    except Exception as error:
      if not jax.distributed.is_initialized():
        raise
      if hosts.lost_another(error):
        fail(RuntimeError(_LOST))
      traceback.print_exc()
      hosts.leave(1)

  app.run(guarded, flags_parser=_parse)


def line() -> str:
  """Returns the command as it was given, for the records it writes."""
  name = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
  return shlex.join(["python", "-m", name, *sys.argv[1:]])


def fail(error: Exception) -> None:
  """Prints an error in one line and exits."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  hosts.leave(1)


def _parse(arguments: Sequence[str]) -> list[str]:
  """Parses flags; what is wrong with them is one line."""
  with _explained(arguments):
    rest = flags.FLAGS(arguments)
    if "config" in flags.FLAGS:
      hasattr(flags.FLAGS["config"].value, "seed")  # raises if not loaded
    return rest


@contextlib.contextmanager
def _explained(arguments: Sequence[str]):
  """Says what flags refuse; a key that does not exist names its nearest."""
  try:
    yield
  except flags.Error as error:
    if _IN_CONFIG in str(error):
      _fail_to_load(arguments, _first(error))
    fail(checked.RefusedError(_legal_value(str(error))))
  except (AttributeError, KeyError) as error:
    keys = [a.lstrip("-").partition("=")[0] for a in arguments]
    known = list(config_lib.flatten(_default().to_dict(), "config."))
    for key in keys:
      if key.startswith("config.") and key not in known:
        fail(checked.RefusedError(checked.unknown_key(key, known)))
    fail(error)
  except (OSError, ImportError, SyntaxError, TypeError) as error:
    _fail_to_load(arguments, error)


def _fail_to_load(arguments, error):
  reason = str(error)
  if isinstance(error, OSError):  # the library lists where it looked
    reason = "no such file; use one such as configs/quickstart.py"
  named = [
    a if "=" in a else f"{a} {following}"
    for a, following in zip(arguments, [*arguments[1:], ""], strict=True)
    if a.startswith(("--config=", "-config=")) or a in ("--config", "-config")
  ]
  files = " ".join(named) or "that is the default"
  fail(checked.RefusedError(f"cannot load the config {files}: {reason}"))


def _first(error: BaseException) -> BaseException:
  """The error during whose handling all others came."""
  while error.__context__ is not None:
    error = error.__context__
  return error


def _legal_value(message: str) -> str:
  """What a flag's parser says, with what it would take."""
  for complaint, legal in _LEGAL.items():
    flag, found, _ = message.partition(complaint)
    if found:
      name, _, value = flag.partition("=")
      return f"{name}={checked.cut(value)}: it must be {legal}"
  return message


def _default() -> ml_collections.ConfigDict:
  from configs import base

  return base.get_config()


def define_config(default: str | None = None) -> flags.FlagHolder:
  """The flag --config=FILE with --config.KEY=VALUE to change settings."""
  if default:  # beside this file, wherever the command is started
    default = str(pathlib.Path(__file__).parent.parent / default)
  with _explained(sys.argv):  # a default is loaded here, and keys set in it
    return config_flags.DEFINE_config_file(
      "config", default, "settings of the experiment, a file in configs/"
    )
