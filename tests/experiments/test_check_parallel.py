import importlib.util
import json

import pytest

from experiments import check_parallel, parallel_tables, progress, report


def test_a_topology_needs_the_tpu_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"v5e:4x4 .* pip install 'jax\[tpu\]'"):
    next(check_parallel._pod("v5e:4x4", progress.Progress()))


def test_the_record_is_exact_and_its_formula_holds():
  record = json.loads((report.DOCS / "parallel.json").read_text())
  for row in record["errors"].values():
    assert max(row.values()) < 1e-5
  for layer in record["bytes"] + record["scaling"]:
    for row in layer["rows"]:
      assert row["measured"] == row["formula"] > 0


def test_bytes_of_a_segment_of_two_shards_do_not_grow_with_the_devices():
  record = json.loads((report.DOCS / "parallel.json").read_text())
  ((_, rows),) = parallel_tables.scaling(record)
  assert [row[0] for row in rows] == ["1", "2", "4", "8"]
  assert len({row[2] for row in rows[1:]}) == 1
