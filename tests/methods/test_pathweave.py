"""PathWeave: the vectors of its definition, what moves and what does not, and what a path remembers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from walking import QUICK, TUNE, grow, logits, move, state

from graftlm.core.errors import ConfigError, MethodConflict, RunError
from graftlm.data.types import Sample, Stage
from graftlm.experiment.stages import StageStore
from graftlm.learning.method import Context, Method
from graftlm.learning.stage import learn
from graftlm.merging.rules import average
from graftlm.methods import build as mix
from graftlm.methods.mera import Merge, Realign
from graftlm.methods.moelora import MoELoRA
from graftlm.methods.pathweave import PathWeave
from graftlm.model import checkpoint
from graftlm.model.adapters import StageAdapter
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import LoraSpec, ModelSpec
from graftlm.model.weave import WeaveLayer, WeaveSpec, WovenExperts, open_weave


def woven(model: MultimodalLM) -> WovenExperts:
    assert isinstance(model.extension, WovenExperts)
    return model.extension


# --- one layer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vector_layer() -> WeaveLayer:
    """x = [1, 2], W = I: the two experts of the definition, of rank 1."""
    layer = WeaveLayer(2, 2, "layer")
    for _ in range(2):
        layer.grow(WeaveSpec(rank=1), seed=0)
    for expert, down, up in zip(layer.experts, ([[1.0, 0]], [[0, 1.0]]), ([[1.0], [0]], [[0], [1.0]]), strict=True):
        expert.down.copy_(torch.tensor(down))
        expert.up.copy_(torch.tensor(up))
    layer.passages["2"].inner.weights[0].fill_(2.0)
    layer.passages["2"].inner.biases[0].zero_()
    return layer


@pytest.mark.parametrize(("odds", "expected"), [(1.0, [2.0, 3.0]), (3.0, [2.5, 2.5])])
def test_two_experts_share_by_the_gate(odds: float, expected: list[float]) -> None:
    x, layer = torch.tensor([[[1.0, 2.0]]]), vector_layer()
    with torch.no_grad():
        layer.passages["2"].gate.copy_(torch.tensor([[math.log(odds), 0], [0, 0]]))  # logits (ln odds, 0) at x
    torch.testing.assert_close(x + layer.added(x, 2, trains=False), torch.tensor([[expected]]))
    with torch.no_grad():
        torch.testing.assert_close(layer.stacked(2, torch.float32)(x, x.clone()), torch.tensor([[expected]]))


@torch.no_grad()
def test_a_new_stage_shrinks_older_experts_by_their_number() -> None:
    """up_m = 0 and equal gates: W x + 1/E Σ of the older ones, through in-adapters that are here the identity."""
    layer = WeaveLayer(5, 4, "layer")
    spec = WeaveSpec(rank=3)
    for seed in range(4):
        layer.grow(spec, seed)
    for seed, expert in enumerate(layer.experts):
        assert not expert.up.any() and float(expert.scale) == 1
        if seed < 3:
            move(dict(expert.named_parameters()), seed)
    passage = layer.passages["4"]
    assert not passage.gate.any() and passage.noise is None
    passage.inner.weights[0].copy_(torch.eye(3).expand(3, 3, 3))
    passage.inner.biases[0].zero_()
    x = torch.randn(2, 6, 5)
    each = [(x @ e.down.T @ e.up.T) * e.scale for e in layer.experts]
    torch.testing.assert_close(layer.added(x, 4, trains=True), sum(each[:3], torch.zeros(())) / 4)
    torch.testing.assert_close(layer.added(x, 1, trains=True), each[0])


@pytest.mark.parametrize("in_adapter", ["linear", "mlp"])
def test_it_is_the_formula_and_its_gradient(in_adapter: Any) -> None:
    spec = WeaveSpec(rank=3, in_adapter=in_adapter)
    layer = WeaveLayer(5, 4, "layer").double()
    for seed in range(3):
        layer.grow(spec, seed)
    layer.double()
    move(dict(layer.named_parameters()), 1, 0.5)
    passage, x = layer.passages["3"], torch.randn(2, 6, 5, dtype=torch.float64)

    def formula() -> Tensor:
        gate = (x @ passage.gate.T).softmax(-1)
        total = torch.zeros(2, 6, 4, dtype=torch.float64)
        for e, expert in enumerate(layer.experts):
            low = x @ expert.down.T
            if e < 2:
                steps = list(zip(passage.inner.weights, passage.inner.biases, strict=True))
                for step, (weight, bias) in enumerate(steps):
                    low = low @ weight[e].T + bias[e]
                    if in_adapter == "mlp":
                        low = low.relu() if step < 2 else low.sigmoid()
            total = total + gate[..., e : e + 1] * expert.scale * (low @ expert.up.T)
        return total

    trained = [p for p in [*layer.experts[2].parameters(), *passage.parameters()] if p.requires_grad_() is p]
    found, wanted = layer.added(x, 3, trains=True), formula()
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), trained),
        torch.autograd.grad(wanted.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(layer.stacked(3, torch.float64)(x, torch.zeros(2, 6, 4).double()), wanted)


def test_gates_are_noisy_while_they_learn() -> None:
    layer = WeaveLayer(5, 4, "layer")
    for seed in range(2):
        layer.grow(WeaveSpec(rank=3, noise=True), seed)
    passage, x = layer.passages["2"], torch.randn(1000, 5)
    torch.manual_seed(0)
    assert torch.equal(passage.shares(x, noisy=False), torch.full((1000, 2), 0.5))
    drawn = passage.shares(x, noisy=True)
    spread = (drawn[:, 0].log() - drawn[:, 1].log()).std()  # of ε (softplus(0) + 0.01), twice
    assert float(spread) == pytest.approx(math.sqrt(2) * (math.log(2) + 0.01), rel=0.1)
    passage.noise.requires_grad_()
    assert torch.autograd.grad(passage.shares(x, noisy=True).square().sum(), passage.noise)[0].any()


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_first_expert_is_a_lora(
    learn_scale: bool, stages: list[Stage], spec: ModelSpec, features: FeatureCache
) -> None:
    """The same factors at the start, the same gradient, and, with a fixed scale, the same after equal training."""
    assert spec.lora is not None
    lora = dataclasses.replace(spec, lora=LoraSpec(rank=6, alpha=6.0))
    plain, path = (MultimodalLM.build(lora, features=features) for _ in range(2))
    plain.add_modality(spec.modalities[0], seed=0)
    path.add_modality(spec.modalities[0], seed=0)
    method = PathWeave(rank=6, learn_scale=learn_scale)
    for model, opening in ((plain, Method()), (path, method)):
        model.adapter = opening.open(Context(model, stages[0], (), QUICK, 0))
    for name, (a, b, _) in plain.adapter.factors().items():
        expert = f"llm.{name.removesuffix('.weight')}.experts.1"
        assert torch.equal(path.adapter.parameters()[f"{expert}.down"], a)
        assert torch.equal(path.adapter.parameters()[f"{expert}.up"], b)
    assert len(path.adapter.parameters()) == (3 if learn_scale else 2) * 28
    samples = list(stages[0].samples()[:4])
    torch.testing.assert_close(logits(plain.eval(), samples), logits(path.eval(), samples))
    plain.adapter.drop()
    path.adapter.drop()
    assert path.extension is None
    grow(plain, stages[:1], [], schedule=TUNE)
    grow(path, stages[:1], [method], schedule=TUNE)
    base = logits(MultimodalLM.build(lora, features=features).eval(), [Sample("t", "t", (), "what ?", ("red",))])
    assert not torch.equal(base, logits(path, [Sample("t", "t", (), "what ?", ("red",))]))
    if not learn_scale:
        torch.testing.assert_close(logits(plain, samples), logits(path, samples), rtol=1e-4, atol=1e-4)
    for name, tensor in plain.connectors.state_dict().items():
        close = torch.allclose(tensor, path.connectors.state_dict()[name], rtol=1e-3, atol=1e-4)
        assert close or learn_scale


def test_only_the_new_expert_its_in_adapters_and_its_gate_move(
    stages: list[Stage], spec: ModelSpec, features: FeatureCache
) -> None:
    model = grow(MultimodalLM.build(spec, features=features), stages[:2], [PathWeave(rank=4)])
    before = state(model)
    grow(model, stages[:3], [PathWeave(rank=4)], first=2)
    after = state(model)
    current = f"connectors.{stages[2].modalities[0]}."
    moved = [name for name in after if name not in before or not torch.equal(after[name], before[name])]
    assert moved and all(
        name.startswith(current) or ".experts.2." in name or ".passages.3." in name or name.startswith("encoders.")
        for name in moved
    )
    assert not any(".passages.2." in name for name in after)  # what nothing can take any more
    fresh = MultimodalLM.build(spec, features=features).llm.state_dict()
    assert all(torch.equal(model.llm.state_dict()[name], tensor) for name, tensor in fresh.items())
    assert model.adapter.ledger == [] and woven(model).settings()["experts"] == 3
    gates = [name for name in after if name.endswith("passages.3.gate")]
    assert len(gates) == 28 and any(after[name].any() for name in gates)
    assert any(after[name].any() for name in after if name.endswith("experts.2.up"))
    assert sum(float(after[name]) != 1 for name in after if name.endswith("experts.2.scale")) > 20


def test_gradients_reach_what_learns_and_nothing_else(
    stages: list[Stage], spec: ModelSpec, features: FeatureCache
) -> None:
    model = grow(MultimodalLM.build(spec, features=features), stages[:1], [PathWeave(rank=4)])
    model.adapter = open_weave(model, ["image"], woven(model).spec, seed=1)
    move({n: p for n, p in model.adapter.parameters().items() if n.endswith("up")}, 0)
    for parameter in model.adapter.parameters().values():
        parameter.requires_grad_(True)
    model.train()
    model(model.batch(stages[0].samples()[:4])).loss.backward()
    own = {id(parameter) for parameter in model.adapter.parameters().values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_previous_is_the_stage_before_to_the_bit(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    """On a ledger with a stage that was folded before; in training too, where a teacher is asked."""
    model = grow(MultimodalLM.build(spec, features=features), stages[:1], [])
    samples, ledger = list(stages[0].samples()[:4]), list(model.adapter.ledger)
    for number in range(3):
        before, held, former = logits(model, samples), state(model), model.adapter
        for drops in (True, False):
            adapter = model.adapter = open_weave(model, ["image"], WeaveSpec(rank=3), seed=number)
            move(adapter.parameters(), number)
            moved = logits(model, samples)
            assert not torch.equal(moved, before)
            model.train()
            with adapter.previous():
                assert torch.equal(logits(model, samples), before)
                with adapter.previous():
                    assert torch.equal(logits(model, samples), before)
            model.eval()
            assert torch.equal(logits(model, samples), moved)
            if drops:
                adapter.drop()
                adapter.drop()
                assert model.adapter is former and torch.equal(logits(model, samples), before)
                assert all(torch.equal(tensor, state(model)[name]) for name, tensor in held.items())
                assert state(model).keys() == held.keys() and (model.extension is None) == (number == 0)
        adapter.fold()
        assert type(model.adapter) is StageAdapter and model.adapter.ledger == ledger
        assert torch.equal(logits(model, samples), moved)
    assert model.adapter is former


def test_blend(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    model = MultimodalLM.build(spec, features=features).eval()
    samples = [Sample("t", "t", (), "what is this ?", ("red",))]
    before = logits(model, samples)
    adapter = model.adapter = open_weave(model, [], WeaveSpec(rank=3))
    move(adapter.parameters(), 0)
    adapter.blend(0.0)
    assert torch.equal(logits(model, samples), before)
    adapter.fold()
    model.adapter = open_weave(model, [], WeaveSpec(rank=3))
    with pytest.raises(RunError, match="blend on delta: experts of 2 stages; one fresh expert without a gate"):
        model.adapter.blend(0.5)


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_adapter", ["linear", "mlp"])
def test_with_switched_paths_nothing_is_forgotten(
    in_adapter: Any, stages: list[Stage], spec: ModelSpec, features: FeatureCache, tmp_path: Path
) -> None:
    method = PathWeave(rank=4, switch_paths=True, in_adapter=in_adapter)
    model = MultimodalLM.build(spec, features=features)
    seen: list[tuple[list[Sample], Tensor, list[str]]] = []
    for count in (1, 2, 3):
        grow(model, stages[:count], [method], first=count - 1)
        samples = list(stages[count - 1].samples()[:4])
        seen.append((samples, logits(model, samples), model.generate(samples, max_new_tokens=4)))
    assert woven(model).stages == {stage.modalities[0]: i for i, stage in enumerate(stages[:3], start=1)}
    checkpoint.save(model, tmp_path / "saved", history=[])
    for each in (model, checkpoint.load(tmp_path / "saved", features=features)):
        for samples, wanted, answers in seen:
            assert torch.equal(logits(each, samples), wanted)
            assert each.generate(samples, max_new_tokens=4) == answers
    together = [seen[0][0][0], seen[2][0][0], seen[1][0][0], Sample("t", "t", (), "what is this ?", ("red",))]
    batch = model.batch(together)
    kept = model.fuse(batch).attention_mask
    mixed = logits(model, together)
    open_ = model(batch, logits=True).logits
    torch.testing.assert_close(open_[kept], mixed[kept], rtol=1e-4, atol=1e-4)
    for row, sample in enumerate(together):  # a batch of several paths is its rows, up to the order of sums
        alone = logits(model, [sample])[0]
        torch.testing.assert_close(mixed[row][: len(alone)], alone, rtol=1e-3, atol=1e-3)
    answers = [model.generate([sample], max_new_tokens=4)[0] for sample in together]
    assert model.generate(together, max_new_tokens=4) == answers


def test_without_switched_paths_the_newest_serves_all(
    stages: list[Stage], spec: ModelSpec, features: FeatureCache
) -> None:
    model = grow(MultimodalLM.build(spec, features=features), stages[:1], [PathWeave(rank=4)])
    samples = list(stages[0].samples()[:4])
    before = logits(model, samples)
    grow(model, stages[:2], [PathWeave(rank=4)], first=1)
    assert not torch.equal(logits(model, samples), before)


def test_text_takes_the_newest_path_of_its_sample(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    """And media their own; a modality that was there before the first expert has none."""
    model = grow(MultimodalLM.build(spec, features=features), stages[:1], [])
    base = logits(model, list(stages[0].samples()[:2]))
    method = PathWeave(rank=4, switch_paths=True)
    grow(model, stages[:3], [method], first=1)
    names = [stage.modalities[0] for stage in stages[:3]]
    assert woven(model).stages == {names[0]: 0, names[1]: 1, names[2]: 2}
    assert torch.equal(logits(model, list(stages[0].samples()[:2])), base)
    one, two = stages[1].samples()[0], stages[2].samples()[0]
    both = Sample("b", "b", (*one.media, *two.media), f"<{names[1]}> <{names[2]}> what ?", ("red",))
    fused = model.fuse(model.batch([both]))
    taken: list[Tensor] = []
    layer = model.llm.model.layers[0].mlp.up_proj
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])),
        layer.register_forward_hook(lambda *given: taken.append(given[2])),
    ]
    with torch.no_grad():
        model(model.batch([both]))
    for hook in hooks:
        hook.remove()
    experts = woven(model).layers["model/layers/0/mlp/up_proj"]
    plain = nn.functional.linear(inputs[0], layer.weight)
    for position, modality in enumerate(fused.modality_ids[0].tolist()):
        path = 1 if modality == 2 else 2
        x = inputs[0][:, position]
        torch.testing.assert_close(
            taken[0][:, position], plain[:, position] + experts.added(x, path, trains=False), rtol=1e-4, atol=1e-4
        )
    assert {*fused.modality_ids[0].tolist()} == {0, 2, 3}
    adapter = model.adapter = open_weave(model, names[1:2], woven(model).spec)
    move(adapter.parameters(), 0)
    assert woven(model).stages[names[1]] == 3  # learned again: the later of its stages
    with adapter.previous():  # where that modality still takes the path of its first stage
        wanted = [logits(model, [sample]) for sample in (one, two)]
    adapter.drop()
    assert all(torch.equal(logits(model, [each]), was) for each, was in zip((one, two), wanted, strict=True))
    assert woven(model).stages[names[1]] == 1


# --- runs -------------------------------------------------------------------------------------------------------------


def test_the_store_resumes(stages: list[Stage], spec: ModelSpec, tmp_path: Path) -> None:
    """A second stage from the store is the one of an uninterrupted run; other settings are other stages."""
    whole = grow(MultimodalLM.build(spec, features=FeatureCache()), stages[:2], [PathWeave(rank=4)])
    checkpoint.save(whole, tmp_path / "whole", history=[])
    first = StageStore(tmp_path / "store", spec, QUICK, 0).obtain(stages[0], [], [PathWeave(rank=4)], None)
    store = StageStore(tmp_path / "store", spec, QUICK, 0)
    second = store.obtain(stages[1], stages[:1], [PathWeave(rank=4)], first)
    files = [checkpoint.read_manifest(folder)["files"] for folder in (tmp_path / "whole", second.checkpoint)]
    assert files[0] == files[1]
    keys = {store.key(stages[0], [], [method], None) for method in (PathWeave(rank=4), PathWeave(rank=4, noise=True))}
    assert first.key in keys and len(keys) == 2
    again = store.obtain(stages[0], [], [PathWeave(rank=4)], None)
    samples = list(stages[0].samples()[:3])
    found = checkpoint.load(first.checkpoint, features=store.features)
    assert torch.equal(logits(store.load(again), samples), logits(found, samples))


def test_realigning_moves_connectors_alone(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    models = [
        grow(MultimodalLM.build(spec, features=features), stages[:2], methods)
        for methods in ([PathWeave(rank=4)], [PathWeave(rank=4), Realign(0.5)])
    ]
    plain, aligned = (state(model) for model in models)
    differ = {name.split(".")[0] for name in plain if not torch.equal(plain[name], aligned[name])}
    assert plain.keys() == aligned.keys() and differ == {"connectors"}


def test_mixes_that_cannot_work_say_so(stages: list[Stage], spec: ModelSpec, features: FeatureCache) -> None:
    model = MultimodalLM.build(spec, features=features)
    for other in (Merge(), MoELoRA(experts=2, rank=4)):
        with pytest.raises(MethodConflict, match="cannot share the LLM"):
            learn(model, stages[0], [], [PathWeave(rank=4), other], QUICK, modalities={})
    model.adapter = open_weave(model, [], WeaveSpec(rank=3))
    with pytest.raises(RunError, match="rule 'average', but the stage was learned by experts"):
        model.adapter.fold(average, weight=0.5)
    made = mix([{"pathweave": {"rank": 8, "in_adapter": "mlp", "switch_paths": True}}])
    assert made == [PathWeave(rank=8, in_adapter="mlp", switch_paths=True)]
    with pytest.raises(ConfigError, match=r"methods\[0\]\.pathweave\.rank: 0; at least 1"):
        mix([{"pathweave": {"rank": 0}}])
    with pytest.raises(ConfigError, match=r"pathweave\.in_adapter: 'deep' does not fit"):
        mix([{"pathweave": {"in_adapter": "deep"}}])


def test_alpha_is_where_scales_start() -> None:
    layer = WeaveLayer(2, 2, "layer")
    layer.grow(WeaveSpec(rank=4, alpha=8.0), 0)
    assert float(layer.experts[0].scale) == 2.0


def test_in_half_precision_experts_stay_in_float32(
    stages: list[Stage], spec: ModelSpec, features: FeatureCache, tmp_path: Path
) -> None:
    """And are computed in the LLM's dtype when no gradient is taken."""
    half = dataclasses.replace(spec, dtype="bfloat16")
    model = grow(MultimodalLM.build(half, features=features), stages[:2], [PathWeave(rank=4)], schedule=TUNE)
    samples = list(stages[0].samples()[:4])
    assert {parameter.dtype for parameter in woven(model).parameters()} == {torch.float32}
    stacked = logits(model, samples)
    open_ = model(model.batch(samples), logits=True).logits
    assert stacked.dtype == open_.dtype == torch.bfloat16 and open_.requires_grad is False
    model.connectors.requires_grad_(True)
    open_ = model(model.batch(samples), logits=True).logits
    assert open_.requires_grad
    torch.testing.assert_close(stacked.float(), open_.float(), rtol=0.1, atol=0.25)
    checkpoint.save(model, tmp_path / "saved", history=[])
    assert torch.equal(logits(checkpoint.load(tmp_path / "saved", features=features), samples), stacked)
