"""How every command starts and fails: flags in, one clear line out.

Exit codes tell a supervisor what to do:

  0        done
  1        refused, with the reason in one line, or a defect with a traceback
  3        diverged: the loss or the gradient stopped being finite
  4        storage failed: it is full, gone or does not answer
  5        another process of the run has ended: start all again
  6        stopped by the watchdog: no step had ended for too long
  128 + n  stopped by signal n after saving (143 SIGTERM, 130 Ctrl-C)
"""

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import inspect
import os
import pathlib
import platform
import shlex
import sys
import traceback
import typing
import warnings

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from longnet_jax import checked, storage
from longnet_jax.parallel import hosts
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.training import checkpoint, report
from longnet_jax.training import config as config_lib

# What is defined here belongs to the command that asks for it, in its --help.
flags.disclaim_key_flags()

REFUSED, DIVERGED, STORAGE = 1, 3, 4
_CODES = {
  report.DivergedError: DIVERGED,
  checkpoint.WriteError: STORAGE,
  hosts.LostError: hosts.LOST,
}  # and watchdog.STALLED
# How the library begins when a config file raises; a traceback follows.
_IN_CONFIG = "Error whilst parsing config file"
# How the parsers of flags begin to complain -> what they would take.
_LEGAL = {
  ": invalid literal for int()": "a whole number such as 4",
  ": could not convert string to float": "a number such as 0.1",
  ": ('Non-boolean argument": "True or False",
}


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Runs `main`; a refused input is one line on stderr.

  An error that is not about the input keeps its traceback.
  """
  sys.unraisablehook = _quiet_loop(sys.unraisablehook)

  def guarded(arguments):
    # What goes wrong in a library's threads is raised here too, and said once.
    logging.set_verbosity(logging.FATAL)
    _keep_compiled()
    try:
      return main(arguments)
    except hosts.LostError as error:
      fail(error)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      hosts.leave(130)
    except MemoryError as error:
      fail(
        checked.RefusedError(f"out of memory: {error}; choose smaller sizes")
      )
    except Exception as error:
      several = jax.distributed.is_initialized()
      if several and hosts.lost_another(error):
        fail(hosts.LostError())
      refusals = (checked.RefusedError, OSError, report.DivergedError)
      if isinstance(error, refusals):
        fail(error)
      if not several:
        raise
      traceback.print_exc()
      hosts.leave(REFUSED)

  app.run(guarded, flags_parser=_parse)


def _keep_compiled() -> None:
  """Keeps what is compiled for the next start, unless told otherwise.

  JAX_COMPILATION_CACHE_DIR names another place; JAX_ENABLE_COMPILATION_CACHE=0
  keeps nothing.
  """
  if jax.config.jax_compilation_cache_dir is None:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(cache).expanduser() / "longnet_jax" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
  # Messages that a file could not be kept are of no use to a run.
  warnings.filterwarnings("ignore", message=".*persistent compilation cache")


def _processor() -> str:
  """A name of this processor: code made for another one may not run here."""
  features = platform.processor() + platform.machine()
  with contextlib.suppress(OSError):
    for row in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if row.startswith(("model name", "flags", "Features")):
        features += row
        if not row.startswith("model name"):
          break
  return hashlib.sha256(features.encode()).hexdigest()[:12]


def line() -> str:
  """Returns the command as it was given, for the records it writes."""
  name = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
  return shlex.join(["python", "-m", name, *sys.argv[1:]])


def fail(error: Exception) -> typing.NoReturn:
  """Prints an error in one line and exits with the code of its class."""
  text = storage.said(error) if isinstance(error, OSError) else str(error)
  print(f"error: {' '.join(text.split())}", file=sys.stderr)
  hosts.leave(_code(error))


def _code(error: Exception) -> int:
  """What the end of the process says of an error."""
  if isinstance(error, OSError) and storage.failed(error):
    return STORAGE
  codes = (code for kind, code in _CODES.items() if isinstance(error, kind))
  return next(codes, REFUSED)


def _quiet_loop(hook):
  """A hook that leaves out what reads and writes say that were given up."""

  def quiet(unraisable):
    is_given_up = inspect.iscoroutine(unraisable.object)
    if str(unraisable.exc_value) != "Event loop is closed" and not is_given_up:
      hook(unraisable)

  return quiet


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
    message = _cut(_legal_value(str(error)), arguments)
    fail(checked.RefusedError(message + _setting(error)))
  except (AttributeError, KeyError) as error:
    keys = [a.lstrip("-").partition("=")[0] for a in arguments]
    known = list(config_lib.flatten(_default().to_dict(), "config."))
    for key in keys:
      if key.startswith("config.") and key not in known:
        fail(checked.RefusedError(checked.unknown_key(key, known)))
    fail(checked.RefusedError(_cut(str(error), arguments)))
  except RecursionError:  # of absl's search for the nearest flag
    name = max(arguments, key=len)
    fail(checked.RefusedError(f"there is no flag {checked.cut(name)}"))
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
  text = f"cannot load the config {files}: {reason}"
  fail(checked.RefusedError(_cut(text, arguments)))


def _first(error: BaseException) -> BaseException:
  """The error during whose handling all others came."""
  while error.__context__ is not None:
    error = error.__context__
  return error


def _setting(error: flags.Error) -> str:
  """The flag that was meant by one that is the key of a setting."""
  name = getattr(error, "flagname", None)
  known = config_lib.flatten(_default().to_dict())
  if "config" not in flags.FLAGS or name not in known:
    return ""
  return f"; did you mean --config.{name}?"


def _legal_value(message: str) -> str:
  """What a flag's parser says, with what it would take."""
  for complaint, legal in _LEGAL.items():
    flag, found, _ = message.partition(complaint)
    if found:
      name, _, value = flag.partition("=")
      return f"{name}={checked.cut(value)}: it must be {legal}"
  return message


