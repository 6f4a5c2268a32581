"""DAMC's composition: modalities keep their LoRAs and vectors, the LoRAs of text are mixed, and every expert is still there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from soundfile import write as write_sound
from torch import Tensor, nn
from typer.testing import CliRunner

from graftlm.cli.main import app
from graftlm.core.errors import CheckpointError, MergeError
from graftlm.core.files import hash_file, read_json, write_json
from graftlm.data.types import Media, Sample
from graftlm.merging.compose import compose, read_recipe
from graftlm.merging.damc import compose_damc
from graftlm.merging.recipe import Recipe
from graftlm.model import checkpoint
from graftlm.model.decoupled import decouple
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.restore import restore
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

SPECS = {
    "image": ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("mlp")),
    "audio": ModalitySpec("audio", EncoderSpec("mini-audio", "miniworld"), ConnectorSpec("qformer", {"queries": 8})),
    "point": ModalitySpec("point", EncoderSpec("mini-point"), ConnectorSpec("mlp")),  # random: its file is carried
}
RANKS = {"image": 4, "audio": 3, "point": 2}
Experts = dict[str, Path]
WAYS = ("dense", "build", "correct")


def expert(folder: Path, modality: str, *, text: float = 0.03, dtype: str = "float32") -> Path:
    """A checkpoint with decoupled parameters, moved at random; ``text`` is how far those of text are."""
    model = MultimodalLM.build(ModelSpec("miniworld", (SPECS[modality],), None, dtype))
    seed = list(SPECS).index(modality) + 1
    torch.manual_seed(seed)
    model.add_modality(SPECS[modality], seed)
    rank = RANKS[modality]
    model.adapter = decouple(model, modality, LoraSpec(rank, 2.0 * rank), prefix=2, suffix=seed - 1, seed=seed)
    for name, parameter in model.adapter.parameters().items():
        if name.endswith(".B"):
            parameter.data += (text if name.startswith("llm.text") else 0.03) * torch.randn(parameter.shape)
    model.adapter.fold()
    checkpoint.save(model, folder, history=[{"stage": modality}])
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    root = tmp_path_factory.mktemp("experts")
    return {modality: expert(root / modality, modality) for modality in SPECS}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Text alone, one image, one sound, both, and images around a sound."""
    root, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / f"{number}.png")
        write_sound(root / f"{number}.wav", rng.standard_normal(8000).astype(np.float32) / 4, 8000)
    images, sounds = (
        [Media(modality, root / f"{number}.{ending}") for number in range(2)]
        for modality, ending in (("image", "png"), ("audio", "wav"))
    )
    return [
        Sample("text", "t", (), "what color is the sky ?", ("blue",)),
        Sample("image", "t", (images[0],), "what is this ?", ("a red cube",)),
        Sample("audio", "t", (sounds[0],), "what is heard ?", ("a low sound",)),
        Sample("both", "t", (images[1], sounds[1]), "<image> <audio> what do these share ?", ("red",)),
        Sample("around", "t", (images[0], sounds[0], images[1]), "a <image> b <audio> c <image> ?", ("red",)),
    ]


def recipe(experts: Experts, *names: str, **per_model: float) -> Recipe:
    shares = {name: {"weight": weight} for name, weight in per_model.items()}
    return Recipe("damc", {name: str(experts[name]) for name in names}, per_model=shares)


