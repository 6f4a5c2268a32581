"""From YAML text and `a.b=c` settings to a tree, and from pydantic's complaints to sentences.

Differs from YAML 1.1, which PyYAML speaks: ``1e-3`` is a number, ``yes``, ``no``, ``on``, ``off`` and dates are text,
and a key that is given twice is an error.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from graftlm.core.errors import ConfigError, did_you_mean

__all__ = ["apply_override", "explain", "parse", "write"]

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")

SHORT = {"phases": "schedule", "encoder": "kind", "connector": "kind"}
"""Settings that may be a mere name, and the key that the name has when they are written out."""


class _Loader(yaml.SafeLoader):
    """Safe, with the scalars of YAML 1.2 and without repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  the name is PyYAML's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text; quote it", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


for tag, pattern, first in (
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, list(first))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever one of the two YAML versions would not read as text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def parse(text: str, source: str) -> Any:
    """The tree that YAML text says.

    Args:
        source: where the text is from, for messages.

    Raises:
        ConfigError: not YAML; the message names source, line and column.

    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not YAML: {error.problem}. Correct the text there.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {error}. Correct the text.") from None


def write(tree: Mapping[str, Any]) -> str:
    """YAML text that `parse` reads back as the same tree."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put one ``a.b[0].c=value`` from the command line into the tree.

    Raises:
        ConfigError: not of this form, or the path leads through something that has no settings.

    """
    path, equals, text = override.partition("=")
    steps = [int(index) if index else key for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]
    if not equals or not steps or _dotted(steps) != path.strip():
        raise ConfigError(
            f"'{override}' is not a setting; key=value is expected, for example model.lora.rank=8 or seed=1."
        )
    value = parse(text, f"'{override}'")
    node: Any = tree
    for depth, step in enumerate(steps[:-1]):
        node = _inside(node, step, steps, depth)
    last = steps[-1]
    in_list = isinstance(node, list) and isinstance(last, int) and last < len(node)
    if in_list or (isinstance(node, dict) and isinstance(last, str)):
        node[last] = value
    else:
        raise ConfigError(f"{path}: there is nothing of that name to set; {_dotted(steps[:-1])} is {node!r}.")


def _inside(node: Any, step: str | int, steps: list[str | int], depth: int) -> Any:
    """The child of a node, made when it is missing and written out when it is a mere name."""
    here = _dotted(steps[: depth + 1])
    if isinstance(node, list):
        if not isinstance(step, int) or step >= len(node):
            raise ConfigError(f"{here}: no such entry; {len(node)} are there, counted from [0].")
        if isinstance(node[step], str):
            node[step] = {node[step]: {}}
        return node[step]
    if not isinstance(node, dict) or not isinstance(step, str):
        raise ConfigError(f"{here}: {_dotted(steps[:depth])} is {node!r}, which has no settings.")
    child = node.get(step)
    if child is None:
        child = {}
    elif isinstance(child, str) and step in SHORT:
        child = {SHORT[step]: child}
    node[step] = child
    return child


def _dotted(steps: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def explain(error: ValidationError, tree: Any) -> str:
    """One line per wrong setting: its full path, what is wrong, what would be right."""
    lines = dict.fromkeys(_sentence(details, tree) for details in error.errors(include_url=False))
    return "\n".join(lines)


def _sentence(details: ErrorDetails, tree: Any) -> str:
    context, kind = details.get("ctx", {}), details["type"]
    path = (_dotted(_real(details["loc"], tree, kind)) + context.get("at", "")).removeprefix(".")
    if kind == "setting":
        return f"{path}: {details['msg']}"
    if kind == "missing":
        return f"{path}: missing; this setting is required."
    message = details["msg"][0].lower() + details["msg"][1:]
    if kind == "literal_error":
        message = did_you_mean(str(details["input"]), re.findall(r"'([^']*)'", context["expected"])).removesuffix(".")
    end = "" if message.endswith("?") else "."
    return f"{path or 'the experiment'}: {details['input']!r} does not fit; {message}{end}"


def _real(location: Sequence[str | int], tree: Any, kind: str) -> list[str | int]:
    """The location without what pydantic adds: names of alternatives, and keys of settings given as a mere name."""
    steps: list[str | int] = []
    for depth, step in enumerate(location):
        if isinstance(tree, Mapping) and step in tree:
            tree = tree[str(step)]
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
        elif not (kind == "missing" and depth == len(location) - 1):
            continue
        steps.append(step)
    return steps
