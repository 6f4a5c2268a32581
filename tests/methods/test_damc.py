"""DAMC trains what it should, nothing else, and ends as what its checkpoint holds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError, MethodConflict, RunError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Phase, Sample, Stage
from graftlm.experiment.spec import load
from graftlm.experiment.stages import StageStore
from graftlm.learning.fit import fit
from graftlm.learning.method import Context, Method
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.merging.rules import average
from graftlm.methods import build as mix
from graftlm.methods.damc import DAMC
from graftlm.methods.mera import Merge
from graftlm.model import checkpoint
from graftlm.model.adapters import StageAdapter
from graftlm.model.decoupled import decouple
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.restore import restore
from graftlm.model.rule import Rule, keep_new
from graftlm.model.specs import LoraSpec, ModelSpec

QUICK = Schedule(
    tuple(dataclasses.replace(phase, epochs=1) for phase in SCHEDULES["miniworld"].phases),
    SCHEDULES["miniworld"].realign,
)
SMALL: dict[str, Any] = {"rank": 4, "alpha": 8.0, "prefix": 2, "suffix": 3}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Little stages of the mini world, by name."""
    root = build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world"))
    return {
        stage.name: Stage(stage.name, tuple(dataclasses.replace(task, train=task.train[:16]) for task in stage.tasks))
        for stage in miniworld(root, "sequential").stages
    }


@pytest.fixture(scope="module")
def features() -> FeatureCache:
    return FeatureCache()


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load("mera-miniworld", []).model_spec()


@pytest.fixture
def model(spec: ModelSpec, features: FeatureCache) -> MultimodalLM:
    """A base with a connector for images."""
    built = MultimodalLM.build(spec, features=features)
    built.add_modality(spec.modalities[0], seed=0)
    return built


def learned(spec: ModelSpec, stage: Stage, features: FeatureCache, *methods: Method, seed: int = 0) -> MultimodalLM:
    model = MultimodalLM.build(spec, features=features)
    learn(model, stage, [], methods, QUICK, modalities={s.name: s for s in spec.modalities}, seed=seed)
    return model


