"""Imports point down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "graftlm"
STACK = ("core", "data", "model", "merging", "learning", "methods")
MEASURE = {"core", "data", "model", "evaluation"}
MAY = {room: {*STACK[: index + 1]} for index, room in enumerate(STACK)} | {
    "evaluation": MEASURE,
    "report": {"core", "data", "report", "evaluation.gains", "experiment.store"},
    "experiment": {*STACK, *MEASURE, "experiment", "report"},
    "cli": {*STACK, *MEASURE, "experiment", "report", "cli"},
}
"""Per room the rooms, or single modules, that it may import."""

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]


def imported(path: Path) -> Iterator[str]:
    """Dotted names inside the package that a module imports, anywhere in its text."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{name}" for name in names]
        yield from (name.removeprefix("graftlm.") for name in names if name.startswith("graftlm."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    allowed = MAY[path.relative_to(PACKAGE).parts[0]] | {"version", "__version__"}
    wrong = [name for name in imported(path) if not any(f"{name}.".startswith(f"{room}.") for room in allowed)]
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}, may import {sorted(allowed)}"
