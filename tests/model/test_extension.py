"""Extensions: attached and taken out to the bit, saved with the checkpoint, and never lost in silence."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError, MergeError, RunError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Batch, Sample
from graftlm.experiment.spec import load as experiment
from graftlm.experiment.tailoring import StoredModel
from graftlm.merging.compose import open_inputs
from graftlm.merging.recipe import Recipe
from graftlm.model import checkpoint
from graftlm.model.decoupled import decouple
from graftlm.model.experts import ExtensionAdapter, linear_layers, shapes_of
from graftlm.model.extension import KINDS, Extension
from graftlm.model.features import FeatureCache
from graftlm.model.fusion import Fused
from graftlm.model.mixture import ExpertMixture, MixtureSpec, open_mixture
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.rule import Rule
from graftlm.model.specs import LoraSpec, ModelSpec
from graftlm.model.weave import WeaveSpec, WovenExperts, open_weave

MIXTURE = MixtureSpec(experts=2, rank=4, alpha=8.0)
WEAVE = WeaveSpec(rank=3)


class Greeting(Extension):
    """Learned positions before every row."""

    kind = "greeting"

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.ones(count, width))

    def settings(self) -> dict[str, Any]:
        return {"count": len(self.words)}

    @classmethod
    def build(cls, model: MultimodalLM, settings: Mapping[str, Any]) -> Self:
        return cls(model.llm.config.hidden_size, settings["count"])

    def fuse(self, fused: Fused, batch: Batch) -> Fused:
        rows, count = len(fused.embeds), len(self.words)

        def before(values: Tensor, fill: Any) -> Tensor:
            return torch.cat([values.new_full((rows, count), fill), values], 1)

        return Fused(
            torch.cat([self.words.expand(rows, -1, -1), fused.embeds], 1),
            before(fused.attention_mask, True),
            before(fused.labels, -100),
            before(fused.modality_ids, 0),
        )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    root = build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world"))
    return [*miniworld(root, "sequential").stages[0].samples()[:3], Sample("t", "t", (), "what is this ?", ("red",))]


@pytest.fixture(scope="module")
def features() -> FeatureCache:
    return FeatureCache()


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return experiment("mera-miniworld", []).model_spec()


@pytest.fixture
def model(spec: ModelSpec, features: FeatureCache) -> MultimodalLM:
    """A base with a connector for images and one stage in its ledger."""
    built = MultimodalLM.build(spec, features=features)
    built.add_modality(spec.modalities[0], seed=0)
    built.eval().adapter.open(0)
    move(built.adapter.parameters(), 5)
    built.adapter.fold()
    return built


@torch.no_grad()
def move(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def grown(model: MultimodalLM, kind: str, stages: int = 2) -> MultimodalLM:
    """With experts that moved in every stage."""
    for stage in range(stages):
        model.adapter = (
            open_weave(model, ["image"], WEAVE, seed=stage) if kind == "pathweave" else open_mixture(model, MIXTURE)
        )
        move(model.adapter.parameters(), stage)
        model.adapter.fold()
    return model


@torch.no_grad()
def logits(model: MultimodalLM, samples: list[Sample]) -> Tensor:
    out = model(model.batch(samples), logits=True).logits
    assert out is not None
    return out


def state(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- in the model -----------------------------------------------------------------------------------------------------


def test_the_table_leads_to_extensions_of_that_kind() -> None:
    for kind in ("pathweave", "moelora"):
        assert issubclass(KINDS.get(kind), Extension) and KINDS.get(kind).kind == kind


def test_what_it_puts_into_the_sequence_is_learned_from_and_answered_after(
    model: MultimodalLM, samples: list[Sample]
) -> None:
    before, answers = logits(model, samples), model.generate(samples)
    greeting = Greeting(128, 2)
    model.extend(greeting)
    assert greeting.model is model and not greeting.words.requires_grad
    assert [name for name, _ in model.named_parameters() if name.startswith("extension.")] == ["extension.words"]
    out = model(model.batch(samples), logits=True)
    assert out.logits is not None and out.logits.shape[1] == before.shape[1] + 2
    assert not torch.equal(out.logits[:, 2:], before)
    greeting.requires_grad_(True)
    assert torch.autograd.grad(model(model.batch(samples)).loss, greeting.words)[0].any()
    seen: list[tuple[int, ...]] = []
    hook = model.llm.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    model.generate(samples, max_new_tokens=1)
    hook.remove()
    assert seen[0][1] == before.shape[1] + 2 - len_of_longest_answer(model, samples)
    model.extend(None)
    assert model.extension is None and torch.equal(logits(model, samples), before)
    assert model.generate(samples) == answers
    with pytest.raises(RunError, match="'greeting': attached to no model"):
        _ = greeting.model


def len_of_longest_answer(model: MultimodalLM, samples: list[Sample]) -> int:
    full, asked = (model.batch(samples, answers=answers).input_ids.shape[1] for answers in (True, False))
    return full - asked


@pytest.mark.parametrize("kind", ["pathweave", "moelora"])
def test_experts_come_and_go_to_the_bit(kind: str, model: MultimodalLM, samples: list[Sample]) -> None:
    before, held = logits(model, samples), state(model)
    modules = dict(model.llm.named_modules())
    grown(model, kind)
    after = logits(model, samples)
    assert not torch.equal(after, before)
    assert dict(model.llm.named_modules()) == modules  # layers are themselves, and the LLM has no new name
    own = {name: tensor for name, tensor in state(model).items() if not name.startswith("extension.")}
    assert same(own, held) and len(model.adapter.ledger) == 1 and not model.adapter.is_open
    experts = model.extension
    model.extend(None)
    assert torch.equal(logits(model, samples), before) and same(state(model), held)
    model.extend(experts)
    assert torch.equal(logits(model, samples), after)
    model.extend(experts)  # there already
    assert torch.equal(logits(model, samples), after)
    model.extend(Greeting(128, 1))
    model.extend(None)
    assert torch.equal(logits(model, samples), before)


@pytest.mark.parametrize("kind", ["pathweave", "moelora"])
def test_stacked_experts_compute_what_differentiable_ones_do(
    kind: str, model: MultimodalLM, samples: list[Sample]
) -> None:
    grown(model, kind, 3)
    stacked = logits(model, samples)
    open_ = model(model.batch(samples), logits=True).logits
    assert open_ is not None
    torch.testing.assert_close(stacked, open_, rtol=1e-4, atol=1e-4)
    assert not torch.equal(stacked, logits_without(model, samples))


def logits_without(model: MultimodalLM, samples: list[Sample]) -> Tensor:
    experts = model.extension
    model.extend(None)
    found = logits(model, samples)
    model.extend(experts)
    return found


def test_a_changed_expert_is_seen(model: MultimodalLM, samples: list[Sample]) -> None:
    """Stacks are held between passes, but not beyond a change."""
    grown(model, "moelora")
    before = logits(model, samples)
    assert torch.equal(logits(model, samples), before)
    assert isinstance(model.extension, ExpertMixture)
    move(dict(model.extension.named_parameters()), 9)
    moved = logits(model, samples)
    assert not torch.equal(moved, before)
    experts = model.extension
    loaded = ExpertMixture.build(model, experts.settings())
    loaded.load_state_dict(experts.state_dict())
    model.extend(loaded)
    assert torch.equal(logits(model, samples), moved)
    move(dict(loaded.named_parameters()), 1)
    assert not torch.equal(logits(model, samples), moved)
    model.adapter = open_mixture(model, MIXTURE)  # while it learns, even past the counter of changes
    before = logits(model, samples)
    for parameter in model.adapter.parameters().values():
        parameter.data.add_(0.05)
    assert not torch.equal(logits(model, samples), before)


def test_a_stage_may_be_folded_into_the_llm_under_experts(model: MultimodalLM, samples: list[Sample]) -> None:
    """A LoRA of a later stage stands beside the experts."""
    grown(model, "pathweave")
    before = logits(model, samples)
    model.adapter.open(3)
    assert torch.equal(logits(model, samples), before)
    move(model.adapter.parameters(), 7)
    moved = logits(model, samples)
    with model.adapter.previous():
        assert torch.equal(logits(model, samples), before)
    model.adapter.fold()
    assert not torch.equal(moved, before) and len(model.adapter.ledger) == 2
    torch.testing.assert_close(logits(model, samples), moved, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        RunError, match="dense_state: the model has an extension 'pathweave', which the LLM's weights do"
    ):
        next(model.adapter.dense_state())
    model.extend(None)
    assert next(model.adapter.dense_state())[0]


def test_composed_models_have_none(model: MultimodalLM, spec: ModelSpec, features: FeatureCache) -> None:
    grown(model, "moelora")
    plain = MultimodalLM.build(spec, features=features)
    plain.add_modality(spec.modalities[0], seed=0)
    plain.adapter = decouple(plain, "image", LoraSpec(2, 2.0))
    assert plain.composition is not None
    with pytest.raises(RunError, match="extend: the LLM is of a composed checkpoint"):
        plain.extend(Greeting(128, 1))
    with pytest.raises(RunError, match="compose: the model has an extension 'moelora'"):
        model.compose(plain.composition)
    plain.adapter.drop()
    plain.adapter.open(0)
    with pytest.raises(RunError, match="a stage is open; a folded model is expected"):
        open_mixture(plain, MIXTURE)
    assert plain.extension is None and plain.adapter.is_open


def test_targets(model: MultimodalLM) -> None:
    every = linear_layers(model.llm, "all-linear")
    assert len(every) == 28 and "lm_head" not in every and every["model.layers.0.mlp.down_proj"][1] == 128
    assert len(linear_layers(model.llm, ["q_proj", "v_proj"])) == 8
    assert list(linear_layers(model.llm, r".*layers\.2\.mlp\.up_proj")) == ["model.layers.2.mlp.up_proj"]
    with pytest.raises(ConfigError, match=r"lora.targets: \['nothing'\] names none of this LLM's 2"):
        linear_layers(model.llm, ["nothing"])
    with pytest.raises(CheckpointError, match=r"'model\.norm' is no linear layer of this LLM"):
        shapes_of(model.llm, ["model.norm"])


def test_the_adapter_refuses_what_has_no_meaning(model: MultimodalLM) -> None:
    adapter = open_mixture(model, MIXTURE)
    model.adapter = adapter
    assert isinstance(adapter, ExtensionAdapter) and adapter.is_open and adapter.changing() == {}
    for call in (lambda: adapter.open(0), lambda: adapter.set_ledger([]), lambda: next(adapter.dense_state())):
        with pytest.raises(RunError, match="a stage is open; none is expected"):
            call()
    with pytest.raises(RunError, match="rule 'half', but the stage was learned by experts beside the LLM"):
        adapter.fold(Rule("half", lambda before, after: before))
    with adapter.previous(), pytest.raises(RunError, match=r"fold: the LLM is θ_\{i-1\} inside previous"):
        adapter.fold()
    adapter.fold()
    assert adapter.parameters() == {} and model.adapter is not adapter
    with pytest.raises(RunError, match="fold: the stage is closed"):
        adapter.fold()
    with pytest.raises(RunError, match=r"has an extension 'moelora' of {.*'rank': 4.*but {.*'rank': 6"):
        open_mixture(model, MixtureSpec(experts=2, rank=6, alpha=8.0))
    with pytest.raises(RunError, match="pathweave: the model has an extension 'moelora' of other modules"):
        open_weave(model, ["image"], WEAVE)


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pathweave", "moelora"])
def test_a_checkpoint_brings_it_back_bit_by_bit(
    kind: str, model: MultimodalLM, samples: list[Sample], spec: ModelSpec, features: FeatureCache, tmp_path: Path
) -> None:
    checkpoint.save(model, tmp_path / "plain", history=[])
    grown(model, kind)
    wanted, answers = logits(model, samples), model.generate(samples)
    checkpoint.save(model, tmp_path / "a", history=[{"stage": "image"}])
    manifest = checkpoint.read_manifest(tmp_path / "a")
    assert manifest["format"] == 3 and checkpoint.read_manifest(tmp_path / "plain")["format"] == 2
    assert manifest["extension"]["kind"] == kind and manifest["extension"]["file"] == "extension.safetensors"
    assert len(manifest["ledger"]) == 1
    loaded = checkpoint.load(tmp_path / "a", features=features)
    assert torch.equal(logits(loaded, samples), wanted) and loaded.generate(samples) == answers
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    checkpoint.save(loaded, tmp_path / "b", history=[{"stage": "image"}])
    assert checkpoint.read_manifest(tmp_path / "b") == manifest

    checkpoint.load(tmp_path / "plain", model=loaded)  # which takes it out again
    assert loaded.extension is None and same(
        state(loaded), state(checkpoint.load(tmp_path / "plain", features=features))
    )
    other = grown(MultimodalLM.build(spec, features=features), "moelora" if kind == "pathweave" else "pathweave")
    checkpoint.load(tmp_path / "a", model=other)
    assert torch.equal(logits(other, samples), wanted)
    other.adapter = open_weave(other, ["image"], WEAVE) if kind == "pathweave" else open_mixture(other, MIXTURE)
    with pytest.raises(CheckpointError, match="a stage is open; a folded model is expected"):
        checkpoint.save(other, tmp_path / "c", history=[])
    move(other.adapter.parameters(), 8)
    checkpoint.load(tmp_path / "a", model=other)  # which drops the stage
    assert torch.equal(logits(other, samples), wanted) and not other.adapter.is_open


def test_what_is_damaged_is_named(
    model: MultimodalLM, samples: list[Sample], features: FeatureCache, tmp_path: Path
) -> None:
    grown(model, "moelora")
    folder = tmp_path / "saved"
    checkpoint.save(model, folder, history=[])
    untouched = logits(model, samples)
    original = (folder / "manifest.json").read_text()
    for change, message in (
        (lambda m: m.pop("extension"), "format 3 without an extension"),
        (lambda m: m.update(format=2), "format 2 with an extension"),
        (lambda m: m["extension"].pop("settings"), r"'extension' is incomplete \(KeyError: 'settings'\)"),
        (lambda m: m["extension"].update(kind="moelorra"), "no kind of extension 'moelorra'; did you mean 'moelora'"),
        (lambda m: m["extension"].update(file="none"), "'none' is not among its files"),
        (lambda m: m.update(ledger=[], routing={"kind": "mmer", "routes": [{"name": "a", "modality": "image"}], "files": []}),
         "routes and an extension"),
    ):  # fmt: skip
        edit(folder, change)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder, model=model)
        assert torch.equal(logits(model, samples), untouched)
        (folder / "manifest.json").write_text(original)
    for change, message in (
        (
            lambda m: m["extension"]["settings"].pop("stages"),
            r"settings of extension 'moelora' are incomplete or wrong \(KeyError",
        ),
        (lambda m: m["extension"]["settings"].update(rank=8), r"extension.safetensors: tensor '.*' has shape"),
        (lambda m: m["extension"]["settings"].update(layers=["x"]), "'x' is no linear layer of this LLM"),
    ):
        edit(folder, change)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder, model=model)
        assert model.extension is None and model.specs == {} and model.adapter.ledger == []
        (folder / "manifest.json").write_text(original)
    checkpoint.load(folder, model=model)
    assert torch.equal(logits(model, samples), untouched)
    (folder / "extension.safetensors").write_bytes((folder / "extension.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"extension\.safetensors: truncated"):
        checkpoint.load(folder, features=features)


def test_merging_does_not_lose_it(model: MultimodalLM, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "plain", history=[])
    grown(model, "pathweave")
    checkpoint.save(model, tmp_path / "woven", history=[])
    recipe = Recipe("average", {"a": str(tmp_path / "plain"), "b": str(tmp_path / "woven")})
    with pytest.raises(MergeError, match=r"b \(.*woven\): has an extension 'pathweave', modules beside the LLM"):
        open_inputs(recipe)
    with pytest.raises(CheckpointError, match=r"woven: has an extension 'pathweave'"):
        StoredModel(tmp_path / "woven")


def test_layers_that_see_other_positions_are_refused(model: MultimodalLM) -> None:
    model.adapter = open_weave(model, ["image"], WeaveSpec(rank=3, switch_paths=True))
    model.adapter.fold()
    assert isinstance(model.extension, WovenExperts)
    model.extension.stages = {"image": 0}
    embeds = torch.zeros(2, 3, 128)
    ids = torch.tensor([[1, 1, 0], [0, 0, 0]])
    fused = Fused(embeds, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3), ids)
    with (
        model.extension.over(fused),
        pytest.raises(RunError, match=r"sees a tensor of \(2, 5, 128\), but the paths of"),
    ):
        model.llm.model.layers[0].self_attn.q_proj(torch.zeros(2, 5, 128))
