"""What is refused before a weight is read."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.core.errors import CheckpointError, MergeError
from graftlm.core.files import hash_file
from graftlm.merging.checks import Finding, Grown, compare, nonfinite, place, read_model, require
from graftlm.merging.headers import Weights, read_weights
from graftlm.model.checkpoint import save
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]

SIZES = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["<s>", "</s>", "a", "b", "c", "d", "e", "f", "ab", "cd"]
MERGES = [("a", "b"), ("c", "d")]
IMAGE = ModalitySpec("image", EncoderSpec("mini-image"), ConnectorSpec("mlp", {"pool": 2}))
POINT = ModalitySpec("point", EncoderSpec("mini-point"), ConnectorSpec("linear"))


def llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SIZES | settings)).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(WORDS)}, MERGES))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("checks") / "base")


@pytest.fixture(scope="module")
def base(folder: Path) -> Weights:
    return read_weights(folder)


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "m")
    return tmp_path / "m"


def say(findings: Sequence[Finding], level: str = "error") -> str:
    return "\n".join(str(finding) for finding in findings if finding.level == level)


def check(base: Weights, *folders: Path, **arguments: Any) -> list[Finding]:
    models = {folder.name: read_model(folder) for folder in folders}
    return compare(base, models, **{"least": 1, **arguments})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_models_of_one_base_fit(base: Weights, tmp_path: Path) -> None:
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    assert check(base, *models, out=tmp_path / "out", needed=1000, least=2) == []
    require([])


def test_all_errors_are_told_at_once(base: Weights, tmp_path: Path) -> None:
    other = llama(tmp_path / "a", hidden_size=8)
    findings = check(base, other, out=other, least=2)
    with pytest.raises(
        MergeError, match=r"(?s)3 reasons against merging:\n.*1 given, at least 2.*another base.*output is a"
    ):
        require(findings)
    with pytest.raises(MergeError, match=r"^the models: 1 given, at least 2 expected. Name the models to merge.$"):
        require(check(base, llama(tmp_path / "b"), least=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 8}, "another base: hidden_size 8 instead of 16"),
        ({"num_hidden_layers": 3}, "another base: num_hidden_layers 3 instead of 2"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4},
            "num_attention_heads 4 instead of 2, num_key_value_heads 4 instead of 2, head_dim 4 instead of 8",
        ),
    ],
)
def test_another_base_is_seen_in_the_config(base: Weights, tmp_path: Path, settings: Any, message: str) -> None:
    found = check(base, llama(tmp_path / "m", **settings))
    assert len(found) == 1 and message in say(found) and "trained from this base" in say(found)


def test_another_architecture_with_the_same_shapes(base: Weights, model: Path) -> None:
    edit_json(model / "config.json", lambda c: c.update(model_type="mistral", architectures=["MistralForCausalLM"]))
    assert "another architecture: mistral instead of llama" in say(check(base, model))
    edit_json(model / "config.json", lambda c: c.update(model_type="llava", architectures=["LlavaLlamaForCausalLM"]))
    assert check(base, model) == []


def test_other_positions_and_epsilons_are_worth_a_word(base: Weights, model: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["rms_norm_eps"] = 1e-3
        config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}

    edit_json(model / "config.json", change)
    found = check(base, model)
    assert not say(found)
    assert "rms_norm_eps 0.001 instead of 1e-06, rotary positions {'rope_theta': 500000.0}" in say(found, "warning")

    def older(config: dict[str, Any]) -> None:
        config["rms_norm_eps"] = 1e-6
        del config["rope_parameters"]
        config["rope_theta"] = 10000

    edit_json(model / "config.json", older)
    assert check(base, model) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda x: [x.pop(f"model.layers.{i}.mlp.{n}_proj.weight") for i in (0, 1) for n in ("up", "down")],
            r"4 tensors? of the base missing: model.layers.0.mlp.\w+.weight, model.layers.\d.mlp.\w+.weight, "
            r"model.layers.\d.mlp.\w+.weight and 1 more",
        ),
        (
            lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}),
            "1 tensor that the base does not have: model.layers.0.self_attn.q_proj.bias. They would be lost",
        ),
        (
            lambda x: x.update({"model.norm.weight": torch.zeros(8)}),
            r"1 tensor of another shape: model.norm.weight \(8,\) instead of \(16,\)",
        ),
        (
            lambda x: x.update({name: torch.zeros(14, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}),
            r"another vocabulary: 14 rows instead of 12 in .*resize_token_embeddings",
        ),
        (
            lambda x: x.update({"model.norm.weight": x["model.norm.weight"].double()}),
            "1 tensor of F64, but only BF16, F16, F32 can be merged: model.norm.weight",
        ),
        (
            lambda x: x.update({name: value.to(torch.int8) for name, value in x.items() if "mlp" in name}),
            r"6 tensors of I8, but only BF16, F16, F32 can be merged: .* and 3 more",
        ),
        (
            lambda x: [x.update({f"x.{name}": x.pop(name)}) for name in list(x)],
            r"none of its tensors is called as in the base",
        ),
    ],
)
def test_other_tensors(base: Weights, model: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    edit_weights(model, edit)
    found = check(base, model)
    assert len(found) == 1
    with pytest.raises(MergeError, match=message):
        require(found)


def test_dtypes_are_worth_a_word(base: Weights, model: Path, tmp_path: Path) -> None:
    found = check(base, llama(tmp_path / "half", dtype=torch.bfloat16))
    assert not say(found) and "BF16, but the base is F32" in say(found, "warning")
    edit_weights(model, lambda x: x.update({"model.norm.weight": x["model.norm.weight"].half()}))
    assert "mixed dtypes: F32 (20 tensors), F16 (1 tensor)" in say(check(base, model), "warning")


def test_constants_are_copied(base: Weights, model: Path) -> None:
    edit_weights(model, lambda x: x.update({"model.norm.weight": torch.zeros(16, dtype=torch.int64)}))
    assert "1 tensor of whole numbers: model.norm.weight. They are not merged" in say(check(base, model), "warning")
    edit_json(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    assert "1 tensor of I64, but only" in say(check(base, model))


def test_heads_that_are_the_embedding_in_one_of_both(base: Weights, tmp_path: Path) -> None:
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    assert "1 tensor of the base missing: lm_head.weight. Its head is the embedding" in say(check(base, tied))
    assert "would be lost. Use a base with a head of its own" in say(check(read_weights(tied), base.folder))


def test_what_a_vision_language_model_has_beside_its_language_model(base: Weights, model: Path) -> None:
    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_tower.vision_model.weight"] = torch.zeros(2)
        tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(2)

    edit_weights(model, wrap)
    edit_json(
        model / "config.json", lambda c: c.update(text_config=dict(c), model_type="llava", architectures=["Llava"])
    )
    found = check(base, model)
    assert not say(found)
    text = say(found, "warning")
    assert "2 tensors beside the language model" in text and "vision_tower.vision_model" in text
    assert "multi_modal_projector.linear_1" in text and "is under 'language_model.'" in text


# --- tokenizers -------------------------------------------------------------------------------------------------------


def swap(content: dict[str, Any]) -> None:
    content["model"]["vocab"].update({"ab": 9, "cd": 8})


def shorten(content: dict[str, Any]) -> None:
    del content["model"]["vocab"]["cd"]
    content["model"]["merges"].pop()


def remerge(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def spell(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def add(content: dict[str, Any]) -> None:
    content["added_tokens"].append({"id": 10, "content": "<image>"})


def empty(content: dict[str, Any]) -> None:
    del content["model"]


@pytest.mark.parametrize(
    ("edit", "level", "message"),
    [
        (swap, "error", "another vocabulary: 10 tokens in both, and token 8 is 'cd' instead of 'ab'"),
        (add, "error", "11 tokens instead of 10; token 10 is '<image>', and the base has none of that number"),
        (shorten, "warning", "9 tokens instead of 10; it lacks token 9, 'cd'"),
        (remerge, "error", "text is split otherwise (merges differ)"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "warning", "normalizer of tokenizer.json differ"),
        (empty, "error", "a tokenizer.json of an unknown form"),
        (spell, "", ""),
        (lambda c: c.update(truncation={"max_length": 5}), "", ""),
    ],
)
def test_other_tokenizers(
    base: Weights, model: Path, edit: Callable[[dict[str, Any]], None], level: str, message: str
) -> None:
    edit_json(model / "tokenizer.json", edit)
    found = check(base, model)
    assert message in say(found, level) if level else found == []


def test_tokenizers_that_cannot_be_compared(base: Weights, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("[]")
    assert "a tokenizer.json of an unknown form" in say(check(base, model))
    (model / "tokenizer.json").unlink()
    assert f"cannot be compared: {model} without one" in say(check(base, model), "warning")
    (model / "tokenizer.model").write_bytes(b"a")
    assert "the base's is of another kind" in say(check(base, model), "warning")
    shutil.copytree(model, tmp_path / "base")
    (model / "tokenizer.model").write_bytes(b"b")
    assert "another tokenizer: tokenizer.model differs" in say(check(read_weights(tmp_path / "base"), model))


# --- adapters ---------------------------------------------------------------------------------------------------------


def lora(base: Path, folder: Path, targets: Sequence[str] = ("q_proj",), **settings: Any) -> Path:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=[*targets], **settings)
    )
    model.save_pretrained(folder)
    return folder


def test_adapters_fit_their_base(base: Weights, folder: Path, tmp_path: Path) -> None:
    assert check(base, lora(folder, tmp_path / "a"), lora(folder, tmp_path / "b", modules_to_save=["lm_head"])) == []


def test_adapters_of_another_base(base: Weights, folder: Path, tmp_path: Path) -> None:
    larger = lora(llama(tmp_path / "larger", hidden_size=32), tmp_path / "a")
    found = check(base, larger)
    assert "2 tensors of another shape: model.layers.0.self_attn.q_proj.weight (32, 32) instead of (16, 16)" in say(
        found
    )
    assert f"made for the base '{tmp_path / 'larger'}', not {folder}" in say(found, "warning")
    deeper = lora(llama(tmp_path / "deeper", num_hidden_layers=3), tmp_path / "b")
    assert "1 weight that the base does not have: model.layers.2.self_attn.q_proj.weight" in say(check(base, deeper))


def test_an_adapter_names_its_base_in_many_ways(base: Weights, folder: Path, tmp_path: Path) -> None:
    made = lora(folder, tmp_path / "a")
    for name, warned in (("someone/base", False), ("someone/Base/", False), ("", False), ("someone/other", True)):
        edit_json(made / "adapter_config.json", lambda c, name=name: c.update(base_model_name_or_path=name))
        assert bool(check(base, made)) == warned
    snapshot = tmp_path / "models--someone--other" / "snapshots" / "1"
    shutil.copytree(folder, snapshot)
    assert check(read_weights(snapshot), made) == []


def test_an_adapter_of_the_head_of_a_tied_base(tmp_path: Path) -> None:
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    found = check(read_weights(tied), lora(tied, tmp_path / "a", ["q_proj", "lm_head"]))
    assert "it changes the head, which in this base is the embedding" in say(found)


# --- checkpoints of graftlm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints named after their modalities."""
    place = tmp_path_factory.mktemp("grown")
    for specs in ((IMAGE,), (POINT,), ()):
        built = MultimodalLM.build(ModelSpec(str(folder), specs, LoraSpec(rank=2, alpha=4.0)))
        for spec in specs:
            built.add_modality(spec, seed=1)
        built.adapter.open(1)
        built.adapter.fold()
        save(built, place / ("-".join(spec.name for spec in specs) or "none"), history=[])
    return place


