"""The cells of a run that composes experts: choose settings, compose, and measure what was expanded, kept and forgotten.

    candidates/<hash>.json              a setting that was tried, with its scores on validation data
    own/<composer>/<stage>/             an expert that learned its stage as this composer needs it
    composers/<name>/tuning.json        every setting that was compared, and the chosen one
    composers/<name>/composed/          the composed checkpoint
    composers/<name>/expand/            scores with all modalities in one model
    composers/<name>/retain-<expert>/   scores of a recovered original, where the composer keeps them apart
    composers/<name>/blind/             expansion with other samples' media, of the composer that is ablated
    ablation/<name>/                    the same without one step of the decoupling
    counts/<experts>/<composer>/        retention of fewer experts
    later/<task>+<task>/                an expert's LLM after new tasks, encoder and connector frozen
    forgetting/<scenario>/              composed again, and what Model Tailor makes of the same models

Settings are chosen by the mean retention on validation data, the same for every composer; a setting that each expert may have
of its own (λ of MMER) by the retention of that expert.

Paper:   MMER, ACL 2025, arXiv:2505.17110, §4-6.
Differs: the paper calibrates λ per modality without saying on what, and does not say how its baselines were tuned.
"""

import dataclasses
import itertools
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.core import seeds
from graftlm.core.cache import cache_folder
from graftlm.core.errors import ConfigError, MergeError, did_you_mean
from graftlm.core.files import hash_json, is_complete, locked, milestone, read_json, write_json
from graftlm.data.types import Phase, Stage, Stream, Task
from graftlm.evaluation import gains, suite
from graftlm.evaluation.blind import blind
from graftlm.experiment.cells import EVALUATION_UNIT, Cell, Told, Worker
from graftlm.experiment.originals import expand_originals
from graftlm.experiment.progress import Progress
from graftlm.experiment.settings import ComposerSettings, ForgettingSettings, StudySettings
from graftlm.experiment.sizes import count
from graftlm.experiment.spec import ExperimentSpec
from graftlm.experiment.stages import LearnedStage, StageStore, copy_linked
from graftlm.experiment.store import RunStore
from graftlm.learning.method import Method, check_adapters
from graftlm.learning.phase import Schedule
from graftlm.merging.compose import compose
from graftlm.merging.mmer import storage_bits
from graftlm.merging.recipe import EXPERTS, PER_MODEL, Recipe
from graftlm.merging.tailor import hessian, tailor
from graftlm.methods import build as build_methods
from graftlm.model import checkpoint
from graftlm.model.composed import read_header
from graftlm.model.multimodal import MultimodalLM

__all__ = ["ComposingWorker", "check", "plan_cells", "summarise", "units"]

ORIGINALS = "originals"
"""In the place of a rule: nothing is merged, see `originals`."""

ROUTED = ("mmer", "signs", EXPERTS)
"""Rules that keep every original apart."""

EXPANSION = "expansion_"
"""How the names of tasks over combinations of modalities begin."""

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no-congruence": {"congruence": False},
    "no-significance": {"significance": 0.0},
    "no-calibration": {"significance": 1.0},
}
"""Steps of the decoupling that are left out, as settings. Paper: MMER, Table 5."""

Split = Literal["val", "test"]


@dataclass(frozen=True)
class Model:
    """An original that is composed.

    Attributes:
        name: of its route.
        tasks: what it is measured on.
        learned: where it is.
        home: where its own scores are kept.
    """

    name: str
    tasks: tuple[Task, ...]
    learned: LearnedStage
    home: Path


@dataclass(frozen=True)
class Choice:
    """Settings of a rule with values."""

    rule: str
    settings: Mapping[str, Any]
    per_model: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def recipe(self, models: Sequence[Model]) -> Recipe:
        """What composes these models with these settings."""
        folders = {model.name: str(model.learned.checkpoint) for model in models}
        return Recipe(rule=self.rule, models=folders, settings=dict(self.settings), per_model=dict(self.per_model))


# --- which cells there are --------------------------------------------------------------------------------------------


def check(spec: ExperimentSpec) -> None:
    """Whether composers, rules and their settings exist, and studies name what there is.

    Raises:
        ConfigError: a setting is wrong; the message starts with its path.
    """
    composers = spec.composers or {}
    for name, composer in composers.items():
        _check_experts(f"composers.{name}", composer)
        for values in _grid(composer.tune) if composer.rule != ORIGINALS else ():
            try:
                Recipe(composer.rule, {"a": "a", "b": "b"}, settings={**composer.settings, **values})
            except (MergeError, TypeError) as error:
                raise ConfigError(f"composers.{name}: {error}") from None
    study = spec.study or StudySettings()
    named: dict[str, str | None] = {"study.ablation": study.ablation}
    if study.sweep:
        named["study.sweep.composer"] = study.sweep.composer
    if study.forgetting:
        named["study.forgetting.composer"] = study.forgetting.composer
    for index, name in enumerate(study.counts.composers if study.counts else ()):
        named[f"study.counts.composers[{index}]"] = name
    for path, wanted in named.items():
        if wanted is not None and wanted not in composers:
            raise ConfigError(f"{path}: no composer '{wanted}'; {did_you_mean(wanted, composers)}")
    for path in ("study.ablation", "study.sweep.composer", "study.forgetting.composer"):
        if (wanted := named.get(path)) and composers[wanted].rule != "mmer":
            raise ConfigError(
                f"{path}: composer '{wanted}' has rule {composers[wanted].rule}; one with rule mmer is expected. Name another."
            )


