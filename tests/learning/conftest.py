"""A real little world, a real base, and stages that take a second."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Stage, Stream
from graftlm.experiment.spec import load
from graftlm.learning.method import Method
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

QUICK = Schedule(
    tuple(dataclasses.replace(phase, epochs=1) for phase in SCHEDULES["miniworld"].phases),
    dataclasses.replace(SCHEDULES["miniworld"].realign, epochs=1),
)


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    root = build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world"))
    whole = miniworld(root, "sequential")

    def small(stage: Stage) -> Stage:
        return Stage(stage.name, tuple(dataclasses.replace(task, train=task.train[:24]) for task in stage.tasks))

    return Stream(whole.name, tuple(small(stage) for stage in whole.stages), whole.probes)


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return load("mera-miniworld", []).model_spec()


@pytest.fixture(scope="session")
def grow(stream: Stream, features: FeatureCache, spec: ModelSpec) -> Callable[..., MultimodalLM]:
    """Learn the first stages of the stream with a fresh mix and return the model."""
    torch.set_num_threads(1)

    def grown(methods: list[Method], stages: int = 2, seed: int = 0, start: Path | None = None) -> MultimodalLM:
        model = MultimodalLM.build(spec, seed=seed, features=features)
        for index in range(stages):
            learn(
                model,
                stream.stages[index],
                stream.stages[:index],
                methods,
                QUICK,
                modalities={s.name: s for s in spec.modalities},
                seed=seed,
            )
        return model

    return grown


@pytest.fixture(scope="session")
def weights() -> Callable[[MultimodalLM], dict[str, Tensor]]:
    """Every parameter of a model by name, copied."""

    def copied(model: MultimodalLM) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    return copied
