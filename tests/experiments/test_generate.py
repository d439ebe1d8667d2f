"""The command on a tiny model that was never trained."""

import dataclasses
import json
import os
import sys
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import pytest

from configs import base
from experiments import generate
import longnet_jax
from longnet_jax.data import tokenizers
from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer
from longnet_jax.training import checkpoint
from longnet_jax.training import workdir as workdir_lib


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = config_lib.LongNetConfig(
    vocab_size=264,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    ffn_dim=8,
    segment_lengths=(8,),
    dilation_rates=(2,),
    max_positions=64,
    xpos_scale_base=1.0,
    dtype="float32",
  )
  settings = base.get_config()
  settings.model = dataclasses.asdict(config)
  settings.data.window = 16
  settings = settings.to_dict()
  path = workdir_lib.config_path(folder)
  path.write_text(json.dumps(settings))
  tokenizers.ByteTokenizer().save(workdir_lib.tokenizer_path(folder))
  params = jax.jit(transformer.LongNetLM(config).init)(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )["params"]
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save_params(params, {"config": settings})
  return folder


class _Written(NamedTuple):
  out: bytes
  err: str


def _run(capsysbinary, *arguments):
  """Returns what the command writes."""
  values = flags.FLAGS
  values.unparse_flags()
  values([sys.argv[0], *map(str, arguments)])
  try:
    generate.main([])
  finally:
    for name in values.flags_by_module_dict()[generate.__name__]:
      values[name.name].unparse()
  out, err = capsysbinary.readouterr()
  return _Written(out, err.decode())


def test_a_prompt_is_continued_the_same_streamed_or_not(workdir, capsysbinary):
  settings = (f"--workdir={workdir}", "--prompt=x =", "--max_new_tokens=12")
  whole = _run(capsysbinary, *settings)
  assert whole.out.endswith(b"\n") and len(whole.out) > 1
  assert "prompt: 4 tokens\n" in whole.err
  assert "12 tokens in" in whole.err
  assert "warning" not in whole.err and "stopped" not in whole.err
  assert _run(capsysbinary, *settings, "--stream").out == whole.out
  assert _run(capsysbinary, *settings, "--seq=4", "--model=2").out == whole.out
  assert _run(capsysbinary, *settings, "--seed=1").out != whole.out


def test_bytes_go_in_and_out_as_they_are(workdir, capsysbinary):
  # What Python makes of an argument of which UTF-8 knows nothing.
  prompt = os.fsdecode(b"caf\xe9")
  settings = (f"--workdir={workdir}", "--max_new_tokens=30")
  written = _run(capsysbinary, *settings, f"--prompt={prompt}")
  assert "prompt: 5 tokens" in written.err
  config, params = longnet_jax.load_checkpoint(workdir)
  (ids,) = longnet_jax.generate(
    config,
    params,
    [[256, *b"caf\xe9"]],
    max_new_tokens=30,
    temperature=0.8,
    stop_tokens=(256,),
  )
  expected = bytes(i for i in ids if i < 256)
  assert written.out == expected + b"\n"
  with pytest.raises(UnicodeDecodeError):  # else nothing was to be replaced
    expected.decode()


def test_a_file_may_hold_any_bytes_and_a_prompt_nothing(workdir, capsysbinary):
  file = workdir / "bytes"
  file.write_bytes(b"\xff\xfe\x00 ok")
  settings = (f"--workdir={workdir}", "--max_new_tokens=2")
  written = _run(capsysbinary, *settings, f"--prompt_file={file}")
  assert "prompt: 7 tokens\n" in written.err
  # A document begins with its separator, so there is always one to go on from.
  written = _run(capsysbinary, *settings, "--prompt=")
  assert "prompt: 1 tokens\n2 tokens in" in written.err


def test_a_long_prompt_warns_and_stops_where_positions_end(
  workdir, capsysbinary
):
  limit = config_lib.LongNetConfig.from_dict(
    json.loads(workdir_lib.config_path(workdir).read_text())["model"]
  ).position_limit
  file = workdir / "prompt.txt"
  file.write_bytes(b"a" * (limit - 5))
  written = _run(capsysbinary, f"--workdir={workdir}", f"--prompt_file={file}")
  assert written.err.count("warning: the prompt is longer than the 16") == 1
  # The separator is a token, and the last new one is not read.
  assert "5 tokens in" in written.err
  assert f"stopped at the last of {limit} positions" in written.err
  file.write_bytes(b"a" * limit)
  with pytest.raises(ValueError, match=f"the prompt has {limit + 1} tokens"):
    _run(capsysbinary, f"--workdir={workdir}", f"--prompt_file={file}")


def test_what_is_missing_is_said(workdir, capsysbinary):
  with pytest.raises(ValueError, match="--workdir is missing"):
    _run(capsysbinary, "--prompt=a")
  with pytest.raises(ValueError, match="either --prompt or --prompt_file"):
    _run(capsysbinary, f"--workdir={workdir}")
  with pytest.raises(ValueError, match="--checkpoint is 'newest'"):
    _run(
      capsysbinary, f"--workdir={workdir}", "--prompt=a", "--checkpoint=newest"
    )
