"""L2P: the pool learns, the LLM does not, and a stage ends as what its checkpoint holds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from walking import ALIGN, QUICK, TUNE, WORDS, logits, moved, state, walk

from graftlm.core.errors import ConfigError, MethodConflict, RunError
from graftlm.data.types import Phase, Stage
from graftlm.experiment.stages import StageStore
from graftlm.learning.fit import fit
from graftlm.learning.method import Context, Method
from graftlm.learning.phase import Schedule
from graftlm.methods import build as mix
from graftlm.methods.eproj import EProj
from graftlm.methods.ewc import EWC
from graftlm.methods.l2p import L2P
from graftlm.methods.mera import Merge, Realign
from graftlm.methods.modalprompt import ModalPrompt
from graftlm.methods.moelora import MoELoRA
from graftlm.model import checkpoint
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.prompts import PromptPool, Prompts
from graftlm.model.specs import ModelSpec

SMALL: dict[str, Any] = {"pool": 4, "top": 2, "length": 2}


@pytest.fixture
def model(spec: ModelSpec, features: FeatureCache) -> MultimodalLM:
    return MultimodalLM.build(spec, features=features)


def pool(model: MultimodalLM) -> PromptPool:
    assert isinstance(model.extension, PromptPool)
    return model.extension


def test_it_is_on_the_shelf() -> None:
    (method,) = mix([{"l2p": {"pool": 8, "selection": "batch", "lr": None}}])
    assert method == L2P(pool=8, selection="batch") and method.adapter == "own"
    assert (L2P().pool, L2P().top, L2P().length, L2P().pull) == (10, 5, 5, 0.1)


# --- what moves -------------------------------------------------------------------------------------------------------


def test_the_llm_is_the_base_after_every_stage(model: MultimodalLM, spec: ModelSpec, stages: list[Stage]) -> None:
    base = state(MultimodalLM.build(spec))
    before: dict[str, torch.Tensor] = {}
    for count in (1, 2, 3):
        logs = [log for ctx in walk(model, stages[:count], [L2P(**SMALL)], first=count - 1) for log in ctx.logs]
        after = state(model)
        assert not moved({name: x for name, x in base.items() if name.startswith("llm.")}, after)
        changed = {name for name in moved(before, after) if not name.startswith("encoders.")}
        own = stages[count - 1].modalities[0]
        assert f"extension.keys.{own}" in after and after["extension.keys.text"].shape == (4, 128)
        assert changed <= {"extension.prompts", f"extension.keys.{own}"} and ("extension.prompts" in changed) == bool(
            before
        )
        assert logs[1].parameters == sum(p.numel() for p in pool(model).parameters())
        assert not model.adapter.is_open and model.adapter.ledger == []
        assert not any(p.requires_grad for p in model.parameters())
        before = after
    assert pool(model).settings()["modalities"] == [stage.modalities[0] for stage in stages]


def test_before_the_pool_a_connector_is_aligned_as_ever(
    model: MultimodalLM, spec: ModelSpec, stages: list[Stage], features: FeatureCache
) -> None:
    """And the pool leaves it as it is."""
    plain, aligned = (MultimodalLM.build(spec, features=features) for _ in range(2))
    walk(plain, stages[:1], [], schedule=ALIGN)
    (ctx,) = walk(aligned, stages[:1], [L2P(**SMALL)], schedule=ALIGN)
    assert aligned.extension is None and len(ctx.logs) == 1
    walk(model, stages[:1], [L2P(**SMALL)])
    for other in (aligned, model):
        for name, tensor in plain.connectors.state_dict().items():
            assert torch.equal(tensor, other.connectors.state_dict()[name])


def test_connectors_may_go_on(model: MultimodalLM, stages: list[Stage]) -> None:
    walk(model, stages[:2], [L2P(**SMALL)], schedule=QUICK)
    before = state(model)
    old, new = (f"connectors.{stage.modalities[0]}." for stage in stages[:2])
    (ctx,) = walk(model, stages[:2], [L2P(**SMALL, connectors=True)], first=1, schedule=TUNE)
    changed = moved(before, state(model))
    assert any(name.startswith(new) for name in changed) and not any(name.startswith(old) for name in changed)
    before = state(model)
    walk(model, stages[:2], [L2P(**SMALL)], first=1, schedule=TUNE)
    assert not any(name.startswith("connectors") for name in moved(before, state(model)))
    assert ctx.logs[0].parameters > sum(p.numel() for p in pool(model).parameters())


def test_a_new_connector_is_never_left_random(model: MultimodalLM, stages: list[Stage]) -> None:
    """Where one phase is all there is, connectors of new modalities learn in it; of old ones do not."""
    for connectors, fresh, alone in (
        ("connectors.current", True, False),
        ("connectors", True, True),
        ("", False, False),
    ):
        phase = dataclasses.replace(TUNE.phases[0], trainable=frozenset({connectors, "llm"} - {""}))
        schedule = Schedule((phase,), TUNE.realign)
        image = stages[0].modalities[0]
        for new in (frozenset({image}), frozenset[str]()):
            ctx = Context(model, stages[0], (), schedule, 0, new=new)
            parts = frozenset({"llm", *([connectors.replace("current", image)] if connectors else [])})
            wanted = {"extension", *([f"connectors.{image}"] if fresh and new else [])}
            assert L2P().trainable(ctx, parts) == wanted
        assert ("connectors" in L2P(connectors=True).trainable(ctx, parts)) == alone
    ctx = Context(model, stages[0], (), QUICK, 0, new=frozenset({image}))
    assert L2P().trainable(ctx, frozenset({f"connectors.{image}", "llm"})) == {"extension"}
    assert L2P().trainable(ctx, frozenset({f"connectors.{image}"})) == {f"connectors.{image}"}
    assert L2P().trainable(ctx, frozenset({"llm.model.layers.0"})) == {"extension"}
    (ctx,) = walk(model, stages[:1], [L2P(**SMALL)], schedule=TUNE)
    numbers = [p.numel() for part in (model.connectors, pool(model)) for p in part.parameters()]
    assert ctx.logs[0].parameters == sum(numbers)


@pytest.mark.parametrize("lr", [None, 2e-3])
def test_one_step_of_adam_is_the_rate(lr: float | None, model: MultimodalLM, stages: list[Stage]) -> None:
    method = L2P(**SMALL, lr=lr)
    walk(model, stages[:1], [], schedule=ALIGN)
    phase = Phase("finetune", frozenset({"llm"}), {"llm": 1e-3}, batch_size=64, warmup=0, clip=0)
    ctx = Context(model, stages[0], (), Schedule((phase,), phase), 0)
    ctx.phase, ctx.parts = phase, method.trainable(ctx, phase.trainable)
    rated = method.rates(ctx, phase.lr)
    assert rated == {"llm": 1e-3, "extension": lr or 1e-3} and ctx.parts == {"extension"}
    before = state(model)
    fit(model, stages[0].samples()[:4], dataclasses.replace(phase, lr=rated), ctx.parts, seed=0)
    step = (state(model)["extension.prompts"] - before["extension.prompts"]).abs()
    assert float(step.max()) == pytest.approx(lr or 1e-3, rel=1e-2)
    assert L2P().rates(ctx, {"connectors": 1.0}) == {"connectors": 1.0}


def test_the_pull_draws_keys_to_samples(model: MultimodalLM, spec: ModelSpec, stages: list[Stage]) -> None:
    walk(model, stages[:1], [L2P(**SMALL)])
    samples = stages[0].samples()[:8]
    close = float(pool(model).closeness(pool(model).query(model.batch(samples))))
    other = MultimodalLM.build(spec, features=model.features)
    walk(other, stages[:1], [L2P(**SMALL, pull=0.0)])
    apart = float(pool(other).closeness(pool(other).query(other.batch(samples))))
    assert close > apart + 0.01
    keys = pool(other).keys["image"]
    fresh = MultimodalLM.build(spec, features=model.features)
    walk(fresh, stages[:1], [], schedule=ALIGN)
    method = L2P(**SMALL, pull=0.0)
    method.prepare(ctx := Context(fresh, stages[0], (), QUICK, 0))
    method.begin(ctx)
    assert torch.equal(pool(fresh).keys["image"], keys)  # nothing else moves them


def test_the_term_is_the_pull_of_the_batch(model: MultimodalLM, stages: list[Stage]) -> None:
    method = L2P(**SMALL, pull=0.3)
    walk(model, stages[:1], [method])
    ctx = Context(model, stages[0], (), QUICK, 0, parts=frozenset({"extension"}))
    batch = model.batch(stages[0].samples()[:3])
    out = model(batch)
    found = method.loss(ctx, batch, out)
    similarity = pool(model).similarity(pool(model).query(batch)).detach()
    assert found.keys() == {"pull"}
    torch.testing.assert_close(found["pull"].detach(), -0.3 * similarity.topk(2, 1).values.sum() / 3)
    ctx.parts = frozenset({"connectors.image"})
    assert method.loss(ctx, batch, out) == {}
    ctx.parts = frozenset({"extension"})
    model.extend(None)
    with pytest.raises(RunError, match="l2p: the model's extension is NoneType; its pool is expected"):
        method.loss(ctx, batch, out)


def test_learning_helps(model: MultimodalLM, stages: list[Stage]) -> None:
    """The answers become likelier, by prompts alone."""
    walk(model, stages[:1], [], schedule=ALIGN)
    batch = model.batch(stages[0].samples()[:12])
    long = dataclasses.replace(TUNE.phases[0], epochs=8, lr={"connectors": 1e-3, "llm": 2e-2})
    with torch.no_grad():
        before = float(model(batch).loss)
    walk(model, stages[:1], [L2P(**SMALL)], schedule=Schedule((long,), TUNE.realign))
    with torch.no_grad():
        after = float(model(batch).loss)
    assert after < before - 0.1


# --- laws -------------------------------------------------------------------------------------------------------------


def test_without_vectors_it_is_the_frozen_model(
    model: MultimodalLM, spec: ModelSpec, stages: list[Stage], features: FeatureCache
) -> None:
    walk(model, stages[:2], [L2P(pool=4, top=2, length=0)])
    plain = MultimodalLM.build(spec, features=features)
    walk(plain, stages[:2], [EProj()], schedule=ALIGN)
    samples = [*stages[0].samples()[:2], *stages[1].samples()[:2], WORDS]
    assert torch.equal(logits(model, samples), logits(plain, samples))
    assert model.generate(samples, max_new_tokens=4) == plain.generate(samples, max_new_tokens=4)


@pytest.mark.parametrize("method", [L2P(**SMALL), ModalPrompt(prompts=3, top=2)])
def test_an_llm_of_bfloat16(method: Method, spec: ModelSpec, stages: list[Stage], features: FeatureCache) -> None:
    """Prompts stay float32, and training, under autocast, chooses as answering does."""
    model = MultimodalLM.build(dataclasses.replace(spec, dtype="bfloat16"), features=features)
    walk(model, stages[:2], [method])
    found = model.extension
    assert isinstance(found, Prompts) and {p.dtype for p in found.parameters()} == {torch.float32}
    batch = model.batch([*stages[0].samples()[:4], *stages[1].samples()[:4], WORDS])
    with torch.no_grad():
        plain = model.fuse(batch).embeds
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.fuse(batch).embeds[:, 1:5], plain[:, 1:5])
    assert plain.dtype == torch.bfloat16 and len(model.generate([WORDS], max_new_tokens=2)) == 1


@pytest.mark.parametrize("selection", ["sample", "batch"])
def test_the_seed_decides(selection: Any, spec: ModelSpec, stages: list[Stage], features: FeatureCache) -> None:
    made = []
    for seed in (0, 0, 1):
        model = MultimodalLM.build(spec, features=features)
        walk(model, stages[:2], [L2P(**SMALL, selection=selection)], seed=seed)
        made.append({name: x for name, x in state(model).items() if not name.startswith("encoders")})
    assert not moved(made[0], made[1]) and "extension.prompts" in moved(made[0], made[2])


def test_a_learned_stage_is_what_its_checkpoint_loads_to(
    model: MultimodalLM, stages: list[Stage], features: FeatureCache, tmp_path: Path
) -> None:
    walk(model, stages[:2], [L2P(**SMALL)])
    checkpoint.save(model, tmp_path / "saved", history=[])
    loaded = checkpoint.load(tmp_path / "saved", features=features)
    samples = [*stages[0].samples()[:2], *stages[1].samples()[:2], WORDS]
    assert torch.equal(logits(loaded, samples), logits(model, samples))
    assert loaded.generate(samples, max_new_tokens=6) == model.generate(samples, max_new_tokens=6)


def test_the_store_resumes(stages: list[Stage], model: MultimodalLM, spec: ModelSpec, tmp_path: Path) -> None:
    """A second stage from the store is the one of an uninterrupted run; other settings are other stages."""
    walk(model, stages[:2], [L2P(**SMALL)])
    checkpoint.save(model, tmp_path / "whole", history=[])
    first = StageStore(tmp_path / "store", spec, QUICK, 0).obtain(stages[0], [], [L2P(**SMALL)], None)
    store = StageStore(tmp_path / "store", spec, QUICK, 0)
    second = store.obtain(stages[1], stages[:1], [L2P(**SMALL)], first)
    files = [checkpoint.read_manifest(folder)["files"] for folder in (tmp_path / "whole", second.checkpoint)]
    assert files[0] == files[1]
    keys = {store.key(stages[0], [], [method], None) for method in (L2P(**SMALL), L2P(**SMALL, selection="batch"))}
    assert first.key in keys and len(keys) == 2


def test_realigning_moves_connectors_alone(model: MultimodalLM, stages: list[Stage]) -> None:
    walk(model, stages[:1], [L2P(**SMALL)])
    before = state(model)
    (ctx,) = walk(model, stages[:2], [L2P(**SMALL), Realign(1.0)], first=1)
    assert [log.phase for log in ctx.logs] == ["pretrain", "finetune", "realign"]
    changed = moved(before, state(model))
    assert any(name.startswith("connectors.image") for name in changed)
    prompts = state(model)["extension.prompts"]
    other = MultimodalLM.build(model.spec, features=model.features)
    walk(other, stages[:2], [L2P(**SMALL)])
    assert torch.equal(pool(other).prompts, prompts)  # the pool is not realigned
    assert all(name.startswith(("connectors.", "extension.")) for name in changed)


# --- in a mix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [MoELoRA(), L2P(), Merge(), EWC()])
def test_no_other_way_of_making_the_llm_plastic(other: Method, model: MultimodalLM, stages: list[Stage]) -> None:
    with pytest.raises(MethodConflict, match="cannot share the LLM"):
        walk(model, stages[:1], [L2P(**SMALL), other])


def test_an_ingredient_that_needs_the_llm_open_is_refused(model: MultimodalLM, stages: list[Stage]) -> None:
    for on in ("weights", "factors"):
        with pytest.raises(MethodConflict, match=r"L2P \(adapter = 'own'\) and EWC"):
            walk(model, stages[:1], [L2P(**SMALL), EWC(on=on)])

    class Measures(Method):
        def prepare(self, ctx: Context) -> None:
            ctx.open()

    with pytest.raises(MethodConflict, match="L2P keeps the LLM frozen, but another ingredient"):
        walk(model, stages[:1], [L2P(**SMALL), Measures()])
    assert not model.adapter.is_open


def test_without_the_llm_there_is_nothing_to_take_the_place_of(model: MultimodalLM, stages: list[Stage]) -> None:
    """An ingredient to the left leaves no LLM in the phase: neither pool nor term."""
    walk(model, stages[:1], [EProj(), L2P(**SMALL)])
    assert model.extension is None


def test_another_pool_cannot_go_on(model: MultimodalLM, stages: list[Stage]) -> None:
    walk(model, stages[:1], [L2P(**SMALL)])
    with pytest.raises(RunError, match="l2p: the model has an extension 'l2p' of"):
        walk(model, stages[:2], [L2P(pool=5, top=2, length=2)], first=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 11}, r"l2p\.top: 11 prompts of a pool of 10"),
        ({"top": 0}, r"l2p\.top: 0 prompts of a pool of 10"),
        ({"length": -1}, r"l2p\.length: -1; a number of vectors from 0"),
        ({"pull": -1}, r"l2p\.pull: -1.0 is out of range"),
        ({"lr": -1}, r"l2p\.lr: -1.0 is no learning rate"),
        ({"spread": float("inf")}, r"l2p\.spread: inf is out of range"),
        ({"selection": "vote"}, r"l2p\.selection: 'vote' does not fit"),
        ({"k": 1}, r"l2p\.k: no such setting"),
        ({"_here": True}, r"l2p\._here: no such setting"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mix([{"l2p": settings}])
