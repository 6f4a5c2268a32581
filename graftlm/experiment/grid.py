"""What a comparison runs: methods x orders x seeds, read from the words of a command line.

A method is the name of one in the experiment file, ingredients joined by "+" with their settings after a colon
("ewc:strength=1e3,fraction=.1+realign"), or YAML. An order is "given", "reverse", stages ("audio>image>video"), or a stream.
Nothing here imports torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import ConfigError, RunError, did_you_mean
from graftlm.core.files import write_text
from graftlm.experiment import reading, tables
from graftlm.experiment.settings import NAME
from graftlm.experiment.spec import ExperimentSpec

__all__ = ["Entries", "Grid", "Order", "held", "make_grid", "parse_methods", "parse_order", "remember"]

Entries = list[Any]
"""Ingredients as an experiment file has them: a name, or {name: {setting: value}}."""

FILE = "compare.yaml"
"""What a comparison's folder is about; it grows when methods, orders or seeds are added."""

VARIED = frozenset({"methods", "order", "stream", "seed", "jobs"})
"""Settings of the experiment that the runs of one comparison do not share."""

INGREDIENT_SPLIT = re.compile(r"\+(?=[A-Za-z_])")  # the + of 1e+3 is part of a number
SETTING_SPLIT = re.compile(r",(?=[A-Za-z_]\w*=)")  # the commas of [1, 2] are part of a list


@dataclass(frozen=True)
class Order:
    """A stream in one order of its stages; ``label`` names it in folders and tables."""

    label: str
    stream: str
    stages: str | list[str]


@dataclass(frozen=True)
class Grid:
    """Every run of a comparison.

    Attributes:
        spec: what the runs share.
        against: the method that the others are compared with.
    """

    spec: ExperimentSpec
    methods: Mapping[str, Entries]
    orders: tuple[Order, ...]
    seeds: tuple[int, ...]
    against: str

    def run(self, order: Order, seed: int) -> ExperimentSpec:
        """The experiment of one run.

        Raises:
            ConfigError: an ingredient or a setting is wrong.
        """
        tree = self.spec.to_dict()
        tree |= {"methods": dict(self.methods), "stream": order.stream, "order": order.stages, "seed": seed}
        return ExperimentSpec.from_dict(tree)

    @staticmethod
    def name(order: Order, seed: int) -> str:
        """The folder of one run."""
        return f"{order.label}-seed{seed}"

    def runs(self) -> list[tuple[Order, int]]:
        """All runs: the orders of one seed stand together, as they share experts and stages."""
        return [(order, seed) for seed in self.seeds for order in self.orders]

    def to_dict(self) -> dict[str, Any]:
        """As YAML has it."""
        shared = {key: value for key, value in self.spec.to_dict().items() if key not in VARIED}
        return {
            "against": self.against,
            "methods": {name: list(entries) for name, entries in self.methods.items()},
            "orders": {order.label: {"stream": order.stream, "order": order.stages} for order in self.orders},
            "seeds": list(self.seeds),
            "experiment": shared,
        }


def make_grid(
    spec: ExperimentSpec,
    methods: Sequence[str] = (),
    orders: Sequence[str] = (),
    seeds: Sequence[int] = (),
    against: str | None = None,
) -> Grid:
    """A grid from an experiment and words; what is not given is the experiment's own.

    Raises:
        ConfigError: a misspelled method, ingredient, setting or order; a seed twice; nothing to compare with of that name.
    """
    if spec.composers is not None:
        raise ConfigError(
            f"{spec.name}: composes experts, and a comparison is of methods that learn stage after stage. Use `graftlm run`; "
            f"`graftlm report` puts several runs side by side."
        )
    chosen = parse_methods(methods, spec) if methods else spec.mixes()
    own = Order(spec.order if isinstance(spec.order, str) else "-".join(spec.order), spec.stream, spec.order)
    read = [parse_order(word, spec) for word in orders] or [own]
    named = {"orders": [each.label for each in read], "seeds": [str(seed) for seed in seeds]}
    for what, names in named.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"--{what}: {', '.join(twice)} is named twice; each once is expected.")
    if any(seed < 0 for seed in seeds):
        raise ConfigError(f"--seeds: {list(seeds)}; numbers from 0 are expected.")
    if against is not None and against not in chosen:
        raise ConfigError(f"--against: no method '{against}' in this comparison; {did_you_mean(against, chosen)}")
    grid = Grid(spec, chosen, tuple(read), tuple(seeds) or (spec.seed,), against or next(iter(chosen)))
    for order in grid.orders:
        grid.run(order, grid.seeds[0])  # every name is known
    return grid


def parse_methods(words: Sequence[str], spec: ExperimentSpec) -> dict[str, Entries]:
    """Methods by name: "all" is every one of the file.

    Raises:
        ConfigError: no such method or ingredient; not YAML; two different methods of one name.
    """
    own, found = spec.mixes(), dict[str, Entries]()
    for word in words:
        for name, entries in _read(word.strip(), own).items():
            if found.setdefault(name, entries) != entries:
                raise ConfigError(f"--methods: '{name}' names two different methods; give one another name, in YAML.")
    return found


def _read(word: str, own: Mapping[str, Entries]) -> dict[str, Entries]:
    if word in own:
        return {word: list(own[word])}
    if word == "all":
        return {name: list(entries) for name, entries in own.items()}
    if word.startswith(("[", "{")) or ": " in word:
        return _from_tree(reading.parse(word, "--methods"), word)
    entries = [_ingredient(part, word, own) for part in INGREDIENT_SPLIT.split(word)]
    return {_name(word): entries}


