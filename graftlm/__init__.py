"""Grow a multimodal LLM one modality at a time without forgetting.

The names below are the public surface; each is imported when it is first used, so that ``import graftlm`` is light.
Everything else may change.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = version = "0.1.0"

if TYPE_CHECKING:
    from graftlm.core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        GraftError,
        MergeError,
        MethodConflict,
        RunError,
    )
    from graftlm.data.types import Media, Phase, Sample, Stage, Stream, Task
    from graftlm.evaluation.suite import evaluate
    from graftlm.experiment.plan import plan
    from graftlm.experiment.run import run
    from graftlm.experiment.spec import ExperimentSpec
    from graftlm.experiment.spec import load as load_experiment
    from graftlm.learning.method import Context, Method
    from graftlm.learning.stage import learn
    from graftlm.model.checkpoint import load, save
    from graftlm.model.features import FeatureCache
    from graftlm.model.multimodal import MultimodalLM
    from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec
    from graftlm.report.page import write as write_report

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConnectorSpec",
    "Context",
    "DataError",
    "EncoderSpec",
    "ExperimentSpec",
    "FeatureCache",
    "GraftError",
    "LoraSpec",
    "Media",
    "MergeError",
    "Method",
    "MethodConflict",
    "ModalitySpec",
    "ModelSpec",
    "MultimodalLM",
    "Phase",
    "RunError",
    "Sample",
    "Stage",
    "Stream",
    "Task",
    "evaluate",
    "learn",
    "load",
    "load_experiment",
    "plan",
    "run",
    "save",
    "version",
    "write_report",
]

_HOMES = {
    "graftlm.core.errors": (
        *("CheckpointError", "ConfigError", "DataError", "GraftError", "MergeError", "MethodConflict", "RunError"),
    ),
    "graftlm.data.types": ("Media", "Phase", "Sample", "Stage", "Stream", "Task"),
    "graftlm.evaluation.suite": ("evaluate",),
    "graftlm.experiment.plan": ("plan",),
    "graftlm.experiment.run": ("run",),
    "graftlm.experiment.spec": ("ExperimentSpec", "load_experiment"),
    "graftlm.learning.method": ("Context", "Method"),
    "graftlm.learning.stage": ("learn",),
    "graftlm.model.checkpoint": ("load", "save"),
    "graftlm.model.features": ("FeatureCache",),
    "graftlm.model.multimodal": ("MultimodalLM",),
    "graftlm.model.specs": ("ConnectorSpec", "EncoderSpec", "LoraSpec", "ModalitySpec", "ModelSpec"),
    "graftlm.report.page": ("write_report",),
}

_RENAMED = {"load_experiment": "load", "write_report": "write"}
"""Public names of functions that are called otherwise in their room."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), _RENAMED.get(name, name))
            globals()[name] = value
            return value
    raise AttributeError(f"module 'graftlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
