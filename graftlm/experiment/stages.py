"""Stages by content: learned once, reused by every run and method that would learn the same.

The key of a stage is a hash of what decides its result: its parent's key, its name, its samples and the bytes of their
media, the ingredients that do something at this stage, the schedule, the model, the seed, the device, and this package's
code (not that of other packages: delete the cache when torch or a plug-in of yours changes). Experts are
stages whose parent is the base; MERA's and fine-tuning's first stage is the image expert, and is found as such.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import graftlm
from graftlm.core.files import (
    atomic_folder,
    hash_file,
    hash_json,
    is_complete,
    locked,
    milestone,
    read_json,
    write_json,
)
from graftlm.data.types import Phase, Sample, Stage
from graftlm.learning.fit import Progress
from graftlm.learning.method import Method, check_adapters
from graftlm.learning.phase import Schedule
from graftlm.learning.stage import learn
from graftlm.methods import describe
from graftlm.model import checkpoint
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

__all__ = ["ROOT", "LearnedStage", "StageStore", "copy_linked"]

ROOT = "base"
"""Key of the parent of a first stage: the base model without any modality."""


@functools.cache
def code_digest() -> str:
    """Hash of the source files whose code decides what a stage becomes."""
    package = Path(graftlm.__file__).parent
    files = [
        f
        for room in ("core", "data", "model", "merging", "learning", "methods")
        for f in (package / room).rglob("*.py")
    ]
    return hash_json({str(f.relative_to(package)): hash_file(f) for f in sorted(files)})


@dataclass(frozen=True)
class LearnedStage:
    """A finished stage: its folder holds checkpoint/, methods.safetensors, fit.json, key.json, and any notes.json."""

    folder: Path

    @property
    def key(self) -> str:
        """The content hash of the stage."""
        return str(read_json(self.folder / "key.json")["key"])

    @property
    def checkpoint(self) -> Path:
        """The model after the stage."""
        return self.folder / "checkpoint"

    @property
    def fit(self) -> list[dict[str, Any]]:
        """One log per phase."""
        logs: list[dict[str, Any]] = read_json(self.folder / "fit.json")
        return logs


class StageStore:
    """Learns stages, or finds them.

    Args:
        root: the cache folder.
        model: what to build.
        schedule: phases of a stage.
        seed: the run's seed.
        inquiries: text without labels, for ingredients that regularise on it.
    """

    def __init__(
        self,
        root: Path,
        model: ModelSpec,
        schedule: Schedule,
        seed: int,
        device: str = "cpu",
        inquiries: Sequence[Sample] = (),
    ) -> None:
        self.root = root / "stages"
        self.spec = model
        self.schedule = schedule
        self.seed = seed
        self.device = device
        self.inquiries = tuple(inquiries)
        self.features = FeatureCache(root / "features")
        self._model: MultimodalLM | None = None

    def load(self, stage: LearnedStage | None) -> MultimodalLM:
        """The model as a stage left it, or the base for None. One model per process: an earlier result is overwritten."""
        if self._model is None:
            self._model = MultimodalLM.build(self.spec, seed=self.seed, device=self.device, features=self.features)
        if stage is not None:
            return checkpoint.load(stage.checkpoint, model=self._model)
        self._model.adapter.drop()
        self._model.extend(None)
        self._model.compose(None)
        self._model.remove_modalities()
        self._model.adapter.set_ledger([])
        return self._model

    def obtain(
        self,
        stage: Stage,
        past: Sequence[Stage],
        methods: Sequence[Method],
        parent: LearnedStage | None,
        *,
        schedule: Schedule | None = None,
        progress: Progress | None = None,
    ) -> LearnedStage:
        """The stage learned after ``parent`` by this mix; from the store if it was learned before.

        Methods get the memory (`Method.state`) that they had after the stage.

        Args:
            schedule: of this stage, if it has one of its own.
        """
        schedule = schedule or self.schedule
        key = self.key(stage, past, methods, parent, schedule)
        folder = self.root / key
        with locked(self.root / f".{key}.lock", wait=7 * 24 * 3600.0):
            if not is_complete(folder):
                self._learn(folder, stage, past, methods, parent, schedule, progress)
        found = LearnedStage(folder)
        self.remember(found, methods)
        return found

    def remember(self, stage: LearnedStage, methods: Sequence[Method]) -> None:
        """Give methods the memory (`Method.state`) that they had after a stage."""
        _restore_states(methods, stage.folder / "methods.safetensors", self.device)

    def key(
        self,
        stage: Stage,
        past: Sequence[Stage],
        methods: Sequence[Method],
        parent: LearnedStage | None,
        schedule: Schedule | None = None,
    ) -> str:
        """The content hash of a stage: parent, name, samples and media, ingredients at work, phases, model, seed, code."""
        schedule = schedule or self.schedule
        active = [method for method in methods if not method.idle(len(past) + 1)]
        phases = [*schedule.phases, *([schedule.realign] if active else [])]
        reads = frozenset[str]().union(*(method.reads for method in active))
        more: dict[str, Any] = {}
        if past and check_adapters(methods) == "run":
            more["adapter"] = "run"
        if "inquiries" in reads:
            more["inquiries"] = [[s.id, s.prompt, s.answers] for s in self.inquiries]
        if "pseudo" in reads:
            more["pseudo"] = [[task.name, dict(task.pseudo)] for task in stage.tasks]
        if files := [hash_file(path) for method in active for path in method.files()]:
            more["files"] = files
        return hash_json(
            {
                "parent": parent.key if parent else ROOT,
                "stage": [stage.name, self._digest(stage)],
                "device": self.device,
                "methods": describe(active),
                "phases": [_phase(phase) for phase in phases],
                "model": self.spec.to_dict(),
                "base": self._base(),
                "seed": self.seed,
                "code": code_digest(),
                **more,
            }
        )[:32]

    def _learn(
        self,
        folder: Path,
        stage: Stage,
        past: Sequence[Stage],
        methods: Sequence[Method],
        parent: LearnedStage | None,
        schedule: Schedule,
        progress: Progress | None,
    ) -> None:
        model = self.load(parent)
        milestone("stage.start")
        learned = learn(
            model,
            stage,
            past,
            methods,
            schedule,
            modalities={spec.name: spec for spec in self.spec.modalities},
            inquiries=self.inquiries,
            seed=self.seed,
            progress=progress,
        )
        milestone("stage.learned")
        history = checkpoint.read_manifest(parent.checkpoint)["history"] if parent else []
        active = [method for method in methods if not method.idle(len(past) + 1)]
        step = {"stage": stage.name, "methods": describe(active), "parent": parent.key if parent else ROOT}
        with atomic_folder(folder) as temporary:
            checkpoint.save(
                model, temporary / "checkpoint", history=[*history, step], parent=parent.checkpoint if parent else None
            )
            states = {
                f"{label}.{name}": x.detach().cpu().contiguous().clone()
                for label, method in _labelled(methods)
                for name, x in method.state.items()
            }
            save_file(states, temporary / "methods.safetensors")
            write_json(temporary / "fit.json", [log.to_dict() for log in learned.logs])
            if learned.notes:
                write_json(temporary / "notes.json", learned.notes)
            write_json(temporary / "key.json", {"key": folder.name})
        milestone("stage.saved")

    @functools.cache  # noqa: B019  one store per process, alive as long as it
    def _base(self) -> str:
        return MultimodalLM.build(self.spec, seed=self.seed, device=self.device, features=self.features).fingerprint()

    def _digest(self, stage: Stage) -> str:
        return hash_json(
            [
                [
                    task.name,
                    task.kind,
                    [[s.id, s.prompt, s.answers, [self.features.digest(m) for m in s.media]] for s in task.train],
                ]
                for task in stage.tasks
            ]
        )


def _labelled(methods: Sequence[Method]) -> list[tuple[str, Method]]:
    """Ingredients with a name that does not depend on which idle ones stand beside them: class, and its how many-th."""
    counts: dict[str, int] = {}
    labelled = []
    for method in methods:
        name = type(method).__name__
        counts[name] = counts.get(name, 0) + 1
        labelled.append((f"{name}-{counts[name]}", method))
    return labelled


def _restore_states(methods: Sequence[Method], path: Path, device: str) -> None:
    states = load_file(path, device=device)
    for label, method in _labelled(methods):
        prefix = f"{label}."
        method.state = {name.removeprefix(prefix): x for name, x in states.items() if name.startswith(prefix)}


def _phase(phase: Phase) -> dict[str, Any]:
    values = dataclasses.asdict(phase)
    return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in values.items()}


def copy_linked(source: Path, target: Path) -> None:
    """Copy a finished folder; files are hard links where the file system allows it, so copies cost nothing."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    if is_complete(target):
        return
    with atomic_folder(target) as temporary:
        shutil.copytree(
            source, temporary, dirs_exist_ok=True, copy_function=link, ignore=shutil.ignore_patterns("done")
        )
