"""Does it learn what the paper says? python -m experiments.study --study=NAME.

With --config=FILE and --workdir=DIR it trains the models of a study, each in a
folder of DIR that studies share, measures them, and writes DIR/NAME.json and
DIR/NAME.png after each. Started again it goes on where it was, as
experiments.train does; what is done is not done again. The studies:

  lengths    loss by trained and by read context (the paper's Table 2)
  flops      loss against FLOPs at growing context (Figure 6)
  sizes      loss against parameters, and against the prompt (Figure 7)
  runtime    forward time against length at equal tokens (Figure 5)
  ablations  gradient of the mixture, phases, positions, branches, gaps
  reach      recall against distance, beside the layers that it takes;
             with --config=configs/reach.py

Exit codes are those of experiments.train.
"""

from absl import flags

from experiments import command
from experiments.studies import catalogue, runs
from longnet_jax import checked, storage
from longnet_jax.training import config as config_lib

_CONFIG = command.define_config("configs/study.py")
_STUDY = flags.DEFINE_enum(
  "study", "lengths", list(catalogue.STUDIES), "which one"
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder of the runs; earlier runs in it go on"
)
_SEEDS = flags.DEFINE_integer(
  "seeds", 2, "runs that differ in their seed alone", lower_bound=1
)


def main(_) -> int:
  """Measures what is missing of a study, and shows it."""
  if _WORKDIR.value is None:
    raise checked.RefusedError(
      "--workdir is missing; give a folder such as runs/study"
    )
  name, folder = _STUDY.value, storage.path(_WORKDIR.value)
  config = config_lib.build(_CONFIG.value)
  try:
    record = catalogue.complete(name, config, _SEEDS.value, folder)
  except runs.Stopped as stopped:
    return 128 + stopped.args[0]
  for head, rows in catalogue.STUDIES[name].table(record):
    print(_as_text(head, rows))
  print(f"wrote {folder / name}.json and {folder / name}.png")
  return 0


def _as_text(head, rows) -> str:
  """A table of text with aligned columns."""
  table = [head, *rows]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in table
  )


if __name__ == "__main__":
  command.run(main)
