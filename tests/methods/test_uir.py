"""UIR: its distance, its loop over inquiries, where they come from, and what it keeps."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import disturb, same
from torch import Tensor

from graftlm.core.errors import ConfigError, DataError
from graftlm.data.inquiries import read
from graftlm.data.types import Sample, Stage, Stream
from graftlm.learning.distill import text_mean
from graftlm.learning.method import Context, Method
from graftlm.methods import build
from graftlm.methods.finetune import FineTune
from graftlm.methods.moelora import MoELoRA
from graftlm.methods.uir import UIR
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

Learned = Callable[..., tuple[MultimodalLM, list[Context]]]
Beginning = Callable[..., Context]


@pytest.fixture
def two(halves: dict[str, Stage]) -> list[Stage]:
    return [halves["image-caption"], halves["image-qa"]]


@torch.no_grad()
def hidden(ctx: Context, text: Sample) -> Tensor:
    """Of one text alone, without any padding."""
    training = ctx.model.training
    ctx.model.eval()
    out = ctx.forward(ctx.model.batch([text], answers=False), hidden=True).hidden
    ctx.model.train(training)
    assert out is not None
    return out[0]


def term(method: UIR, ctx: Context) -> Tensor:
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    return method.loss(ctx, batch, ctx.forward(batch))["uir"]


@pytest.mark.parametrize(("norm", "expected"), [("l2", 3.5), ("mse", 7.25)])
def test_distances_of_hidden_states(norm: Any, expected: float) -> None:
    now, before = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[[1.0, 0], [0, 0]]])
    distances = UIR(norm=norm)._distances(before, now)
    assert text_mean(distances, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(expected)


def test_forward_divergence() -> None:
    distances = UIR(variant="fkl")._distances(torch.tensor([[[2.0, 0]]]), torch.tensor([[[0.0, 0]]]))
    assert distances.item() == pytest.approx(0.327813, abs=1e-5)


def test_the_term_is_the_mean_over_texts_of_the_mean_over_tokens(
    two: list[Stage], beginning: Beginning, inquiries: tuple[Sample, ...]
) -> None:
    """Whatever their padding: it is compared with texts one by one."""
    method = UIR(strength=3.0, batch_size=5)
    ctx = beginning(two, method)
    before = [hidden(ctx, text) for text in inquiries]
    disturb(ctx)
    each = [(hidden(ctx, text) - old).norm(dim=-1).mean() for text, old in zip(inquiries, before, strict=True)]
    torch.testing.assert_close(term(method, ctx), 3 * torch.stack(each).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["hidden", "fkl"])
def test_at_the_start_there_is_nothing_to_learn(variant: Any, two: list[Stage], beginning: Beginning) -> None:
    method = UIR(variant=variant)
    ctx = beginning(two, method)
    loss = term(method, ctx)
    assert loss.item() == pytest.approx(0, abs=2e-6)
    for gradient in torch.autograd.grad(loss, list(ctx.model.adapter.parameters().values()), allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-5


def test_no_logits_are_computed(two: list[Stage], beginning: Beginning) -> None:
    """The head has nothing to do, for neither student nor teacher."""
    method = UIR()
    ctx = beginning(two, method)
    batch = ctx.model.batch(ctx.stage.samples()[:3])
    out = ctx.forward(batch)
    seen: list[int] = []
    head = ctx.model.llm.get_output_embeddings()  # type: ignore[no-untyped-call]
    with head.register_forward_hook(lambda _, inputs, output: seen.append(output.numel())):
        method.loss(ctx, batch, out)
    assert seen == [0, 0]


def test_every_inquiry_once_per_round(two: list[Stage], beginning: Beginning, inquiries: tuple[Sample, ...]) -> None:
    method = UIR()
    ctx = beginning(two, method)

    def draws(seed: int) -> list[str]:
        method.prepare(dataclasses.replace(ctx, seed=seed))
        return [s.id for count in (2, 3, 4, 1, 7, 3) * 5 for s in method._draw(count)]

    found = draws(0)
    rounds = [found[i : i + 5] for i in range(0, 100, 5)]
    assert all(sorted(each) == [s.id for s in inquiries] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert draws(0) == found != draws(1)


def test_inquiries_of_like_length_stand_together(two: list[Stage], beginning: Beginning) -> None:
    method = UIR()
    ctx = beginning(two, method)
    texts = tuple(Sample(str(i), "t", (), "x" * (1 + i % 4), ("",)) for i in range(40))
    method.prepare(dataclasses.replace(ctx, inquiries=texts))
    lengths = [[len(s.prompt) for s in method._draw(5)] for _ in range(8)]
    assert sorted(length for each in lengths for length in each) == sorted(len(s.prompt) for s in texts)
    assert all(len(set(each)) == 1 for each in lengths)


def test_as_many_inquiries_as_rows(two: list[Stage], beginning: Beginning, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = UIR._draw

    def counted(self: UIR, count: int) -> list[Sample]:
        drawn.append(count)
        return original(self, count)

    monkeypatch.setattr(UIR, "_draw", counted)
    for method in (UIR(), UIR(batch_size=2)):
        term(method, beginning(two, method))
    assert drawn[-1] == 2 and 3 in drawn


def test_it_is_silent_while_the_llm_stays(two: list[Stage], beginning: Beginning) -> None:
    for method in (UIR(), UIR(variant="replay")):
        ctx = beginning(two, method)
        ctx.parts = frozenset({"connectors"})
        samples = ctx.stage.samples()[:2]
        batch = ctx.model.batch(samples)
        assert method.loss(ctx, batch, ctx.forward(batch)) == {} and method.batch(ctx, samples) == samples


@pytest.mark.parametrize("variant", ["hidden", "fkl", "replay"])
def test_without_strength_it_is_fine_tuning(variant: Any, two: list[Stage], learned: Learned) -> None:
    assert UIR(0.0).idle(1) and UIR(0.0).idle(2) and not UIR().idle(1)
    assert same(learned(two, UIR(0.0, variant=variant))[0], learned(two, FineTune())[0])


@pytest.mark.parametrize("way", ["fresh LoRA", "LoRA of the run", "every weight", "experts"])
def test_it_repeats_itself_and_keeps_text(
    way: str, two: list[Stage], learned: Learned, spec: ModelSpec, inquiries: tuple[Sample, ...]
) -> None:
    tuned = dataclasses.replace(spec, lora=None) if way == "every weight" else spec
    beside: Method = FineTune(continuing=way == "LoRA of the run")
    if way == "experts":
        beside = MoELoRA(experts=2, rank=4, alpha=8.0)

    def grown(strength: float, stages: int) -> MultimodalLM:
        return learned(two[:stages], beside, UIR(strength), spec=tuned, epochs=4)[0]

    def states(model: MultimodalLM) -> list[Tensor]:
        with torch.no_grad():
            return [model(model.batch([text], answers=False), hidden=True).hidden[0] for text in inquiries]

    def drift(strength: float, after: MultimodalLM) -> float:
        """From the first stage to the second."""
        pairs = zip(states(grown(strength, 1)), states(after), strict=True)
        return sum(float((a - b).norm(dim=-1).mean()) for a, b in pairs)

    strong = grown(1.0, 2)
    assert same(strong, grown(1.0, 2))
    assert drift(1.0, strong) < 0.7 * drift(0.0, grown(0.0, 2))


def test_replay_learns_answers(two: list[Stage], beginning: Beginning, inquiries: tuple[Sample, ...]) -> None:
    method = UIR(variant="replay")
    ctx = beginning(two, method)
    samples = ctx.stage.samples()[:5]
    rows = method.batch(ctx, samples)
    assert rows[:5] == samples and sorted(s.id for s in rows[5:]) == [s.id for s in inquiries]
    assert int((ctx.model.batch(rows).labels[5:] != -100).sum()) >= 5 * 2
    few = UIR(variant="replay", batch_size=2)
    few.prepare(ctx)
    assert ctx.phase is not None
    ctx.phase = dataclasses.replace(ctx.phase, accumulate=2)
    assert len(few.batch(ctx, samples)) == 5 + 4


def test_replay_moves_the_model(two: list[Stage], learned: Learned) -> None:
    assert not same(learned(two[:1], UIR(variant="replay"))[0], learned(two[:1], FineTune())[0])


def test_inquiries_are_expected(two: list[Stage], inquiries: tuple[Sample, ...], beginning: Beginning) -> None:
    stream = Stream("s", tuple(two))
    with pytest.raises(DataError, match="uir: the stream has no inquiries; texts without labels are expected"):
        UIR().check(stream)
    with pytest.raises(DataError, match="no inquiries"):
        UIR().prepare(dataclasses.replace(beginning(two, UIR(0.0)), inquiries=()))
    UIR(0.0).check(stream)
    silent = (inquiries[0], dataclasses.replace(inquiries[1], answers=("",)))
    UIR().check(dataclasses.replace(stream, inquiries=silent))
    with pytest.raises(DataError, match=r"uir: 1 of 2 inquiries have no answer \(first: 1\)"):
        UIR(variant="replay").check(dataclasses.replace(stream, inquiries=silent))


def test_inquiries_of_a_file(tmp_path: Path, two: list[Stage]) -> None:
    talk = {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "what is a cube ?"},
            {"from": "gpt", "value": "a solid ."},
            {"from": "human", "value": "and a ball ?"},
        ],
    }
    seen = {"id": "b", "image": "b.jpg", "conversations": [{"from": "human", "value": "what is it ?"}]}
    slot = {"id": "c", "conversations": [{"from": "human", "value": "<image> what is it ?"}]}
    (tmp_path / "a.json").write_text(json.dumps([talk, seen, slot, "say yes ."]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (talk, seen, slot, "say yes .")))
    for name in ("a.json", "a.jsonl"):
        found = read(tmp_path / name)
        assert [(s.id, s.prompt, s.answers) for s in found] == [
            ("0-0", "what is a cube ?", ("a solid .",)),
            ("0-1", "and a ball ?", ("",)),
            ("3-0", "say yes .", ("",)),
        ]
    UIR(inquiries=str(tmp_path / "a.json")).check(Stream("s", tuple(two)))
    for content, message in (
        ({}, "a list of texts or of conversations is expected"),
        ([], "no text without media in 0 entries"),
        ([seen], "no text without media in 1 entries"),
        ([3], "entry 0: '3'; a text, or 'conversations' of turns"),
        ([{"conversations": [{"from": "human"}]}], "entry 0"),
    ):
        (tmp_path / "b.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            read(tmp_path / "b.json")
    (tmp_path / "b.jsonl").write_text("{]\n")
    with pytest.raises(DataError, match="a line is not JSON"):
        read(tmp_path / "b.jsonl")


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"strength": -1}, r"uir\.strength: -1\.0; a number from 0 is expected"),
        ({"variant": "replay", "strength": 0.5}, "replayed inquiries are rows like any other"),
        ({"batch_size": 0}, "batch_size: 0; at least 1 is expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            build([{"uir": settings}])
