"""Models without connectors, with one for all, and without encoders: MERA learns and realigns them like any other."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graftlm.core import seeds
from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Media, Stage
from graftlm.experiment.sizes import count
from graftlm.learning.method import Method
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.merging.checks import compare, read_model
from graftlm.merging.headers import read_weights
from graftlm.methods.mera import Merge, Realign
from graftlm.model import checkpoint
from graftlm.model.base import base_folder
from graftlm.model.connectors import build_connector, build_trunk
from graftlm.model.encoders.base import build_encoder
from graftlm.model.encoders.mini import ImageEncoder
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

QUICK = Schedule(
    tuple(dataclasses.replace(phase, epochs=1) for phase in SCHEDULES["miniworld"].phases),
    dataclasses.replace(SCHEDULES["miniworld"].realign, epochs=1),
)
SHAPES = {"mini-image": (3, 48, 48), "mini-video": (4, 3, 48, 48), "mini-audio": (32, 64), "mini-point": (8, 64, 6)}
MOST = {"mini-image": 4, "mini-video": 4, "mini-audio": 3, "mini-point": 2}
"""Layers that can be taken from an encoder."""

Weights = Mapping[str, Tensor]


def pair(image: ModalitySpec, video: ModalitySpec) -> ModelSpec:
    return ModelSpec("miniworld", (image, video), LoraSpec(rank=4, alpha=4.0))


def mini(name: str, connector: ConnectorSpec) -> ModalitySpec:
    return ModalitySpec(name, EncoderSpec(f"mini-{name}", "miniworld"), connector)


ARCHITECTURES = {
    "connector-free": pair(
        mini("image", ConnectorSpec("encoder-tail")), mini("video", ConnectorSpec("encoder-tail", {"layers": 2}))
    ),
    "uni-connector": pair(mini("image", ConnectorSpec("shared")), mini("video", ConnectorSpec("shared"))),
    "encoder-free": pair(
        ModalitySpec("image", EncoderSpec("patches", None, {"side": 24, "patch": 12}), ConnectorSpec("mlp")),
        mini("video", ConnectorSpec("mlp")),
    ),
    "encoder-free, linear": pair(
        ModalitySpec("image", EncoderSpec("patches"), ConnectorSpec("linear")), mini("video", ConnectorSpec("mlp"))
    ),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, ...]:
    root = build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world"))
    return tuple(
        Stage(stage.name, tuple(dataclasses.replace(task, train=task.train[:16]) for task in stage.tasks))
        for stage in miniworld(root, "sequential").stages[:2]
    )


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def grow(stages: tuple[Stage, ...], features: FeatureCache) -> Callable[..., MultimodalLM]:
    def grown(spec: ModelSpec, methods: list[Method], count: int = 2) -> MultimodalLM:
        model = MultimodalLM.build(spec, features=features)
        modalities = {each.name: each for each in spec.modalities}
        for number in range(count):
            learn(model, stages[number], stages[:number], methods, QUICK, modalities=modalities)
        return model

    return grown


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def part(values: Weights, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in values.items() if name.startswith(f"{prefix}.")}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(a: Weights, b: Weights) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def trainable(model: MultimodalLM, prefix: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mera_moves_connectors_and_the_llm_and_nothing_else(name: str, grow: Callable[..., MultimodalLM]) -> None:
    spec = ARCHITECTURES[name]
    fresh = MultimodalLM.build(spec)
    for each in spec.modalities:
        fresh.add_modality(each, seeds.derive(0, "connector", each.name))
    start = weights(fresh)
    first, merged = weights(grow(spec, [], 1)), weights(grow(spec, [Merge()]))
    model = grow(spec, [Merge(), Realign(0.5)])
    final = weights(model)

    for found in (first, merged, final):  # what an encoder kept never moves
        for encoder in ("encoders.image", "encoders.video"):
            assert not part(found, encoder) or same(part(found, encoder), part(start, encoder))
    # stage 1: the whole of its connector, the common module included
    learned = trainable(model, "connectors.image")
    assert learned and learned <= moved(part(start, "connectors.image"), first)
    # stage 2: its own connector, and nothing of the first
    assert same(part(merged, "connectors.image"), part(first, "connectors.image"))
    assert trainable(model, "connectors.video") <= moved(part(start, "connectors.video"), merged)
    assert not same(part(merged, "llm"), part(first, "llm"))
    # realigning: every parameter of every connector, and no other tensor of the model
    assert moved(merged, final) == trainable(model, "connectors")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_gives_the_same_model(
    name: str, grow: Callable[..., MultimodalLM], stages: tuple[Stage, ...], features: FeatureCache, tmp_path: Path
) -> None:
    spec = ARCHITECTURES[name]
    model = grow(spec, [Merge(), Realign(0.5)])
    checkpoint.save(model, tmp_path / "saved", history=[])
    loaded = checkpoint.load(tmp_path / "saved", features=features)
    assert same(weights(loaded), weights(model))
    samples = [*stages[0].samples()[:3], *stages[1].samples()[:3]]
    with torch.no_grad():
        assert torch.equal(loaded(loaded.batch(samples)).loss, model(model.batch(samples)).loss)
    assert [loaded.encoder(each).fingerprint() for each in loaded.specs] == [
        model.encoder(each).fingerprint() for each in model.specs
    ]
    # and into a model that already learned something else
    other = grow(spec, [], 1)
    checkpoint.load(tmp_path / "saved", model=other)
    assert same(weights(other), weights(model))


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_trunk_and_tail_are_the_encoder(kind: str) -> None:
    whole = build_encoder(EncoderSpec(kind, "miniworld"))
    x = torch.rand(3, *SHAPES[kind], generator=torch.Generator().manual_seed(0))
    expected = whole(x)
    seen = {whole.fingerprint()}
    total = sum(p.numel() for p in whole.parameters())
    for layers in range(1, MOST[kind] + 1):
        trunk = build_encoder(EncoderSpec(kind, "miniworld"))
        tail = build_connector(ConnectorSpec("encoder-tail", {"layers": layers}), trunk, 128)
        tokens = trunk(x)
        assert tokens.shape == (3, trunk.tokens, trunk.width)
        assert tail.tokens == whole.tokens
        torch.testing.assert_close(tail(tokens), expected, rtol=1e-5, atol=1e-5)
        assert sum(p.numel() for p in (*trunk.parameters(), *tail.parameters())) == total
        spec = ModalitySpec("x", EncoderSpec(kind, "miniworld"), ConnectorSpec("encoder-tail", {"layers": layers}))
        assert build_trunk(spec).fingerprint() == trunk.fingerprint()
        seen.add(trunk.fingerprint())
        nn.ModuleDict({"trunk": trunk, "tail": tail}).train()
        assert not any(module.training for both in (trunk, tail) for module in both.modules())
    assert len(seen) == MOST[kind] + 1
    for layers in (0, MOST[kind] + 1):
        with pytest.raises(ConfigError, match=rf"layers: {layers}, but 1 to {MOST[kind]} layers of this encoder"):
            build_connector(
                ConnectorSpec("encoder-tail", {"layers": layers}), build_encoder(EncoderSpec(kind, "miniworld")), 128
            )


def test_the_cache_keeps_what_the_trunk_gives(stages: tuple[Stage, ...], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    item: list[Media] = [stages[0].samples()[0].media[0]]
    spec = mini("image", ConnectorSpec("encoder-tail", {"layers": 3}))
    whole, trunk = build_encoder(spec.encoder), build_trunk(spec)
    for encoder, shape in ((whole, (1, 16, 128)), (trunk, (1, 64, 64)), (whole, (1, 16, 128))):
        found = cache.get(encoder, item)
        assert found.shape == shape
        assert torch.equal(found, encoder(encoder.read(item[0].source)[None]))
    assert (cache.misses, cache.hits) == (2, 1)


def test_a_tail_starts_from_the_encoder_whatever_the_seed() -> None:
    spec = ARCHITECTURES["connector-free"]
    one, two = MultimodalLM.build(spec), MultimodalLM.build(spec)
    one.add_modality(spec.modalities[0], seed=1)
    two.add_modality(spec.modalities[0], seed=2)
    assert same(weights(one.connectors), weights(two.connectors))
    whole = build_encoder(spec.modalities[0].encoder)
    assert isinstance(whole, ImageEncoder)
    last = part(weights(one.connectors), "image").values()
    assert all(torch.equal(a, b) for a, b in zip(last, whole.net[-1].state_dict().values(), strict=True))


def test_the_common_module_is_there_once() -> None:
    spec = ARCHITECTURES["uni-connector"]
    model = MultimodalLM.build(spec)
    for number, each in enumerate(spec.modalities):
        model.add_modality(each, seed=number)
    names = [name for name in trainable(model, "connectors") if ".shared." in name]
    assert names and all(name.startswith("connectors.image.shared.") for name in names)
    x = torch.rand(2, 16, 128)
    before = model.connectors["video"](torch.rand(2, 64, 128, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.get_parameter("connectors.image.shared.net.3.bias").add_(1)
    after = model.connectors["video"](torch.rand(2, 64, 128, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(after, before + 1)
    assert model.connectors["image"](x).shape == (2, 16, 128)


def test_sizes_count_the_common_module_once() -> None:
    sizes = count(ARCHITECTURES["uni-connector"])
    layer = 128 * 128 + 128
    mlp = 2 * 128 + 2 * layer
    assert sizes.connectors == {"image": layer + mlp, "video": layer}
    assert sizes.features == {"image": 16 * 128, "video": 64 * 128}
    assert sizes.tokens == {"image": 16, "video": 16}


def test_widths_that_do_not_fit() -> None:
    image = build_encoder(EncoderSpec("mini-image"))
    with pytest.raises(ConfigError, match="encoder-tail: the encoder ends in width 128, but the LLM embeds in 64"):
        build_connector(ConnectorSpec("encoder-tail"), image, 64)
    assert image.width == 128 and image.cut == 0
    with pytest.raises(ConfigError, match=r"encoder Patches: its last layers cannot be taken"):
        build_connector(
            ConnectorSpec("encoder-tail"), build_encoder(EncoderSpec("patches", None, {"side": 8, "patch": 4})), 48
        )
    first = build_connector(ConnectorSpec("shared"), image, 64)
    narrow = build_encoder(EncoderSpec("mini-point"))
    narrow.width = 96
    with pytest.raises(ConfigError, match=r"shared: the encoder ends in width 96, but the module .* made for 128"):
        build_connector(ConnectorSpec("shared"), narrow, 64, [first])


def test_patches_are_pixels() -> None:
    encoder = build_encoder(EncoderSpec("patches", None, {"side": 6, "patch": 2}))
    x = torch.rand(2, 3, 6, 6)
    tokens = encoder(x)
    assert tokens.shape == (2, 9, 12) == (2, encoder.tokens, encoder.width)
    for row in range(3):
        for column in range(3):
            square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(tokens[:, 3 * row + column], 2 * square.flatten(1) - 1)
    other = build_encoder(EncoderSpec("patches", None, {"side": 6, "patch": 3}))
    assert encoder.fingerprint() != other.fingerprint()
    for side, patch in ((6, 4), (4, 6), (6, 0)):
        with pytest.raises(ConfigError, match=f"patches of {patch} x {patch} do not tile a picture of {side} x {side}"):
            build_encoder(EncoderSpec("patches", None, {"side": side, "patch": patch}))


def test_another_encoder_behind_a_tail_is_refused(grow: Callable[..., MultimodalLM], tmp_path: Path) -> None:
    model = grow(ARCHITECTURES["connector-free"], [], 1)
    model.encoder("image").get_parameter("net.0.bias").data += 1
    checkpoint.save(model, tmp_path / "saved", history=[])
    with pytest.raises(CheckpointError, match="another encoder of 'image'"):
        checkpoint.load(tmp_path / "saved")


def test_models_with_a_common_module_are_not_composed(tmp_path: Path) -> None:
    """Each has its own, and connectors trained behind one do not fit the other."""
    for each in ARCHITECTURES["uni-connector"].modalities:
        model = MultimodalLM.build(ARCHITECTURES["uni-connector"])
        model.add_modality(each, seed=0)
        model.adapter.open(0)
        model.adapter.fold()
        checkpoint.save(model, tmp_path / each.name, history=[])
    both = {name: read_model(tmp_path / name) for name in ("image", "video")}
    base = read_weights(base_folder("miniworld"))
    said = [finding.what for finding in compare(base, both, least=1)]
    assert said == ["has connectors that share a module, which another model has too, with other weights"] * 2
    assert compare(base, {"image": both["image"]}, least=1) == []
