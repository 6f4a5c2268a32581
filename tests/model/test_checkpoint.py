"""Checkpoints: the same model comes back, bit by bit, and a damaged folder is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.core.files import hash_file
from graftlm.merging.rules import average
from graftlm.model import manifest as manifests
from graftlm.model.checkpoint import hash_llm, load, read_manifest, save
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

IMAGE = ModalitySpec("image", EncoderSpec("mini-image"), ConnectorSpec("mlp", {"pool": 2}))
POINT = ModalitySpec("point", EncoderSpec("mini-point"), ConnectorSpec("linear"))
AUDIO = ModalitySpec("audio", EncoderSpec("mini-audio"), ConnectorSpec("linear"))


def write_base(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *["a", "b", "c", "d", "e", "f"]]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llm")


def build(base: Path, lora: LoraSpec | None = LoraSpec(rank=2, alpha=4.0), dtype: str = "float32") -> MultimodalLM:  # noqa: B008
    return MultimodalLM.build(ModelSpec(str(base), (IMAGE, POINT), lora, dtype))


def learn(model: MultimodalLM, spec: ModalitySpec, stage: int) -> None:
    """A stage in short: a new modality, an LLM that moves and is merged."""
    model.add_modality(spec, seed=stage)
    model.adapter.open(stage)
    generator = torch.Generator().manual_seed(stage)
    for parameter in (*model.adapter.parameters().values(), *model.connectors.parameters()):
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    model.adapter.fold(average, weight=1 / stage)


def weights(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Tensor]]]:
    """Two checkpoints, the second the child of the first, and the weights they must give."""
    root = tmp_path_factory.mktemp("saved")
    model, seen = build(base), []
    learn(model, IMAGE, 1)
    save(model, root / "1", history=[{"stage": "image"}])
    seen.append(weights(model))
    learn(model, POINT, 2)
    save(model, root / "2", history=[{"stage": "image"}, {"stage": "point"}], parent=root / "1")
    seen.append(weights(model))
    return root / "1", root / "2", seen


@pytest.fixture
def folder(saved: tuple[Path, Path, object], tmp_path: Path) -> Path:
    """A copy of the second checkpoint, to be damaged."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_new_model(saved: tuple[Path, Path, list[dict[str, Tensor]]]) -> None:
    for folder, expected in zip(saved[:2], saved[2], strict=True):
        model = load(folder)
        assert same(weights(model), expected)
    assert list(model.specs) == ["image", "point"] and model.modality_index == {"text": 0, "image": 1, "point": 2}
    assert len(model.adapter.ledger) == 2 and not model.adapter.is_open
    assert model.spec == build(Path(model.spec.llm)).spec
    model.adapter.restore(1)
    llm = {name: tensor for name, tensor in saved[2][0].items() if name.startswith("llm.")}
    assert same({name: tensor for name, tensor in weights(model).items() if name in llm}, llm)


def test_in_place(base: Path, saved: tuple[Path, Path, list[dict[str, Tensor]]]) -> None:
    """Back and forth in one model, with more modalities, other ones, and an open stage to begin with."""
    first, second, expected = saved
    model = build(base)
    learn(model, IMAGE, 7)
    model.adapter.open(0)
    encoder = model.encoders["image"]
    for folder, right in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        assert load(folder, model=model) is model
        assert same(weights(model), right) and not model.adapter.is_open
        assert model.encoders["image"] is encoder
    other = build(base)
    learn(other, AUDIO, 1)
    learn(other, IMAGE, 2)
    load(second, model=other)
    assert list(other.specs) == ["image", "point"] and same(weights(other), expected[1])


@pytest.mark.parametrize("lora", [LoraSpec(rank=2, alpha=4.0), None], ids=["lora", "full"])
def test_bfloat16_and_full_tuning(base: Path, lora: LoraSpec | None, tmp_path: Path) -> None:
    model = build(base, lora, "bfloat16")
    learn(model, IMAGE, 1)
    learn(model, POINT, 2)
    save(model, tmp_path / "c", history=[])
    assert same(weights(load(tmp_path / "c")), weights(model))


def test_growing_goes_on_after_loading(base: Path, saved: tuple[Path, Path, list[dict[str, Tensor]]]) -> None:
    model = load(saved[0])
    for name, tensor in model.connectors.state_dict().items():
        assert torch.equal(tensor, saved[2][0][f"connectors.{name}"])
    learn(model, POINT, 2)
    llm = {name for name in saved[2][1] if name.startswith(("llm.", "connectors."))}
    assert all(torch.equal(weights(model)[name], saved[2][1][name]) for name in llm)


