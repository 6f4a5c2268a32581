"""MoELoRA: the vector of its definition, what its experts remember, and its reduction to a LoRA."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from walking import QUICK, TUNE, grow, logits, move, state

from graftlm.core.errors import ConfigError, MethodConflict, RunError
from graftlm.data.types import Sample, Stage
from graftlm.experiment.stages import StageStore
from graftlm.learning.method import Context, Method
from graftlm.learning.stage import learn
from graftlm.methods import build as mix
from graftlm.methods.mera import Merge, Realign
from graftlm.methods.moelora import MoELoRA
from graftlm.model import checkpoint
from graftlm.model.adapters import StageAdapter
from graftlm.model.features import FeatureCache
from graftlm.model.mixture import ExpertMixture, MixtureLayer, MixtureSpec, open_mixture
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import LoraSpec, ModelSpec

SMALL = MixtureSpec(experts=2, rank=4, alpha=8.0)


def small() -> MoELoRA:
    return MoELoRA(experts=2, rank=4, alpha=8.0)


# --- one layer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_router_shares() -> None:
    """Logits (ln 3, 0) at x = [1, 2]; A_1 = [1, 0], A_2 = [0, 1], B_1 = [1, 0]ᵀ, B_2 = [0, 1]ᵀ, s = 2."""
    layer = MixtureLayer(2, 2, MixtureSpec(experts=2, rank=2, alpha=4.0), 0, "layer")
    assert layer.router is not None and not layer.b.any()
    layer.a.copy_(torch.eye(2))
    layer.b.copy_(torch.eye(2))
    layer.router.copy_(torch.tensor([[math.log(3), 0], [0, 0]]))
    x, expected = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.5, 1.0]]])
    torch.testing.assert_close(layer.added(x, 1, trains=True), expected)
    torch.testing.assert_close(layer.stacked(1, torch.float32)(x, x.clone()), x + expected)


def test_it_is_the_formula_and_its_gradient() -> None:
    layer = MixtureLayer(5, 4, MixtureSpec(experts=3, rank=6, alpha=9.0), 0, "layer").double()
    move(dict(layer.named_parameters()), 1, 0.5)
    x, trained = torch.randn(2, 7, 5, dtype=torch.float64), [p.requires_grad_() for p in layer.parameters()]
    assert layer.router is not None and len(trained) == 3
    gate = (x @ layer.router.T).softmax(-1)
    each = [x @ layer.a[2 * e : 2 * e + 2].T @ layer.b[:, 2 * e : 2 * e + 2].T for e in range(3)]
    wanted = 1.5 * sum((gate[..., e : e + 1] * y for e, y in enumerate(each)), torch.zeros(()))
    found = layer.added(x, 1, trains=True)
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(y.square().sum(), trained) for y in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_acts_where_it_learns_alone() -> None:
    layer = MixtureLayer(5, 4, MixtureSpec(experts=2, rank=4, alpha=4.0, dropout=0.5), 0, "layer")
    move(dict(layer.named_parameters()), 1, 0.5)
    x = torch.randn(3, 5)
    assert torch.equal(layer.added(x, 1, trains=False), layer.added(x, 1, trains=False))
    assert not torch.equal(layer.added(x, 1, trains=True), layer.added(x, 1, trains=True))


# --- stages -----------------------------------------------------------------------------------------------------------


def test_one_expert_is_a_lora(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    """The same factors at the start, and the same function after equal training."""
    lora = dataclasses.replace(spec, lora=LoraSpec(rank=6, alpha=12.0))
    method = MoELoRA(experts=1, rank=6, alpha=12.0)
    plain, other = (MultimodalLM.build(lora, features=features) for _ in range(2))
    for model, opening in ((plain, Method()), (other, method)):
        model.adapter = opening.open(Context(model, stages[0], (), QUICK, 0))
    found = other.adapter.parameters()
    assert len(found) == 2 * 28
    for name, (a, b, scale) in plain.adapter.factors().items():
        expert = f"llm.{name.removesuffix('.weight')}.experts"
        assert torch.equal(found[f"{expert}.a"], a) and torch.equal(found[f"{expert}.b"], b) and scale == 2
    plain.adapter.drop()
    other.adapter.drop()
    assert other.extension is None
    grow(plain, stages[:1], [], schedule=TUNE)
    grow(other, stages[:1], [method], schedule=TUNE)
    samples = list(stages[0].samples()[:4])
    torch.testing.assert_close(logits(plain, samples), logits(other, samples), rtol=1e-4, atol=1e-4)
    for name, tensor in plain.connectors.state_dict().items():
        torch.testing.assert_close(tensor, other.connectors.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_experts_and_routers_go_on_and_the_llm_stays(
    stages: list[Stage], spec: ModelSpec, features: FeatureCache
) -> None:
    model = grow(MultimodalLM.build(spec, features=features), stages[:1], [small()])
    before = state(model)
    grow(model, stages[:2], [small()], first=1)
    after = state(model)
    fresh = MultimodalLM.build(spec, features=features).llm.state_dict()
    assert all(torch.equal(after[f"llm.{name}"], tensor) for name, tensor in fresh.items())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {name for name in before if name.startswith("extension.")}
    assert moved == experts and len(experts) == 3 * 28
    assert model.adapter.ledger == [] and type(model.adapter) is StageAdapter


def test_previous_is_the_stage_before_to_the_bit(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    """On a ledger with a stage that was folded before; in training too, where a teacher is asked."""
    model = grow(MultimodalLM.build(spec, features=features), stages[:1], [])
    samples, former, ledger = list(stages[0].samples()[:4]), model.adapter, list(model.adapter.ledger)
    spec_ = dataclasses.replace(SMALL, dropout=0.3)
    for number in range(3):
        before, held = logits(model, samples), state(model)
        for drops in (True, False):
            adapter = model.adapter = open_mixture(model, spec_)
            assert torch.equal(logits(model, samples), before) or number == 0
            move(adapter.parameters(), number)
            moved = logits(model, samples)
            assert not torch.equal(moved, before)
            model.train()
            with adapter.previous():
                assert torch.equal(logits(model, samples), before)
            model.eval()
            assert torch.equal(logits(model, samples), moved)
            if drops:
                adapter.drop()
                assert model.adapter is former and torch.equal(logits(model, samples), before)
                assert all(torch.equal(tensor, state(model)[name]) for name, tensor in held.items())
                assert (model.extension is None) == (number == 0)
        adapter.fold()
        assert model.adapter is former and former.ledger == ledger
        assert torch.equal(logits(model, samples), moved)


def test_blend(spec: ModelSpec, features: FeatureCache) -> None:
    """Of the first stage the update; later the factors, half way and all the way back."""
    model = MultimodalLM.build(spec, features=features).eval()
    samples = [Sample("t", "t", (), "what is this ?", ("red",))]
    base = logits(model, samples)
    adapter = model.adapter = open_mixture(model, SMALL)
    move(adapter.parameters(), 0)
    with pytest.raises(RunError, match="blend on factors: the experts are new, so their update can be blended alone"):
        adapter.blend(0.5, on="factors")
    full = {name: p.clone() for name, p in adapter.parameters().items()}
    adapter.blend(0.5)
    for name, parameter in adapter.parameters().items():
        assert torch.equal(parameter, full[name] * (0.5 if name.endswith(".b") else 1))
    adapter.fold()
    first = logits(model, samples)
    adapter = model.adapter = open_mixture(model, SMALL)
    before = {name: p.clone() for name, p in adapter.parameters().items()}
    move(adapter.parameters(), 1)
    after = {name: p.clone() for name, p in adapter.parameters().items()}
    with pytest.raises(RunError, match="blend on delta: the experts go on from the stage before, so factors"):
        adapter.blend(0.5)
    adapter.blend(0.25, on="factors")
    for name, parameter in adapter.parameters().items():
        torch.testing.assert_close(parameter.data, 0.75 * before[name] + 0.25 * after[name])
    adapter.blend(0.0, on="factors")
    assert torch.equal(logits(model, samples), first) and not torch.equal(first, base)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_the_store_resumes(stages: list[Stage], spec: ModelSpec, tmp_path: Path) -> None:
    """A second stage from the store is the one of an uninterrupted run."""
    whole = grow(MultimodalLM.build(spec, features=FeatureCache()), stages[:2], [small()])
    checkpoint.save(whole, tmp_path / "whole", history=[])
    first = StageStore(tmp_path / "store", spec, QUICK, 0).obtain(stages[0], [], [small()], None)
    second = StageStore(tmp_path / "store", spec, QUICK, 0).obtain(stages[1], stages[:1], [small()], first)
    files = [checkpoint.read_manifest(folder)["files"] for folder in (tmp_path / "whole", second.checkpoint)]
    assert files[0] == files[1]
    assert checkpoint.read_manifest(second.checkpoint)["extension"]["settings"]["stages"] == 2


def test_realigning_moves_connectors_alone(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    plain, aligned = (
        state(grow(MultimodalLM.build(spec, features=features), stages[:2], methods))
        for methods in ([small()], [small(), Realign(0.5)])
    )
    differ = {name.split(".")[0] for name in plain if not torch.equal(plain[name], aligned[name])}
    assert plain.keys() == aligned.keys() and differ == {"connectors"}


def test_what_cannot_work_says_so(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    model = MultimodalLM.build(spec, features=features)
    for other in (Merge(), small()):
        with pytest.raises(MethodConflict, match=r"MoELoRA \(adapter = 'own'\)"):
            learn(model, stages[0], [], [small(), other], QUICK, modalities={})
    assert mix([{"moelora": {"experts": 4, "rank": 8}}]) == [MoELoRA(experts=4, rank=8)]
    for settings, message in (
        ({"rank": 100}, r"moelora\.rank: 100 does not split into 8 experts"),
        ({"experts": 0}, r"moelora\.rank: 128 does not split into 0 experts"),
        ({"dropout": 1.0}, r"moelora\.dropout: 1.0 is no share"),
    ):
        with pytest.raises(ConfigError, match=message):
            mix([{"moelora": settings}])
    open_mixture(model, SMALL).fold()
    assert isinstance(model.extension, ExpertMixture)
    with pytest.raises(RunError, match="the same are expected at every stage"):
        MoELoRA().open(Context(model, stages[0], (), QUICK, 0))
