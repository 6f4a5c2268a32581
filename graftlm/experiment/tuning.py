"""Hyperparameters on equal terms: every method gets the same number of candidates, on validation data of an extra seed.

Candidates of a method are taken from the values of its ingredients' settings. One setting: its values, evenly spread. Several:
a Latin hypercube, in which every value of every setting appears equally often. What an experiment file sets itself is not
tuned, unless the command names it.

    score = (Bw + Fw) / 2      backward and forward gain after the last stage: what is kept, and what is learned

Paper:   none; the protocol is ours. McKay et al., Technometrics 21(2), 1979 (Latin hypercubes).
Differs: nothing.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.core.files import hash_json
from graftlm.experiment import reading
from graftlm.experiment.grid import Entries
from graftlm.methods import METHODS

__all__ = ["DEFAULT_GRID", "OBJECTIVE", "Candidate", "Tuning", "candidates", "parse_grid"]

OBJECTIVE = "mean of backward and forward gain after the last stage, on validation data"

RATE = "times"
"""Marks values that multiply the learning rate of the phase of realigning."""

DEFAULT_GRID: Mapping[str, tuple[Any, ...]] = {
    "ewc.strength": (1e2, 1e3, 1e4, 1e5),
    "lwf.strength": (0.1, 0.3, 1.0, 3.0),
    "uir.strength": (0.1, 0.3, 1.0, 3.0),
    "ikd.strength": (0.1, 0.3, 1.0, 3.0),
    "olora.strength": (0.1, 0.5, 2.0, 10.0),
    "llava-c.strength": (0.1, 0.3, 1.0, 3.0),
    "llava-c.alpha": (0.1, 0.2, 0.3, 0.5),
    "merge.alpha": (0.1, 0.2, 0.3, 0.5),
    "realign.lr": (RATE, 0.5, 1.0, 2.0, 4.0),
    "mera.lr": (RATE, 0.5, 1.0, 2.0, 4.0),
    "replay.repeat": (1, 2, 3, 4),
}
"""Ingredient and setting -> values. An ingredient of another name, or without such a setting, has nothing to tune."""


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen.

    Attributes:
        budget: candidates per method, for each alike; a method with fewer different ones gets these.
        seed: of the runs that are only for choosing.
        grid: "ingredient.setting" -> values, before `DEFAULT_GRID`.
    """

    budget: int = 4
    seed: int = 100
    grid: Mapping[str, Sequence[Any]] | None = None

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ConfigError(f"--tune-budget: {self.budget}; at least 1 candidate per method is expected.")


@dataclass(frozen=True)
class Candidate:
    """A method with some settings.

    Attributes:
        settings: "ingredient.setting" -> value; empty is the method as it was given.
    """

    name: str
    settings: Mapping[str, Any]
    entries: Entries


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """Values from words such as ``ewc.strength=1e2,1e3``.

    Raises:
        ConfigError: no such ingredient or setting, or no values.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name, dot, setting = key.strip().partition(".")
        if not (equals and dot and text.strip()):
            raise ConfigError(f"--grid: '{word}' does not fit; ingredient.setting=value,value is expected.")
        if name not in METHODS.table():
            raise ConfigError(f"--grid: no ingredient '{name}'; {did_you_mean(name, METHODS.table())}")
        known = _settings(name)
        if setting not in known:
            raise ConfigError(f"--grid: {name} has no setting '{setting}'; {did_you_mean(setting, known)}")
        values = reading.parse(f"[{text}]", f"--grid {word}")
        grid[key.strip()] = list(dict.fromkeys(values))
    return grid


def candidates(method: str, entries: Entries, tuning: Tuning, rate: float | None) -> list[Candidate]:
    """At most ``tuning.budget`` different candidates of one method, always the same ones; a single one is the method itself.

    Args:
        rate: learning rate of the connectors while realigning, which some values multiply.
    """
    axes = _axes(entries, tuning.grid or {}, rate)
    if not axes or tuning.budget == 1:
        return [_candidate(method, entries, {})]
    found = dict[str, Candidate]()
    columns = [_column(method, key, values, tuning.budget, shuffled=i > 0) for i, (key, values) in enumerate(axes)]
    for row in zip(*columns, strict=True):
        made = _candidate(method, entries, {key: value for (key, _), value in zip(axes, row, strict=True)})
        found[made.name] = made
    return list(found.values())


def _axes(entries: Entries, grid: Mapping[str, Sequence[Any]], rate: float | None) -> list[tuple[str, list[Any]]]:
    axes = []
    for entry in entries:
        name, given = _parts(entry)
        known = _settings(name)
        for setting in known:
            key = f"{name}.{setting}"
            if key in grid:
                axes.append((key, list(grid[key])))
            elif key in DEFAULT_GRID and setting not in given and (key != "merge.alpha" or _has_alpha(given)):
                values = list(DEFAULT_GRID[key])
                if values[0] == RATE:
                    values = [] if rate is None else [float(f"{rate * times:.6g}") for times in values[1:]]
                if values:
                    axes.append((key, values))
    return list(dict(axes).items())


def _has_alpha(given: Mapping[str, Any]) -> bool:
    """Whether this merging keeps a share alpha; a running average has a weight, and that is the method."""
    return bool(given.get("rule", "average") != "average")


def _column(method: str, key: str, values: Sequence[Any], budget: int, *, shuffled: bool) -> list[Any]:
    """One value per candidate, each equally often as far as that goes."""
    if budget < len(values):
        last = max(1, budget - 1)
        values = [values[round(i * (len(values) - 1) / last)] for i in range(budget)]
    column = [values[i % len(values)] for i in range(budget)]
    if not shuffled:
        return column
    return [column[i] for i in seeds.rng(0, "tuning", method, key).permutation(budget)]


def _candidate(method: str, entries: Entries, settings: Mapping[str, Any]) -> Candidate:
    mixed: Entries = []
    for entry in entries:
        name, given = _parts(entry)
        own = {key.partition(".")[2]: value for key, value in settings.items() if key.partition(".")[0] == name}
        mixed.append({name: {**given, **own}} if own else entry)
    return Candidate(f"{method}.{hash_json(dict(settings))[:6]}", settings, mixed)


def _parts(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    name, settings = next(iter(entry.items()))
    return name, settings or {}


def _settings(name: str) -> list[str]:
    """Settings of an ingredient, in the order in which it declares them."""
    return list(inspect.signature(METHODS.get(name)).parameters)
