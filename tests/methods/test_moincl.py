"""MoInCL: when pseudo targets are made, of what, what is distilled, and how stages are fused."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from distilled import disturb, same, tensors
from torch import Tensor

from graftlm.core.errors import ConfigError, DataError, MethodConflict
from graftlm.data.types import IGNORE, Batch, Media, Output, Sample, Stage, Stream, Task
from graftlm.learning.method import Context, Method, check_adapters
from graftlm.methods import build
from graftlm.methods.finetune import FineTune
from graftlm.methods.mera import Merge
from graftlm.methods.moelora import MoELoRA
from graftlm.methods.moincl import IKD, PTGM, Fuse, earlier, moincl
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

Learned = Callable[..., tuple[MultimodalLM, list[Context]]]
Beginning = Callable[..., Context]

ORDERS = {
    1: ("audio-caption", "image-caption", "video-qa", "audio-qa", "image-qa", "video-caption"),
    2: ("image-caption", "video-caption", "video-qa", "image-qa", "audio-caption", "audio-qa"),
}
TABLE: Mapping[int, dict[str, list[float | None]]] = {
    1: {
        "weight": [None, 0.1, 0.1, 0.1, 0.5, 0.5],
        "pseudo_rows": [None, None, None, 4, 1, 4],
        "strength": [None, None, None, 1.0, 0.5, 0.1],
    },
    2: {
        "weight": [None, 0.8, 0.5, 0.8, 0.1, 0.5],
        "pseudo_rows": [None, None, 4, 2, 4, 4],
        "strength": [None, None, 0.5, 0.1, 0.1, 1.0],
    },
}
"""Settings of the released scripts, per stage."""


def sample(id: str, task: str, modality: str) -> Sample:
    return Sample(id, task, (Media(modality, __file__),), f"describe the {modality}.", (id,))  # type: ignore[arg-type]


def stages_of(order: int) -> list[Stage]:
    stages = []
    for name in ORDERS[order]:
        modality, kind = name.split("-")
        train = tuple(sample(id, name, modality) for id in "abcdefgh")
        pseudo = {id: ("what is it ?", id) for id in "abcdefgh"} if kind == "caption" else {}
        task = Task(name, kind, (modality,), "exact", train, (), train, pseudo=pseudo)  # type: ignore[arg-type]
        stages.append(Stage(name, (task,)))
    return stages


@pytest.fixture
def two(halves: dict[str, Stage]) -> list[Stage]:
    return [halves["image-caption"], halves["image-qa"]]


@pytest.fixture
def reverse(halves: dict[str, Stage]) -> list[Stage]:
    return [halves["image-qa"], halves["image-caption"]]


# --- when


@pytest.mark.parametrize(
    ("order", "unseen", "expected"),
    [(1, False, [3, 4, 5]), (2, False, [2, 3, 5]), (1, True, [2, 3, 4, 5]), (2, True, [2, 3, 4, 5])],
)
def test_pseudo_targets_are_of_what_was_learned_before(order: int, unseen: bool, expected: list[int]) -> None:
    stages = stages_of(order)
    found = [i for i, stage in enumerate(stages) if earlier(stage.tasks[0], stages[:i], unseen)]
    assert found == expected


def test_the_other_type_is_of_the_same_modality_if_there_is_one() -> None:
    stages = stages_of(1)
    assert [earlier(stages[i].tasks[0], stages[:i]).name for i in (3, 4, 5)] == [  # type: ignore[union-attr]
        "audio-caption",
        "image-caption",
        "video-qa",
    ]
    words = dataclasses.replace(stages[0].tasks[0], kind="instruction")
    assert earlier(words, stages) is None


@pytest.mark.parametrize("order", [1, 2])
def test_the_table_of_the_scripts_fits_the_stages(order: int, inquiries: tuple[Sample, ...]) -> None:
    stream = Stream("micl", tuple(stages_of(order)), inquiries=inquiries)
    for method in moincl(**TABLE[order]):  # type: ignore[arg-type]
        method.check(stream)
    pseudo, texts, fuse = moincl(**TABLE[order])  # type: ignore[arg-type]
    assert [pseudo.idle(i + 1) for i in range(6)] == [rows is None for rows in TABLE[order]["pseudo_rows"]]
    assert [texts.idle(i + 1) for i in range(6)] == [True] + [False] * 5
    assert fuse.adapter == "run" and fuse.idle(1) and not fuse.idle(2)


@pytest.mark.parametrize("setting", ["weight", "pseudo_rows", "strength"])
def test_one_value_per_stage_is_expected(setting: str, inquiries: tuple[Sample, ...]) -> None:
    stream = Stream("micl", tuple(stages_of(1)), inquiries=inquiries)
    with pytest.raises(ConfigError, match=f"{setting}: 2 values, but the stream has 6 stages"):
        for method in moincl(**{setting: [1.0, 1.0]}):  # type: ignore[arg-type]
            method.check(stream)
    with pytest.raises(ConfigError, match="2 values, but the stream has 3 stages"):
        PTGM(pseudo_rows=[1.0, 1.0]).idle(3)


def test_captions_after_questions_need_a_file() -> None:
    stages = stages_of(1)
    stages[5] = Stage("video-caption", (dataclasses.replace(stages[5].tasks[0], pseudo={}),))
    stream = Stream("micl", tuple(stages))
    expected = r"task video-caption of stage video-caption learns captions after video-qa.*a file id -> \{Q, A\}"
    with pytest.raises(DataError, match=expected):
        PTGM().check(stream)
    PTGM(pseudo_rows=[None, 4, 4, 4, 4, 0]).check(stream)


# --- pseudo rows


def prepared(ctx: Any, method: PTGM, monkeypatch: pytest.MonkeyPatch) -> PTGM:
    monkeypatch.setattr(
        "graftlm.methods.moincl._generate", lambda ctx, samples, limit: [f"a {s.media[0].modality}" for s in samples]
    )
    monkeypatch.setattr("graftlm.methods.moincl.connectors_before", lambda ctx: {})
    method.prepare(ctx)
    return method


def fake(order: int, number: int, accumulate: int = 1) -> Context:
    from types import SimpleNamespace

    stages = stages_of(order)
    return SimpleNamespace(  # type: ignore[return-value]
        stage=stages[number],
        past=tuple(stages[:number]),
        number=number + 1,
        seed=0,
        notes={},
        trains_llm=True,
        phase=SimpleNamespace(accumulate=accumulate),
    )


@pytest.mark.parametrize(("number", "expected"), [(3, "efgh"), (5, "abcd")])
def test_a_batch_and_its_pseudo_rows(number: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions: the last four with a caption; captions: the first four with a question."""
    ctx = fake(1, number)
    method = prepared(ctx, PTGM(), monkeypatch)
    samples = list(ctx.stage.tasks[0].train)
    rows = method.batch(ctx, samples)
    name = ctx.stage.name
    assert rows[:8] == samples
    assert [s.id for s in rows[8:]] == [f"{name}/{id}+pseudo" for id in expected]
    if number == 3:
        assert {(s.prompt, s.answers) for s in rows[8:]} == {("describe the audio.", ("a audio",))}
    else:
        assert [(s.prompt, s.answers) for s in rows[8:]] == [("what is it ?", (id,)) for id in expected]
    assert [s.media for s in rows[8:]] == [s.media for s in samples[:4]]