def test_checkpoints_fit_the_base_that_they_were_grown_from(base: Weights, grown: Path, tmp_path: Path) -> None:
    assert check(base, grown / "image", grown / "point") == []
    other = llama(tmp_path / "other", seed=7)
    found = check(read_weights(other), grown / "image")
    assert "another base: " in say(found) and f"but {other} is" in say(found) and len(found) == 1


def test_a_checkpoint_without_modality_or_connector(base: Weights, grown: Path) -> None:
    assert "has no modality, hence no connector" in say(check(base, grown / "none"))
    model = read_model(grown / "image")
    assert isinstance(model, Grown)
    files = {name: file for name, file in model.manifest["files"].items() if not name.startswith("connectors")}
    found = compare(base, {"image": Grown(model.folder, {**model.manifest, "files": files})}, least=1)
    assert "no connector of 'image' (connectors.image.safetensors is missing)" in say(found)


def test_a_modality_is_of_one_connector(base: Weights, grown: Path, tmp_path: Path) -> None:
    model = read_model(grown / "image")
    assert isinstance(model, Grown)
    manifest = model.manifest
    again = Grown(tmp_path, manifest)
    found = compare(base, {"image": model, "ocr": Grown(grown / "image" / "..", manifest)}, least=1)
    assert "modality 'image' is also of 'image', with the same connector" in say(found, "warning")
    files = {**manifest["files"], "connectors.image.safetensors": {"sha256": "0", "bytes": 1}}
    found = compare(base, {"image": model, "ocr": Grown(grown / "image", {**manifest, "files": files})})
    assert "modality 'image' is also of 'image', with another encoder or connector" in say(found)
    assert "is the folder of image too" in say(found, "warning")
    twice = {**manifest, "modalities": manifest["modalities"] * 2}
    assert "names modality 'image' twice" in say(compare(base, {"image": Grown(again.folder, twice)}))