def _cut(message: str, arguments: Sequence[str]) -> str:
  """A message with at most 80 characters of each name and value given."""
  parts = {p for a in arguments for p in a.lstrip("-").partition("=")}
  for part in sorted(parts, key=len, reverse=True):
    message = message.replace(part, checked.cut(part)) if part else message
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


def define_mesh(*axes: str) -> Callable[[], jax.sharding.Mesh]:
  """The flags --AXIS=DEVICES and --fake_devices; returns what makes a mesh."""
  shared = {"data": "windows", "seq": "positions", "model": "heads"}
  for axis in axes:
    flags.DEFINE_integer(
      axis, 1, f"devices that share the {shared[axis]}", lower_bound=1
    )
  flags.DEFINE_integer(
    "fake_devices", None, "CPU devices, to try a mesh out", lower_bound=1
  )

  def make():
    given = flags.FLAGS
    if given.fake_devices:
      hosts.start(num_processes=1, fake_devices=given.fake_devices)
    return mesh_lib.make_mesh(**{axis: given[axis].value for axis in axes})

  return make


def rounded(value):
  """JSON-ready values with five significant digits of each float."""
  if isinstance(value, dict):
    return {key: rounded(each) for key, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [rounded(each) for each in value]
  return float(f"{value:.5g}") if isinstance(value, float) else value


def define_checkpoint() -> Callable[[], int | str]:
  """The flag --checkpoint; returns what reads a step, "latest" or "best"."""
  holder = flags.DEFINE_string(
    "checkpoint", "latest", "latest, best (by validation) or a step"
  )

  def which():
    text = holder.value
    if text.isdigit():
      return int(text)
    if text not in ("latest", "best"):
      raise checked.RefusedError(
        f"--checkpoint is {checked.shown(text)}; use latest, best or a step"
      )
    return text

  return which


def trained(workdir: flags.FlagHolder):
  """The folder that --workdir names, of a training run, or RefusedError."""
  if not workdir.value:
    raise checked.RefusedError(
      "--workdir is missing; give the folder of a training run"
    )
  return storage.path(workdir.value)
