"""Several processes on one machine train as one, and end as one."""

import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from longnet_jax.parallel import hosts, joining
from longnet_jax.training import checkpoint, loop, metrics
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib
from longnet_jax.training import state as state_lib
from longnet_jax.training import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = 8
_STEPS_FLAG = "--config.training.steps"
# The command, with a last process that is slow to have its batches.
_SLOW_INPUT = """
import runpy, time
import jax
from longnet_jax.training import run
place = run.Run.place
def slow(self, batch):
  time.sleep(0.1 * (jax.process_index() == jax.process_count() - 1))
  return place(self, batch)
run.Run.place = slow
runpy.run_module("experiments.train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def settings(tiny_settings):
  """(attention, steps, mesh) -> settings of a small run."""

  def make(attention="dilated", steps=STEPS, mesh=None):
    return tiny_settings(
      model__num_layers=1,
      model__attention=attention,
      training__steps=steps,
      training__eval_every=STEPS,
      training__checkpoint_every=4,
      **{f"mesh__{axis}": size for axis, size in (mesh or {}).items()},
    )

  return make


def _write(settings, folder):
  """The settings as a file that the command can read."""
  path = folder / "tiny.py"
  path.write_text(
    "import json\nimport ml_collections\n\n\ndef get_config():\n"
    f"  text = {json.dumps(settings.to_dict())!r}\n"
    "  config = json.loads(text)\n"
    "  for name in ('segment_lengths', 'dilation_rates'):\n"
    "    config['model'][name] = tuple(config['model'][name])\n"
    "  return ml_collections.ConfigDict(config)\n"
  )
  return path


class _Processes:
  """`count` processes of one run, started together."""

  def __init__(self, count, *flags, program=("-m", "experiments.train")):
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      port = probe.getsockname()[1]
    self._texts = None
    joining = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    self.all = [
      _start(program, *flags, *joining, f"--process_id={i}")
      for i in range(count)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.all:
      process.kill()
    self.finish()

  def finish(self):
    """Exit codes, and what each wrote to stdout and stderr."""
    if self._texts is None:
      self._texts = [process.communicate() for process in self.all]
    return [process.returncode for process in self.all], self._texts

  def wait_for(self, condition):
    """True once the condition is, False if a process ended before."""
    while all(process.poll() is None for process in self.all):
      if condition():
        return True
      time.sleep(0.01)
    return False


def _start(program, *flags):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, *program, *map(str, flags)],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _complete(workdir):
  """Steps of the checkpoints that are whole: other names are longer."""
  names = [p.name for p in (workdir / "checkpoints").glob("*")]
  return sorted(int(name) for name in names if name.isdigit())


def _check_a_killed_run(settings, folder, count, killed, devices):
  """A run of `count` processes, one killed, ends as one process ends alone."""
  alone, workdir = folder / "alone", folder / "killed"
  flags = [
    f"--config={_write(settings, folder)}",
    f"--workdir={workdir}",
    f"--fake_devices={devices}",
  ]
  # However late the test looks, this run has not ended by itself.
  with _Processes(count, *flags, f"{_STEPS_FLAG}=100000") as first:
    assert first.wait_for(lambda: _complete(workdir)), first.finish()
    first.all[killed].kill()
    codes, texts = first.finish()
  assert codes[killed] == -signal.SIGKILL
  assert all(codes), texts
  steps = _complete(workdir)[-1] + STEPS
  settings.training.steps = steps
  flags.append(f"{_STEPS_FLAG}={steps}")
  with _Processes(count, *flags, program=("-c", _SLOW_INPUT)) as second:
    codes, texts = second.finish()
  assert codes == [0] * count, texts
  assert f"step {steps}, parameters" in texts[0][0]
  # Only process 0 reports.
  assert not any("step" in out for out, _ in texts[1:])
  loop.train(config_lib.build(settings), alone, stream=io.StringIO())
  records, expected = map(metrics.read_metrics, (workdir, alone))
  assert [r["step"] for r in records] == list(range(1, steps + 1))
  late = [r for r in records if r["attempt"] == 2]
  slowest = [r["slowest_process"] for r in late]
  assert slowest.count(count - 1) > len(slowest) / 2
  assert {r["slowest_host"] for r in late} == {socket.gethostname()}
  for name in ("loss", "gradient_norm"):
    np.testing.assert_allclose(
      [r[name] for r in records], [r[name] for r in expected], rtol=1e-4
    )
  _, params = checkpoint.load_checkpoint(alone)
  _, got = checkpoint.load_checkpoint(workdir)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    got,
    params,
  )


def test_one_of_two_processes_killed_changes_nothing(settings, tmp_path):
  run = settings("dense", mesh={"data": 2})  # compiles fastest
  _check_a_killed_run(run, tmp_path, 2, 1, devices=1)


@pytest.mark.slow
@pytest.mark.parametrize(
  "count, killed, devices, mesh",
  [
    (2, 0, 2, {"data": 2, "seq": 2}),
    (2, 1, 2, {"seq": 4}),
    (2, 1, 1, {"model": 2}),
    (4, 2, 1, {"data": 2, "seq": 2}),
  ],
  ids=str,
)
def test_one_of_many_processes_killed_changes_nothing(
  settings, tmp_path, count, killed, devices, mesh
):
  run = settings(mesh=mesh)
  _check_a_killed_run(run, tmp_path, count, killed, devices)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(settings, tmp_path):
  config = _write(settings(steps=100_000, mesh={"data": 2}), tmp_path)
  workdir = tmp_path / "run"
  with _Processes(2, f"--config={config}", f"--workdir={workdir}") as run:
    assert run.wait_for(lambda: metrics.read_metrics(workdir)), run.finish()
    run.all[1].send_signal(signal.SIGTERM)
    codes, texts = run.finish()
  assert codes == [128 + signal.SIGTERM] * 2, texts
  stopped = int(texts[0][0].split("stopped after step ")[1].split()[0])
  with checkpoint.open_to_read(workdir) as checkpoints:
    assert checkpoints.find() == stopped
  assert metrics.read_metrics(workdir)[-1]["step"] == stopped


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"process_id": 0}, "--coordinator and --num_processes not given"),
    ({"num_processes": 2}, "--coordinator and --process_id not given"),
    ({"coordinator": "a:1"}, "--num_processes and --process_id not given"),
    ({"num_processes": 0}, "num_processes is 0; choose 1 or more"),
    (
      {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
      "process_id is 2; choose 0 to 1",
    ),
    (
      {"coordinator": "here", "num_processes": 2, "process_id": 0},
      "coordinator is 'here'; give the host",
    ),
    ({"fake_devices": 10**8}, "fake_devices is 100000000; .* in 1..4096"),
  ],
  ids=str,
)
def test_wrong_combinations_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    hosts.start(**arguments)
  assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  "text",
  [
    "UNKNOWN: Gloo all-reduce failed: pair.cc:547",
    "INTERNAL: NCCL operation ncclAllReduce failed: unhandled system error",
    "NCCL communicator was aborted: remote process exited or network error",
    "UNAVAILABLE: CoordinationService/Heartbeat",
    "[external/gloo/gloo/transport/tcp/pair.cc:547] x",
  ],
)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_lost_process_is_told_by_its_texts(text, kind):
  assert hosts.lost_another(kind(text))
  try:
    raise checkpoint.WriteError("cannot write a checkpoint") from kind(text)
  except ValueError as error:
    assert hosts.lost_another(error)


def test_other_errors_are_no_lost_process():
  assert not hosts.lost_another(ValueError("batch_size is 0"))
  assert not hosts.lost_another(RuntimeError("NCCL is out of memory"))


def _join(**flags):
  code = (
    "import sys\nfrom experiments import command\n"
    "from longnet_jax.parallel import hosts, joining\n"
    f"command.run(lambda _: hosts.start(**{flags!r}))\n"
  )
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_never_comes_is_one_line(process_id):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  ended = _join(
    coordinator=f"localhost:{port}",
    num_processes=2,
    process_id=process_id,
    join_timeout=2,
  )
  assert ended.returncode == hosts.LOST, ended.stderr
  (line,) = [x for x in ended.stderr.splitlines() if x.startswith("error: ")]
  assert "2 seconds" in line and f"localhost:{port}" in line
  assert "Traceback" not in ended.stderr


def test_a_taken_port_is_one_line():
  with socket.socket(socket.AF_INET6) as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(ValueError, match=f"port {port} .*Address already in"):
      hosts.start(f"localhost:{port}", 2, 0, join_timeout=2)


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_slurm_variables_in_part_are_named(missing, monkeypatch):
  for name in joining._SLURM:
    monkeypatch.setenv(name, "0")
  monkeypatch.setenv("SLURM_NTASKS", "2")
  monkeypatch.delenv(missing)
  with pytest.raises(ValueError, match=f"{missing} not set: start with srun"):
    hosts.start()


def test_one_slurm_variable_of_another_shell_means_nothing(monkeypatch):
  for name in joining._SLURM:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("SLURM_NTASKS", "2")
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  hosts.start()
  assert not jax.distributed.is_initialized()


def _run(settings, workdir):
  return run_lib.make_run(
    config_lib.build(settings), workdir_lib.tokenizer_path(workdir)
  )


def test_a_checkpoint_of_eight_devices_goes_on_with_fewer(
  tiny_settings, tmp_path
):
  """Exactly its parameters, and losses within what rounding allows."""
  small = {
    "model__num_layers": 1,
    "model__attention": "dense",  # compiles fastest
    "training__steps": 2,
  }
  eight = tiny_settings(mesh__seq=8, **small)
  result = loop.train(config_lib.build(eight), tmp_path, stream=io.StringIO())
  whole = _run(eight, tmp_path)
  losses = []
  for mesh in ({"seq": 8}, {"data": 2, "seq": 2}, {}):
    axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    run = (
      whole
      if mesh == {"seq": 8}
      else _run(tiny_settings(**axes, **small), tmp_path)
    )
    with checkpoint.open_to_read(tmp_path) as checkpoints:
      state, step = loop.restore_or_init(run, checkpoints)
    assert step == 2
    assert len(state.params["embedding"].devices()) == run.mesh.size
    assert state_lib.fingerprint(state.params) == result.fingerprint
    batch = run.train_source.batch(step, 4)
    _, values = run.train_step(state, run.place(batch))
    losses.append([float(values["loss"]), float(values["gradient_norm"])])
  np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)
