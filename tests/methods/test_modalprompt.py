"""ModalPrompt: a task's prompts learn once and for all, and come back when their task does."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from walking import ALIGN, QUICK, TUNE, WORDS, logits, moved, state, walk

from graftlm.core.errors import ConfigError, MethodConflict, RunError
from graftlm.data.types import Batch, Output, Stage
from graftlm.experiment.stages import StageStore
from graftlm.learning.method import Context, Method
from graftlm.learning.phase import Schedule
from graftlm.methods import build as mix
from graftlm.methods.damc import DAMC
from graftlm.methods.l2p import L2P
from graftlm.methods.mera import Merge, Realign
from graftlm.methods.modalprompt import ModalPrompt
from graftlm.methods.pathweave import PathWeave
from graftlm.model import checkpoint
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.prompts import PromptShelf
from graftlm.model.specs import ModelSpec

SMALL: dict[str, Any] = {"prompts": 3, "top": 2}


@pytest.fixture
def model(spec: ModelSpec, features: FeatureCache) -> MultimodalLM:
    return MultimodalLM.build(spec, features=features)


def shelf(model: MultimodalLM) -> PromptShelf:
    assert isinstance(model.extension, PromptShelf)
    return model.extension


def test_it_is_on_the_shelf() -> None:
    (method,) = mix([{"modalprompt": {"prompts": 4, "connectors": True}}])
    assert method == ModalPrompt(prompts=4, connectors=True) and method.adapter == "own"
    assert (ModalPrompt().prompts, ModalPrompt().top, ModalPrompt().media) == (10, 3, 0.5)


# --- what moves -------------------------------------------------------------------------------------------------------


def test_old_tasks_and_the_llm_stay_to_the_bit(model: MultimodalLM, spec: ModelSpec, stages: list[Stage]) -> None:
    base = state(MultimodalLM.build(spec))
    before: dict[str, Tensor] = {}
    for count in (1, 2, 3):
        (ctx,) = walk(model, stages[:count], [ModalPrompt(**SMALL)], first=count - 1)
        after = state(model)
        assert not moved({name: x for name, x in base.items() if name.startswith("llm.")}, after)
        assert not moved(before, after)  # connectors of earlier stages too
        new = {name for name in after if name.startswith("extension.") and name not in before}
        own = [f"extension.tasks.{count - 1}.{name}" for name, _ in shelf(model).newest.named_parameters()]
        assert new == set(own) and ctx.logs[1].parameters == sum(after[name].numel() for name in own)
        assert not model.adapter.is_open and model.adapter.ledger == []
        assert not any(p.requires_grad for p in model.parameters())
        before = after
    assert shelf(model).settings() == {
        "prompts": 3,
        "top": 2,
        "media": 0.5,
        "tasks": [{"name": stage.name, "modalities": list(stage.modalities)} for stage in stages],
    }


def test_prompts_and_transform_learn(model: MultimodalLM, spec: ModelSpec, stages: list[Stage]) -> None:
    walk(model, stages[:1], [ModalPrompt(**SMALL)])
    fresh = MultimodalLM.build(spec, features=model.features)
    walk(fresh, stages[:1], [], schedule=ALIGN)
    method = ModalPrompt(**SMALL)
    method.prepare(ctx := Context(fresh, stages[0], (), QUICK, 0))
    method.begin(ctx)
    assert moved(state(fresh), state(model)) == {name for name in state(fresh) if name.startswith("extension.")}


def test_prompts_learn_from_the_answers_too(model: MultimodalLM, spec: ModelSpec, stages: list[Stage]) -> None:
    """Without the prototype's term the transform stays, and the prompts move."""
    walk(model, stages[:1], [ModalPrompt(**SMALL, align=0.0)])
    fresh = MultimodalLM.build(spec, features=model.features)
    walk(fresh, stages[:1], [], schedule=ALIGN)
    method = ModalPrompt(**SMALL)
    method.prepare(ctx := Context(fresh, stages[0], (), QUICK, 0))
    method.begin(ctx)
    assert moved(state(fresh), state(model)) == {"extension.tasks.0.vectors"}


def test_a_stage_begins_one_task(model: MultimodalLM, stages: list[Stage]) -> None:
    """However many of its phases train it; and the same method serves all stages."""
    twice = Schedule((*QUICK.phases, dataclasses.replace(QUICK.phases[1], name="more")), QUICK.realign)
    method = ModalPrompt(**SMALL)
    walk(model, stages[:2], [method], schedule=twice)
    assert shelf(model).names == [stage.name for stage in stages[:2]]
    with pytest.raises(RunError, match=r"'modalprompt' of \{'prompts': 3.* is asked for"):
        walk(model, stages[:3], [ModalPrompt(prompts=4, top=2)], first=2)


