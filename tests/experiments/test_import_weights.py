"""The commands around imported weights, from file to checkpoint to outputs."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import longnet_jax
from longnet_jax.interop import keywords, torchscale
from longnet_jax.models import config as model_config
from longnet_jax.models import slide_encoder
from longnet_jax.training import checkpoint

_GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
_GIGAPATH = json.dumps(
  {
    "heads": 8,
    "slide_ngrids": 50,
    "segment_lengths": [16, 40, 128, 300, 1024],
  }
)


@pytest.fixture
def call(run):
  """Runs a command with options; returns stdout, or stderr if it fails."""

  def call(command, *arguments, fails=False, **options):
    options = [f"--{name}={value}" for name, value in options.items()]
    ended = run(command, *arguments, *options)
    assert ended.code == (1 if fails else 0), ended.err
    return ended.err if fails else ended.out

  return call


def _tensors(path):
  """Name -> type, shape and bytes."""
  return {
    name: (array.dtype, array.shape, array.tobytes())
    for name, array in safetensors_numpy.load_file(path).items()
  }


def test_slide_encoder_from_pth_to_embedding(call, tmp_path):
  workdir = tmp_path / "slide"
  printed = call(
    "import_weights",
    _GOLDEN / "gigapath_small.pth",
    kind="gigapath",
    workdir=workdir,
    config=_GIGAPATH,
    check=_GOLDEN / "gigapath_small.npz",
  )
  assert "47 tensors, 103,168 parameters" in printed
  assert printed.count("largest error") == 3
  note = "note: torchscale misplaces rows of sequences longer than 300, "
  assert note in printed
  config, params = longnet_jax.load_checkpoint(workdir)
  assert isinstance(config, slide_encoder.SlideEncoderConfig)
  with np.load(_GOLDEN / "gigapath_small.npz") as file:
    golden = dict(file)
  apply = jax.jit(slide_encoder.SlideEncoder(config).apply)
  found = apply({"params": params}, golden["tiles"], golden["coords"])
  np.testing.assert_allclose(found, golden["cls"], atol=1e-4)

  out, record = tmp_path / "out.npz", tmp_path / "record.json"
  printed = call(
    "encode_slide", workdir=workdir, num_tiles=300, out=out, json=record
  )
  assert note in printed
  with np.load(out) as outputs:
    assert outputs["features"].shape == (300, 64)
    assert outputs["cls"].shape == outputs["mean"].shape == (64,)
  record = json.loads(record.read_text())
  assert record["tiles"] == 300
  assert record["command"].startswith("python -m experiments.encode_slide")
  assert record["hardware"]["cpu_cores"] >= 1


def test_decoder_can_be_evaluated_and_continued(
  call, tmp_path, random_parameters
):
  config = model_config.LongNetConfig(
    vocab_size=264,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    ffn_dim=16,
    segment_lengths=(8, 16),
    dilation_rates=(1, 2),
    max_positions=64,
  )
  params = random_parameters(config, 0.1)
  source, settings = tmp_path / "a.safetensors", tmp_path / "a.json"
  safetensors_numpy.save_file(torchscale.export(config, params), source)
  settings.write_text(json.dumps(keywords.export(config, decoder=True)))
  workdir = tmp_path / "decoder"
  call(
    "import_weights",
    source,
    kind="torchscale",
    workdir=workdir,
    config=settings,
  )
  _, loaded = longnet_jax.load_checkpoint(workdir)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  call("export_weights", workdir=workdir, format="torchscale")
  again = workdir / "torchscale"
  assert _tensors(again / "model.safetensors") == _tensors(source)
  assert json.loads((again / "config.json").read_text()) == json.loads(
    settings.read_text()
  )
  assert (again / "tokenizer.json").read_bytes() == (
    workdir / "tokenizer.json"
  ).read_bytes()
  printed = call("evaluate", workdir=workdir, lengths=32, max_tokens=2000)
  assert "step 0, test split" in printed
  assert printed.count("reach: the window of 32 is longer than the") == 1
  result = json.loads((workdir / "evaluation_test_0.json").read_text())
  # Random weights know nothing: about log2(264) bits a byte.
  assert 7 < result["lengths"][0]["bits_per_byte"] < 10
  assert call("generate", workdir=workdir, prompt="a", max_new_tokens=3)


def test_an_import_that_failed_can_be_repeated(call, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  golden = _GOLDEN / "torchscale_decoder_0.npz"
  options = dict(kind="torchscale", workdir=workdir)

  def fail(checkpoints, *_):
    assert (workdir / "config.json").exists()
    raise KeyError("a defect")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save_params", fail)
    with pytest.raises(KeyError):
      call("import_weights", golden, **options)
  assert not list(workdir.iterdir())
  # As one that was killed leaves it.
  (workdir / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
  assert f"wrote {workdir}" in call("import_weights", golden, **options)
  message = call("import_weights", golden, **options, fails=True)
  assert "holds a run already" in message


def test_a_wrong_model_is_not_written(call, tmp_path):
  golden, workdir = _GOLDEN / "torchscale_encoder.npz", tmp_path / "run"
  options = dict(kind="torchscale", workdir=workdir, check=golden)
  message = call(
    "import_weights", golden, **options, tolerance=1e-12, fails=True
  )
  assert message.startswith("error: encoder_out is off by")
  assert message.endswith("nothing was written\n")
  assert not workdir.exists()


@pytest.mark.parametrize(
  "source, options, message",
  [
    ((), {}, "give one file of weights, got none"),
    (("x.pth",), {"kind": "gigapath"}, "--workdir is missing"),
    (("x.pth",), {"kind": "gigapath", "workdir": "."}, "x.pth"),
    (
      (_GOLDEN / "gigapath_small.pth",),
      {"kind": "torchscale", "workdir": "nowhere"},
      "--config is missing: tensors of torchscale do not tell",
    ),
    (
      (_GOLDEN / "gigapath_small.pth",),
      {"kind": "torchscale", "workdir": "nowhere", "config": "heads"},
      "--config names no file, 'heads'; give the model's keyword dictionary",
    ),
  ],
)
def test_refuses_in_one_line(call, source, options, message):
  error = call("import_weights", *source, **options, fails=True)
  assert message in error
  assert error.startswith("error: ")
  assert error.count("\n") == 1


@pytest.mark.slow
def test_released_size_runs_at_ten_thousand_tiles(call, tmp_path):
  record = tmp_path / "record.json"
  call("encode_slide", num_tiles=10_000, json=record)
  assert json.loads(record.read_text())["parameters"] == 86_330_880
