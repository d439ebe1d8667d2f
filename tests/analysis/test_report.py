import subprocess
import sys

from longnet_jax import analysis

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
  assert "of every key" in text


def test_a_billion_positions_are_described():
  text = analysis.summary(analysis.Pattern(2**30, 12, *PAPER))
  assert "7.04 PFLOP" in text
  assert "reach: not walked" in text


def test_nothing_heavier_than_numpy_and_matplotlib_is_imported():
  program = (
    "import sys; from longnet_jax import analysis;"
    "sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", program]).returncode == 0
