"""Little stages of the mini world, whole ones and captions and questions apart, and a way to learn them."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Sample, Stage
from graftlm.experiment.spec import load
from graftlm.learning.method import Context, Method
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

SHORT = Schedule(
    (dataclasses.replace(SCHEDULES["miniworld"].phases[1], epochs=2, batch_size=8),), SCHEDULES["miniworld"].realign
)
"""Connector and LLM together, two epochs."""

Learned = Callable[..., tuple[MultimodalLM, list[Context]]]


@pytest.fixture(scope="session")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, ...]:
    """The stages of a world that is on disk."""
    torch.set_num_threads(1)
    return miniworld(build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world")), "sequential").stages


@pytest.fixture(scope="session")
def stages(sequential: tuple[Stage, ...]) -> list[Stage]:
    """Little stages: image, then two more."""
    return [
        Stage(stage.name, tuple(dataclasses.replace(task, train=task.train[:12]) for task in stage.tasks))
        for stage in sequential[:3]
    ]


@pytest.fixture(scope="module")
def features() -> FeatureCache:
    return FeatureCache()


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return load("mera-miniworld", []).model_spec()


@pytest.fixture(scope="session")
def halves(sequential: tuple[Stage, ...]) -> dict[str, Stage]:
    """Stages "image-caption", "image-qa", "video-caption" and "video-qa"; captions have pseudo targets."""
    stages = {}
    for stage in sequential[:2]:
        for task in stage.tasks:
            train = task.train[:12]
            pseudo = {s.id: ("what is there ?", f"number {k}") for k, s in enumerate(train)}
            small = dataclasses.replace(task, train=train, pseudo=pseudo if task.kind == "caption" else {})
            name = f"{stage.name}-{task.kind}"
            stages[name] = Stage(name, (small,))
    return stages


@pytest.fixture(scope="session")
def inquiries() -> tuple[Sample, ...]:
    texts = ("name a color .", "what is a cube ?", "say one two three .", "which is larger , a cat or a house ?", "red")
    return tuple(Sample(str(i), "inquiries", (), text, ("yes",)) for i, text in enumerate(texts))


@pytest.fixture(scope="session")
def learned(spec: ModelSpec, inquiries: tuple[Sample, ...]) -> Learned:
    """Learn stages with a mix; returns the model and what the ingredients saw, per stage."""
    features = FeatureCache()

    def grown(
        stages: Sequence[Stage], *methods: Method, seed: int = 0, spec: ModelSpec = spec, epochs: int = 2
    ) -> tuple[MultimodalLM, list[Context]]:
        model = MultimodalLM.build(spec, features=features)
        known = {each.name: each for each in spec.modalities}
        schedule = Schedule(tuple(dataclasses.replace(phase, epochs=epochs) for phase in SHORT.phases), SHORT.realign)
        contexts = [
            learn(model, stage, stages[:i], methods, schedule, modalities=known, inquiries=inquiries, seed=seed)
            for i, stage in enumerate(stages)
        ]
        return model, contexts

    return grown


@pytest.fixture(scope="session")
def beginning(spec: ModelSpec, inquiries: tuple[Sample, ...], learned: Learned) -> Callable[..., Context]:
    """A model that learned all stages but the last, which begins: prepared, opened, and in its phase."""

    def begun(stages: Sequence[Stage], method: Method, *, spec: ModelSpec = spec) -> Context:
        model, _ = learned(stages[:-1], method, spec=spec)
        stage, phase = stages[-1], SHORT.phases[0]
        new = frozenset(stage.modalities) - model.specs.keys()
        for each in spec.modalities:
            if each.name in new:
                model.add_modality(each, seed=0)
        ctx = Context(model, stage, tuple(stages[:-1]), SHORT, 0, new=new, inquiries=inquiries, plastic=method)
        method.prepare(ctx)
        ctx.phase, ctx.parts = phase, frozenset({"connectors", "llm"})
        ctx.open()
        for parameter in (*model.adapter.parameters().values(), *model.connectors.parameters()):
            parameter.requires_grad_(True)
        return ctx

    return begun