def test_every_micro_batch_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = fake(1, 3, accumulate=2)
    method = prepared(ctx, PTGM(pseudo_rows=1), monkeypatch)
    ids = [s.id for s in method.batch(ctx, list(ctx.stage.tasks[0].train))]
    assert ids == [*"abcd", "audio-qa/d+pseudo", *"efgh", "audio-qa/h+pseudo"]


def test_samples_of_other_ingredients_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = fake(1, 3)
    method = prepared(ctx, PTGM(), monkeypatch)
    others = [Sample(str(i), "old", (), "what ?", ("yes",)) for i in range(4)]
    rows = method.batch(ctx, [*ctx.stage.tasks[0].train[:2], *others])
    assert [s.id for s in rows[6:]] == ["audio-qa/a+pseudo", "audio-qa/b+pseudo"]


@pytest.mark.parametrize(("order", "number"), [(1, 0), (1, 2), (2, 4)])
def test_where_it_is_not_active_a_batch_is_a_batch(order: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = fake(order, number)
    method = prepared(ctx, PTGM(), monkeypatch)
    samples = list(ctx.stage.tasks[0].train)
    assert method.batch(ctx, samples) == samples and method.wants == frozenset()


def test_an_unseen_modality_has_the_prompt_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = fake(1, 2)
    method = prepared(ctx, PTGM(allow_unseen_modality=True), monkeypatch)
    assert method.batch(ctx, list(ctx.stage.tasks[0].train))[-1].prompt == "describe the video."


def test_the_model_before_captions_every_training_sample(
    two: list[Stage], beginning: Beginning, learned: Learned
) -> None:
    method = PTGM()
    ctx = beginning(two, method)
    before, task = learned(two[:1], PTGM())[0], two[1].tasks[0]
    rows = list(method._pseudo.values())
    assert [(s.id, s.media) for s in rows] == [(f"{task.name}/{s.id}+pseudo", s.media) for s in task.train]
    assert {s.prompt for s in rows} <= {s.prompt for s in two[0].samples()}
    limit = two[0].tasks[0].max_new_tokens
    for row in rows[:3]:
        assert row.answers == tuple(before.generate([row], max_new_tokens=limit))
    assert ctx.notes["ptgm"] == {task.name: 12}


# --- distillation on pseudo rows


@torch.no_grad()
def text_logits(ctx: Context, row: Sample) -> Tensor:
    """Of one sample alone, at its text."""
    out = ctx.forward(ctx.model.batch([row]), logits=True)
    assert out.logits is not None
    return out.logits[0][out.modality_ids[0] == 0]


def look(method: PTGM, ctx: Context, count: int = 6) -> tuple[Batch, Output, list[Sample]]:
    rows = method.batch(ctx, list(ctx.stage.samples()[:count]))
    batch = ctx.model.batch(rows)
    return batch, ctx.forward(batch, logits="logits" in method.wants), rows[count:]


@pytest.mark.parametrize("stages", ["two", "reverse"])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_distillation_compares_equal_positions(
    stages: str, positions: Any, request: pytest.FixtureRequest, beginning: Beginning
) -> None:
    """Whatever stands beside a row, and however much padding: it is compared with each row alone."""
    method = PTGM(pseudo_rows=3, kd_positions=positions, strength=2.0)
    ctx = beginning(request.getfixturevalue(stages), method)
    assert method.wants == ({"logits"} if positions == "all" else set())
    batch, _, rows = look(method, ctx)
    assert len(rows) == 3
    old = [text_logits(ctx, row) for row in rows]
    disturb(ctx)
    new = [text_logits(ctx, row) for row in rows]
    if positions == "answer":
        counts = [int((ctx.model.batch([row]).labels != IGNORE).sum()) for row in rows]
        old, new = ([x[-count - 1 : -1] for x, count in zip(side, counts, strict=True)] for side in (old, new))
    p, q = (torch.log_softmax(torch.cat(side) / 5, -1) for side in (old, new))
    expected = 2 * 25 * (p.exp() * (p - q)).sum(-1).mean()
    out = ctx.forward(batch, logits=positions == "all")
    torch.testing.assert_close(method.loss(ctx, batch, out)["ptgm"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_at_the_start_there_is_nothing_to_distil(positions: Any, two: list[Stage], beginning: Beginning) -> None:
    method = PTGM(kd_positions=positions)
    ctx = beginning(two, method)
    batch, out, _ = look(method, ctx)
    loss = method.loss(ctx, batch, out)["ptgm"]
    assert loss.item() == pytest.approx(0, abs=1e-5)
    for gradient in torch.autograd.grad(loss, list(ctx.model.adapter.parameters().values()), allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-4


def test_one_pass_of_the_teacher_on_pseudo_rows_alone(
    two: list[Stage], beginning: Beginning, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = PTGM(pseudo_rows=2)
    ctx = beginning(two, method)
    batch, out, _ = look(method, ctx)
    rows: list[int] = []
    forward = ctx.model.forward

    def counted(batch: Batch, **wants: bool) -> Output:
        rows.append(len(batch.input_ids))
        return forward(batch, **wants)

    monkeypatch.setattr(ctx.model, "forward", counted)
    method.loss(ctx, batch, out)
    assert rows == [2]


def test_a_micro_batch_without_pseudo_rows_has_no_term(two: list[Stage], beginning: Beginning) -> None:
    method = PTGM()
    ctx = beginning(two, method)
    method.batch(ctx, list(ctx.stage.samples()[:6]))
    batch = ctx.model.batch(ctx.stage.samples()[:2])
    assert method.loss(ctx, batch, ctx.forward(batch)) == {}


def test_pseudo_rows_alone_distil_nothing(two: list[Stage], beginning: Beginning) -> None:
    method = PTGM(strength=0.0)
    ctx = beginning(two, method)
    assert method.wants == frozenset()
    batch, out, rows = look(method, ctx)
    assert len(rows) == 4 and method.loss(ctx, batch, out) == {}


def test_connectors_alone_are_learned_without(two: list[Stage], beginning: Beginning) -> None:
    method, texts = PTGM(), IKD(variant="pseudo")
    ctx = beginning(two, method)
    texts.prepare(dataclasses.replace(ctx, past=()))
    ctx.parts = frozenset({"connectors"})
    samples = list(ctx.stage.samples()[:6])
    assert method.batch(ctx, samples) == samples == texts.batch(ctx, samples)
    batch = ctx.model.batch(samples)
    assert method.loss(ctx, batch, ctx.forward(batch)) == {} == IKD().loss(ctx, batch, ctx.forward(batch))


# --- instructions


def test_distillation_on_instructions(two: list[Stage], beginning: Beginning) -> None:
    method = IKD(strength=2.0)
    ctx = beginning(two, method)
    again = IKD()
    again.prepare(ctx)
    texts = again._draw(ctx, replace=True)
    assert len(texts) == 4

    def alone() -> Tensor:
        with torch.no_grad():
            outs = [ctx.forward(ctx.model.batch([text], answers=False), logits=True).logits for text in texts]
        return torch.cat([out[0] for out in outs if out is not None])

    old = alone()
    disturb(ctx)
    p, q = (torch.log_softmax(logits / 5, -1) for logits in (old, alone()))
    expected = 2 * 25 * (p.exp() * (p - q)).sum(-1).mean()
    batch = ctx.model.batch(ctx.stage.samples()[:2])
    torch.testing.assert_close(method.loss(ctx, batch, ctx.forward(batch))["ikd"], expected, rtol=1e-3, atol=1e-4)
    draws = [tuple(s.id for s in method._draw(ctx, replace=True)) for _ in range(40)]
    assert any(len(set(draw)) < 4 for draw in draws) and len(set(draws)) > 10


def test_instructions_that_the_model_before_answered(
    two: list[Stage], beginning: Beginning, learned: Learned, inquiries: tuple[Sample, ...]
) -> None:
    method = IKD(variant="pseudo", texts=3, pool=4, max_new_tokens=5)
    ctx = beginning(two, method)
    before = learned(two[:1], IKD())[0]
    assert len(method._texts) == 4
    for text in method._texts:
        assert text.answers == tuple(before.generate([text], max_new_tokens=5))
        assert text.prompt in {each.prompt for each in inquiries}
    samples = list(ctx.stage.samples()[:3])
    rows = method.batch(ctx, samples)
    assert rows[:3] == samples and len({s.id for s in rows[3:]}) == len(rows[3:]) == 3
    batch = ctx.model.batch(rows)
    assert method.loss(ctx, batch, ctx.forward(batch)) == {}


def test_instructions_are_expected(two: list[Stage], inquiries: tuple[Sample, ...]) -> None:
    with pytest.raises(DataError, match="ikd: the stream has no inquiries"):
        IKD().check(Stream("s", tuple(two)))
    IKD().check(Stream("s", tuple(two), inquiries=inquiries))
    IKD().check(Stream("s", tuple(two[:1])))


# --- fusion


def test_a_scalar_that_learns_one_per_epoch(two: list[Stage], beginning: Beginning) -> None:
    """Old 0, and 1 more in every epoch before it is fused: .1, .11, .111."""
    method = Fuse(0.1)
    ctx = beginning(two, method)
    before = {name: p.detach().clone() for name, p in ctx.model.adapter.parameters().items()}
    for expected in (0.1, 0.11, 0.111):
        for parameter in ctx.model.adapter.parameters().values():
            parameter.data += 1
        method.after_epoch(ctx)
        for name, parameter in ctx.model.adapter.parameters().items():
            torch.testing.assert_close(
                parameter.data - before[name], torch.full_like(parameter, expected), atol=1e-5, rtol=0
            )


def test_factors_and_deltas_are_other_models(two: list[Stage], beginning: Beginning) -> None:
    """Of deltas the fused weights are the blend of weights; of factors they are not: A and B are blended apart."""
    name, moved = "model.layers.0.mlp.up_proj.weight", {}
    for on in ("factors", "delta"):
        method = Fuse(0.3, on=on)
        ctx = beginning(two, method)

        def update(ctx: Context = ctx) -> Tensor:
            a, b, scale = ctx.model.adapter.factors()[name]
            return (scale * b @ a).detach()

        old = update()
        disturb(ctx)
        now = update()
        method.after_epoch(ctx)
        moved[on] = (update() - (0.7 * old + 0.3 * now)).abs().max()
    assert moved["delta"] < 1e-6 < 1e-3 < moved["factors"]


def test_every_weight_is_blended(two: list[Stage], beginning: Beginning, spec: ModelSpec) -> None:
    method = Fuse(0.25)
    ctx = beginning(two, method, spec=dataclasses.replace(spec, lora=None))
    before = tensors(ctx.model)
    disturb(ctx)
    now = tensors(ctx.model)
    method.after_epoch(ctx)
    for name, parameter in ctx.model.named_parameters():
        if name.startswith("llm."):
            torch.testing.assert_close(parameter.detach(), torch.lerp(before[name], now[name], 0.25))


def test_no_fusion_at_the_first_stage_nor_of_connectors(two: list[Stage], learned: Learned) -> None:
    assert same(learned(two[:1], Fuse(0.1))[0], learned(two[:1], FineTune())[0])
    fused, plain = (learned(two, *mix)[0] for mix in ([Fuse(0.1)], [FineTune(continuing=True)]))
    assert not same(fused, plain)


def test_a_fused_stage_is_nearer_to_the_one_before(two: list[Stage], learned: Learned) -> None:
    def way(*mix: Method) -> float:
        first, second = (tensors(learned(two[:n], *mix)[0]) for n in (1, 2))
        squares = [(second[k] - first[k]).square().sum() for k in first if k.startswith("llm.")]
        return float(torch.stack(squares).sum().sqrt())

    for on in ("factors", "delta"):
        assert way(Fuse(0.2, on=on)) < 0.6 * way(FineTune(continuing=on == "factors"))


def test_a_weight_of_one_is_off(two: list[Stage], learned: Learned) -> None:
    assert Fuse(1.0).adapter == "any" and Fuse(1.0).idle(2) and Fuse([None, 1.0]).adapter == "any"
    assert Fuse([None, 1.0, 0.5], on="delta").idle(2) and not Fuse([None, 1.0, 0.5]).idle(2)
    assert same(learned(two, Fuse(1.0))[0], learned(two, FineTune())[0])


def test_a_weight_of_zero_is_refused() -> None:
    for value in (0.0, [None, 0.5, 0.0]):
        with pytest.raises(ConfigError, match="weight: 0 undoes after every epoch all that the LoRA learned"):
            Fuse(value)
    with pytest.raises(ConfigError, match=r"weight: 1\.5 is not a share"):
        Fuse(1.5)
    with pytest.raises(ConfigError, match=r"weight: nan is not a share"):
        Fuse(math.nan)


def test_who_cannot_share_the_llm_is_named() -> None:
    assert check_adapters(moincl()) == "run"
    assert check_adapters([*moincl(on="delta"), Merge()]) == "stage"
    with pytest.raises(MethodConflict, match=r"Fuse \(adapter = 'run'\) and Merge \(adapter = 'stage'\)"):
        check_adapters([*moincl(), Merge()])


# --- all together


@pytest.mark.parametrize(
    "mix",
    [
        [PTGM(pseudo_rows=0)],
        [IKD(strength=0.0)],
        [IKD(strength=0.0, variant="pseudo")],
        moincl(0, 0, 1, text_strength=0),
    ],
    ids=["no rows", "no instructions", "no pseudo instructions", "moincl of nothing"],
)
def test_without_strength_it_is_fine_tuning(mix: list[Method], two: list[Stage], learned: Learned) -> None:
    assert all(method.idle(2) for method in mix)
    assert same(learned(two, *mix)[0], learned(two, FineTune())[0])


@pytest.mark.parametrize("way", ["factors", "delta", "every weight", "experts"])
def test_it_repeats_itself(way: str, halves: dict[str, Stage], learned: Learned, spec: ModelSpec) -> None:
    """Captions, then questions, then captions of another modality, which its questions were learned before."""
    stages = [halves["image-caption"], halves["video-qa"], halves["image-qa"], halves["video-caption"]]
    tuned = dataclasses.replace(spec, lora=None) if way == "every weight" else spec

    def mix() -> list[Method]:
        if way == "experts":
            return [MoELoRA(experts=2, rank=4, alpha=8.0), *moincl(weight=1.0)]
        return moincl(on="delta" if way == "delta" else "factors")

    (first, seen), (second, _) = (learned(stages, *mix(), spec=tuned, epochs=1) for _ in range(2))
    assert same(first, second)
    assert [ctx.notes.get("ptgm") for ctx in seen] == [None, {}, {"okvqa": 12}, {"msvd": 12}]
    assert all(math.isfinite(log.last_loss) for ctx in seen for log in ctx.logs)


def test_the_parts_of_moincl_from_a_file() -> None:
    pseudo, texts, fuse = build([{"moincl": {**TABLE[2], "texts": 2, "on": "delta"}}])
    assert pseudo == PTGM(TABLE[2]["pseudo_rows"], TABLE[2]["strength"])
    assert texts == IKD(texts=2) and fuse == Fuse(TABLE[2]["weight"], "delta")
    for settings, message in (
        ({"ptgm": {"pseudo_rows": 1.5}}, r"ptgm\.pseudo_rows: 1\.5; a whole number from 0 is expected"),
        ({"ptgm": {"pseudo_rows": float("inf")}}, r"ptgm\.pseudo_rows: inf; a whole number"),
        ({"ptgm": {"strength": [None, -1.0]}}, r"ptgm\.strength: -1\.0; a number from 0 is expected"),
        ({"ptgm": {"temperature": 0}}, r"ptgm\.temperature: 0\.0; a number above 0 is expected"),
        ({"ptgm": {"max_new_tokens": 0}}, r"ptgm\.max_new_tokens: 0; at least 1 is expected"),
        ({"ikd": {"strength": -1}}, r"ikd\.strength: -1\.0; a number from 0 is expected"),
        ({"ikd": {"texts": 0}}, r"ikd\.texts: 0; at least 1 is expected"),
        ({"ikd": {"variant": "pseudo", "strength": 0.5}}, r"ikd\.strength: 0\.5, but pseudo answers are rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            build([settings])