@pytest.fixture(scope="module")
def both(experts: Experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose(recipe(experts, "image", "audio"), tmp_path_factory.mktemp("composed") / "both")


def logits(model: MultimodalLM, samples: list[Sample]) -> Tensor:
    model.eval()  # a new connector is in training mode
    with torch.no_grad():
        out = model(model.batch(samples), logits=True)
    assert out.logits is not None
    return out.logits[out.attention_mask]


def fits(asked: list[Sample], *modalities: str) -> list[Sample]:
    return [sample for sample in asked if {m.modality for m in sample.media} <= set(modalities)]


def tensors(folder: Path) -> dict[str, Tensor]:
    files = checkpoint.read_manifest(folder)["routing"]["files"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def delta(stored: dict[str, Tensor], branch: str) -> Tensor:
    a, b, scale = (stored[f"{branch}.{part}"] for part in ("A", "B", "scale"))
    return scale * b @ a


def naive(experts: Experts, shares: dict[str, float], ids: Tensor) -> nn.Module:
    """The base, in which every linear layer has a weight per position, written out from the experts' own files."""
    llm = MultimodalLM.build(ModelSpec("miniworld")).llm
    stored = {name: tensors(experts[name]) for name in shares}
    for path, module in llm.named_modules():
        if isinstance(module, nn.Linear) and module is not llm.get_output_embeddings():
            text = sum(share * delta(stored[n], f"{path}.weight.text") for n, share in shares.items())
            own = [delta(stored[n], f"{path}.weight.{n}") for n in shares]
            each = (module.weight + torch.stack([torch.as_tensor(text), *own]))[ids]
            module.forward = lambda x, each=each: torch.einsum("bsi,bsoi->bso", x, each)
    return llm


@pytest.mark.parametrize(
    ("way", "shares"),
    [*((way, {}) for way in WAYS), ("build", {"image": 0.8, "audio": 0.2}), ("dense", {"image": 1.0, "audio": 0.0})],
)
def test_expansion_is_every_position_with_its_own_weights(
    way: Any, shares: dict[str, float], experts: Experts, asked: list[Sample], tmp_path: Path
) -> None:
    out = compose(recipe(experts, "image", "audio", **shares), tmp_path / "both")
    model = checkpoint.load(out, way=way)
    assert list(model.specs) == ["image", "audio"] and model.mode == "expand"
    fused = model.fuse(model.batch(asked))
    llm = naive(experts, shares or {"image": 0.5, "audio": 0.5}, fused.modality_ids)
    with torch.no_grad():
        wanted = llm(inputs_embeds=fused.embeds).logits[fused.attention_mask]
    torch.testing.assert_close(logits(model, asked), wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_one_expert_composed_is_that_expert_bit_by_bit(
    way: Any, experts: Experts, asked: list[Sample], tmp_path: Path
) -> None:
    out = compose(recipe(experts, "image"), tmp_path / "one")
    own, samples = checkpoint.load(experts["image"], way=way), fits(asked, "image")
    for mode in ("expand", "retain:image"):
        assert torch.equal(logits(checkpoint.load(out, mode=mode, way=way), samples), logits(own, samples))


@pytest.mark.parametrize("way", WAYS)
def test_a_retained_expert_is_that_expert_bit_by_bit(
    way: Any, experts: Experts, both: Path, asked: list[Sample]
) -> None:
    model = checkpoint.load(both, way=way)
    together = logits(model, asked)
    for name in ("image", "audio", "image"):
        samples = fits(asked, name)
        model.set_mode(f"retain:{name}")
        assert model.mode == f"retain:{name}" and list(model.specs) == [name]
        own = checkpoint.load(experts[name], way=way)
        assert torch.equal(logits(model, samples), logits(own, samples))
        assert model.generate(samples) == own.generate(samples)
    with pytest.raises(CheckpointError, match="in mode 'retain:image', whose weights no file holds"):
        checkpoint.save(model, both.parent / "no", history=[])
    model.set_mode("expand")
    assert torch.equal(logits(model, asked), together)


def test_experts_that_did_not_move_text_leave_it_as_in_the_base(
    asked: list[Sample], tmp_path: Path, experts: Experts
) -> None:
    still = {name: expert(tmp_path / name, name, text=0.0) for name in ("image", "audio")}
    model = checkpoint.load(compose(recipe(still, "image", "audio"), tmp_path / "both"))
    base = MultimodalLM.build(ModelSpec("miniworld"))
    assert torch.equal(logits(model, asked[:1]), logits(base, asked[:1]))
    assert base.generate(asked[:1]) == model.generate(asked[:1])
    for name, weight in base.llm.named_parameters():
        assert torch.equal(weight, model.llm.get_parameter(name)), name


def test_decoded_tokens_are_text(both: Path, asked: list[Sample]) -> None:
    """Step by step with a cache, and all at once without one."""
    model = checkpoint.load(both)
    for sample in asked[1:]:
        [answer] = model.generate([sample], max_new_tokens=4)
        forced = Sample(sample.id, "t", sample.media, sample.prompt, (answer,))
        out = model(model.batch([forced]), logits=True)
        words = out.logits[0, :-1].argmax(-1)[out.labels[0, 1:] != -100]
        wanted = out.labels[0][out.labels[0] != -100]
        assert torch.equal(words[:3], wanted[:3]), (answer, sample.id)


def test_the_folder(experts: Experts, asked: list[Sample], tmp_path: Path) -> None:
    """Three experts: parts of all, one routing file each, and a record."""
    told: list[tuple[str, int, int]] = []
    made = recipe(experts, "image", "point", "audio")
    out = compose_damc(made, tmp_path / "all", lambda *what: told.append(what))
    manifest = read_json(out / "manifest.json")
    assert [r["name"] for r in manifest["routing"]["routes"]] == ["image", "point", "audio"]
    assert manifest["routing"]["settings"]["text"] == pytest.approx(dict.fromkeys(("image", "point", "audio"), 1 / 3))
    assert "encoders.point.safetensors" in manifest["files"] and len(manifest["routing"]["files"]) == 3
    (record,) = manifest["history"]
    assert record["inputs"]["audio"]["sha256"] == hash_file(experts["audio"] / "manifest.json")
    assert read_recipe(out) == made and "| point |" in (out / "README.md").read_text()
    assert len(told) == 3 and told[-1][1] == told[-1][2]
    mine, own = tensors(out), tensors(experts["point"])
    name = "model.layers.1.mlp.down_proj.weight"
    for part in ("A", "B", "scale"):
        assert torch.equal(mine[f"{name}.point.{part}"], own[f"{name}.point.{part}"])
        assert torch.equal(mine[f"{name}.text:point.{part}"], own[f"{name}.text.{part}"])
    assert torch.equal(mine["prompt.point.suffix"], own["prompt.point.suffix"])
    model = checkpoint.load(out)
    assert len(model.generate(asked)) == len(asked)
    checkpoint.save(model, tmp_path / "again", history=[])
    routing = [checkpoint.read_manifest(folder)["routing"] for folder in (out, tmp_path / "again")]
    assert routing[0] == routing[1]
    assert torch.equal(logits(checkpoint.load(tmp_path / "again"), asked), logits(model, asked))


def test_names_are_free(experts: Experts, asked: list[Sample], tmp_path: Path) -> None:
    renamed = Recipe("damc", {"eyes": str(experts["image"]), "ears": str(experts["audio"])})
    model = checkpoint.load(compose(renamed, tmp_path / "both"), mode="retain:ears")
    samples = fits(asked, "audio")
    assert torch.equal(logits(model, samples), logits(checkpoint.load(experts["audio"]), samples))


def test_a_base_inside_the_experts_is_carried(asked: list[Sample], experts: Experts, tmp_path: Path) -> None:
    from graftlm.model.base import base_folder

    shutil.copytree(experts["image"], tmp_path / "image")
    shutil.copytree(base_folder("miniworld"), tmp_path / "image" / "llm")
    manifest = read_json(tmp_path / "image/manifest.json")
    manifest["model"]["llm"] = manifest["llm"]["source"] = "llm"
    for path in (tmp_path / "image/llm").iterdir():
        manifest["files"][f"llm/{path.name}"] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    write_json(tmp_path / "image/manifest.json", manifest)
    out = compose(recipe({"image": tmp_path / "image", "audio": experts["audio"]}, "image", "audio"), tmp_path / "both")
    shutil.rmtree(tmp_path / "image")
    assert checkpoint.read_manifest(out)["llm"]["source"] == "llm"
    assert len(checkpoint.load(out).generate(asked)) == len(asked)


def test_the_command(experts: Experts, tmp_path: Path) -> None:
    models = [word for name in ("image", "audio") for word in ("--model", f"{name}={experts[name]}")]
    arguments = ["compose", "damc", *models, "--out", str(tmp_path / "both"), "image.weight=0.7", "audio.weight=0.3"]
    run: Callable[..., Any] = CliRunner().invoke
    assert run(app, [*arguments, "--plan"], catch_exceptions=False).exit_code == 0
    assert not (tmp_path / "both").exists()
    assert "composed:" in run(app, arguments, catch_exceptions=False).output
    settings = checkpoint.read_manifest(tmp_path / "both")["routing"]["settings"]
    assert settings["text"] == {"image": 0.7, "audio": 0.3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_model": {"image": {"weight": 0.5}}}, r"per_model.audio.weight: missing"),
        ({"per_model": {"image": {"weight": 0.5}, "audio": {"weight": 0.6}}}, r"weights .* sum to 1.1"),
        ({"per_model": {"image": {"significance": 0.5}}}, r"significance: no such setting of one model"),
        ({"settings": {"density": 0.5}}, r"settings.density: no setting of damc"),
        ({"base": "miniworld"}, r"base: no setting of damc"),
        ({"dtype": "bfloat16"}, r"dtype: no setting of damc"),
    ],
)
def test_wrong_recipes(change: dict[str, Any], message: str, experts: Experts) -> None:
    with pytest.raises(MergeError, match=message):
        Recipe("damc", {name: str(experts[name]) for name in ("image", "audio")}, **change)


def test_models_that_do_not_fit(experts: Experts, both: Path, tmp_path: Path) -> None:
    plain = MultimodalLM.build(ModelSpec("miniworld", (SPECS["image"],)))
    plain.add_modality(SPECS["image"], 0)
    checkpoint.save(plain, tmp_path / "plain", history=[])
    shutil.copytree(experts["audio"], tmp_path / "moved")
    manifest = read_json(tmp_path / "moved/manifest.json")
    manifest["llm"]["sha256"] = "0" * 64
    write_json(tmp_path / "moved/manifest.json", manifest)
    expert(tmp_path / "half", "audio", dtype="bfloat16")
    image = str(experts["image"])
    refused = [
        (
            {"image": image, "audio": str(tmp_path / "plain")},
            r"audio .*an ordinary checkpoint, but DAMC composes experts",
        ),
        ({"image": image, "audio": str(both)}, r"is itself composed of image, audio"),
        (
            {"image": image, "audio": str(tmp_path / "moved")},
            r"audio .*: a base of hash 0000000000000000, but image has",
        ),
        ({"image": image, "audio": str(tmp_path / "half")}, r"audio .*: dtype bfloat16, but image has float32"),
        ({"image": image, "other": image}, r"other .*: serves 'image', as 'image' does"),
        ({"image": image, "a.b": str(experts["audio"])}, r"'a.b' cannot be a route; no dot"),
        ({"text": image}, r"'text' cannot be a route"),
    ]
    for models, message in refused:
        with pytest.raises(MergeError, match=message):
            compose(Recipe("damc", models), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    with pytest.raises(MergeError, match="exists; a new folder is expected"):
        compose(recipe(experts, "image"), tmp_path / "mine")
    with pytest.raises(MergeError, match="is inside image"):
        compose(recipe(experts, "image"), experts["image"] / "out")
    with pytest.raises(MergeError, match="composed of models that stay apart"):
        compose(Recipe("average", {"a": image, "b": str(experts["audio"])}), tmp_path / "out")
    with pytest.raises(CheckpointError, match="DAMC keeps no original as one LLM"):
        restore(both, "image", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints(both: Path, experts: Experts, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    manifest = read_json(folder / "manifest.json")
    manifest["routing"]["settings"]["text"] = {"image": 0.5, "video": 0.5}
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match=r"shares .*video.* of text; a number for each of the routes"):
        checkpoint.load(folder)
    broken = Path(shutil.copytree(experts["image"], tmp_path / "broken"))
    (file,) = (broken / "routing").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        compose(recipe({"image": broken}, "image"), tmp_path / "out")
