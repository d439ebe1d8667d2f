"""The README's figures are those of the committed JSON."""

import json

import pytest

from experiments import report


def test_readme_is_what_the_command_makes_of_docs():
  text = (report.ROOT / "README.md").read_text()
  assert "<!-- table: quickstart -->" in text
  assert report.rebuild(text) == text


def test_a_changed_figure_changes_the_table(tmp_path, monkeypatch):
  record = json.loads((report.DOCS / "quickstart.json").read_text())
  record["trigram_bits_per_byte"] = 7.125
  (tmp_path / "quickstart.json").write_text(json.dumps(record))
  monkeypatch.setattr(report, "DOCS", tmp_path)
  text = report.rebuild("<!-- table: quickstart -->\nold\n<!-- end -->")
  assert "| byte trigram | 7.125 |" in text and "old" not in text


def test_an_unknown_table_is_refused():
  with pytest.raises(ValueError, match="no table 'speed'"):
    report.rebuild("<!-- table: speed -->\n<!-- end -->")