def test_the_manifest_tells_the_story(base: Path, saved: tuple[Path, Path, object]) -> None:
    manifest = read_manifest(saved[1])
    assert manifest["format"] == 2
    assert manifest["history"] == [{"stage": "image"}, {"stage": "point"}]
    assert manifest["llm"] == {"source": str(base), "sha256": hash_llm(base)}
    assert manifest["ledger"] == ["ledger/000.safetensors", "ledger/001.safetensors"]
    assert manifest["files"].keys() == {
        *("connectors.image.safetensors", "connectors.point.safetensors"),
        *("encoders.image.safetensors", "encoders.point.safetensors"),
        *manifest["ledger"],
    }
    for file, values in manifest["files"].items():
        assert values == {"sha256": hash_file(saved[1] / file), "bytes": (saved[1] / file).stat().st_size}


def test_unchanged_entries_are_links(base: Path, saved: tuple[Path, Path, object], tmp_path: Path) -> None:
    first, second, _ = saved
    assert (first / "ledger/000.safetensors").samefile(second / "ledger/000.safetensors")
    model = load(second)
    save(model, tmp_path / "loaded", history=[], parent=second)
    for file in read_manifest(second)["ledger"]:
        assert (second / file).samefile(tmp_path / "loaded" / file)


def test_a_damaged_parent_is_not_linked(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    damaged = folder / "ledger/000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    save(model, tmp_path / "a", history=[], parent=folder)
    (folder / "manifest.json").write_text("{")
    save(model, tmp_path / "b", history=[], parent=folder)
    for child in (tmp_path / "a", tmp_path / "b"):
        assert not (child / "ledger/000.safetensors").samefile(damaged)
        assert same(weights(load(child)), weights(model))


def test_a_file_of_the_llm_is_hashed_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hash_llm(base)
    monkeypatch.setattr(manifests, "hash_file", lambda path: pytest.fail(f"{path} was read again"))
    hash_llm(base)


def test_encoders_with_weights_of_their_own_are_referred_to(
    base: Path, saved: tuple[Path, ...], tmp_path: Path
) -> None:
    shutil.copy(saved[0] / "encoders.image.safetensors", tmp_path / "image.safetensors")
    spec = ModalitySpec("image", EncoderSpec("mini-image", str(tmp_path / "image.safetensors")), IMAGE.connector)
    model = build(base)
    learn(model, spec, 1)
    save(model, tmp_path / "c", history=[])
    assert read_manifest(tmp_path / "c")["files"].keys() == {"connectors.image.safetensors", "ledger/000.safetensors"}
    assert same(weights(load(tmp_path / "c")), weights(model))
    tensors = load_file(tmp_path / "image.safetensors")
    tensors["net.0.bias"] = tensors["net.0.bias"] + 1
    save_file(tensors, tmp_path / "image.safetensors")
    with pytest.raises(
        CheckpointError, match=r"another encoder of 'image'\. Its connector was trained on [0-9a-f]{64}"
    ):
        load(tmp_path / "c")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_saving_needs_a_folded_model_and_a_new_folder(base: Path, saved: tuple[Path, ...], tmp_path: Path) -> None:
    model = build(base)
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="holds something; a new folder is expected"):
        save(model, tmp_path, history=[])
    with pytest.raises(CheckpointError, match="holds something; a new folder is expected"):
        save(model, saved[0], history=[])
    assert (tmp_path / "mine").read_text() == "precious"
    model.adapter.open(0)
    with pytest.raises(CheckpointError, match="a stage is open; a folded model is expected"):
        save(model, tmp_path / "c", history=[])
    model.adapter.drop()
    model.folder = None
    with pytest.raises(CheckpointError, match="the LLM is of no folder, but a checkpoint refers to one"):
        save(model, tmp_path / "c", history=[])
    assert not (tmp_path / "c").exists()


def missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1,')


def unknown_format(folder: Path) -> None:
    edit(folder, lambda m: m.update(format=99))


def no_format(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]")


def no_ledger(folder: Path) -> None:
    edit(folder, lambda m: m.pop("ledger"))


def no_model(folder: Path) -> None:
    edit(folder, lambda m: m["model"].pop("llm"))


def no_hash(folder: Path) -> None:
    edit(folder, lambda m: m["files"]["connectors.image.safetensors"].pop("sha256"))


def no_connector(folder: Path) -> None:
    edit(folder, lambda m: m["files"].pop("connectors.image.safetensors"))


def outside(folder: Path) -> None:
    edit(folder, lambda m: m["files"].update({"../evil.safetensors": {"sha256": "", "bytes": 0}}))


def outside_absolute(folder: Path) -> None:
    edit(folder, lambda m: m["files"].update({"/etc/passwd": {"sha256": "", "bytes": 0}}))


