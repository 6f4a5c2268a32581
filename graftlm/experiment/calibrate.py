"""Choose the settings of a recipe on validation data: the best mean retention of the originals' scores.

Every value is composed, measured and dropped; what a model may have of its own (λ_i of MMER) is chosen by its own
modality's scores, what all share (λ of task arithmetic, K of TIES) by the mean over models. Scores are kept in a folder
beside the output, so that a calibration that was stopped goes on.

Paper:   MMER, ACL 2025, arXiv:2505.17110, §3.1 (λ_i and α are chosen by validation accuracy), Eq. 8 (retention).
Differs: the paper does not say which accuracy; here it is retention, each task's score over the original's.
"""

import dataclasses
import itertools
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.errors import ConfigError, MergeError
from graftlm.core.files import hash_json, read_json, write_json
from graftlm.data.types import Task
from graftlm.evaluation import gains, suite
from graftlm.merging.compose import compose, open_inputs
from graftlm.merging.recipe import Recipe
from graftlm.merging.stream import Progress
from graftlm.model import checkpoint
from graftlm.model.manifest import read_manifest

__all__ = ["calibrate", "calibration_folder"]


def calibration_folder(out: Path) -> Path:
    """Where the scores of a calibration are kept."""
    return out.with_name(f"{out.name}.calibration")


def calibrate(
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    tasks: Sequence[Task],
    folder: Path,
    *,
    limit: int | None = None,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> Recipe:
    """The recipe with the settings that retain most.

    Args:
        recipe: of checkpoints of graftlm.
        grid: setting -> values to try; settings of single models are chosen for each.
        tasks: a model is measured on those that its modalities can answer, on their "val" samples.
        folder: for scores; see `calibration_folder`.
        limit: only the first so many samples of a task.

    Raises:
        ConfigError: a model has no task to be measured on, or an original scores 0 on all.
        MergeError: the models cannot be merged, or a setting does not exist.
    """
    choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    recipes = [dataclasses.replace(recipe, settings={**recipe.settings, **choice}) for choice in choices]
    inputs = open_inputs(recipe)  # refuses before anything is measured
    if inputs.kind != "graftlm":
        raise MergeError(
            "calibration measures multimodal models: checkpoints of graftlm are expected. For folders of Hugging Face, "
            "`graftlm consolidate --sweep` measures one model against its base."
        )
    own = {name: _own(name, Path(path), tasks) for name, path in recipe.models.items()}
    asked = {name: [[task.name, [s.id for s in task.val[:limit]], task.source] for task in own[name]] for name in own}
    identities = {name: [read_manifest(Path(path))["files"], asked[name]] for name, path in recipe.models.items()}
    steps = len(recipes) + 1
    originals: dict[str, dict[str, float]] = {}
    for name, path in recipe.models.items():
        progress("measuring originals", len(originals), len(own))
        home = folder / f"original-{name}"
        originals[name] = _scores(Path(path), None, own[name], home, identities[name], limit, device)
    tried: list[dict[str, float]] = []
    for number, each in enumerate(recipes, start=1):
        progress("calibrating", number, steps)
        tried.append(_try(each, own, originals, folder, identities, inputs.routed, limit, device))
    chosen = _choose(recipe, grid, choices, tried)
    write_json(
        folder / "calibration.json",
        {
            "tried": [{"settings": choice, "retention": row} for choice, row in zip(choices, tried, strict=True)],
            "chosen": {
                "settings": dict(chosen.settings),
                "per_model": {k: dict(v) for k, v in chosen.per_model.items()},
            },
        },
    )
    return chosen


def _own(name: str, path: Path, tasks: Sequence[Task]) -> list[Task]:
    known = {spec["name"] for spec in read_manifest(path)["modalities"]}
    found = [task for task in tasks if task.modalities and set(task.modalities) <= known and task.val]
    if not found:
        raise ConfigError(
            f"{name} ({path}): none of the data sets asks about {', '.join(sorted(known))} and has validation samples; at "
            f"least one is expected. Name others with --data."
        )
    return found


def _scores(
    path: Path, mode: str | None, tasks: Sequence[Task], folder: Path, identity: Any, limit: int | None, device: str
) -> dict[str, float]:
    """Scores of a checkpoint; those of the same model and question are kept."""
    key = hash_json([identity, mode, [task.name for task in tasks], limit])
    if not (folder / "scores.json").is_file() or read_json(folder / "key.json") != key:
        shutil.rmtree(folder, ignore_errors=True)
        model = checkpoint.load(path, mode=mode, device=device)
        suite.evaluate(model, tasks, folder, split="val", limit=limit)
        write_json(folder / "key.json", key)
    return {task: score["value"] for task, score in read_json(folder / "scores.json").items()}


def _try(
    recipe: Recipe,
    own: Mapping[str, Sequence[Task]],
    originals: Mapping[str, Mapping[str, float]],
    folder: Path,
    identities: Any,
    routed: bool,
    limit: int | None,
    device: str,
) -> dict[str, float]:
    """Retention of every model under one setting."""
    home = folder / hash_json([recipe.digest, identities])[:16]
    if (home / "retention.json").is_file():
        kept: dict[str, float] = read_json(home / "retention.json")
        return kept
    composed = home / "composed"
    shutil.rmtree(composed, ignore_errors=True)
    compose(recipe, composed)
    found: dict[str, float] = {}
    for name, tasks in own.items():
        mode = f"retain:{name}" if routed else None
        values = _scores(composed, mode, tasks, home / name, identities[name], limit, device)
        found[name] = gains.retention(values, originals[name])
        if found[name] != found[name]:
            raise ConfigError(
                f"{name}: the original scores 0 on {', '.join(t.name for t in tasks)}. Name other data sets."
            )
    shutil.rmtree(composed)
    write_json(home / "retention.json", found)
    return found


def _choose(
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    choices: Sequence[Mapping[str, Any]],
    tried: Sequence[Mapping[str, float]],
) -> Recipe:
    """For every value of the shared settings each model's best of its own; then the shared value of the best mean."""
    single = [key for key in grid if recipe.rule == "mmer" and key == "significance"]
    groups: dict[str, list[int]] = {}
    for index, choice in enumerate(choices):
        shared = {key: value for key, value in choice.items() if key not in single}
        groups.setdefault(hash_json(shared), []).append(index)
    best: tuple[float, Recipe] | None = None
    for members in groups.values():
        pick = {name: max(members, key=lambda i: tried[i][name]) for name in recipe.models}
        if not single:
            pick = dict.fromkeys(recipe.models, members[0])
        value = statistics.fmean(tried[index][name] for name, index in pick.items())
        if best is not None and value <= best[0]:
            continue
        shared = {key: value for key, value in choices[members[0]].items() if key not in single}
        per_model = {
            name: {**recipe.per_model.get(name, {}), **{k: choices[i][k] for k in single}} for name, i in pick.items()
        }
        settings = {**recipe.settings, **shared}
        changes: dict[str, Any] = {"settings": settings} | ({"per_model": per_model} if single else {})
        best = value, dataclasses.replace(recipe, **changes)
    assert best is not None  # a grid has at least one value
    return best[1]
