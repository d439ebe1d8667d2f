import io
import json
import sys
import types

import numpy as np
import pytest

from longnet_jax import storage
from longnet_jax.training import curves, metrics


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_records_past_the_restored_step_and_torn_lines_go(tmp_path):
  path = metrics.metrics_path(tmp_path)
  lines = [json.dumps({"step": s, "loss": 1.0 * s}) for s in (1, 2, 3)]
  path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
  with metrics.Writer(tmp_path, start=2, total=9, stream=io.StringIO()) as out:
    out.record(3, {"loss": 0.5})
  got = metrics.read_metrics(tmp_path)
  assert [(r["step"], r["loss"]) for r in got] == [(1, 1.0), (2, 2.0), (3, 0.5)]


@pytest.mark.parametrize(
  "line",
  [
    *(b"[1]", b"null", b'{"loss": 1}', b"\xff\xfe", b"", b"[" * 100_000),
    *(b'{"step": 1, "loss": nul', b'{"step": 1, "loss": null}'),
    *(
      b'{"step": 1, "step_seconds": %s}' % s for s in (b"NaN", b"-1", b"1e999")
    ),
    b'{"step": 1, "loss": 1%s}' % (b"0" * 400),
    *(b'{"step": 4294967296}', b'{"step": -1}'),
    *(b'{"step": 1, "loss": "1"}', b'{"step": 1, "slowest_host": 1}'),
  ],
)
def test_what_is_no_record_is_named(tmp_path, line):
  path = metrics.metrics_path(tmp_path)
  path.write_bytes(b'{"step": 1, "slowest_host": "a"}\n' + line + b"\n")
  with pytest.raises(ValueError, match="line 2 of .*jsonl is no record"):
    metrics.read_metrics(tmp_path)


def test_a_file_that_is_gone_is_said_before_a_save(tmp_path):
  workdir, moved = tmp_path / "run", tmp_path / "moved"
  workdir.mkdir()
  with metrics.Writer(workdir, start=0, total=9, stream=io.StringIO()) as out:
    out.flush()
    workdir.rename(moved)
    with pytest.raises(storage.StorageError, match="was removed or replaced"):
      out.flush()
    workdir.mkdir()
    metrics.metrics_path(workdir).touch()
    with pytest.raises(storage.StorageError, match="was removed or replaced"):
      out.flush()


def test_a_full_disk_names_the_file(tmp_path):
  with metrics.Writer(tmp_path, start=0, total=9, stream=io.StringIO()) as out:
    whole, out._file._file = out._file._file, open("/dev/full", "a")
    with pytest.raises(OSError, match="No space left .*metrics.jsonl"):
      out.record(1, {"loss": 2.5})
    with pytest.raises(OSError, match="No space left .*metrics.jsonl"):
      out._file.close()
    out._file._file = whole


def test_plain_lines_in_a_file(tmp_path, monkeypatch):
  stream = io.StringIO()
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  with metrics.Writer(tmp_path, start=0, total=4, stream=stream) as out:
    now[0] = 900.0  # until the first step was compiled
    out.advance(1)
    losses = {"bits_per_byte": 3.0, "loss": 2.5}
    out.record(1, losses | {"tokens_per_second": 1234.0})
    now[0] = 910.0
    out.advance(2)
    out.record(2, {"validation_loss": 1.0, "validation_bits_per_byte": 1.5})
  assert stream.getvalue().splitlines() == [
    "step 1/4  loss 3.0000 bits/byte = 2.5000 nats/token  1,234 tokens/s",
    "step 2/4  validation 1.5000 bits/byte = 1.0000 nats/token  0m20s left",
  ]


def test_a_bar_with_the_time_left_on_a_terminal(tmp_path):
  stream = _Terminal()
  with metrics.Writer(tmp_path, start=2, total=4, stream=stream) as out:
    out.advance(3)
    out.record(3, {"bits_per_byte": 3.0, "loss": 2.5})
    validation = {"validation_loss": 1.0, "validation_bits_per_byte": 1.5}
    out.record(4, validation)
    out.say("hello")
  shown = stream.getvalue()
  assert "3/4" in shown
  assert "loss 3.0000 bits/byte" in shown and "2.5000" not in shown
  # Lines that nothing is drawn over.
  assert "step 4/4  validation 1.5000 bits/byte = 1.0000 nats/token\n" in shown
  assert "hello\n" in shown


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
  calls = []

  class Board:
    def __init__(self, folder, purge_step):
      calls.append((folder, purge_step))

    def add_scalar(self, *scalar):
      calls.append(scalar)

    def close(self):
      calls.append("closed")

  fake = types.ModuleType("tensorboardX")
  fake.SummaryWriter = Board
  fake.__spec__ = types.SimpleNamespace()
  monkeypatch.setitem(sys.modules, "tensorboardX", fake)
  with metrics.Writer(tmp_path, start=2, total=4, stream=io.StringIO()) as out:
    out.record(3, {"loss": 2.5})
  folder = str(tmp_path / "tensorboard")
  assert calls == [(folder, 3), ("loss", 2.5, 3), "closed"]


@pytest.mark.parametrize(
  "seconds, text", [(0, "0m00s"), (75, "1m15s"), (3725, "1h02m")]
)
def test_durations(seconds, text):
  assert metrics.duration(seconds) == text


def test_curves_of_several_runs_in_one_picture(tmp_path):
  falling = lambda height: [
    {"step": s, "loss": 5 / s, "validation_bits_per_byte": height / s}
    for s in range(1, 51)
  ]
  runs = {"longnet": falling(6), "dense": falling(7)}
  bits = [r | {"bits_per_byte": r["loss"]} for r in runs["dense"]]
  drawn = {"two": runs, "one": {"": runs["dense"]}, "bits": {"": bits}}
  drawn |= {"early": {"": bits[:1]}, "nothing": {"": []}}
  pictures = set()
  for name, each in drawn.items():
    curves.draw_losses(each, tmp_path / name)
    pictures.add((tmp_path / name).read_bytes())
  assert len(pictures) == len(drawn)
  assert all(p[:8] == b"\x89PNG\r\n\x1a\n" for p in pictures)


def test_smoothing_keeps_the_mean_of_a_line():
  values = curves.smooth(np.arange(100), share=0.1)
  assert values[50] == 50
  assert len(values) == 100