def test_before_a_task_begins_those_before_it_answer(model: MultimodalLM, stages: list[Stage]) -> None:
    walk(model, stages[:1], [ModalPrompt(**SMALL)])
    seen: set[tuple[str, bool, int]] = set()

    class Watching(ModalPrompt):
        def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
            found = shelf(ctx.model)
            chosen = found.choose(found.query(batch))
            assert ctx.phase is not None and chosen is not None
            seen.add((ctx.phase.name, found.learns, chosen.shape[1]))
            return super().loss(ctx, batch, out)

    walk(model, stages[:2], [Watching(**SMALL)], first=1)
    assert seen == {("pretrain", False, 3), ("finetune", True, 6)}


def test_the_term_is_the_misfit_of_the_batch(model: MultimodalLM, stages: list[Stage]) -> None:
    method = ModalPrompt(**SMALL, align=0.5)
    walk(model, stages[:1], [method])
    ctx = Context(model, stages[0], (), QUICK, 0, parts=frozenset({"extension"}))
    batch = model.batch([*stages[0].samples()[:3], WORDS])
    out = model(batch)
    found = method.loss(ctx, batch, out)
    query, task = shelf(model).query(batch), shelf(model).newest
    each = torch.cosine_similarity
    text = 1 - each(query.text, task.prototype("text")[None])
    media = 1 - each(query.media["image"][1], task.prototype("image")[None])
    assert found.keys() == {"alignment"}
    torch.testing.assert_close(found["alignment"], 0.5 * (text.sum() + media.sum()) / 4)
    ctx.parts = frozenset({"connectors.image"})
    assert method.loss(ctx, batch, out) == {}
    ctx.parts = frozenset({"extension"})
    model.extend(None)
    with pytest.raises(RunError, match="modalprompt: the model's extension is NoneType"):
        method.loss(ctx, batch, out)


# --- who answers ------------------------------------------------------------------------------------------------------


def test_each_task_guides_its_own_samples(model: MultimodalLM, stages: list[Stage]) -> None:
    """After three stages, samples of a task are closest to it, so that its prompts stand last, next to the text."""
    long = dataclasses.replace(TUNE.phases[0], epochs=6, lr={"connectors": 1e-3, "llm": 1e-2})
    walk(model, stages, [ModalPrompt(**SMALL)], schedule=Schedule((ALIGN.phases[0], long), TUNE.realign))
    for number, stage in enumerate(stages):
        samples = stage.samples()[:6]
        query = shelf(model).query(model.batch(samples))
        with torch.no_grad():
            guidance = shelf(model).guidance(query, shelf(model).shelf())
            chosen = shelf(model).choose(query)
        assert (guidance.argmax(1) == number).all(), stage.name
        assert chosen is not None and chosen.shape[1] == 6
        assert all(torch.equal(row[3:], list(shelf(model).shelf())[number].vectors) for row in chosen)


def test_with_its_own_prompts_alone_nothing_is_forgotten(model: MultimodalLM, stages: list[Stage]) -> None:
    """top = 1: a sample that finds its task is answered as right after it."""
    long = dataclasses.replace(TUNE.phases[0], epochs=6, lr={"connectors": 1e-3, "llm": 1e-2})
    schedule = Schedule((ALIGN.phases[0], long), TUNE.realign)
    method = ModalPrompt(prompts=3, top=1)
    walk(model, stages[:1], [method], schedule=schedule)
    samples = stages[0].samples()[:4]
    before, answers = logits(model, samples), model.generate(samples, max_new_tokens=6)
    walk(model, stages[:2], [method], first=1, schedule=schedule)
    assert torch.equal(logits(model, samples), before)
    assert model.generate(samples, max_new_tokens=6) == answers


def test_learning_helps(model: MultimodalLM, stages: list[Stage]) -> None:
    """The answers become likelier, by prompts alone."""
    walk(model, stages[:1], [], schedule=ALIGN)
    batch = model.batch(stages[0].samples()[:12])
    long = dataclasses.replace(TUNE.phases[0], epochs=8, lr={"connectors": 1e-3, "llm": 2e-2})
    with torch.no_grad():
        before = float(model(batch).loss)
    walk(model, stages[:1], [ModalPrompt(**SMALL)], schedule=Schedule((long,), TUNE.realign))
    with torch.no_grad():
        after = float(model(batch).loss)
    assert after < before - 0.1


