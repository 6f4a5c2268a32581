"""The documents say what is so: commands, links, names and code in them are checked."""

import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import graftlm
from graftlm.cli.main import app
from graftlm.experiment.spec import load
from graftlm.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "graftlm").rglob("*.py"))
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LATER: set[str] = set()
"""Linked before it is made: the picture of the report is taken when the numbers are in."""


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """The code blocks of a page in these languages: what stands behind the language, and the code."""
    for language, rest, code in FENCE.findall(page.read_text()):
        if language in languages:
            yield rest.strip(), code


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every ``graftlm`` command of the documents, from shell blocks and from inline code."""
    for page in PAGES:
        text = page.read_text()
        lines = [
            line.partition(" #")[0].strip() for _, code in blocks(page, "sh", "bash") for line in code.splitlines()
        ]
        lines += re.findall(r"`(graftlm [^`\n]+)`", FENCE.sub("", text))
        yield from ((page.name, shlex.split(line)[1:]) for line in lines if line.startswith("graftlm "))


def anchor(heading: str) -> str:
    """The fragment that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_commands_exist(page: str, words: list[str]) -> None:
    group = typer.main.get_command(app)
    known = group.commands  # type: ignore[attr-defined]
    assert words[0] in known, f"{page}: graftlm {words[0]}"
    flags = {flag for parameter in known[words[0]].params for flag in parameter.opts} | {"--help"}
    used = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
    assert used <= flags, f"{page}: {words[0]} has no {used - flags}"
    if words[0] in ("run", "plan") and len(words) > 1 and not words[1].endswith(".yaml"):
        load(words[1], [word for word in words[2:] if "=" in word and not word.startswith("-")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if str(path.relative_to(ROOT)) in LATER:
            continue
        assert path.exists(), f"{page.name}: {target} is not there"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks marked ``no-run`` (they train) must compile and may use public names only; all others run, in order."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for mark, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "graftlm":
                assert node.attr in graftlm.__all__, f"{page.name}: graftlm.{node.attr} is not public"
        program = compile(code, page.name, "exec", dont_inherit=True)
        if mark != "no-run":
            exec(program, names)


def test_yaml_blocks_are_experiments(tmp_path: Path) -> None:
    for page in PAGES:
        for mark, code in blocks(page, "yaml"):
            if mark != "part":
                (tmp_path / "experiment.yaml").write_text(code)
                load(tmp_path / "experiment.yaml").check()


def test_papers_page_names_every_method_and_rule() -> None:
    page = (ROOT / "docs" / "papers.md").read_text()
    files = [*(ROOT / "graftlm" / "methods").glob("*.py"), *(ROOT / "graftlm" / "evaluation" / "metrics").glob("*.py")]
    files += [path for path in (ROOT / "graftlm" / "merging").glob("*.py") if "\nPaper:" in path.read_text()]
    missing = [
        name for path in files if path.stem != "__init__" and (name := f"{path.parent.name}/{path.name}") not in page
    ]
    assert not missing, f"docs/papers.md says nothing of {missing}"


def test_papers_page_names_every_paper_of_the_code() -> None:
    page = (ROOT / "docs" / "papers.md").read_text()
    cited = {number for path in MODULES for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text())}
    assert cited, "no paper is cited"
    assert not (missing := {number for number in cited if number not in page}), f"docs/papers.md lacks arXiv:{missing}"


@pytest.mark.parametrize("path", [*(ROOT / "graftlm" / "methods").glob("*.py")], ids=lambda path: path.name)
def test_methods_say_what_differs(path: Path) -> None:
    if path.stem != "__init__":
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "Paper:" in doc and "Differs:" in doc, f"{path.name}: its docstring needs 'Paper:' and 'Differs:'"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    defines = any(isinstance(node, ast.ClassDef | ast.FunctionDef) for node in tree.body)
    names = {t.id for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) for t in _targets(n)}
    assert not defines or "__all__" in names, "no __all__"


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target for target in targets if isinstance(target, ast.Name)]


def test_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == graftlm.version
    assert f"## [{graftlm.version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_exist() -> None:
    for name in graftlm.__all__:
        assert getattr(graftlm, name) is not None


@pytest.mark.parametrize("name", METHODS.table())
def test_methods_page_names_every_setting(name: str) -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    section = page.partition(f"## `{name}`\n")[2].partition("\n## ")[0]
    assert section, f"docs/methods.md has no section of {name}"
    missing = [each for each in inspect.signature(METHODS.get(name)).parameters if f"| `{each}` |" not in section]
    assert not missing, f"docs/methods.md, {name}: no row of {missing}"