def _check_experts(path: str, composer: ComposerSettings) -> None:
    """Whether a composer's own experts can be learned, and are there where the rule needs them."""
    if composer.rule == EXPERTS and composer.experts is None:
        raise ConfigError(
            f"{path}.experts: missing; rule {EXPERTS} composes experts that were trained for it. Name their ingredients, "
            f"for example experts: [damc]."
        )
    if composer.experts:
        check_adapters(build_methods(composer.experts.methods, f"{path}.experts.methods"))
    if composer.rule == ORIGINALS and (composer.settings or composer.tune or composer.per_model or composer.experts):
        raise ConfigError(
            f"{path}: rule {ORIGINALS} routes the experts as they are, and has no settings. Leave them out."
        )


def plan_cells(spec: ExperimentSpec, stream: Stream) -> list[Cell]:
    """Experts; then composers and what needs no chosen setting; then what builds on a composer's settings."""
    study = spec.study or StudySettings()
    cells = [*(Cell("expert", stage.name) for stage in stream.stages), Cell("base", "")]
    for name, composer in (spec.composers or {}).items():
        cells += [Cell("own", f"{name}/{stage.name}") for stage in stream.stages if composer.experts]
    if study.forgetting:
        cells += [Cell("later", "+".join(stage.name for stage in chain[1:]), 1) for chain in chains(spec, stream)]
    cells += [Cell("composer", name, 1) for name in spec.composers or ()]
    if study.sweep:
        cells.append(Cell("sweep", study.sweep.composer, 1))
    if study.ablation:
        cells += [Cell("ablation", name, 2) for name in ABLATIONS]
    if study.counts:
        cells += [Cell("count", "+".join(names), 2) for names in study.counts.sets]
    if study.forgetting:
        cells += [Cell("forgetting", name, 2) for name in study.forgetting.scenarios]
    return cells


def chains(spec: ExperimentSpec, stream: Stream) -> list[tuple[Stage, ...]]:
    """What an expert's LLM learns after its stage, that stage first: each new task alone, and those of one modality in turn."""
    forgetting = spec.study.forgetting if spec.study else None
    later = {stage.name: stage for stage in stream.later}
    found: dict[tuple[str, ...], None] = {}
    for tasks in forgetting.scenarios.values() if forgetting else ():
        for owner, own in by_modality(tasks, stream).items():
            found |= {(owner, task): None for task in own}
            found |= {(owner, *own[: i + 1]): None for i in range(len(own))}
    return [(_stage(stream, owner), *(later[task] for task in own)) for owner, *own in found]


def sentences(spec: ExperimentSpec, stream: Stream) -> list[str]:
    """What is composed, for a plan."""
    study = spec.study or StudySettings()
    said = []
    for name, composer in (spec.composers or {}).items():
        tried = len(_grid(composer.tune))
        said.append(
            f"{name} ({composer.rule}): {f'{tried} settings tried, ' if composer.tune else ''}1 composition measured"
        )
    if study.sweep:
        said.append(
            f"sweep: {len(study.sweep.density) * len(study.sweep.significance)} settings of {study.sweep.composer}"
        )
    if study.ablation:
        said.append(f"ablation of {study.ablation}: {', '.join(ABLATIONS)}")
    if study.counts:
        sets = ", ".join("+".join(names) for names in study.counts.sets)
        said.append(f"counts: {', '.join(study.counts.composers)} of {sets}")
    for name, tasks in (study.forgetting.scenarios if study.forgetting else {}).items():
        said.append(
            f"forgetting, {name}: {len(stream.stages) + len(tasks)} models; fine-tuning and Model Tailor beside it"
        )
    return said


def by_modality(tasks: Iterable[str], stream: Stream) -> dict[str, list[str]]:
    """Stage of the matching expert -> new tasks, in order.

    Raises:
        ConfigError: the stream has no such task.
    """
    later = {stage.name: stage for stage in stream.later}
    owners = {stage.modalities: stage.name for stage in stream.stages}
    found: dict[str, list[str]] = {}
    for task in tasks:
        if task not in later:
            raise ConfigError(f"study.forgetting.scenarios: no later task '{task}'; {did_you_mean(task, later)}")
        found.setdefault(owners[later[task].modalities], []).append(task)
    return found