def test_ledgers_of_another_base(base: Weights, grown: Path, tmp_path: Path) -> None:
    model = read_model(grown / "image")
    assert isinstance(model, Grown)
    a, b = torch.zeros(2, 16), torch.zeros(16, 2)
    entries = {
        "model.layers.9.mlp.up_proj.weight.delta": a,
        "model.layers.0.self_attn.q_proj.weight.A": a[:, :8].clone(),
    }
    save_file(entries | {"model.layers.0.self_attn.q_proj.weight.B": b}, tmp_path / "0.safetensors")
    (tmp_path / "connectors.image.safetensors").touch()
    found = compare(base, {"m": Grown(tmp_path, {**model.manifest, "ledger": ["0.safetensors"]})}, least=1)
    assert "1 update of unknown tensors: 0.safetensors: model.layers.9.mlp.up_proj.weight.delta" in say(found)
    assert (
        "1 update of another shape: 0.safetensors: model.layers.0.self_attn.q_proj.weight.A (2, 8) on (16, 16)"
        in say(found)
    )


def test_composed_checkpoints(base: Weights, grown: Path, folder: Path, tmp_path: Path) -> None:
    model = read_model(grown / "image")
    assert isinstance(model, Grown)
    routed = Grown(model.folder, {**model.manifest, "routing": {"kind": "mmer"}})
    assert "is itself composed of several models" in say(compare(base, {"m": routed}, least=1))
    shutil.copytree(grown / "image", tmp_path / "plain")
    shutil.copytree(folder, tmp_path / "plain" / "llm")
    plain = Grown(tmp_path / "plain", {**model.manifest, "format": 2, "llm": {"source": "llm", "sha256": ""}})
    assert compare(base, {"m": plain}, least=1) == []
    edit_weights(tmp_path / "plain" / "llm", lambda x: x.pop("model.norm.weight"))
    assert "1 tensor of the base missing: model.norm.weight" in say(compare(base, {"m": plain}, least=1))