def opened(model: MultimodalLM, seed: int = 0, **changes: Any) -> StageAdapter:
    """A model with decoupled parameters, every factor of them moved."""
    lora = LoraSpec(4, 8.0, changes.pop("dropout", 0.0))
    model.adapter = decouple(model, "image", lora, **{"prefix": 2, "suffix": 3, "seed": seed, **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.adapter.parameters().items():
        if not name.endswith(".A"):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.adapter


def logits(model: MultimodalLM, samples: list[Sample]) -> Tensor:
    model.eval()  # a new connector is in training mode
    with torch.no_grad():
        out = model(model.batch(samples), logits=True)
    assert out.logits is not None
    return out.logits


def unheard(name: str) -> bool:
    """Of the last block, a modality's positions are only read as keys and values: nothing is predicted there."""
    return ".layers.3." in name and not name.split(".layers.3.")[1].startswith(("self_attn.k", "self_attn.v"))


def weights(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_expansion_is_each_position_with_its_own_lora(model: MultimodalLM, stages: dict[str, Stage]) -> None:
    """While it trains and after it was folded: the same as an LLM with a weight per position."""
    samples = [*stages["image"].samples()[:3], Sample("t", "t", (), "what is this ?", ("red",))]
    found = opened(model).parameters()
    batch = model.batch(samples)
    fused = model.fuse(batch)
    count = int((fused.modality_ids == 1).sum())
    tokens = model.connectors["image"](batch.media["image"])
    assert count == 3 * (tokens.shape[1] + 5)
    row = fused.modality_ids[0]
    first = int(row.nonzero()[0])
    prefix, suffix = (found[f"llm.prompt.image.{side}"] for side in ("prefix", "suffix"))
    assert torch.equal(fused.embeds[0, first : first + 2], prefix)
    assert torch.equal(fused.embeds[0, first + 2 : first + 2 + tokens.shape[1]], tokens[0])
    assert torch.equal(fused.embeds[0, first + 2 + tokens.shape[1] : first + int(row.sum())], suffix)

    plain = MultimodalLM.build(model.spec).llm
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear) and module is not plain.get_output_embeddings():
            a, b = (
                torch.stack([found[f"llm.{branch}.{path}.{side}"] for branch in ("text", "image")]) for side in "AB"
            )
            each = module.weight + 2.0 * b @ a  # alpha / rank
            module.forward = lambda x, each=each: torch.einsum("bsi,bsoi->bso", x, each[fused.modality_ids])
    with torch.no_grad():
        wanted = plain(inputs_embeds=fused.embeds).logits
    open_ = logits(model, samples)
    kept = fused.attention_mask
    torch.testing.assert_close(open_[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    model.adapter.fold()
    assert not model.adapter.is_open and model.mode == "expand"
    torch.testing.assert_close(logits(model, samples)[kept], wanted[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ordered", [True, False])
def test_gradients_are_those_of_a_weight_per_position(ordered: bool, model: MultimodalLM) -> None:
    """Contiguous positions and scattered ones."""
    adapter = opened(model)
    name = "model.layers.0.mlp.up_proj"
    layer = model.llm.get_submodule(name)
    ids = torch.tensor([[1, 1, 1, 0, 0, 0]] if ordered else [[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]])
    x = torch.randn(*ids.shape, 128, requires_grad=True)
    keys = [f"llm.{branch}.{name}.{side}" for branch in ("text", "image") for side in "AB"]
    factors = [adapter.parameters()[key].requires_grad_() for key in keys]
    assert model.composition is not None
    with model.composition.over(ids):
        out = layer(x)
    found = torch.autograd.grad(out.square().sum(), [x, *factors])
    each = torch.stack([layer.get_parameter("weight") + 2 * b @ a for a, b in (factors[:2], factors[2:])])
    expected = torch.einsum("bsi,bsoi->bso", x, each[ids])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for gradient, wanted in zip(found, torch.autograd.grad(expected.square().sum(), [x, *factors]), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_a_fresh_start_computes_the_base(model: MultimodalLM, stages: dict[str, Stage]) -> None:
    samples = list(stages["image"].samples()[:4])
    before = logits(model, samples)
    model.adapter = decouple(model, "image", LoraSpec(4, 8.0), prefix=0, suffix=0)
    assert torch.equal(logits(model, samples), before)
    model.adapter.drop()
    assert torch.equal(logits(model, samples), before)


def test_previous_blend_and_drop(model: MultimodalLM, stages: dict[str, Stage]) -> None:
    samples = list(stages["image"].samples()[:4])
    state, before = weights(model), logits(model, samples)
    adapter = opened(model)
    moved = logits(model, samples)
    assert moved.shape != before.shape
    with adapter.previous():
        assert torch.equal(logits(model, samples), before)
    assert torch.equal(logits(model, samples), moved)
    text = [Sample("t", "t", (), "what is this ?", ("red",))]
    plain = MultimodalLM.build(model.spec)
    adapter.blend(0.0)
    assert torch.equal(logits(model, text), logits(plain, text))
    adapter.drop()
    assert weights(model).keys() == state.keys() and all(torch.equal(x, state[k]) for k, x in weights(model).items())
    assert type(model.adapter) is StageAdapter and not model.adapter.is_open
    assert torch.equal(logits(model, samples), before)


def test_training_moves_both_loras_the_vectors_and_the_connector(
    spec: ModelSpec, stages: dict[str, Stage], features: FeatureCache
) -> None:
    model = learned(spec, stages["image"], features, DAMC(**SMALL))
    assert model.composition is not None
    tensors = model.composition.files.prompts()["image"]
    assert [None if t is None else tuple(t.shape) for t in tensors] == [(2, 128), (3, 128)]
    fresh = MultimodalLM.build(spec, features=features)
    stored = dict(fresh.llm.named_parameters())
    for name in model.composition.files.parameters:
        update = model.composition.files.update(name, stored[name].shape)
        assert bool(update.text_delta(slice(0, 8)).any()), name
        assert bool(update.route_delta(0, slice(0, 8)).any()) != unheard(name), name
    for name, parameter in model.llm.named_parameters():  # embedding and norms
        if name not in model.composition.files.parameters:
            assert torch.equal(parameter, stored[name]), name
    connector = learned(spec, stages["image"], features)
    aligned = Schedule(QUICK.phases[:1], QUICK.realign)
    only = MultimodalLM.build(spec, features=features)
    learn(only, stages["image"], [], [DAMC(**SMALL)], aligned, modalities={s.name: s for s in spec.modalities})
    for name, tensor in model.connectors.state_dict().items():
        assert not torch.equal(tensor, only.connectors.state_dict()[name])
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.encoders.state_dict().values(), connector.encoders.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("text_rate", [0.0, 0.5, 1.0])
def test_text_learns_at_its_own_rate(text_rate: float, model: MultimodalLM, stages: dict[str, Stage]) -> None:
    """One step of Adam moves a parameter by its rate."""
    method = DAMC(**SMALL, text_rate=text_rate)
    stage = stages["image"]
    ctx = Context(model, stage, (), QUICK, 0)
    phase = Phase("finetune", frozenset({"llm"}), {"llm": 1e-3}, batch_size=64, warmup=0, clip=0)
    model.adapter = method.open(ctx)
    before = {name: p.detach().clone() for name, p in model.adapter.parameters().items()}
    rated = dataclasses.replace(phase, lr=method.rates(ctx, phase.lr))
    log = fit(model, stage.samples()[:4], rated, phase.trainable, seed=0)
    assert log.parameters == sum(p.numel() for p in before.values())
    for name, parameter in model.adapter.parameters().items():
        step = (parameter - before[name]).abs().max()
        still = name.endswith(".A") or (name.startswith("llm.image") and unheard(name))
        wanted = 0.0 if still else 1e-3 * (text_rate if name.startswith("llm.text") else 1)
        assert float(step) == pytest.approx(wanted, rel=1e-2, abs=1e-9), name
    assert not any(p.requires_grad for p in (*model.parameters(), *model.adapter.parameters().values()))


def test_other_rates_stay(stages: dict[str, Stage], model: MultimodalLM) -> None:
    ctx = Context(model, stages["image"], (), QUICK, 0)
    assert DAMC().rates(ctx, {"connectors": 1.0}) == {"connectors": 1.0}
    assert DAMC().rates(ctx, {"connectors": 1.0, "llm": 2e-4}) == {
        "connectors": 1.0,
        "llm": 2e-4,
        "llm.text": pytest.approx(1e-5),
    }


def test_a_learned_stage_is_what_its_checkpoint_loads_to(
    spec: ModelSpec, stages: dict[str, Stage], features: FeatureCache, tmp_path: Path
) -> None:
    samples = list(stages["image"].samples()[:4])
    model = learned(spec, stages["image"], features, DAMC(**SMALL))
    checkpoint.save(model, tmp_path / "a", history=[])
    manifest = checkpoint.read_manifest(tmp_path / "a")
    assert manifest["routing"]["kind"] == "damc" and manifest["ledger"] == []
    assert manifest["routing"]["routes"] == [{"name": "image", "modality": "image"}]
    stored = load_file(tmp_path / "a" / manifest["routing"]["files"][0])
    name = "model.layers.2.self_attn.o_proj.weight"
    assert stored[f"{name}.image.A"].shape == (4, 128) and stored[f"{name}.text.B"].shape == (128, 4)
    assert stored[f"{name}.text.scale"].item() == 2.0
    loaded = checkpoint.load(tmp_path / "a", features=features)
    assert torch.equal(logits(loaded, samples), logits(model, samples))
    assert loaded.generate(samples) == model.generate(samples)
    checkpoint.save(loaded, tmp_path / "b", history=[])
    assert checkpoint.read_manifest(tmp_path / "b")["files"] == manifest["files"]
    with pytest.raises(RunError, match="of a composed checkpoint, whose weights no stage can change"):
        loaded.adapter.open(0)


def test_the_store_resumes_and_tells_settings_apart(
    spec: ModelSpec, stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experts and a plain one, one after the other in one process, are those that are learned alone."""
    samples = list(stages["image"].samples()[:4])
    store = StageStore(tmp_path / "one", spec, QUICK, 0)
    first = store.obtain(stages["image"], [], [DAMC(**SMALL)], None)
    second = store.obtain(stages["audio"], [], [DAMC(**SMALL)], None)
    plain = store.obtain(stages["image"], [], [], None)
    again = store.obtain(stages["image"], [], [DAMC(**SMALL)], None)
    assert again.key == first.key and len({first.key, second.key, plain.key}) == 3
    assert store.key(stages["image"], [], [DAMC(**SMALL, text_rate=1.0)], None) != first.key
    other = StageStore(tmp_path / "two", spec, QUICK, 0)
    alone = {key: other.obtain(stages[name], [], methods, None) for key, name, methods in (
        ("second", "audio", [DAMC(**SMALL)]), ("plain", "image", []), ("first", "image", [DAMC(**SMALL)])
    )}  # fmt: skip
    for stage, key in ((first, "first"), (second, "second"), (plain, "plain")):
        assert alone[key].key == stage.key
        files = [checkpoint.read_manifest(each.checkpoint)["files"] for each in (stage, alone[key])]
        assert files[0] == files[1], key
    assert torch.equal(logits(store.load(first), samples), logits(other.load(alone["first"]), samples))

    class Stopped(Exception):
        pass

    def stops(*_: Any, **__: Any) -> None:
        raise Stopped

    monkeypatch.setattr("graftlm.learning.method.Method.after_epoch", stops)
    stopped = StageStore(tmp_path / "three", spec, QUICK, 0)
    with pytest.raises(Stopped):
        stopped.obtain(stages["image"], [], [DAMC(**SMALL)], None)
    monkeypatch.undo()
    resumed = stopped.obtain(stages["image"], [], [DAMC(**SMALL)], None)
    assert checkpoint.read_manifest(resumed.checkpoint)["files"] == checkpoint.read_manifest(first.checkpoint)["files"]


def test_an_interrupted_second_phase_leaves_the_base(
    spec: ModelSpec, stages: dict[str, Stage], features: FeatureCache
) -> None:
    """What a failure leaves open is dropped by the next load."""
    model = MultimodalLM.build(spec, features=features)
    base = weights(model)

    class Fails(Method):
        def consolidate(self, ctx: Context) -> None:
            raise RunError("stop")

    with pytest.raises(RunError, match="stop"):
        learn(
            model, stages["image"], [], [DAMC(**SMALL), Fails()], QUICK, modalities={s.name: s for s in spec.modalities}
        )
    assert model.adapter.is_open
    with pytest.raises(RunError, match="a stage is open; none is expected"):
        model.adapter.open(0)
    with pytest.raises(RunError, match="a stage is open"):
        model.adapter.set_ledger([])
    model.adapter.drop()
    model.remove_modalities()
    assert weights(model).keys() == base.keys() and all(torch.equal(x, base[k]) for k, x in weights(model).items())


def test_a_model_in_bfloat16(spec: ModelSpec, stages: dict[str, Stage], features: FeatureCache, tmp_path: Path) -> None:
    model = learned(dataclasses.replace(spec, dtype="bfloat16"), stages["image"], features, DAMC(**SMALL, dropout=0.1))
    checkpoint.save(model, tmp_path / "a", history=[])
    assert load_file(tmp_path / "a/routing/00001.safetensors")["prompt.image.prefix"].dtype == torch.float32
    samples = list(stages["image"].samples()[:4])
    assert torch.equal(logits(checkpoint.load(tmp_path / "a", features=features), samples), logits(model, samples))
    fresh = MultimodalLM.build(model.spec, features=features)
    fresh.add_modality(spec.modalities[0], 0)
    opened(fresh)
    found = logits(fresh, samples)  # outside of training nothing is cast
    fresh.adapter.fold()
    error = (logits(fresh, samples).float() - found.float()).norm() / found.float().norm()
    assert found.dtype == torch.bfloat16 and error < 0.03


def test_refusals(model: MultimodalLM, stages: dict[str, Stage], spec: ModelSpec, features: FeatureCache) -> None:
    modalities = {s.name: s for s in spec.modalities}
    with pytest.raises(RunError, match=r"stage audio: learns audio after 1 stages; DAMC learns one modality"):
        learn(model, stages["audio"], [stages["image"]], [DAMC()], QUICK, modalities=modalities)
    with pytest.raises(MethodConflict, match=r"DAMC \(adapter = 'own'\) and Merge \(adapter = 'stage'\)"):
        learn(model, stages["image"], [], [DAMC(), Merge()], QUICK, modalities=modalities)
    other = MultimodalLM.build(spec, features=features)
    other.add_modality(spec.modalities[0], 0)
    other.adapter.open(0)
    with pytest.raises(RunError, match="decoupled parameters: a stage is open"):
        decouple(other, "image", LoraSpec(4, 8.0))
    other.adapter.fold()
    with pytest.raises(RunError, match="the LLM is no longer its base"):
        decouple(other, "image", LoraSpec(4, 8.0))


def test_halves_are_not_merged(model: MultimodalLM) -> None:
    rules: list[Rule] = [average, Rule("dense", keep_new.dense)]
    adapter = opened(model)
    for rule in rules:
        with pytest.raises(RunError, match=f"rule '{rule.name}', but decoupled LoRAs are no update of one LLM"):
            adapter.fold(rule)
    assert adapter.is_open and model.adapter is adapter


def test_an_expert_is_no_dense_llm(
    spec: ModelSpec, stages: dict[str, Stage], features: FeatureCache, tmp_path: Path
) -> None:
    checkpoint.save(learned(spec, stages["image"], features, DAMC(**SMALL)), tmp_path / "a", history=[])
    with pytest.raises(CheckpointError, match="DAMC keeps no original"):
        restore(tmp_path / "a", "image", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"damc\.rank: 0; at least 1"),
        ({"prefix": -1}, r"damc\.prefix, suffix: -1, 5"),
        ({"dropout": 1}, r"damc\.dropout: 1.0 is no share"),
        ({"text_rate": -1}, r"damc\.text_rate: -1.0 is out of range"),
        ({"spread": float("inf")}, r"damc\.spread: inf is out of range"),
        ({"text_lr": 1}, r"damc\.text_lr: no such setting"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mix([{"damc": settings}])


def test_other_ways_of_their_own_use_the_same_hook(
    spec: ModelSpec, stages: dict[str, Stage], features: FeatureCache
) -> None:
    """A run-long ingredient opens what the default opens: the result is fine-tuning, bit by bit."""
    calls: list[str] = []

    class Long(Method):
        adapter = "run"

        def open(self, ctx: Context) -> StageAdapter:
            calls.append(ctx.phase.name if ctx.phase else "")
            return super().open(ctx)

    plain, mine = learned(spec, stages["image"], features), learned(spec, stages["image"], features, Long())
    assert calls == ["finetune"]
    assert all(torch.equal(x, weights(mine)[name]) for name, x in weights(plain).items())
