"""Evaluates trained models: python -m experiments.evaluate --workdir=DIR.

Prints perplexity and bits per byte at each context length, and by position the
same tokens in windows of the longest length and of the shortest: the difference
is what context is worth. Writes evaluation_SPLIT_STEP.json and .png into the
workdir: what it has so far, where a signal stops it. With --compare=DIR2,DIR3
these are evaluated on the same text and drawn into the same picture, and
loss_compare.png shows their training.
"""

from absl import flags
import jax

from experiments import command, hardware, progress
from longnet_jax import analysis, checked, evaluate, scores, storage
from longnet_jax.data import config as data_config
from longnet_jax.training import checkpoint, curves, metrics, stopping
from longnet_jax.training import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_COMPARE = flags.DEFINE_list("compare", [], "workdirs to set beside it")
_LENGTHS = flags.DEFINE_list(
  "lengths",
  [],
  "context lengths in tokens; by default the window and an eighth of it",
)
_SPLIT = flags.DEFINE_enum(
  "split", "test", data_config.SPLITS, "which documents to read"
)
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens",
  1_000_000,
  "tokens of the split to read, spread evenly",
  lower_bound=1,
)
_MAKE_MESH = command.define_mesh("data", "seq", "model")
_WHICH = command.define_checkpoint()


def main(_) -> int:
  """Evaluates the workdir, and those to compare it with."""
  workdir = command.trained(_WORKDIR)
  lengths = [_length(text) for text in _LENGTHS.value]
  mesh = _MAKE_MESH()
  workdirs = [workdir, *map(storage.path, _COMPARE.value)]
  labels = _labels(workdirs)
  records = {}
  with stopping.catch_signals() as caught:
    for label, workdir in zip(labels, workdirs, strict=True):
      record = evaluate_workdir(workdir, lengths, mesh, caught)
      records[f"{label}, step {record['step']}"] = record
      if caught:
        break
  first = next(iter(records.values()))
  picture = workdirs[0] / f"{_stem(first)}.png"
  scores.draw(records, picture)
  print(f"wrote {picture}")
  if caught:
    print(f"{caught[0].name}: stopped before the end")
    return 128 + caught[0]
  if _COMPARE.value:
    picture = workdirs[0] / "loss_compare.png"
    runs = map(metrics.read_metrics, workdirs)
    curves.draw_losses(dict(zip(labels, runs, strict=True)), picture)
    print(f"wrote {picture}")
  return 0


def evaluate_workdir(
  workdir: storage.Path,
  lengths: list[int],
  mesh: jax.sharding.Mesh,
  caught: list,
) -> dict:
  """Prints one workdir's table and writes its JSON, which it returns.

  It ends early where a signal is `caught`.
  """
  with checkpoint.open_to_read(workdir) as checkpoints:
    step = checkpoints.find(_WHICH())
  model, params = checkpoint.load_checkpoint(workdir, step=step, sharding=mesh)
  config = workdir_lib.read_config(workdir, step=step)
  window = config.data.window
  lengths = lengths or [window // 8 or 1, window]
  reach = analysis.model_reach_line(model, max(lengths))
  print(f"{workdir}: {model.attention}, step {step}, {_SPLIT.value} split")
  print(reach, flush=True)
  shown = progress.Progress()
  shown.show("compiling")

  def stop(length, share):
    shown.show(f"context {length:,}: {share:.0%}")
    return bool(caught)

  result = evaluate.evaluate(
    model,
    params,
    config.data,
    workdir_lib.load_tokenizer(workdir, step=step),
    lengths,
    split=_SPLIT.value,
    max_tokens=_MAX_TOKENS.value,
    mesh=mesh,
    stop=stop,
  )
  shown.clear()
  print(scores.table(result), flush=True)
  return scores.write(
    result,
    workdir / f"{_stem({'split': result.split, 'step': step})}.json",
    step=step,
    stopped=bool(caught),
    attention=model.attention,
    trained_window=window,
    reach=reach,
    command=command.line(),
    hardware=hardware.describe(),
  )


def _stem(record: dict) -> str:
  return f"evaluation_{record['split']}_{record['step']}"


def _length(text: str) -> int:
  if not text.strip().isdigit() or int(text) < 1:
    raise checked.RefusedError(
      f"--lengths has {checked.shown(text)}; use whole numbers such as 2048"
    )
  return int(text)


def _labels(workdirs: list[storage.Path]) -> list[str]:
  """Folder names, or whole paths where the names are the same."""
  names = [storage.absolute(workdir).name for workdir in workdirs]
  return names if len(set(names)) == len(names) else list(map(str, workdirs))


if __name__ == "__main__":
  command.run(main)