def test_damaged_checkpoints_are_not_read(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown / "image", tmp_path / "m")
    with (tmp_path / "m" / "connectors.image.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(CheckpointError, match="longer than it was"):
        read_model(tmp_path / "m")


# --- places -----------------------------------------------------------------------------------------------------------


def test_the_output_is_apart_from_the_inputs(model: Path, tmp_path: Path) -> None:
    inputs = {"the base": model}
    assert place(tmp_path / "new" / "out", inputs, 0) == []
    (tmp_path / "empty").mkdir()
    assert place(tmp_path / "empty", inputs, 0) == []
    assert f"the output is the base ({model})" in say(place(model, inputs, 0))
    assert f"the output is the base ({model})" in say(place(model / ".." / "m", inputs, 0))
    assert "the output is inside the base" in say(place(model / "out", inputs, 0))
    assert "the output contains the base" in say(place(tmp_path, inputs, 0))
    (tmp_path / "link").symlink_to(model)
    assert "the output is the base" in say(place(tmp_path / "link", inputs, 0))


def test_the_output_is_new_and_has_space(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for path in (tmp_path / "full", tmp_path / "full" / "x"):
        assert "exists; a new folder is expected" in say(place(path, {}, 0))
    assert "cannot be written" in say(place(tmp_path / "full" / "x" / "out", {}, 0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1,001 bytes are needed, 1,000 are free. Make space" in say(place(tmp_path / "out", {}, 1001))
    assert place(tmp_path / "out", {}, 1000) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "x").write_bytes(bytes(4096))
    assert place(tmp_path / "out", {}, 1001) == []


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_none_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("graftlm.merging.checks.CHUNK", 64)
    (tmp_path / "config.json").write_text("{}")
    good, bad = torch.randn(100, 3).to(dtype), torch.randn(50).to(dtype)
    good[0] = torch.finfo(dtype).max
    good[1] = torch.finfo(dtype).smallest_normal / 2
    bad[::10] = float("nan")
    bad[7], bad[49] = float("inf"), float("-inf")
    save_file({"good": good, "bad": bad, "whole": torch.full((9,), -1)}, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path)
    seen: list[int] = []
    found = nonfinite(weights, seen.append)
    assert len(found) == 1 and "7 of 50 values are infinite or no numbers" in str(found[0])
    assert f"{tmp_path / 'model.safetensors'}: 'bad'" in str(found[0])
    assert seen == sorted(seen) and seen[-1] <= weights.bytes
    assert nonfinite({"good": weights.tensors["good"]}) == []
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(weights.tensors["bad"].start + 4)
    with pytest.raises(CheckpointError, match=r"ends within '.*'. The file was cut"):
        nonfinite(weights)


def test_values_of_a_checkpoint(grown: Path) -> None:
    model = read_model(grown / "image")
    assert isinstance(model, Grown)
    assert {name.partition(": ")[0] for name in model.tensors} == {
        name for name in model.manifest["files"] if hash_file(model.folder / name)
    }
    assert nonfinite(model) == []
