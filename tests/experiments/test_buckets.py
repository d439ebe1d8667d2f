"""A run in a bucket, with a server of Google Cloud Storage on this machine."""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
# Long enough to be killed between two of its three saves.
STEPS = "--config.training.steps=15"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment():
  """What makes the clients of a process speak to a server of ours."""
  pytest.importorskip("gcsfs")
  pytest.importorskip("gcp_storage_emulator")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  server = subprocess.Popen(
    [
      sys.executable,
      ROOT / "tests" / "experiments" / "gcs_server.py",
      str(port),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  url = f"http://127.0.0.1:{port}"
  yield {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
  }
  server.kill()
  server.wait()


def _start(environment, name, *flags):
  return subprocess.Popen(
    [sys.executable, "-m", f"experiments.{name}", *flags],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process):
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out


def test_a_killed_run_in_a_bucket_ends_as_one_on_disk(
  environment, config_file, tmp_path
):
  flags = [f"--config={config_file}", STEPS]
  local = _start(environment, "train", *flags, f"--workdir={tmp_path / 'run'}")
  fingerprint = _finish(local).split()[-1]
  flags.append("--workdir=gs://bucket/run")
  first = _start(environment, "train", *flags)
  for line in first.stdout:
    if line.startswith("step 11/"):
      first.send_signal(signal.SIGKILL)
      break
  first.communicate()
  assert first.returncode == -signal.SIGKILL
  out = _finish(_start(environment, "train", *flags))
  assert "step 6/" in out or "step 11/" in out
  assert out.split()[-1] == fingerprint
  table = _finish(
    _start(environment, "evaluate", flags[-1], "--lengths=16", "--compare=")
  )
  assert "step 15, test split" in table
  assert not (ROOT / "gs:").exists()


def test_a_second_run_in_a_bucket_is_refused(environment, config_file):
  flags = [f"--config={config_file}", "--workdir=gs://bucket/two"]
  first = _start(environment, "train", *flags)
  for line in first.stdout:
    if line.startswith("step 2/"):
      break
  second = _start(environment, "train", *flags)
  _, err = second.communicate()
  assert second.returncode == 1, err
  assert f"in use by process {first.pid} on" in err
  _finish(first)


def test_a_server_that_vanishes_is_one_line(environment, config_file):
  closed = environment | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"}
  flags = [f"--config={config_file}", "--workdir=gs://bucket/three"]
  process = _start(closed, "train", *flags)
  _, err = process.communicate()
  assert process.returncode == 4, err
  assert "error: gs://bucket/three" in err and "Traceback" not in err


def test_a_slide_in_a_bucket_is_encoded_by_weights_in_it(environment, tmp_path):
  golden = ROOT / "tests" / "golden"
  local, remote = tmp_path / "slide.npz", "gs://bucket/slide.npz"
  with np.load(golden / "gigapath_small.npz") as slides:
    np.savez(local, tiles=slides["tiles"][0], coords=slides["coords"][0])
  copy = (
    "import sys\nfrom longnet_jax import storage\n"
    "source, target = map(storage.path, sys.argv[1:])\n"
    "storage.write_whole(target, storage.read(source))\n"
  )
  run = functools.partial(subprocess.run, env=environment, cwd=ROOT, check=True)
  run([sys.executable, "-c", copy, local, remote])
  settings = '{"heads": 8, "slide_ngrids": 50, "segment_lengths": '
  settings += "[16, 40, 128, 300, 1024]}"
  imported = _start(
    environment,
    "import_weights",
    golden / "gigapath_small.pth",
    "--kind=gigapath",
    "--workdir=gs://bucket/slides",
    f"--config={settings}",
  )
  _finish(imported)
  results = {}
  for slide, out in ((remote, "gs://bucket/out.npz"), (local, tmp_path / "a")):
    flags = ["--workdir=gs://bucket/slides", f"--slide={slide}", f"--out={out}"]
    _finish(_start(environment, "encode_slide", *flags))
    results[slide] = out
  run([sys.executable, "-c", copy, results[remote], tmp_path / "b.npz"])
  with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as two:
    for name in ("cls", "mean", "features", "coords"):
      np.testing.assert_array_equal(one[name], two[name])
  # The weights leave it, too.
  flags = ["--workdir=gs://bucket/slides", "--out=gs://bucket/exported"]
  assert "tensors" in _finish(_start(environment, "export_weights", *flags))
  assert not (ROOT / "gs:").exists()