def units(spec: ExperimentSpec, stream: Stream, cell: Cell) -> float:
    """Work of a cell in training samples, roughly: answers of everything that it asks."""
    from graftlm.experiment import cells

    study = spec.study or StudySettings()
    if cell.kind in ("base", "expert"):
        extra = 0.0 if cell.kind == "base" else _asked(_stage(stream, cell.name).tasks, "val", study.tuning.limit)
        return cells.units(spec, stream, cell) + EVALUATION_UNIT * extra
    tasks = [task for stage in stream.stages for task in stage.tasks]
    tried, final = _asked(tasks, "val", study.tuning.limit), _asked(tasks, spec.evaluate.split, spec.evaluate.limit)
    joint = _asked(_expansions(stream), spec.evaluate.split, spec.evaluate.limit)
    if cell.kind == "later":
        later = [stage for stage in stream.later if stage.name in cell.name.split("+")]
        return float(sum(len(stage.samples()) for stage in later) * later_phase(spec).epochs)
    if cell.kind == "own":
        stage = _stage(stream, cell.name.partition("/")[2])
        return cells.units(spec, stream, Cell("expert", stage.name)) * 1.5
    if cell.kind == "sweep" and study.sweep:
        return EVALUATION_UNIT * len(study.sweep.density) * len(study.sweep.significance) * tried * 1.5
    if cell.kind == "count" and study.counts and spec.composers:
        share = len(cell.name.split("+")) / len(stream.stages)
        candidates = sum(len(_grid(spec.composers[name].tune)) + 1 for name in study.counts.composers)
        return EVALUATION_UNIT * share * candidates * tried
    if cell.kind == "forgetting":
        return EVALUATION_UNIT * (5 * tried + final + joint)
    composer = (spec.composers or {}).get(cell.name)
    candidates = len(_grid(composer.tune)) if composer and composer.tune else 0
    return EVALUATION_UNIT * (candidates * tried + 1.5 * final + joint)


def _asked(tasks: Iterable[Task], split: str, limit: int | None) -> float:
    sizes = [len(task.measured(split)) for task in tasks]
    return float(sum(size if limit is None else min(size, limit) for size in sizes))


