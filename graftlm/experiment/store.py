"""The run folder: written once, read anywhere.

    experiment.yaml   the exact settings              environment.json  versions and machine
    journal.jsonl     what happened, line by line     summary.json      every score, when the run is finished
    base/             the base on the probes          report.html
    experts/<stage>/  what a stage alone makes of the base         blind/<stage>/  the expert with other samples' media
    methods/<name>/<i>-<stage>/                                    a method after its i-th stage

A cell, the innermost folder, holds checkpoint/, fit.json, scores.json and predictions/<task>.jsonl.
"""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from graftlm.core.errors import RunError
from graftlm.core.files import (
    append_jsonl,
    is_complete,
    locked,
    milestone,
    read_json,
    read_jsonl,
    write_json,
    write_text,
)
from graftlm.experiment.spec import ExperimentSpec

__all__ = ["Cell", "RunStore", "environment"]

PACKAGES = ("graftlm", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
"""Whose versions can change a result."""


@dataclass(frozen=True)
class Cell:
    """One measured model of a run."""

    folder: Path
    stage: str

    @property
    def learned(self) -> bool:
        """Whether the model is there, complete."""
        return is_complete(self.folder)

    @property
    def measured(self) -> bool:
        """Whether all its scores are there."""
        return (self.folder / "scores.json").is_file()

    def scores(self) -> dict[str, dict[str, Any]]:
        """Task -> metric, value, n, stderr; empty before it is measured."""
        scores: dict[str, dict[str, Any]] = read_json(self.folder / "scores.json") if self.measured else {}
        return scores

    def fit(self) -> list[dict[str, Any]]:
        """One log per phase; empty before it is learned."""
        path = self.folder / "fit.json"
        logs: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        return logs

    def tasks(self) -> list[str]:
        """Tasks of which predictions exist, finished or not."""
        return sorted(path.stem for path in (self.folder / "predictions").glob("*.jsonl"))

    def predictions(self, task: str) -> list[dict[str, Any]]:
        """What the model answered, in the order of asking."""
        return read_jsonl(self.folder / "predictions" / f"{task}.jsonl")


class RunStore:
    """A run folder. `open` begins or continues one, the constructor looks at one that is there.

    Raises:
        RunError: the folder holds no run.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "experiment.yaml"
        if not path.is_file():
            raise RunError(
                f"{folder}: no run is here (experiment.yaml is missing). Name the folder of `graftlm run --out`."
            )
        self.spec = ExperimentSpec.from_yaml(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def open(cls, folder: Path, spec: ExperimentSpec) -> "RunStore":
        """Begin a run, or continue the one of the same experiment.

        Raises:
            RunError: the folder holds another experiment; the message names every setting that differs.

        """
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder}: a file, where a folder is expected. Choose another --out.")
        path = folder / "experiment.yaml"
        if not path.is_file():
            if found := sorted(entry.name for entry in folder.glob("[!.]*")):
                raise RunError(
                    f"{folder}: not empty ({', '.join(found[:3])}) and no run; a new or empty folder is expected. "
                    "Choose another --out."
                )
            write_text(path, spec.to_yaml())
        store = cls(folder)
        store._same(spec)
        store._note_environment()
        return store

    @classmethod
    def grow(cls, folder: Path, spec: ExperimentSpec) -> "RunStore":
        """As `open`, but the run may have other methods too: those that are there stay, and the spec's are added.

        Raises:
            RunError: the folder holds another experiment, or a method of the same name that is mixed otherwise.

        """
        path = folder / "experiment.yaml"
        if not path.is_file():
            return cls.open(folder, spec)
        store = cls(folder)
        there, here = store.spec.mixes(), spec.mixes()
        store.spec = store.spec.model_copy(update={"methods": {**here, **there}})
        store._same(spec.model_copy(update={"methods": {**there, **here}}))
        grown = spec.model_copy(update={"methods": {**there, **here}})
        if here.keys() - there.keys():
            write_text(path, grown.to_yaml())
            for path in (store.summary_path, store.report):  # there is more to do than they sum up
                path.unlink(missing_ok=True)
        return cls.open(folder, grown)

    @staticmethod
    def finished(folder: Path, spec: ExperimentSpec) -> bool:
        """Whether this very experiment is finished there, report included.

        Raises:
            RunError: the folder holds another experiment.

        """
        if not (folder / "experiment.yaml").is_file():
            return False
        store = RunStore(folder)
        store._same(spec)
        return store.summary_path.is_file() and store.report.is_file()

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run folder; the kernel lets go when the process dies.

        Raises:
            RunError: another process holds it.

        """
        busy = f"{self.folder}: another process is working on this run folder. Wait for it, or choose another --out."
        return locked(self.folder / ".lock", busy=busy)

    def journal(self, event: str, **fields: Any) -> None:
        """Write down what happened; crash tests kill a run right after each line."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_jsonl(self.folder / "journal.jsonl", {"time": time, "event": event, **fields})
        milestone(f"journal.{event}")

    def events(self) -> list[dict[str, Any]]:
        """The journal."""
        return read_jsonl(self.folder / "journal.jsonl")

    @property
    def summary_path(self) -> Path:
        """What a finished run says."""
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        """The page about this run."""
        return self.folder / "report.html"

    def base(self) -> Path:
        """The base model's folder."""
        return self.folder / "base"

    def expert(self, stage: str) -> Path:
        """The folder of the model that learned this stage alone."""
        return self.folder / "experts" / stage

    def blind(self, stage: str) -> Path:
        """The folder of the expert's scores without sight: it is shown other samples' media."""
        return self.folder / "blind" / stage

    def stage(self, method: str, index: int, stage: str) -> Path:
        """The folder of a method after a stage; ``index`` counts from 0, folders from 1."""
        return self.folder / "methods" / method / f"{index + 1}-{stage}"

    def experts(self) -> Iterator[Cell]:
        """The experts that exist."""
        for path in sorted((self.folder / "experts").glob("[!.]*")):
            yield Cell(path, path.name)

    def stages(self, method: str) -> Iterator[Cell]:
        """The stages of a method that exist, in order of learning."""
        found = []
        for path in (self.folder / "methods" / method).glob("*-*"):
            if match := re.fullmatch(r"(\d+)-(.+)", path.name):
                found.append((int(match[1]), match[2], path))
        for _, stage, path in sorted(found):
            yield Cell(path, stage)

    def summary(self) -> dict[str, Any]:
        """The content of summary.json.

        Raises:
            RunError: the run is not finished.

        """
        if not self.summary_path.is_file():
            raise RunError(
                f"{self.folder}: the run is not finished (summary.json is missing). Run the same command again."
            )
        summary: dict[str, Any] = read_json(self.summary_path)
        return summary

    def _same(self, spec: ExperimentSpec) -> None:
        there, here = _flat(self.spec.identity()), _flat(spec.identity())
        differing = [
            f"  {key}: {there.get(key, 'nothing')} there, {here.get(key, 'nothing')} here"
            for key in dict.fromkeys([*there, *here])
            if there.get(key) != here.get(key)
        ]
        if differing:
            raise RunError(
                f"{self.folder}: another experiment is in this folder. Choose another --out, or delete the folder. "
                "What differs:\n" + "\n".join(differing)
            )

    def _note_environment(self) -> None:
        path, now = self.folder / "environment.json", environment()
        if not path.is_file():
            write_json(path, now)
            return
        before = read_json(path)
        changed = {key: [before.get(key), now.get(key)] for key in now if before.get(key) != now.get(key)}
        noted = [event["changed"] for event in self.events() if event["event"] == "environment"]
        if changed and (not noted or noted[-1] != changed):
            self.journal("environment", changed=changed)


def environment() -> dict[str, Any]:
    """Versions and machine, without importing what they are of."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of a tree by dotted path, as text; lists are leaves."""
    if isinstance(value, Mapping) and value:
        return {
            key: text for k, v in value.items() for key, text in _flat(v, f"{prefix}.{k}" if prefix else str(k)).items()
        }
    return {prefix: json.dumps(value, ensure_ascii=False)}
