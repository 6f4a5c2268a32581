"""What tests of methods that stay in the model, experts or prompts, have in common."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graftlm.data.types import Sample, Stage
from graftlm.learning.method import Context, Method
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.model.multimodal import MultimodalLM

QUICK = Schedule(
    tuple(dataclasses.replace(phase, epochs=1) for phase in SCHEDULES["miniworld"].phases),
    dataclasses.replace(SCHEDULES["miniworld"].realign, epochs=1),
)
"""Align the connector on captions, then train it beside the LLM on everything."""

ALIGN = Schedule(QUICK.phases[:1], QUICK.realign)

TUNE = Schedule(QUICK.phases[1:], QUICK.realign)

WORDS = Sample("t", "t", (), "what is this ?", ("red",))
"""A sample of text alone."""


def walk(
    model: MultimodalLM,
    stages: Sequence[Stage],
    methods: Sequence[Method],
    *,
    first: int = 0,
    schedule: Schedule = QUICK,
    seed: int = 0,
) -> list[Context]:
    """Learn the stages from number ``first`` on; returns what the ingredients saw, per stage."""
    known = {each.name: each for each in model.spec.modalities}
    return [
        learn(model, stages[index], stages[:index], methods, schedule, modalities=known, seed=seed)
        for index in range(first, len(stages))
    ]


def grow(
    model: MultimodalLM,
    stages: Sequence[Stage],
    methods: Sequence[Method],
    *,
    first: int = 0,
    schedule: Schedule = QUICK,
) -> MultimodalLM:
    """The model, after `walk`."""
    walk(model, stages, methods, first=first, schedule=schedule)
    return model


@torch.no_grad()
def move(parameters: Mapping[str, nn.Parameter], seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter += size * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: MultimodalLM, samples: Sequence[Sample]) -> Tensor:
    out = model(model.batch(samples), logits=True).logits
    assert out is not None
    return out


def state(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of what was there before and is another now."""
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
