"""LwF: the value of its term, where it is silent, and what it keeps."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from distilled import disturb, same, tensors
from torch import Tensor

from graftlm.core.errors import ConfigError
from graftlm.data.types import Stage
from graftlm.learning.method import Context, Method
from graftlm.methods import build
from graftlm.methods.finetune import FineTune
from graftlm.methods.lwf import LwF
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

Learned = Callable[..., tuple[MultimodalLM, list[Context]]]
Beginning = Callable[..., Context]


@pytest.fixture
def two(halves: dict[str, Stage]) -> list[Stage]:
    return [halves["image-caption"], halves["image-qa"]]


@pytest.mark.parametrize(("target", "expected"), [("kl", 1.029613), ("ce", 3.358425)])
def test_the_term_by_hand(target: Literal["kl", "ce"], expected: float) -> None:
    method = LwF(strength=2.0, target=target)
    method._knows = True
    adapter = SimpleNamespace(previous=torch.no_grad)
    model = SimpleNamespace(training=True, eval=lambda: None, train=lambda mode: None, adapter=adapter)
    old, new = (SimpleNamespace(answer_logits=torch.tensor([logits])) for logits in ([2.0, 0], [0.0, 1]))
    ctx = cast(Context, SimpleNamespace(number=2, trains_llm=True, model=model, forward=lambda batch: old))
    assert method.loss(ctx, cast(Any, None), cast(Any, new))["lwf"].item() == pytest.approx(2 * expected, abs=1e-5)


def test_the_teacher_is_the_model_before(two: list[Stage], beginning: Beginning) -> None:
    """LLM and connector: the value is that of a copy of the model which nothing moved."""
    method = LwF()
    ctx = beginning(two, method)
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    with torch.no_grad():
        before = ctx.forward(batch).answer_logits
    disturb(ctx)
    out = ctx.forward(batch)
    p, q = (torch.log_softmax(logits / 2, -1) for logits in (before, out.answer_logits))
    expected = 4 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(method.loss(ctx, batch, out)["lwf"], expected, rtol=1e-3, atol=1e-5)


def test_at_the_start_there_is_nothing_to_learn(two: list[Stage], beginning: Beginning) -> None:
    method = LwF()
    ctx = beginning(two, method)
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    loss = method.loss(ctx, batch, ctx.forward(batch))["lwf"]
    moving = list(ctx.model.adapter.parameters().values())
    assert loss.item() == pytest.approx(0, abs=1e-6)
    for gradient in torch.autograd.grad(loss, moving, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-5


def test_it_is_silent_while_the_llm_stays(two: list[Stage], beginning: Beginning) -> None:
    method = LwF()
    ctx = beginning(two, method)
    ctx.parts = frozenset({"connectors"})
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    assert method.loss(ctx, batch, ctx.forward(batch)) == {}


def test_without_strength_it_is_fine_tuning(two: list[Stage], learned: Learned) -> None:
    assert LwF(0.0).idle(1) and LwF(0.0).idle(2) and not LwF().idle(2)
    assert same(learned(two, LwF(0.0))[0], learned(two, FineTune())[0])


def test_a_first_stage_has_nothing_to_forget(two: list[Stage], learned: Learned) -> None:
    assert same(learned(two[:1], LwF())[0], learned(two[:1], FineTune())[0])


@pytest.mark.parametrize("way", ["fresh LoRA", "LoRA of the run", "every weight"])
def test_it_repeats_itself_and_keeps_more(way: str, two: list[Stage], learned: Learned, spec: ModelSpec) -> None:
    tuned = dataclasses.replace(spec, lora=None) if way == "every weight" else spec

    def mix(strength: float) -> list[Method]:
        return [LwF(strength), FineTune(continuing=way == "LoRA of the run")]

    def answers(model: MultimodalLM) -> Tensor:
        with torch.no_grad():
            scores: Tensor = model(model.batch(two[1].samples())).answer_logits
        return torch.log_softmax(scores, -1)

    before = answers(learned(two[:1], *mix(5.0), spec=tuned, epochs=5)[0])
    strong, again, plain = (learned(two, *mix(strength), spec=tuned, epochs=5)[0] for strength in (5.0, 5.0, 0.0))
    assert same(strong, again)

    def drift(model: MultimodalLM) -> Tensor:
        return (before.exp() * (before - answers(model))).sum(-1).mean()

    assert drift(strong) < 0.7 * drift(plain)


def test_there_is_no_second_llm(two: list[Stage], beginning: Beginning) -> None:
    method = LwF()
    ctx = beginning(two, method)
    count = len(tensors(ctx.model))
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    method.loss(ctx, batch, ctx.forward(batch))
    assert len(tensors(ctx.model)) == count
    kept = sum(tensor.numel() for tensor in method._connectors.values())
    assert kept == sum(p.numel() for p in ctx.model.connectors.parameters())


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"methods\[0\]\.lwf\.strength: -1\.0; a number from 0 is expected"):
        build([{"lwf": {"strength": -1}}])
    with pytest.raises(ConfigError, match=r"methods\[0\]\.lwf\.temperature: 0\.0; a number above 0 is expected"):
        build([{"lwf": {"temperature": 0}}])
    with pytest.raises(ConfigError, match=r"methods\[0\]\.lwf\.target: 'mse' does not fit"):
        build([{"lwf": {"target": "mse"}}])