# --- laws -------------------------------------------------------------------------------------------------------------


def test_the_seed_decides(spec: ModelSpec, stages: list[Stage], features: FeatureCache) -> None:
    made = []
    for seed in (0, 0, 1):
        model = MultimodalLM.build(spec, features=features)
        walk(model, stages[:2], [ModalPrompt(**SMALL)], seed=seed)
        made.append({name: x for name, x in state(model).items() if not name.startswith("encoders")})
    assert not moved(made[0], made[1])
    assert {name for name in made[0] if name.startswith("extension")} <= moved(made[0], made[2])


def test_a_learned_stage_is_what_its_checkpoint_loads_to(
    model: MultimodalLM, stages: list[Stage], features: FeatureCache, tmp_path: Path
) -> None:
    walk(model, stages, [ModalPrompt(**SMALL)])
    checkpoint.save(model, tmp_path / "saved", history=[])
    loaded = checkpoint.load(tmp_path / "saved", features=features)
    samples = [*stages[0].samples()[:2], *stages[2].samples()[:2], WORDS]
    assert torch.equal(logits(loaded, samples), logits(model, samples))
    assert loaded.generate(samples, max_new_tokens=6) == model.generate(samples, max_new_tokens=6)


def test_the_store_resumes(stages: list[Stage], model: MultimodalLM, spec: ModelSpec, tmp_path: Path) -> None:
    walk(model, stages[:2], [ModalPrompt(**SMALL)])
    checkpoint.save(model, tmp_path / "whole", history=[])
    first = StageStore(tmp_path / "store", spec, QUICK, 0).obtain(stages[0], [], [ModalPrompt(**SMALL)], None)
    store = StageStore(tmp_path / "store", spec, QUICK, 0)
    second = store.obtain(stages[1], stages[:1], [ModalPrompt(**SMALL)], first)
    files = [checkpoint.read_manifest(folder)["files"] for folder in (tmp_path / "whole", second.checkpoint)]
    assert files[0] == files[1]
    again = store.obtain(stages[0], [], [ModalPrompt(**SMALL)], None)
    assert again.key == first.key and len(shelf(store.load(again)).names) == 1


@pytest.mark.parametrize("last", [True, False])
def test_realigning_moves_connectors_alone(last: bool, model: MultimodalLM, stages: list[Stage]) -> None:
    """In either order: while it runs no prompt learns."""
    plain = MultimodalLM.build(model.spec, features=model.features)
    walk(plain, stages[:2], [ModalPrompt(**SMALL)])
    methods: list[Method] = [ModalPrompt(**SMALL), Realign(1.0)]
    walk(model, stages[:1], [ModalPrompt(**SMALL)])
    (ctx,) = walk(model, stages[:2], methods if last else methods[::-1], first=1)
    assert [log.phase for log in ctx.logs] == ["pretrain", "finetune", "realign"]
    changed = {".".join(name.split(".")[:2]) for name in moved(state(plain), state(model))}
    assert changed == {f"connectors.{stage.modalities[0]}" for stage in stages[:2]}


# --- in a mix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [L2P(), PathWeave(), DAMC(), Merge()])
def test_no_other_way_of_making_the_llm_plastic(other: Method, model: MultimodalLM, stages: list[Stage]) -> None:
    with pytest.raises(MethodConflict, match="cannot share the LLM"):
        walk(model, stages[:1], [ModalPrompt(**SMALL), other])


def test_a_model_with_a_pool_has_no_place_for_it(model: MultimodalLM, stages: list[Stage]) -> None:
    walk(model, stages[:1], [L2P(pool=2, top=1, length=1)])
    with pytest.raises(RunError, match="modalprompt: the model has an extension 'l2p' of"):
        walk(model, stages[:2], [ModalPrompt()], first=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": 0}, r"modalprompt\.prompts: 0; at least 1"),
        ({"top": 0}, r"modalprompt\.top: 0; at least 1"),
        ({"media": 1.5}, r"modalprompt\.media: 1.5 is not a share"),
        ({"align": -1}, r"modalprompt\.align: -1.0 is out of range"),
        ({"lr": float("nan")}, r"modalprompt\.lr: nan is no learning rate"),
        ({"transfer": 3}, r"modalprompt\.transfer: no such setting"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mix([{"modalprompt": settings}])
