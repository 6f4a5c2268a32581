"""O-LoRA, EWF, selective and joint training, SAC in a stage, and the LoRA that lives through a run."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import ConfigError, MethodConflict, RunError
from graftlm.data.types import Stream
from graftlm.learning.method import at_stage, check_adapters, check_per_stage
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.merging.rules import average
from graftlm.methods.eproj import EProj
from graftlm.methods.ewf import EWF
from graftlm.methods.finetune import FineTune
from graftlm.methods.mera import Merge, Realign
from graftlm.methods.olora import OLoRA, overlap
from graftlm.methods.select import Select
from graftlm.model.ledger import LedgerEntry
from graftlm.model.multimodal import MultimodalLM

QUICK = Schedule(
    tuple(dataclasses.replace(phase, epochs=1) for phase in SCHEDULES["miniworld"].phases),
    SCHEDULES["miniworld"].realign,
)

Grow = Callable[..., MultimodalLM]
Weights = Callable[[MultimodalLM], dict[str, Tensor]]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- O-LoRA


@pytest.mark.parametrize(
    ("old", "new", "norm", "expected"),
    [
        ([[1.0, 0, 0], [0, 1, 0]], [[1.0, 1, 1]], "abs", 2.0),
        ([[1.0, -1, 0]], [[1.0, 1, 0], [0, 2, 0]], "abs", 2.0),
        ([[1.0, -1, 0]], [[1.0, 1, 0], [0, 2, 0]], "squared", 4.0),
    ],
)
def test_overlap(old: list[list[float]], new: list[list[float]], norm: str, expected: float) -> None:
    assert overlap(torch.tensor(old), torch.tensor(new), norm).item() == pytest.approx(expected)


def test_the_length_of_the_new_factors() -> None:
    factors = {"w": (torch.tensor([[1.0, 1, 1]]), torch.zeros(2, 1), 1.0)}
    ctx: Any = SimpleNamespace(trains_llm=True, model=SimpleNamespace(adapter=SimpleNamespace(factors=lambda: factors)))
    assert OLoRA(l2=1.0).loss(ctx, cast(Any, None), cast(Any, None))["length"].item() == pytest.approx(1.732051)


def test_olora_without_strength_is_fine_tuning(grow: Grow, weights: Weights) -> None:
    assert same(weights(grow([OLoRA(0.0)])), weights(grow([FineTune()])))


def test_olora_makes_stages_more_orthogonal(grow: Grow) -> None:
    def shared(model: MultimodalLM) -> float:
        first, second = (entry.tensors for entry in model.adapter.ledger)
        return sum(float(overlap(first[name], second[name])) for name in first if name.endswith(".A"))

    assert shared(grow([OLoRA(1.0)])) < 0.9 * shared(grow([FineTune()]))


def test_olora_needs_the_factors_of_earlier_stages(grow: Grow, stream: Stream) -> None:
    model = grow([], 1)
    dense = {f"{name}.delta": torch.zeros(1) for name in model.adapter.ledger[0].names()}
    model.adapter.ledger[0] = LedgerEntry(dense)
    ctx: Any = SimpleNamespace(model=model, past=stream.stages[:1])
    with pytest.raises(RunError, match="no factors of"):
        OLoRA().prepare(ctx)


# --- EWF, SAC, selection


def test_ewf_weighs_by_the_root_of_the_share(grow: Grow, weights: Weights) -> None:
    first, vanilla, fused = (weights(grow(mix, n)) for mix, n in (([], 1), ([], 2), ([EWF()], 2)))
    name = "llm.model.layers.0.mlp.up_proj.weight"
    beta = 0.5**0.5  # two stages of as many samples
    torch.testing.assert_close(fused[name], torch.lerp(first[name], vanilla[name], beta), rtol=1e-5, atol=1e-6)


def test_whole_shares_are_fine_tuning(grow: Grow, weights: Weights) -> None:
    plain = weights(grow([]))
    assert same(weights(grow([Merge("sac", alpha=1.0, connectors=True)])), plain)
    assert same(weights(grow([Merge("model_mix", alpha=1.0)])), plain)


def test_model_mix_is_an_average_and_sac_notes_its_spectra(grow: Grow, weights: Weights) -> None:
    mixed = weights(grow([Merge("model_mix", alpha=0.3)], 1))
    assert same(mixed, weights(grow([Merge(weight=0.3)], 1)))
    assert not same(weights(grow([Merge("sac", alpha=0.3)], 1)), mixed)


def test_sac_folds_old_connectors_too(weights: Weights, stream: Stream, spec: Any, features: Any) -> None:
    known = {each.name: each for each in spec.modalities}
    found = {}
    for connectors in (False, True):
        model = MultimodalLM.build(spec, features=features)
        learn(model, stream.stages[0], [], [], QUICK, modalities=known)
        before = weights(model)
        folding = Merge("sac", alpha=0.0, connectors=connectors)
        ctx = learn(model, stream.stages[0], stream.stages[:1], [folding], QUICK, modalities=known, seed=1)
        assert ctx.notes["spectra"][0]["k"] >= 1
        found[connectors] = weights(model)
    vector = next(n for n, w in before.items() if n.startswith("connectors") and w.dim() == 1)
    assert torch.equal(found[True][vector], before[vector])  # of a vector, alpha 0 keeps nothing
    assert not torch.equal(found[False][vector], before[vector])


def test_selection_moves_only_what_was_chosen(grow: Grow, weights: Weights, spec: Any) -> None:
    base = weights(MultimodalLM.build(spec))
    model = grow([Select(["gate_proj", "up_proj"])], 1)
    moved = {n for n, w in weights(model).items() if n in base and not torch.equal(w, base[n])}
    assert moved and all(n.split(".")[-2] in ("gate_proj", "up_proj") for n in moved)


def test_a_module_that_is_not_there(grow: Grow) -> None:
    with pytest.raises(ConfigError, match=r"no module 'q_porj'; did you mean 'q_proj'\?"):
        grow([Select(["q_porj"])], 1)


def test_two_ways_to_fold_are_a_conflict() -> None:
    with pytest.raises(MethodConflict, match="Merge and EWF each say how a stage becomes part of the LLM"):
        check_adapters([Merge(), Realign(), EWF()])


def test_folding_after_realigning_is_a_conflict() -> None:
    with pytest.raises(MethodConflict, match="Realign stands before Merge, which would find the stage folded already"):
        check_adapters([Realign(), Merge()])


def test_eproj_leaves_the_llm_alone_beside_a_selection(grow: Grow, weights: Weights, spec: Any) -> None:
    base = weights(MultimodalLM.build(spec))
    for mix in ([Select(), EProj()], [EProj(), Select()]):
        after = weights(grow(mix, 1))
        assert all(torch.equal(after[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.2}, "alpha: an average has a weight"),
        ({"rule": "sac", "weight": 0.2}, "weight: rule 'sac' has an alpha"),
        ({"rule": "sac", "alpha": 1.2}, "alpha: 1.2 is not a share"),
    ],
)
def test_settings_that_a_rule_does_not_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Merge(**settings)


# --- one value, or one per stage


def test_values_per_stage() -> None:
    assert at_stage(0.5, 3) == 0.5
    assert at_stage([0.1, None, 0.3], 3) == 0.3
    assert at_stage([0.1, None, 0.3], 2) != at_stage([0.1, None, 0.3], 2)  # nan
    check_per_stage("weight", [1.0, 2.0], 2)
    with pytest.raises(ConfigError, match="weight: 3 values, but the stream has 2 stages"):
        check_per_stage("weight", [1.0, 2.0, 3.0], 2)


# --- the LoRA that goes on


def perturbed(model: MultimodalLM) -> None:
    with torch.no_grad():
        for factor in model.adapter.parameters().values():
            factor.add_(0.01)


def test_it_goes_on_where_it_was_and_previous_is_the_stage_before(grow: Grow, stream: Stream) -> None:
    model = grow([], 1)
    batch = model.batch(stream.stages[0].samples()[:2])
    before = model(batch, logits=True).logits
    model.adapter.open(5, resume=True)
    torch.testing.assert_close(model(batch, logits=True).logits, before, rtol=1e-4, atol=1e-5)
    perturbed(model)
    assert not torch.allclose(model(batch, logits=True).logits, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.adapter.previous():
        torch.testing.assert_close(model(batch, logits=True).logits, before, rtol=1e-4, atol=1e-5)
    model.adapter.drop()
    torch.testing.assert_close(model(batch, logits=True).logits, before, rtol=0, atol=0)
    assert len(model.adapter.ledger) == 1


def test_factors_blend_apart(grow: Grow) -> None:
    model = grow([], 1)
    model.adapter.open(5, resume=True)
    old = {name: tuple(x.clone() for x in pair[:2]) for name, pair in model.adapter.factors().items()}
    perturbed(model)
    model.adapter.blend(0.25, on="factors")
    for name, (a, b, _) in model.adapter.factors().items():
        torch.testing.assert_close(a, old[name][0] + 0.0025)
        torch.testing.assert_close(b, old[name][1] + 0.0025)
    with pytest.raises(RunError, match="two updates has twice its rank"):
        model.adapter.blend(0.5)


def test_what_cannot_go_on_says_so(grow: Grow, spec: Any) -> None:
    bare = MultimodalLM.build(spec)
    with pytest.raises(RunError, match="the ledger is empty"):
        bare.adapter.open(0, resume=True)
    model = grow([], 1)
    model.adapter.open(1)
    with pytest.raises(RunError, match="is fresh, and has no earlier factors"):
        model.adapter.blend(0.5, on="factors")
    perturbed(model)
    model.adapter.fold(average, weight=0.5)
    model.adapter.open(2, resume=True)
    with pytest.raises(RunError, match="the LoRA goes on from the stage before and is kept as it is"):
        model.adapter.fold(average, weight=0.5)
    model.adapter.drop()
    dense = {f"{name}.delta": torch.zeros(1) for name in model.adapter.ledger[-1].names()}
    model.adapter.ledger.append(LedgerEntry(dense))
    entries = len(model.adapter.ledger)
    with pytest.raises(RunError, match="no LoRA of rank 32 on the same layers"):
        model.adapter.open(3, resume=True)
    assert len(model.adapter.ledger) == entries
