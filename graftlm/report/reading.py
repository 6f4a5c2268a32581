"""Read a run folder.

A finished run says everything in ``summary.json``. Of an unfinished one the finished stages are put together
from their own files, in the same form, so that a page can be made at any time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from graftlm.core.errors import RunError
from graftlm.core.files import read_json, read_jsonl
from graftlm.evaluation.gains import backward_gains, forward_gains, summary

__all__ = ["MethodResult", "Run", "Scores", "flatten", "gains", "read_run", "stage_folders"]

Scores = Mapping[str, Mapping[str, float]]
"""stage -> task -> score."""


@dataclass(frozen=True)
class MethodResult:
    """What one method made of the stream.

    Attributes:
        ingredients: the mix, as text ("realign fraction=0.1").
        scores: per finished stage, the scores of everything seen so far.
        details: per finished stage, task -> what its scores.json says (metric, n, stderr); may be empty.
        backward, forward: percent, per finished stage.
        probes: per finished stage, task -> score of tasks that are never learned.
        cost: one entry per stage and phase.
        missing: stages of the order that are not finished.
        joint: stage -> percent of its expert, of a method that learned all stages at once and has none to tell apart.
        shift: per finished stage, how far the language moved, in L2 of hidden states; empty where it was not measured.
        spectra: stage -> what its folding noted about singular values: name, before, after, k, reached.
    """

    name: str
    ingredients: tuple[str, ...]
    scores: tuple[Scores, ...]
    details: tuple[Mapping[str, Mapping[str, Any]], ...]
    backward: tuple[float, ...]
    forward: tuple[float, ...]
    mean: float | None
    std: float | None
    probes: tuple[Mapping[str, float], ...]
    cost: tuple[Mapping[str, Any], ...]
    missing: tuple[str, ...]
    joint: Mapping[str, float] = field(default_factory=dict)
    shift: tuple[float, ...] = ()
    spectra: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        order: stage names in the order of learning, as far as they are known.
        experts, blind: stage -> task -> score; either may be empty.
        base: probe -> score of the base LLM, before any stage.
        settings: the experiment file.
        settings_text: the same, as written.
        environment: dotted name -> value.
        started, ended: times as text, empty when unknown.
        composing: what summary.json says about compositions; empty in a run of methods, or an unfinished one.
    """

    folder: Path
    name: str
    order: tuple[str, ...]
    experts: Scores
    blind: Scores
    base: Mapping[str, float]
    methods: tuple[MethodResult, ...]
    settings: Mapping[str, Any]
    settings_text: str
    environment: Mapping[str, str]
    started: str
    ended: str
    composing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def composes(self) -> bool:
        """Whether experts are composed in this run, instead of methods walking a stream."""
        return bool(self.composing or self.settings.get("composers"))

    @property
    def finished(self) -> bool:
        """Whether every method went through every stage, or every composition was measured."""
        if self.composes:
            return bool(self.composing)
        return bool(self.methods) and not any(method.missing for method in self.methods)

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """The tasks of each stage, in order."""
        found: dict[str, dict[str, None]] = {stage: {} for stage in self.order}
        for scores in (self.experts, *(s for method in self.methods for s in method.scores)):
            for stage, values in scores.items():
                found.setdefault(stage, {}).update(dict.fromkeys(values))
        return {stage: tuple(tasks) for stage, tasks in found.items()}

    @property
    def probes(self) -> tuple[str, ...]:
        """Tasks that were measured but never learned."""
        return tuple(dict.fromkeys(task for method in self.methods for probes in method.probes for task in probes))


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as dotted name -> text."""
    if isinstance(value, Mapping):
        pairs: Iterator[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        pairs = ((str(index), item) for index, item in enumerate(value))
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return {prefix: text}
    start = f"{prefix}." if prefix else ""
    return {name: text for key, item in pairs for name, text in flatten(item, start + key).items()}


def stage_folders(folder: Path) -> list[tuple[str, Path]]:
    """The ``<number>-<stage>`` folders in order of learning: (stage, folder)."""
    found = []
    for path in folder.glob("*-*"):
        if match := re.fullmatch(r"(\d+)-(.+)", path.name):
            found.append((int(match[1]), match[2], path))
    return [(stage, path) for _, stage, path in sorted(found)]


def gains(scores: Sequence[Scores], experts: Scores) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Backward and forward gain per stage, percent; empty where experts are missing."""
    if not scores or not all(experts.get(stage) for stage in scores[-1]):
        return (), ()
    return tuple(backward_gains(scores, experts)), tuple(forward_gains(scores, experts))


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        RunError: the folder is no run folder, or one of its files is damaged.
    """
    if not any((folder / name).exists() for name in ("summary.json", "experiment.yaml", "methods", "experts")):
        raise RunError(
            f"{folder}: no run here (no summary.json, experiment.yaml, methods/ or experts/). "
            "Give the folder that 'graftlm run' printed."
        )
    settings_text = _text(folder / "experiment.yaml")
    settings = _settings(folder / "experiment.yaml", settings_text)
    path = folder / "summary.json"
    facts = read_json(path) if path.exists() else _summarise(folder, settings)
    order = tuple(facts.get("order", ()))
    started, ended = _times(folder / "journal.jsonl")
    environment = folder / "environment.json"
    return Run(
        folder=folder,
        name=str(facts.get("name") or settings.get("name") or folder.name),
        order=order,
        experts=facts.get("experts", {}),
        blind=facts.get("blind", {}),
        base=facts.get("base", {}),
        methods=tuple(_method(folder, name, method, order) for name, method in facts.get("methods", {}).items()),
        settings=settings,
        settings_text=settings_text,
        environment=flatten(read_json(environment)) if environment.exists() else {},
        started=started,
        ended=ended,
        composing=facts.get("composing", {}),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _settings(path: Path, text: str) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise RunError(f"{path}: not YAML ({error}). The file was changed or damaged; restore it.") from error
    return value if isinstance(value, dict) else {}


def _times(journal: Path) -> tuple[str, str]:
    times = [str(line["time"]) for line in read_jsonl(journal) if isinstance(line, dict) and "time" in line]
    return (times[0], times[-1]) if times else ("", "")


def _method(folder: Path, name: str, facts: Mapping[str, Any], order: Sequence[str]) -> MethodResult:
    scores = tuple(facts.get("scores", ()))
    paths = dict(stage_folders(folder / "methods" / name))
    details = tuple(_scores(paths[stage]) if stage in paths else {} for stage in order[: len(scores)])
    return MethodResult(
        name=name,
        ingredients=tuple(_ingredient(item) for item in facts.get("ingredients", ())),
        scores=scores,
        details=details,
        backward=tuple(facts.get("backward", ())),
        forward=tuple(facts.get("forward", ())),
        mean=facts.get("backward_mean"),
        std=facts.get("backward_std"),
        probes=tuple(facts.get("probes", ())),
        cost=tuple(facts.get("cost", ())),
        missing=() if "joint" in facts else tuple(order[len(scores) :]),
        joint={stage: gain for stage, gain in facts.get("joint", {}).get("relative", {}).items() if gain is not None},
        shift=_shift([paths[stage] for stage in order if stage in paths]),
        spectra={stage: noted for stage, path in paths.items() if (noted := _spectra(path))},
    )


def _shift(folders: Sequence[Path]) -> tuple[float, ...]:
    """Of the stages up to the first that was not measured."""
    values = []
    for folder in folders:
        if not (folder / "shift.json").is_file():
            break
        values.append(float(read_json(folder / "shift.json")["l2"]))
    return tuple(values)


def _spectra(folder: Path) -> tuple[Mapping[str, Any], ...]:
    path = folder / "notes.json"
    noted = read_json(path) if path.is_file() else {}
    return tuple(noted.get("spectra", ())) if isinstance(noted, Mapping) else ()


def _ingredient(item: Any) -> str:
    if not isinstance(item, Mapping):
        return str(item)
    parts = []
    for name, settings in item.items():
        pairs = settings.items() if isinstance(settings, Mapping) else ()
        parts.append(" ".join([str(name), *(f"{key}={value}" for key, value in pairs)]))
    return ", ".join(parts)


def _scores(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    path = folder / "scores.json"
    found: Mapping[str, Mapping[str, Any]] = read_json(path) if path.exists() else {}
    return found


def _values(folder: Path) -> dict[str, dict[str, float]]:
    """Stage -> task -> score of ``experts/`` or ``blind/``."""
    stages = sorted(path for path in folder.glob("*") if (path / "scores.json").exists())
    return {path.name: {task: entry["value"] for task, entry in _scores(path).items()} for path in stages}


def _summarise(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json would say, from the stages that are finished."""
    experts = _values(folder / "experts")
    names = sorted(path.name for path in (folder / "methods").glob("*") if path.is_dir())
    chosen = settings.get("methods")
    if isinstance(chosen, Mapping):
        names = [name for name in chosen if name in names] + [name for name in names if name not in chosen]
    walks = {name: stage_folders(folder / "methods" / name) for name in names}
    at_once = {name for name, walk in walks.items() if [stage for stage, _ in walk] == ["joint"]}
    longest = sorted((walk for name, walk in walks.items() if name not in at_once), key=len, reverse=True)
    order = list(dict.fromkeys(stage for walk in longest for stage, _ in walk))
    order += [stage for stage in experts if stage not in order]
    methods = {}
    for name, walk in walks.items():
        mix = chosen.get(name, []) if isinstance(chosen, Mapping) else chosen if len(walks) == 1 else []
        methods[name] = _summarise_method([] if name in at_once else walk, experts) | {"ingredients": mix or []}
    base = {task: entry["value"] for task, entry in _scores(folder / "base").items()}
    return {"order": order, "experts": experts, "blind": _values(folder / "blind"), "base": base, "methods": methods}