def _from_tree(tree: Any, word: str) -> dict[str, Entries]:
    """A list of ingredients; names with a list each; or one ingredient with its settings."""
    if isinstance(tree, list) and tree:
        parts = [_said(entry) for entry in tree]
        return {_name("+".join(parts)): tree}
    if isinstance(tree, Mapping) and tree:
        if all(isinstance(value, list) for value in tree.values()):
            return {str(name): list(value) for name, value in tree.items()}
        if len(tree) == 1:
            return {_name(_said(tree)): [tree]}
    raise ConfigError(
        f"--methods: {word!r} does not fit; a name, ingredients joined by +, or YAML as in an experiment file is expected, for "
        f'example ewc+realign, ewc:strength=1e3, or "mine: [replay, {{realign: {{fraction: 0.1}}}}]".'
    )


def _said(entry: Any) -> str:
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, settings = next(iter(entry.items()))
        pairs = settings.items() if isinstance(settings, Mapping) else ()
        return f"{name}:" + ",".join(f"{key}={value}" for key, value in pairs) if pairs else str(name)
    return str(entry)


def _ingredient(part: str, word: str, own: Mapping[str, Entries]) -> Any:
    name, colon, rest = part.partition(":")
    known = tables.registry("methods").table()
    if name not in known:
        near = did_you_mean(name, {*known, *own, "all"})
        raise ConfigError(f"--methods: {word!r}: no method and no ingredient '{name}'; {near}")
    if not colon:
        return name
    settings = {}
    for pair in SETTING_SPLIT.split(rest):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--methods: {word!r}: '{pair}' is no setting; key=value is expected after the colon.")
        settings[key.strip()] = reading.parse(value, f"--methods {word}")
    return {name: settings}


def _name(word: str) -> str:
    """A folder's name from what was typed."""
    text = re.sub(r"[:=,\s]+", "-", re.sub(r"[\[\]{}()'\"]", "", word)).strip("-.")
    text = re.sub(r"[^A-Za-z0-9_.+-]", "", text)
    if not NAME.fullmatch(text):
        raise ConfigError(
            f'--methods: {word!r} makes no name of a folder; give it one, in YAML: "name: [ingredients]".'
        )
    return text


def parse_order(word: str, spec: ExperimentSpec) -> Order:
    """An order of the experiment's stages, or a stream. Whether such stages exist is for the stream to say.

    Raises:
        ConfigError: none of these; names of stages are not known here, so a single unknown word is taken for a misspelled one.
    """
    if word in ("given", "reverse"):
        return Order(word, spec.stream, word)
    if ">" in word:
        names = [name.strip() for name in word.split(">")]
        if not all(NAME.fullmatch(name) for name in names):
            raise ConfigError(f"--orders: '{word}'; names of stages with > between them are expected.")
        return Order("-".join(names), spec.stream, names)
    streams = tables.registry("streams").table()
    if word in streams:
        return Order(word, word, "given")
    near = did_you_mean(word, {"given", "reverse", *streams})
    raise ConfigError(f"--orders: '{word}' is no order, no stream, and no stages with > between them; {near}")


def remember(grid: Grid, out: Path) -> Grid:
    """Write down what this folder compares, together with what earlier commands asked for.

    Returns:
        The whole grid: everything that was ever asked for in this folder.

    Raises:
        RunError: the folder compares something else, or is no comparison's.
    """
    path = out / FILE
    tree = grid.to_dict()
    if path.is_file():
        there = _read_back(path)
        _expect_same(there, tree, out)
        tree["methods"] = there["methods"] | tree["methods"]
        tree["orders"] = there["orders"] | tree["orders"]
        tree["seeds"] = sorted({*there["seeds"], *tree["seeds"]})
    elif found := sorted(entry.name for entry in out.glob("[!.]*")) if out.exists() else []:
        raise RunError(
            f"{out}: not empty ({', '.join(found[:3])}) and no comparison; a new or empty folder is expected. Choose another "
            f"--out."
        )
    text = reading.write(tree)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    orders = tuple(Order(label, each["stream"], each["order"]) for label, each in tree["orders"].items())
    return replace(grid, methods=tree["methods"], orders=orders, seeds=tuple(tree["seeds"]))


def held(out: Path) -> dict[str, Entries]:
    """The methods that a folder compares already."""
    path = out / FILE
    return dict(_read_back(path)["methods"]) if path.is_file() else {}


def _read_back(path: Path) -> dict[str, Any]:
    there = reading.parse(path.read_text(encoding="utf-8"), str(path))
    kinds = {"methods": dict, "orders": dict, "seeds": list, "experiment": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(there, dict) or not isinstance(there.get(key), kind)]
    if wrong:
        raise RunError(
            f"{path}: {', '.join(wrong)} missing or of another form; the file was changed or damaged. Restore it, or choose "
            f"another --out."
        )
    return dict(there)


def _expect_same(there: Mapping[str, Any], here: Mapping[str, Any], out: Path) -> None:
    """What both have must be the same; what only one has is growth."""
    differing = [
        f"  {group}.{key}: {there[group].get(key)} there, {here[group].get(key)} here"
        for group in ("experiment", "methods", "orders")
        for key in here[group].keys() | (there[group].keys() if group == "experiment" else set())
        if (group == "experiment" or key in there[group]) and there[group].get(key) != here[group].get(key)
    ]
    if differing:
        raise RunError(
            f"{out}: another comparison is in this folder. Choose another --out, or give the methods that differ another name. "
            "What differs:\n" + "\n".join(sorted(differing))
        )