def outside_link(folder: Path) -> None:
    file = folder / "connectors.point.safetensors"
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def missing_file(folder: Path) -> None:
    (folder / "connectors.point.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "ledger/001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def longer(folder: Path) -> None:
    with (folder / "ledger/001.safetensors").open("ab") as file:
        file.write(b"0")


def flipped(folder: Path) -> None:
    path = folder / "connectors.image.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swapped(folder: Path) -> None:
    a, b = folder / "ledger/000.safetensors", folder / "ledger/001.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def other_base(folder: Path) -> None:
    edit(folder, lambda m: m["llm"].update(sha256="0" * 64))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_manifest, r"copy: no manifest\.json; every checkpoint has one\. Check the path"),
        (no_json, r"manifest\.json: not JSON \(.*\)\. The file was damaged; use another copy"),
        (unknown_format, r"manifest\.json: format 99; this version reads 1 to 3\. Use the version that wrote it"),
        (no_format, r"manifest\.json: format None; this version reads 1 to 3"),
        (no_ledger, r"manifest\.json: 'ledger' is no list"),
        (no_model, r"manifest\.json: 'model' is incomplete \('llm'\)"),
        (no_hash, r"manifest\.json: 'connectors\.image\.safetensors' has no sha256 or bytes"),
        (no_connector, r"manifest\.json: 'connectors\.image\.safetensors' is not among its files"),
        (outside, r"manifest\.json: '\.\./evil\.safetensors' leads out of the folder"),
        (outside_absolute, r"manifest\.json: '/etc/passwd' leads out of the folder"),
        (outside_link, r"manifest\.json: 'connectors\.point\.safetensors' leads out of the folder"),
        (missing_file, r"copy/connectors\.point\.safetensors: missing; the manifest names it"),
        (truncated, r"copy/ledger/001\.safetensors: truncated, \d+ bytes instead of \d+"),
        (longer, r"copy/ledger/001\.safetensors: longer than it was, \d+ bytes instead of \d+"),
        (
            flipped,
            r"copy/connectors\.image\.safetensors: damaged, its hash is [0-9a-f]{16}\.\.\. but [0-9a-f]{16}\.\.\.",
        ),
        (swapped, r"copy/ledger/000\.safetensors: damaged, .* content of ledger/001\.safetensors: files were swapped"),
        (other_base, r"another base LLM\. The checkpoint needs 0{64} .* is [0-9a-f]{64}\. Load it on its own base"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint_is_named_and_a_given_model_not_touched(
    damage: Callable[[Path], None], message: str, folder: Path, saved: tuple[Path, Path, list[dict[str, Tensor]]]
) -> None:
    model = load(saved[0])
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder, model=None if damage is no_model else model)
    assert same(weights(model), saved[2][0]) and list(model.specs) == ["image"]


def test_another_base_shows_both_hashes(saved: tuple[Path, ...], tmp_path: Path) -> None:
    other = write_base(tmp_path / "llm", seed=1)
    model = build(other)
    with pytest.raises(
        CheckpointError, match=f"needs {read_manifest(saved[0])['llm']['sha256']} .* is {hash_llm(other)}"
    ):
        load(saved[0], model=model)


def rehash(folder: Path, file: str) -> None:
    """Let the manifest agree with a file that was written anew."""
    path = folder / file
    described = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    edit(folder, lambda m: m["files"].update({file: described}))


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_a_connector_of_another_model(change: str, folder: Path) -> None:
    file = "connectors.point.safetensors"
    tensors = load_file(folder / file)
    key = sorted(tensors)[-1]
    if change == "shape":
        tensors[key] = tensors[key][:-1].contiguous()
    elif change == "missing":
        del tensors[key]
    else:
        tensors["zzz"] = torch.zeros(3)
    save_file(tensors, folder / file)
    rehash(folder, file)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor '.*' has shape .*, but the model built .* has"):
        load(folder)


def test_after_a_wrong_connector_the_bare_llm_is_left(base: Path, folder: Path) -> None:
    model = load(folder)
    save_file({"x": torch.zeros(1)}, folder / "connectors.point.safetensors")
    rehash(folder, "connectors.point.safetensors")
    with pytest.raises(CheckpointError, match="different models"):
        load(folder, model=model)
    assert same(weights(model), weights(build(base)))
    edit(folder, lambda m: m["modalities"][0]["encoder"].update(kind="no-such"))
    with pytest.raises(ConfigError, match="no encoder 'no-such'"):
        load(folder, model=model)


def test_a_ledger_of_another_llm(folder: Path, saved: tuple[Path, Path, list[dict[str, Tensor]]]) -> None:
    file = "ledger/001.safetensors"
    save_file({"model.layers.7.mlp.up_proj.weight.delta": torch.zeros(24, 16)}, folder / file)
    rehash(folder, file)
    model = load(saved[0])
    with pytest.raises(CheckpointError, match=r"ledger entry 1: tensor .* belongs to no parameter of this LLM"):
        load(folder, model=model)
    assert same(weights(model), saved[2][0])


def test_without_verifying_only_the_form_is_checked(folder: Path) -> None:
    flipped(folder)
    load(folder, verify=False)
    path = folder / "connectors.image.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"connectors\.image\.safetensors: not a safetensors file"):
        load(folder, verify=False)