def _summarise_method(walk: Sequence[tuple[str, Path]], experts: Scores) -> dict[str, Any]:
    scores: list[dict[str, dict[str, float]]] = []
    owner = {task: stage for stage, values in experts.items() for task in values}
    probes: list[dict[str, float]] = []
    cost = []
    for stage, path in walk:
        if not (path / "scores.json").exists():
            break
        probes.append({})
        seen: dict[str, dict[str, float]] = {earlier: {} for earlier, _ in walk[: len(scores) + 1]}
        for task, entry in _scores(path).items():
            if task not in owner and experts.get(stage):
                probes[-1][task] = entry["value"]
            else:
                seen.setdefault(owner.setdefault(task, stage), {})[task] = entry["value"]
        scores.append(seen)
        fit = path / "fit.json"
        cost += [_phase_cost(stage, log) for log in (read_json(fit) if fit.exists() else ())]
    seen_only = [{stage: after[stage] for stage in list(after)[: i + 1]} for i, after in enumerate(scores)]
    backward, forward = gains(seen_only, experts)
    mean, std = summary(backward) if backward else (None, None)
    return {
        "scores": scores,
        "backward": backward,
        "forward": forward,
        "backward_mean": mean,
        "backward_std": std,
        "probes": probes,
        "cost": cost,
    }


def _phase_cost(stage: str, log: Mapping[str, Any]) -> dict[str, Any]:
    seconds, tokens = log.get("seconds") or 0.0, log.get("tokens") or 0
    return {
        "stage": stage,
        "phase": log.get("phase", ""),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_bytes": log.get("peak_memory_bytes"),
    }
