"""The figures of every page are those of the committed JSON."""

import json

import pytest

from experiments import report


@pytest.mark.parametrize("path", report.pages(), ids=lambda path: path.name)
def test_a_page_is_what_the_command_makes_of_docs(path):
  text = path.read_text()
  assert report.rebuild(text) == text


def test_the_tables_have_a_page():
  text = "".join(path.read_text() for path in report.pages())
  for name in ("sample", *report.TABLES):
    assert f"<!-- table: {name} -->" in text


def test_a_changed_figure_changes_the_table(tmp_path, monkeypatch):
  record = json.loads((report.DOCS / "quickstart.json").read_text())
  record["trigram_bits_per_byte"] = 7.125
  record["cut_to"] = 256
  for row in record["positions"]:
    row |= {"bits_per_byte": 2.0, "cut_bits_per_byte": 2.5}
    row["context_worth"] = 0.5
  (tmp_path / "quickstart.json").write_text(json.dumps(record))
  monkeypatch.setattr(report, "DOCS", tmp_path)
  text = report.rebuild("<!-- table: positions -->\nold\n<!-- end -->")
  assert "| byte trigram | 7.1250 |" in text and "old" not in text
  assert "| the same tokens in windows of 256 | context is worth |" in text
  assert "| 512 to 1,023 | 2.0000 | 2.5000 | 0.5000 |" in text


def test_an_unknown_table_is_refused():
  with pytest.raises(ValueError, match="no table 'nothing'"):
    report.rebuild("<!-- table: nothing -->\n<!-- end -->")
