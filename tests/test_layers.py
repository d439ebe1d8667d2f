"""Each layer of the package imports only from the layers before it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "longnet_jax"
LAYERS = [
  "checked",
  "storage",
  "pattern",
  "ops",
  "parallel",
  "models",
  "inference",
  "data",
  "analysis",
  "training",
  "interop",
  "scores",
  "evaluate",
  "plan",
  "estimate",
]
MODULES = sorted(ROOT.rglob("*.py"))


def _layer(module: str) -> int:
  """Number of a dotted module's layer; top-level modules come last."""
  name = (module.split(".") + [""])[1]
  return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def _imports(path: pathlib.Path) -> set[str]:
  """Absolute names of all modules that a file imports, in any scope."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      names.update(f"{node.module}.{alias.name}" for alias in node.names)
  return names


def _module(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=_module)
def test_imports_come_from_the_same_or_an_earlier_layer(path):
  for name in _imports(path):
    if name.split(".")[0] == "longnet_jax":
      assert _layer(name) <= _layer(_module(path)), f"{path} imports {name}"


def test_the_rule_sees_a_violation():
  assert _layer("longnet_jax.training.loop") > _layer("longnet_jax.pattern")


@pytest.mark.parametrize("path", sorted((ROOT / "ops").rglob("*.py")))
def test_ops_know_neither_flax_nor_meshes(path):
  forbidden = ("flax", "jax.sharding", "ml_collections")
  assert not [n for n in _imports(path) if n.startswith(forbidden)]
