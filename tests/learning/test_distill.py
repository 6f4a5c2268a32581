"""Distances by the vectors of their papers, and a teacher that is the student's own past, to the bit."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graftlm.core import seeds
from graftlm.data.types import Batch, Sample, Stage, Stream
from graftlm.learning.distill import (
    connectors_before,
    kl,
    l2,
    mse,
    of_text,
    soft_cross_entropy,
    teacher,
    text_mean,
)
from graftlm.learning.method import Context, Method
from graftlm.learning.phase import SCHEDULES
from graftlm.learning.stage import learn
from graftlm.methods.finetune import FineTune
from graftlm.methods.moelora import MoELoRA
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec


def test_distances_of_hidden_states() -> None:
    student, before = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 0], [0, 0]])
    torch.testing.assert_close(l2(student, before), torch.tensor([2.0, 5.0]))
    assert mse(student, before).mean().item() == pytest.approx(7.25)


@pytest.mark.parametrize(
    ("p", "q", "temperature", "expected"),
    [
        ([2.0, 0], [0.0, 0], 1.0, 0.327813),
        ([0.0, 0], [2.0, 0], 1.0, 0.433781),
        ([2.0, 0], [0.0, 1], 2.0, 1.029613),
        ([5.0, 0, 0], [0.0, 0, 0], 5.0, 25 * 0.123284),
    ],
)
def test_divergences(p: list[float], q: list[float], temperature: float, expected: float) -> None:
    assert kl(torch.tensor(p), torch.tensor(q), temperature).item() == pytest.approx(expected, abs=2e-5)


def test_the_mean_over_positions() -> None:
    old, new = torch.tensor([[5.0, 0, 0], [0, 5, 0]]), torch.tensor([[0.0, 0, 0], [0, 5, 0]])
    assert kl(old, new, 5.0).mean().item() == pytest.approx(1.541056, abs=1e-5)


def test_soft_targets_have_the_gradient_of_the_divergence() -> None:
    p, q = torch.tensor([2.0, 0]), torch.tensor([0.0, 1], requires_grad=True)
    value = soft_cross_entropy(p, q, 2.0)
    assert value.item() == pytest.approx(3.358425, abs=1e-5)
    ours, theirs = (torch.autograd.grad(f(p, q, 2.0), q)[0] for f in (soft_cross_entropy, kl))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("distance", [l2, mse, kl])
def test_of_a_student_that_is_its_teacher_there_is_nothing_to_learn(distance: Callable[..., Tensor]) -> None:
    state = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    student = state.clone().requires_grad_(True)
    value = distance(state, student).sum()
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros(3, 7), atol=1e-6, rtol=0)


def test_a_long_text_counts_as_much_as_a_short_one() -> None:
    values = torch.tensor([[float("nan"), 9.0], [2.0, 4.0]])
    mask = torch.tensor([[False, True], [True, True]])
    assert text_mean(values, mask).item() == pytest.approx((9 + 3) / 2)


def test_positions_before_a_text_are_left_out() -> None:
    batch = Batch(torch.zeros(1, 2), torch.tensor([[False, True]]), torch.zeros(1, 2))
    values, mask = of_text(torch.arange(5.0)[None], batch)
    assert values.tolist() == [[3, 4]] and mask.tolist() == [[False, True]]


# --- the teacher


def ways(spec: ModelSpec) -> dict[str, tuple[ModelSpec, Method]]:
    return {
        "fresh LoRA": (spec, FineTune()),
        "LoRA of the run": (spec, FineTune(continuing=True)),
        "every weight": (dataclasses.replace(spec, lora=None), FineTune()),
        "experts": (spec, MoELoRA(experts=2, rank=4, alpha=8.0)),
    }


def second_stage(way: str, spec: ModelSpec, stream: Stream, features: FeatureCache) -> Context:
    """A model that learned a stage, about to learn the next: of the same modality."""
    chosen, method = ways(spec)[way]
    model = MultimodalLM.build(chosen, features=features)
    schedule = SCHEDULES["miniworld"]
    quick = dataclasses.replace(schedule, phases=tuple(dataclasses.replace(p, epochs=1) for p in schedule.phases))
    stage = stream.stages[0]
    small = Stage(stage.name, tuple(dataclasses.replace(task, train=task.train[:8]) for task in stage.tasks))
    learn(model, small, [], [method], quick, modalities={s.name: s for s in chosen.modalities})
    return Context(model, small, (small,), quick, seed=0, parts=frozenset({"connectors", "llm"}), plastic=method)


@torch.no_grad()
def disturb(model: MultimodalLM) -> None:
    generator = torch.Generator().manual_seed(seeds.derive(0, "disturb"))
    moving = {**model.adapter.parameters(), **dict(model.connectors.named_parameters(prefix="connectors"))}
    for parameter in moving.values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(ctx: Context, samples: list[Sample]) -> Tensor:
    out = ctx.forward(ctx.model.batch(samples), logits=True).logits
    assert out is not None
    return out


@pytest.mark.parametrize("way", ["fresh LoRA", "LoRA of the run", "every weight", "experts"])
def test_the_teacher_is_the_model_before_the_stage(
    way: str, spec: ModelSpec, stream: Stream, features: FeatureCache
) -> None:
    ctx = second_stage(way, spec, stream, features)
    model = ctx.model
    samples = ctx.stage.samples()[:3]
    before = logits(ctx, samples)
    connectors = connectors_before(ctx)
    ctx.open()
    count = sum(p.numel() for p in model.parameters())
    disturb(model)
    now = logits(ctx, samples)
    assert (now - before).abs().max() > 1e-3
    model.train()
    moving = {name: p.requires_grad_(True) for name, p in model.adapter.parameters().items()}
    expected = torch.autograd.grad(ctx.forward(model.batch(samples)).loss, list(moving.values()), allow_unused=True)
    student = ctx.forward(model.batch(samples))  # its graph must survive the teacher
    with teacher(ctx, connectors):
        taught = ctx.forward(model.batch(samples), logits=True)
        assert not model.training and taught.logits is not None and not taught.logits.requires_grad
    torch.testing.assert_close(taught.logits, before, rtol=1e-5, atol=2e-5)
    assert model.training and sum(p.numel() for p in model.parameters()) == count
    assert all(p.requires_grad for p in moving.values())
    found = torch.autograd.grad(student.loss, list(moving.values()), allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model.eval()
    assert torch.equal(logits(ctx, samples), now)


def test_the_student_lends_connectors_that_no_stage_left(
    spec: ModelSpec, stream: Stream, features: FeatureCache
) -> None:
    ctx = second_stage("fresh LoRA", spec, stream, features)
    assert {name.split(".")[0] for name in connectors_before(ctx)} == {"image"}
    assert connectors_before(dataclasses.replace(ctx, new=frozenset({"image"}))) == {}


def test_what_fails_inside_leaves_the_student(spec: ModelSpec, stream: Stream, features: FeatureCache) -> None:
    ctx = second_stage("LoRA of the run", spec, stream, features)
    connectors = connectors_before(ctx)
    ctx.open()
    disturb(ctx.model)
    now = logits(ctx, ctx.stage.samples()[:2])
    with pytest.raises(ZeroDivisionError), teacher(ctx, connectors):
        _ = 1 / 0
    assert torch.equal(logits(ctx, ctx.stage.samples()[:2]), now)


def test_hidden_states_are_what_enters_the_head(spec: ModelSpec, stream: Stream, features: FeatureCache) -> None:
    """Asked for alone they come without the logits of all positions; the loss and the answers' logits are the same."""
    ctx = second_stage("fresh LoRA", spec, stream, features)
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    with torch.no_grad():
        alone, whole, plain = (
            ctx.forward(batch, **w) for w in ({"hidden": True}, {"hidden": True, "logits": True}, {})
        )
    assert alone.hidden is not None and whole.hidden is not None and whole.logits is not None
    torch.testing.assert_close(alone.hidden, whole.hidden)
    head = ctx.model.llm.get_output_embeddings()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(head(alone.hidden), whole.logits)
    assert alone.logits is None and torch.equal(alone.loss, plain.loss)
    torch.testing.assert_close(alone.answer_logits, whole.answer_logits)