def _grid(tune: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of values; one empty one if nothing is to choose."""
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


def _stage(stream: Stream, name: str) -> Stage:
    return next(stage for stage in stream.stages if stage.name == name)


def _expansions(stream: Stream) -> list[Task]:
    return [probe for probe in stream.probes if probe.name.startswith(EXPANSION)]


def own_schedule(spec: ExperimentSpec, composer: ComposerSettings) -> Schedule:
    """The phases of a composer's own experts."""
    from graftlm.experiment.build import changed

    plain = spec.schedule()
    if composer.experts is None:
        return plain
    return Schedule((*plain.phases[:-1], changed(plain.phases[-1], composer.experts.phase)), plain.realign)


def later_phase(spec: ExperimentSpec) -> Phase:
    """The optimisation of a new task: the last phase of a stage, moving the LLM alone, with what the file changes."""
    from graftlm.experiment.build import changed

    plain = dataclasses.replace(spec.schedule().phases[-1], trainable=frozenset({"llm"}), kinds=None)
    forgetting = spec.study.forgetting if spec.study else None
    return changed(plain, forgetting.phase) if forgetting else plain


# --- finishing a cell -------------------------------------------------------------------------------------------------


class ComposingWorker(Worker):
    """One process's tools for a run that composes."""

    def __init__(self, spec: ExperimentSpec, out: Path) -> None:
        super().__init__(spec, out)
        self.study = spec.study or StudySettings()
        self.composers: Mapping[str, ComposerSettings] = spec.composers or {}
        self.out = out
        self._experts: dict[str, Model] = {}

    def finish(self, cell: Cell, progress: Progress) -> None:
        """Finish one cell, from wherever it is."""
        told = Told(progress, units(self.spec, self.stream, cell))
        if cell.kind in ("base", "expert"):
            super().finish(cell, progress)
            if cell.kind == "expert":
                self._scores_of_expert(cell.name, "val", self.study.tuning.limit)
            return
        progress.cell(f"{cell.kind} {cell.name}", "composing")
        folder = self.out / FOLDERS[cell.kind] / cell.name
        if not (folder / "result.json").is_file():
            result = getattr(self, f"_{cell.kind}")(cell.name, folder)
            write_json(folder / "result.json", result)
            milestone(f"{cell.kind}.finished")
            self.store.journal(cell.kind, name=cell.name)
        told.rest()
        progress.cell(f"{cell.kind} {cell.name}", "")

    # originals

    def _originals(self, names: Iterable[str] | None = None) -> list[Model]:
        """The experts, in the order of the stream."""
        wanted = set(names or [stage.name for stage in self.stream.stages])
        for stage in self.stream.stages:
            if stage.name in wanted and stage.name not in self._experts:
                learned = self.stages.obtain(stage, [], [], None)
                home = self.store.expert(stage.name)
                self._experts[stage.name] = Model(stage.name, stage.tasks, learned, home)
        return [self._experts[stage.name] for stage in self.stream.stages if stage.name in wanted]

    def _models(self, composer: str, names: Iterable[str] | None = None) -> list[Model]:
        """What a composer composes: the experts, or its own."""
        settings = self.composers[composer]
        if settings.experts is None:
            return self._originals(names)
        schedule = own_schedule(self.spec, settings)
        store = StageStore(cache_folder(), self.spec.model_spec(), schedule, self.spec.seed, self.spec.device_name())
        wanted = set(names or [stage.name for stage in self.stream.stages])
        models = []
        for stage in self.stream.stages:
            if stage.name in wanted:
                methods: list[Method] = build_methods(settings.experts.methods, f"composers.{composer}.experts.methods")
                learned = store.obtain(stage, [], methods, None)
                models.append(Model(stage.name, stage.tasks, learned, self.out / "own" / composer / stage.name))
        return models

    def _own(self, name: str, folder: Path) -> dict[str, Any]:
        composer, _, stage = name.partition("/")
        (model,) = self._models(composer, [stage])
        if not is_complete(folder / "stage"):
            copy_linked(model.learned.folder, folder / "stage")
        return {"scores": self._answer(self._open(model.learned.checkpoint), model.tasks, folder)}

    def _scores_of_expert(self, name: str, split: Split, limit: int | None) -> dict[str, float]:
        (expert,) = self._originals([name])
        return self._scores_of(expert, split, limit)

    def _scores_of(self, model: Model, split: Split, limit: int | None) -> dict[str, float]:
        """An original's own scores on part of a split, measured once per run."""
        place = model.home / f"{split}-{limit or 'all'}"
        with locked(model.home / f".{place.name}.lock", wait=3600.0):
            if not (place / "scores.json").is_file():
                self._answer(self._open(model.learned.checkpoint), model.tasks, place, split, limit)
        return _values(place)

    def _answer(
        self,
        model: MultimodalLM,
        tasks: Sequence[Task],
        folder: Path,
        split: Split | None = None,
        limit: int | None = None,
    ) -> dict[str, float]:
        """Scores of tasks, from the folder if they are there."""
        if not (folder / "scores.json").is_file():
            suite.evaluate(
                model,
                tasks,
                folder,
                split=split or self.spec.evaluate.split,
                limit=limit if split else self.spec.evaluate.limit,
                batch_size=self.spec.evaluate.batch_size,
            )
        return _values(folder)

    def _open(self, folder: Path, mode: str | None = None) -> MultimodalLM:
        return checkpoint.load(
            folder, device=self.spec.device_name(), features=self.stages.features, verify=False, mode=mode
        )

    # candidates

    def _try(
        self,
        choice: Choice,
        models: Sequence[Model],
        originals: Mapping[str, Mapping[str, float]],
        *,
        joint: bool = False,
    ) -> dict[str, Any]:
        """Scores of one setting on validation data: retention per model, and accuracy over combinations if asked for."""
        limit = self.study.tuning.limit
        keys = [model.learned.key for model in models]
        recipe = choice.recipe(models)
        name = hash_json([recipe.digest, keys, limit, [task.name for model in models for task in model.tasks]])[:20]
        path, work = self.out / "candidates" / f"{name}.json", self.out / "candidates" / f".{name}"
        with locked(self.out / "candidates" / f".{name}.lock", wait=3600.0):
            found: dict[str, Any] = read_json(path) if path.is_file() else {}
            if "retention" in found and ("expansion" in found or not joint):
                return found
            shutil.rmtree(work, ignore_errors=True)
            try:
                compose(recipe, work / "composed", threads=1)
                if "retention" not in found:
                    scores = self._retained(choice.rule, work / "composed", models, work, "val", limit)
                    found |= {
                        "rule": choice.rule,
                        "settings": dict(choice.settings),
                        "per_model": {model: dict(values) for model, values in choice.per_model.items()},
                        "retention": {m.name: gains.retention(scores[m.name], originals[m.name]) for m in models},
                    }
                if joint:
                    tasks = _expansions(self.stream)
                    values = self._answer(self._open(work / "composed"), tasks, work / "expand", "val", None)
                    found["expansion"] = {task.removeprefix(EXPANSION): value for task, value in values.items()}
                write_json(path, found)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        milestone("candidate.tried")
        return found

    def _retained(
        self, rule: str, composed: Path, models: Sequence[Model], folder: Path, split: Split | None, limit: int | None
    ) -> dict[str, dict[str, float]]:
        """Scores of every model's tasks: of the recovered original where the rule keeps it, else of the merged LLM."""
        if rule in ROUTED:
            return {
                m.name: self._answer(
                    self._open(composed, f"retain:{m.name}"), m.tasks, folder / f"retain-{m.name}", split, limit
                )
                for m in models
            }
        scores = self._answer(self._open(composed), _all_tasks(models), folder / "expand", split, limit)
        return {m.name: {task.name: scores[task.name] for task in m.tasks} for m in models}

    def _tune(self, composer: ComposerSettings, models: Sequence[Model], folder: Path, **fixed: Any) -> Choice:
        """The setting with the best mean retention on validation data; what every model may choose is chosen by its own."""
        known = {key: values for key, values in composer.tune.items() if key not in fixed}
        settings = {**composer.settings, **fixed}
        per_model = {m.name: dict(composer.per_model[m.name]) for m in models if m.name in composer.per_model}
        if not known:
            return Choice(composer.rule, settings, per_model)
        limit = self.study.tuning.limit
        originals = {m.name: self._scores_of(m, "val", limit) for m in models}
        own = {key: values for key, values in known.items() if key in PER_MODEL.get(composer.rule, ())}
        shared = {key: values for key, values in known.items() if key not in own}
        rows: list[dict[str, Any]] = []
        best: tuple[float, Choice] | None = None
        for values in _grid(shared):
            tried = []
            for each in _grid(own):
                choice = Choice(composer.rule, {**settings, **values, **each}, per_model)
                row = self._try(choice, models, originals)
                tried.append((each, row["retention"]))
                rows.append({"settings": {**values, **each}, "retention": row["retention"]})
            chosen = {m.name: max(tried, key=lambda pair: pair[1][m.name]) for m in models}
            value = statistics.fmean(chosen[m.name][1][m.name] for m in models)
            if best is None or value > best[0]:
                mine = (
                    {m.name: {**per_model.get(m.name, {}), **chosen[m.name][0]} for m in models} if own else per_model
                )
                best = value, Choice(composer.rule, {**settings, **values}, mine)
        assert best is not None  # a grid has at least one entry
        write_json(
            folder / "tuning.json",
            {"tried": rows, "settings": best[1].settings, "per_model": best[1].per_model, "retention": best[0]},
        )
        return best[1]

    # kinds of cells

    def _composer(self, name: str, folder: Path) -> dict[str, Any]:
        models = self._models(name)
        if self.composers[name].rule == ORIGINALS:
            return self._measured_originals(models, folder)
        choice = self._tune(self.composers[name], models, folder)
        return self._measured(choice, models, folder, shown=name == self.study.ablation)

    def _measured_originals(self, models: Sequence[Model], folder: Path) -> dict[str, Any]:
        """The experts as they are, and all of them in one model without loss."""
        experts = {model.name: model.learned.checkpoint for model in models}
        expanded = expand_originals(experts, folder / "parts", self._open)
        result = self._expanded(expanded, models, folder)
        scores = {model.name: _values(model.home) for model in models}
        size = sum(_size(model.learned.checkpoint) for model in models)
        shutil.rmtree(folder / "parts")
        return {"rule": ORIGINALS, "settings": {}, "per_model": {}, "scores": scores, "bytes": size} | result

    def _expanded(self, model: MultimodalLM, models: Sequence[Model], folder: Path) -> dict[str, Any]:
        """Scores of one model with all modalities: per expert's tasks, per combination, and of the other probes."""
        joint = _expansions(self.stream)
        others = [probe for probe in self.stream.probes if probe not in joint]
        scores = self._answer(model, [*_all_tasks(models), *joint, *others], folder / "expand")
        return {
            "expanded": {m.name: {task.name: scores[task.name] for task in m.tasks} for m in models},
            "expansion": {task.name.removeprefix(EXPANSION): scores[task.name] for task in joint},
            "probes": {task.name: scores[task.name] for task in others},
        }

    def _measured(
        self, choice: Choice, models: Sequence[Model], folder: Path, *, shown: bool = False
    ) -> dict[str, Any]:
        """Compose and measure: every task with all modalities in one model, and every original that can be recovered."""
        composed = folder / "composed"
        if not (composed / checkpoint.MANIFEST).is_file():
            compose(choice.recipe(models), composed, threads=1)
        milestone("composed")
        first = [model for model in models if model.name in {stage.name for stage in self.stream.stages}]
        model = self._open(composed)
        expanded = self._expanded(model, first, folder)
        if shown:
            joint = _expansions(self.stream)
            tasks = [blind(task, seeds.derive(self.spec.seed, "blind", task.name)) for task in joint]
            values = self._answer(model, tasks, folder / "blind")
            expanded["blind"] = {task.removeprefix(EXPANSION): value for task, value in values.items()}
        del model
        kept = expanded["expanded"]
        if choice.rule in ROUTED:
            kept = self._retained(choice.rule, composed, models, folder, None, None)
        record = checkpoint.read_manifest(composed)["history"][-1]
        return {
            "rule": choice.rule,
            "settings": dict(choice.settings),
            "per_model": {model: dict(values) for model, values in choice.per_model.items()},
            "scores": kept,
            "mask_share": record.get("mask_share", {}),
            "bytes": _size(composed),
            "routing": _routing(composed),
            **expanded,
        }

    def _sweep(self, name: str, folder: Path) -> dict[str, Any]:
        assert self.study.sweep is not None  # the cell is there because of it
        models, limit = self._originals(), self.study.tuning.limit
        originals = {m.name: self._scores_of(m, "val", limit) for m in models}
        rows = []
        for density, significance in itertools.product(self.study.sweep.density, self.study.sweep.significance):
            settings = {**self.composers[name].settings, "density": density, "significance": significance}
            row = self._try(Choice(self.composers[name].rule, settings), models, originals, joint=True)
            rows.append({"density": density, "significance": significance} | row)
        return {"composer": name, "rows": rows}

    def _chosen(self, name: str) -> Choice:
        """The settings that a composer was given."""
        result = read_json(self.out / "composers" / name / "result.json")
        return Choice(result["rule"], result["settings"], result["per_model"])

    def _ablation(self, name: str, folder: Path) -> dict[str, Any]:
        assert self.study.ablation is not None  # the cell is there because of it
        chosen, change = self._chosen(self.study.ablation), ABLATIONS[name]
        per_model = {} if "significance" in change else chosen.per_model
        choice = Choice(chosen.rule, {**chosen.settings, **change}, per_model)
        return self._measured(choice, self._originals(), folder)

    def _count(self, name: str, folder: Path) -> dict[str, Any]:
        assert self.study.counts is not None  # the cell is there because of it
        names, limit, split = name.split("+"), self.study.counts.limit, self.spec.evaluate.split
        models = self._originals(names)
        originals = {m.name: self._scores_of(m, split, limit) for m in models}
        results = {}
        for composer in self.study.counts.composers:
            place, models = folder / composer, self._models(composer, names)
            if not (place / "result.json").is_file():
                choice = self._tune(self.composers[composer], models, place)
                shutil.rmtree(place / "composed", ignore_errors=True)
                compose(choice.recipe(models), place / "composed", threads=1)
                scores = self._retained(choice.rule, place / "composed", models, place, split, limit)
                result = {
                    "settings": dict(choice.settings),
                    "per_model": {model: dict(values) for model, values in choice.per_model.items()},
                    "retention": {m.name: gains.retention(scores[m.name], originals[m.name]) for m in models},
                    "bytes": _size(place / "composed"),
                }
                shutil.rmtree(place / "composed")
                write_json(place / "result.json", result)
            results[composer] = read_json(place / "result.json")
        return results

    # new tasks

    def _obtain_later(self, chain: Sequence[str]) -> Model:
        """The expert's LLM after new tasks of its modality, encoder and connector frozen."""
        schedule = Schedule((later_phase(self.spec),), self.spec.schedule().realign)
        store = StageStore(cache_folder(), self.spec.model_spec(), schedule, self.spec.seed, self.spec.device_name())
        (owner,) = by_modality(chain, self.stream)
        (expert,) = self._originals([owner])
        past, parent = [_stage(self.stream, owner)], expert.learned
        tasks: list[Task] = []
        for name in chain:
            stage = next(stage for stage in self.stream.later if stage.name == name)
            parent = store.obtain(stage, past, [], parent)
            past.append(stage)
            tasks += stage.tasks
        name = "+".join(chain)
        return Model(name, tuple(tasks), parent, self.out / "later" / name)

    def _later(self, name: str, folder: Path) -> dict[str, Any]:
        chain = name.split("+")
        model = self._obtain_later(chain)
        if not is_complete(folder / "stage"):
            copy_linked(model.learned.folder, folder / "stage")
        (owner,) = by_modality(chain, self.stream)
        before = _stage(self.stream, owner).tasks
        scores = self._answer(self.stages.load(model.learned), [*before, *model.tasks], folder)
        (expert,) = self._originals([owner])
        untouched = self._answer(self.stages.load(expert.learned), model.tasks, folder / "before")
        return {
            "expert": owner,
            "previous": {task.name: scores[task.name] for task in before},
            "new": {task.name: scores[task.name] for task in model.tasks},
            "untouched": untouched,
        }

    def _forgetting(self, name: str, folder: Path) -> dict[str, Any]:
        assert self.study.forgetting is not None  # the cell is there because of it
        new = [self._obtain_later([task]) for task in self.study.forgetting.scenarios[name]]
        composer = self.composers[self.study.forgetting.composer]
        chosen = self._chosen(self.study.forgetting.composer)
        models = [*self._originals(), *new]
        choice = self._tune(composer, models, folder, **_shared(chosen))
        result = self._measured(choice, models, folder)
        result["tailor"] = {
            owner: self._tailor(owner, tasks, folder / f"tailor-{owner}")
            for owner, tasks in by_modality([model.name for model in new], self.stream).items()
        }
        return result

    def _tailor(self, owner: str, tasks: Sequence[str], folder: Path) -> dict[str, Any]:
        """Model Tailor: patches of the new tasks in the expert; the size of the patch is chosen on validation data.

        Two tasks of one modality: the paper does not say how. Here both patches are sewn in; where they overlap, their mean.
        Of two modalities: one patched expert each, since a patch belongs to one model.
        """
        assert self.study.forgetting is not None  # asked for by a cell that is there because of it
        (expert,) = self._originals([owner])
        new = [self._obtain_later([task]) for task in tasks]
        before = _linear_weights(self._open(expert.learned.checkpoint))
        patches = {share: _Patches(before) for share in self.study.forgetting.share}
        for model in new:
            tuned = self._open(model.learned.checkpoint)
            after, inputs = _linear_weights(tuned), _hessians(tuned, model.tasks, self.study.forgetting.calibration)
            for share, sewn in patches.items():
                sewn.add({key: tailor(before[key], after[key], hessian=inputs[key], share=share) for key in before})
        tasks_of_all = (*expert.tasks, *(task for model in new for task in model.tasks))
        limit = self.study.tuning.limit
        originals = self._scores_of(expert, "val", limit)
        for model in new:
            originals = {**originals, **self._scores_of(model, "val", limit)}
        tried = {}
        for share, sewn in patches.items():
            place = folder / f"share-{share}"
            scores = self._answer(self._sewn(expert, sewn), tasks_of_all, place, "val", limit)
            parts = [[task.name for task in expert.tasks], [task.name for model in new for task in model.tasks]]
            tried[share] = statistics.fmean(
                gains.retention({t: scores[t] for t in part}, {t: originals[t] for t in part}) for part in parts
            )
        share = max(tried, key=lambda share: tried[share])
        scores = self._answer(self._sewn(expert, patches[share]), tasks_of_all, folder / "test")
        return {"share": share, "tried": {str(key): value for key, value in tried.items()}, "scores": scores}

    def _sewn(self, expert: Model, patches: "_Patches") -> MultimodalLM:
        """The expert with patches; built anew, since its weights are no longer those of any checkpoint."""
        model = self._open(expert.learned.checkpoint)
        with torch.no_grad():
            for name, weight in patches.weights().items():
                model.llm.get_parameter(name).copy_(weight)
        return model


FOLDERS = {
    "own": "own",
    "composer": "composers",
    "sweep": "sweep",
    "ablation": "ablation",
    "count": "counts",
    "later": "later",
    "forgetting": "forgetting",
}
"""Kind of cell -> its folder in the run."""


class _Patches:
    """What several patches change, summed up: where they overlap, their mean."""

    def __init__(self, before: Mapping[str, Tensor]) -> None:
        self._before = before
        self._sum = {name: torch.zeros_like(weight) for name, weight in before.items()}
        self._count = {name: torch.zeros_like(weight) for name, weight in before.items()}

    def add(self, patched: Mapping[str, Tensor]) -> None:
        """One more patch, as the weights that it leads to."""
        for name, weight in patched.items():
            change = weight - self._before[name]
            self._sum[name] += change
            self._count[name] += change != 0

    def weights(self) -> dict[str, Tensor]:
        """The weights with all patches."""
        return {name: w + self._sum[name] / self._count[name].clamp_min(1) for name, w in self._before.items()}


def _linear(model: MultimodalLM) -> dict[str, nn.Linear]:
    """The LLM's linear layers but the head, which shares its weight with the embedding, by name of their weight."""
    head = model.llm.get_output_embeddings()  # type: ignore[no-untyped-call]
    modules = model.llm.named_modules()
    return {f"{name}.weight": each for name, each in modules if isinstance(each, nn.Linear) and each is not head}


def _linear_weights(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in _linear(model).items()}


@torch.no_grad()
def _hessians(model: MultimodalLM, tasks: Sequence[Task], count: int) -> dict[str, Tensor]:
    """Σ x xᵀ at the input of every linear layer, over the first training samples of the tasks."""
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Linear) -> Any:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = hessian(inputs[0])
            found[name] = found[name] + seen if name in found else seen

        return layer.register_forward_pre_hook(look)

    hooks = [watch(name, layer) for name, layer in _linear(model).items()]
    samples = [sample for task in tasks for sample in task.train[: -(-count // len(tasks))]]
    try:
        for sample in samples:  # one by one: padding would count as input
            model(model.batch([sample]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _shared(choice: Choice) -> dict[str, Any]:
    """Settings that were chosen for all models together."""
    return {key: value for key, value in choice.settings.items() if key not in PER_MODEL.get(choice.rule, ())}


def _all_tasks(models: Sequence[Model]) -> list[Task]:
    return [task for model in models for task in model.tasks]


def _values(folder: Path) -> dict[str, float]:
    return {task: score["value"] for task, score in read_json(folder / "scores.json").items()}


def _routing(folder: Path) -> dict[str, int]:
    """Of what routes add: bytes on disk, and numbers in the LoRAs of one half (modality or text) of one expert."""
    files = sorted((folder / "routing").glob("*.safetensors"))
    shapes = {key: shape for file in files for key, (shape, _) in read_header(file).items()}
    halves = {tuple(key.split(".")[-2:-1]) for key in shapes if key.endswith(".A")}
    numbers = sum(math.prod(shape) for key, shape in shapes.items() if key.endswith((".A", ".B")))
    return {"bytes": sum(file.stat().st_size for file in files), "adapter": numbers // max(1, len(halves))}


def _size(folder: Path) -> int:
    """Bytes of weights."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


# --- the summary ------------------------------------------------------------------------------------------------------


def summarise(
    spec: ExperimentSpec, store: RunStore, stream: Stream, experts: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """What summary.json says about compositions: retention per expert, accuracy per combination, and every study."""
    study, out = spec.study or StudySettings(), store.folder
    composers = {}
    for name, settings in (spec.composers or {}).items():
        composers[name] = _row(read_json(out / "composers" / name / "result.json"), experts)
        if settings.experts:
            own = {stage: read_json(out / "own" / name / stage / "result.json")["scores"] for stage in experts}
            composers[name]["own"] = _own_row(composers[name], own, experts)
    found: dict[str, Any] = {"composers": composers, "storage": _storage(spec, composers)}
    if study.ablation:
        found["ablation"] = {
            name: _row(read_json(out / "ablation" / name / "result.json"), experts) for name in ABLATIONS
        }
    if study.sweep:
        rows = read_json(out / "sweep" / study.sweep.composer / "result.json")["rows"]
        found["sweep"] = [
            {
                "density": row["density"],
                "significance": row["significance"],
                "retention": statistics.fmean(row["retention"].values()),
                "expansion": statistics.fmean(row["expansion"].values()),
            }
            for row in rows
        ]
    if study.counts:
        found["counts"] = {
            "+".join(names): read_json(out / "counts" / "+".join(names) / "result.json") for names in study.counts.sets
        }
    if study.forgetting:
        found["forgetting"] = _forgetting(study.forgetting, out, stream, experts)
    return {"composing": found}


def _row(result: Mapping[str, Any], experts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A composer's result with its retentions and means."""
    kept = {name: gains.retention(result["scores"][name], scores) for name, scores in experts.items()}
    expanded = {name: gains.retention(result["expanded"][name], scores) for name, scores in experts.items()}
    return {
        **result,
        "retention": kept,
        "retention_mean": statistics.fmean(kept.values()),
        "expanded_retention": expanded,
        "expanded_retention_mean": statistics.fmean(expanded.values()),
        "expansion_mean": statistics.fmean(result["expansion"].values()),
    }


def _own_row(
    row: Mapping[str, Any], own: Mapping[str, Mapping[str, float]], experts: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """A composer's own experts beside the run's, and its result in percent of its own."""
    kept = {name: gains.retention(row["scores"][name], scores) for name, scores in own.items()}
    expanded = {name: gains.retention(row["expanded"][name], scores) for name, scores in own.items()}
    return {
        "scores": own,
        "of_experts": {name: gains.retention(own[name], scores) for name, scores in experts.items()},
        "retention": kept,
        "retention_mean": statistics.fmean(kept.values()),
        "expanded_retention": expanded,
        "expanded_retention_mean": statistics.fmean(expanded.values()),
    }


def _storage(spec: ExperimentSpec, composers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of parameters, and bits by the paper's formulas for these experts.

    Signs have no formula there: one bit per number and model, and the scales of rows, as they are on disk.
    """
    sizes = count(spec.model_spec())
    own = statistics.fmean(sizes.encoders[name] + sizes.connectors[name] for name in sizes.encoders)
    models = len(sizes.encoders)
    methods = ("originals", "plain", "mmer")
    bits = {method: storage_bits(method, models, sizes.llm, own) for method in methods}
    for row in composers.values():
        if row["rule"] == "signs":
            bits["signs"] = storage_bits("plain", models, sizes.llm, own) + 8 * row["routing"]["bytes"]
        if row["rule"] == EXPERTS:
            bits[EXPERTS] = storage_bits(EXPERTS, models, sizes.llm, own, row["routing"]["adapter"])
    by_count = {
        str(n): {method: storage_bits(method, n, sizes.llm, own) for method in methods} for n in range(2, models + 1)
    }
    return {"models": models, "llm": sizes.llm, "own": own, "bits": bits, "by_count": by_count}


def _forgetting(
    settings: ForgettingSettings, out: Path, stream: Stream, experts: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Per scenario: previous and new tasks, kept by the composition, by Model Tailor and by plain fine-tuning.

    Model Tailor and fine-tuning know one modality: "previous" of a modality compares all three on its tasks alone.
    """
    found: dict[str, Any] = {}
    for name, tasks in settings.scenarios.items():
        result = read_json(out / "forgetting" / name / "result.json")
        alone = {task: read_json(out / "later" / task / "result.json") for task in tasks}
        tuned = {task: alone[task]["new"] for task in tasks}
        owners = by_modality(tasks, stream)
        composed = _row(result, experts)
        others = [kept for stage, kept in composed["retention"].items() if stage not in owners]
        row: dict[str, Any] = {
            "tasks": list(tasks),
            "composed": composed
            | {
                "new": {task: gains.retention(result["scores"][task], tuned[task]) for task in tasks},
                "previous": {owner: composed["retention"][owner] for owner in owners},
                "others_mean": statistics.fmean(others) if others else None,
            },
            "untouched": {task: gains.retention(alone[task]["untouched"], tuned[task]) for task in tasks},
            "tailor": {},
            "finetune": {},
        }
        for owner, own in owners.items():
            wanted = {key: value for task in own for key, value in tuned[task].items()}
            chain = read_json(out / "later" / "+".join(own) / "result.json")
            sewn = result["tailor"][owner]
            row["finetune"][owner] = {
                "previous": gains.retention(chain["previous"], experts[owner]),
                "new": gains.retention(chain["new"], wanted),
            }
            row["tailor"][owner] = {
                "share": sewn["share"],
                "previous": gains.retention({t: sewn["scores"][t] for t in experts[owner]}, experts[owner]),
                "new": gains.retention({t: sewn["scores"][t] for t in wanted}, wanted),
            }
        found[name] = row
    return found
