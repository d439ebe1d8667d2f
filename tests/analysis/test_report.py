import dataclasses
import subprocess
import sys

import pytest

from longnet_jax import analysis
from longnet_jax.analysis import report
from longnet_jax.models import config as model_config

PAPER = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


def test_the_paper_setting_in_words(capsys):
  analysis.describe(analysis.Pattern(32768, 12, *PAPER))
  text = capsys.readouterr().out
  assert "32,768 positions, 12 heads of 64, causal" in text
  assert "16,384          6           2,731   10.67%" in text
  assert "no gaps" in text
  assert "214.8 GFLOP  1.649 TFLOP             7.68" in text
  assert "34 MiB       96 MiB" in text
  assert "by  1 layer" in text


def test_gaps_and_unread_positions_are_named():
  text = analysis.summary(analysis.Pattern(64, 3, (16, 64), (4, 8)))
  assert "branch (64, 8) has phases 0 to 7, heads read only 0 to 2" in text
  assert "positions in no branch at all: 16 of 64" in text


def test_all_pairs_are_said_to_be_connected_only_where_they_are():
  pattern = analysis.Pattern(65536, 12, (2048, 8192, 65536), (1, 4, 12))
  text = analysis.summary(pattern)
  assert "99.9999%" in text and "100.0000%" not in text
  assert text.endswith("the others are never connected")


def test_a_line_says_what_reaches_a_position():
  fits = analysis.Pattern(1024, 4, (128, 512, 1024), (1, 2, 4))
  assert analysis.reach_line(fits, 4) == (
    "reach: the longest segment holds the window of 1,024; no gaps; 4 layers "
    "connect 99.9% of its pairs"
  )
  short = analysis.Pattern(2048, 2, (32, 512), (1, 4))
  share = analysis.coverage(short, 1)[0]
  assert analysis.reach_line(short, 1) == (
    "reach: the window of 2,048 is longer than the longest segment, 512, and "
    "no head reads beyond its segment; gaps in 1 of 2 branches; 1 layer "
    f"connects {share:.1%} of its pairs"
  )


def test_other_cores_say_what_they_read():
  config = model_config.LongNetConfig(
    vocab_size=8,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    ffn_dim=8,
    attention="dense",
    sparse_block=16,
    sparse_summary=4,
  )
  line = analysis.model_reach_line(config, 64)
  assert line.endswith("2 layers connect 100% of its pairs")
  sparse = dataclasses.replace(config, attention="sparse")
  line = analysis.model_reach_line(sparse, 64)
  assert line.startswith("reach: blocks of 16 and the last 4 columns")


@pytest.mark.parametrize(
  ("share", "text"),
  [(0.0, "0%"), (4e-5, "under 0.1%"), (0.0314, "3.1%"), (0.9999, "99.9%")],
)
def test_a_share_is_nothing_or_all_only_where_it_is(share, text):
  assert report.percent(share) == text


def test_a_billion_positions_are_described():
  text = analysis.summary(analysis.Pattern(2**30, 12, *PAPER))
  assert "7.04 PFLOP" in text
  assert "by  1 layer " in text
  whole = analysis.summary(analysis.Pattern(2**30, 12, (2048, 2**30), (1, 12)))
  assert "reach: segments are too long to walk" in whole


def test_nothing_heavier_than_numpy_and_matplotlib_is_imported():
  program = (
    "import sys; from longnet_jax import analysis;"
    "sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", program]).returncode == 0
