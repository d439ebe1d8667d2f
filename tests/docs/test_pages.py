"""Snippets of every page run in page order, and its commands are ones."""

import ast
import pathlib
import re

import pytest

from configs import quickstart
from experiments import report
from longnet_jax.training import config as config_lib

_TESTED_ELSEWHERE = ("training.md", "weights.md")
_PAGES = report.pages()
_COMMAND = re.compile(r"python -m experiments\.(\w+)((?:[^`\n\\]|\\\n)*)")
_FLAG = re.compile(r"--([\w.]+)(?:=('[^']*'|[^\s']*))?")


def snippets(path: pathlib.Path) -> list[str]:
  """The Python of a page."""
  return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def _commands():
  """Every command line of every page: (name, arguments), each once."""
  found = {
    (name, arguments.replace("\\\n", " "))
    for path in _PAGES
    for name, arguments in _COMMAND.findall(path.read_text())
  }
  return sorted(found)


@pytest.mark.parametrize(
  "path",
  [p for p in _PAGES if snippets(p) and p.name not in _TESTED_ELSEWHERE],
  ids=lambda path: path.name,
)
@pytest.mark.usefixtures("quickstart")
def test_the_snippets_of_a_page_run_in_order(path, capsys):
  names = {"__name__": path.name}
  for i, code in enumerate(snippets(path)):
    exec(compile(code, f"{path.name}, snippet {i}", "exec"), names)
  if path.name == "README.md":
    assert len(names["ids"]) == 100
    assert names["out"].shape == names["query"].shape
    assert "65,536 positions, 12 heads" in capsys.readouterr().out


@pytest.mark.parametrize("name, arguments", _commands())
def test_a_command_of_the_pages_has_these_flags(name, arguments):
  # By its text: each command takes flags of one name from the one before.
  folder = report.ROOT / "experiments"
  files = (folder / f"{name}.py", folder / "command.py")
  known = set(re.findall(r'"(\w+)"', "".join(f.read_text() for f in files)))
  settings = {}
  for flag, value in _FLAG.findall(arguments):
    if flag.startswith("config."):
      settings[flag.removeprefix("config.")] = value.strip("'")
    else:
      assert {flag, flag.removeprefix("no")} & known, flag
  _check_settings(settings)


def _check_settings(settings):
  """Refuses keys that no config has, and values that none takes."""
  default = quickstart.get_config()
  for key, value in settings.items():
    assert key in config_lib.flatten(default.to_dict())
    # DIR, or $seed, stand for something.
    if not value.isupper() and "$" not in value:
      default.update_from_flattened_dict({key: _literal(value)})
  config_lib.build(default)


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def test_links_of_the_pages_lead_somewhere():
  for path in _PAGES:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
      file, _, section = link.partition("#")
      if not link.startswith("https://"):
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name}: {link}"
        assert not section or section in _sections(target), link


def _sections(page):
  """What a link may name of a page, as GitHub makes it of headings."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  plain = (re.sub(r"[^\w -]", "", heading.lower()) for heading in headings)
  return {heading.replace(" ", "-") for heading in plain}


def test_the_readme_fits_one_sitting():
  assert len((report.ROOT / "README.md").read_text().splitlines()) <= 190
