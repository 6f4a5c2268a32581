"""Headers: what is read is what PEFT and transformers mean, and damaged or hostile files are named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graftlm.core.errors import CheckpointError
from graftlm.merging.headers import Adapter, TensorInfo, align, aligned, kind, read_adapter, read_header, read_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def llama(folder: Path, seed: int = 0, **settings: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SIZES | settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("headers") / "base")


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def tensor(info: TensorInfo) -> Tensor:
    with info.file.open("rb") as file:
        file.seek(info.start)
        return torch.frombuffer(bytearray(file.read(info.bytes)), dtype=DTYPES[info.dtype]).reshape(info.shape)


# --- one file ---------------------------------------------------------------------------------------------------------


def test_places_are_those_of_the_tensors(tmp_path: Path) -> None:
    made = {
        "a": torch.randn(3, 2),
        "b": torch.randn(5).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(2.5).half(),
    }
    save_file(made, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == made.keys()
    assert all(torch.equal(tensor(found[name]), made[name]) for name in "abd")
    assert (found["c"].numel, found["c"].bytes, found["d"].shape, found["b"].dtype) == (0, 0, (), "BF16")
    starts = [info.start for info in found.values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", r"x.safetensors: a header of 1 bytes in a file of 9; 2 to 100000000 are expected"),
        (b"[]", b"", "a JSON list; an object is expected"),
        (b"\xff\xff", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": 1, "a": 2}', b"", "'a' is given twice"),
        ({"a": 7}, b"", "tensor 'a' is 7; dtype, shape and data_offsets are expected"),
        ({"a": entry(0, 8, dtype="F33")}, bytes(8), "tensor 'a' has dtype 'F33'; one of BOOL, F4"),
        ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), r"has dtype \['F32'\]"),
        ({"a": entry(0, 8, shape=[-2])}, bytes(8), r"shape \[-2\] at \[0, 8\]; whole numbers are expected"),
        ({"a": entry(0, 8, shape=[2.0])}, bytes(8), "whole numbers are expected"),
        ({"a": entry(0, 8, shape=[True])}, bytes(8), "whole numbers are expected"),
        ({"a": entry(0, 8, shape=[1 << 64])}, bytes(8), "whole numbers are expected"),
        ({"a": entry(0, 8, shape=[1 << 62, 4])}, bytes(8), "tensor 'a' has 8 bytes; F32 of"),
        ({"a": entry(8, 0, shape=[0])}, bytes(8), "tensor 'a' has -8 bytes; F32"),
        ({"a": entry(0, 8, shape=[3])}, bytes(8), r"tensor 'a' has 8 bytes; F32 of \[3\] has 12"),
        ({"a": entry(0, 0, shape=[3], dtype="F4")}, b"", r"F4 of \[3\] has 1.5"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "tensor 'b' overlaps 'a'; tensors follow one another"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), "tensor 'b' starts 4 bytes after 'a'"),
        ({"a": entry(4, 8)}, bytes(8), "tensor 'a' starts 4 bytes after the header"),
        ({"a": entry(0, 8)}, bytes(7), r"truncated: \d+ bytes instead of \d+"),
        ({"a": entry(0, 8)}, bytes(9), r"longer than its header says: \d+ bytes instead of \d+"),
        ({"a": entry(0, 1 << 40)}, bytes(8), "truncated"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(write(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1 << 63, "a header of 9223372036854775808 bytes"),
        (100_000_001, "2 to 100000000 are expected"),
        (5000, "truncated: the header alone has 5008 bytes, the file 10"),
        (0, "a header of 0 bytes"),
    ],
)
def test_the_length_of_the_header_is_checked_before_it_is_read(tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=length))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a header of 0 bytes in a file of 0"):
        read_header(tmp_path / "empty")
    for name in ("pipe", "missing"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file; a safetensors file is expected"):
            read_header(tmp_path / name)


def test_headers_are_read_without_torch() -> None:
    code = "import sys, graftlm.merging.headers, graftlm.merging.checks; sys.exit('torch' in sys.modules)"
    path = os.pathsep.join(sys.path)
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}).returncode == 0


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_one_file_and_shards_hold_the_same(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    single, shards = read_weights(base), read_weights(tmp_path / "shards")
    assert len(single.files) == 1 and len(shards.files) > 2
    assert single.tensors.keys() == shards.tensors.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(tensor(single.tensors[name]), value) and torch.equal(tensor(shards.tensors[name]), value)
    order = [(info.file.name, info.start) for info in shards.tensors.values()]
    assert order == sorted(order)
    assert single.numel == sum(p.numel() for p in model.parameters()) and single.bytes == 4 * single.numel


def test_tied_heads_and_nested_configs(base: Path, tmp_path: Path) -> None:
    assert not read_weights(base).tied
    assert read_weights(llama(tmp_path / "tied", tie_word_embeddings=True)).tied
    shutil.copytree(base, tmp_path / "vlm")
    config = json.loads((base / "config.json").read_text())
    nested = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": config}
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(nested))
    assert read_weights(tmp_path / "vlm").language["hidden_size"] == 16 and not read_weights(tmp_path / "vlm").tied
    config.pop("tie_word_embeddings", None)
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    assert not read_weights(tmp_path / "vlm").tied  # a head is stored


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(path: Path, name: str) -> Path:
    return write(path, {name: entry(0, 4)}, bytes(4))


def outside(folder: Path) -> None:
    shard(folder.parent / "out.safetensors", "a")


def sharded(folder: Path) -> None:
    shard(folder / "1.safetensors", "a")
    shard(folder / "2.safetensors", "b")


def absolute(folder: Path) -> None:
    outside(folder)
    index(folder, {"a": str(folder.parent / "out.safetensors")})


def above(folder: Path) -> None:
    outside(folder)
    index(folder, {"a": "../out.safetensors"})


def linked(folder: Path) -> None:
    outside(folder)
    (folder / "1.safetensors").symlink_to(folder.parent / "out.safetensors")
    index(folder, {"a": "1.safetensors"})


def linked_single(folder: Path) -> None:
    outside(folder)
    (folder / "model.safetensors").symlink_to(folder.parent / "out.safetensors")


def roundabout(folder: Path) -> None:
    sharded(folder)
    index(folder, {"a": f"../{folder.name}/1.safetensors"})


def nul(folder: Path) -> None:
    index(folder, {"a": "1\0.safetensors"})


def lost(folder: Path) -> None:
    shard(folder / "1.safetensors", "a")
    index(folder, {"a": "1.safetensors", "b": "2.safetensors"})


def elsewhere(folder: Path) -> None:
    sharded(folder)
    index(folder, {"a": "2.safetensors", "b": "1.safetensors"})


def absent(folder: Path) -> None:
    sharded(folder)
    index(folder, {"a": "1.safetensors", "c": "2.safetensors"})


def unlisted(folder: Path) -> None:
    write(folder / "1.safetensors", {"a": entry(0, 4), "b": entry(4, 8)}, bytes(8))
    index(folder, {"a": "1.safetensors"})


def repeated(folder: Path) -> None:
    shard(folder / "1.safetensors", "a")
    write(folder / "2.safetensors", {"a": entry(0, 4), "b": entry(4, 8)}, bytes(8))
    index(folder, {"a": "1.safetensors", "b": "2.safetensors"})


def both(folder: Path) -> None:
    sharded(folder)
    shard(folder / "model.safetensors", "a")
    index(folder, {"a": "1.safetensors", "b": "2.safetensors"})


def no_map(folder: Path) -> None:
    index(folder, ["a"])


def pickles(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").touch()


def no_index(folder: Path) -> None:
    shard(folder / "model-00001-of-00002.safetensors", "a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            absolute,
            "out.safetensors' leads out of the folder, to .*; a file inside is expected. Do not trust this folder",
        ),
        (above, "'../out.safetensors' leads out of the folder"),
        (linked, "'1.safetensors' leads out of the folder, to"),
        (linked_single, "'model.safetensors' leads out of the folder, to"),
        (roundabout, "leads out of the folder"),
        (nul, "leads out of the folder"),
        (lost, "2.safetensors: missing; the folder's index names it"),
        (elsewhere, "tensor 'a' is said to be in 2.safetensors, which does not hold it; it is in 1.safetensors"),
        (absent, "tensor 'c' is said to be in 2.safetensors, which does not hold it. The file is damaged"),
        (unlisted, r"1 tensors of the files are not in the index \(b\)"),
        (repeated, "2.safetensors: tensor 'a' is also in 1.safetensors; one place is expected"),
        (both, "both model.safetensors and model.safetensors.index.json, which names other files"),
        (no_map, r"'weight_map' is \['a'\]; tensor names with their files are expected"),
        (
            pickles,
            r"the weights are pickles \(pytorch_model-00001-of-00002.bin\).*: graftlm convert .*f --out .*f-safetensors$",
        ),
        (no_index, "model-00001-of-00002.safetensors, but no model.safetensors.index.json; shards need their index"),
        (lambda folder: None, "no weights; model.safetensors or model.safetensors.index.json is expected"),
    ],
)
def test_folders_that_disagree_with_themselves(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    make(folder)
    with pytest.raises(CheckpointError, match=message):
        read_weights(folder)


def test_the_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    shard(tmp_path / "models--a--b" / "blobs" / "abc", "a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert list(read_weights(snapshot).tensors) == ["a"]


def test_configs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json; a Hugging Face folder has one"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: a JSON list; an object is expected"):
        read_weights(tmp_path)


def test_kinds_of_folders(base: Path, tmp_path: Path) -> None:
    assert kind(base) == "hf"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert kind(tmp_path) == "peft"
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    assert kind(tmp_path) == "graftlm"
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        kind(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no model"):
        kind(tmp_path / "empty")


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(model: PreTrainedModel, folder: Path, **settings: Any) -> Mapping[str, Tensor]:
    """Save an adapter with random values; the state of the base with it merged, as PEFT has it."""
    made = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad or "bias" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    made.save_pretrained(folder)
    return made.merge_and_unload().state_dict()


def effective(base: Path, adapter: Adapter) -> dict[str, Tensor]:
    """The same from headers."""
    weights = {name: tensor(info) for name, info in read_weights(base).tensors.items()}
    weights |= {name: tensor(info) for name, info in adapter.replaced.items()}
    for name, (a, b, scale) in adapter.updates.items():
        delta = scale * (tensor(b) @ tensor(a))
        weights[name] = weights[name] + (delta.T if name in adapter.transposed else delta)
        assert adapter.shape(name) == weights[name].shape
    return weights


PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 24, r"layers\.1\..*up_proj": 6},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, **PATTERNS},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "use_rslora": True, **PATTERNS},
        {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
        {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_is_what_peft_makes_of_it(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = adapter(LlamaForCausalLM.from_pretrained(base), tmp_path, **settings)
    found = read_adapter(tmp_path)
    assert found.base == str(base) and kind(tmp_path) == "peft"
    assert align(read_weights(base), found).extra == ()
    made = effective(base, found)
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value)
    assert found.tensors.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_base(tmp_path: Path, bias: str) -> None:
    base = llama(tmp_path / "base", attention_bias=True)
    expected = adapter(
        LlamaForCausalLM.from_pretrained(base), tmp_path / "a", target_modules=["q_proj"], r=2, bias=bias
    )
    found = read_adapter(tmp_path / "a")
    assert "model.layers.1.self_attn.q_proj.bias" in found.replaced
    assert ("model.layers.1.self_attn.k_proj.bias" in found.replaced) == (bias == "all")
    made = effective(base, found)
    for name in found.names:
        torch.testing.assert_close(made[name], expected[name])


def test_layers_that_hold_their_weight_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "b"
    )
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "b")
    expected = adapter(model, tmp_path / "a", target_modules=["c_attn", "c_proj"], r=2, fan_in_fan_out=True)
    found = read_adapter(tmp_path / "a")
    assert found.transposed == found.updates.keys()
    base = read_weights(tmp_path / "b")
    assert base.tied
    names = align(base, found).names  # the file may lack GPT-2's own prefix
    for name in names:
        torch.testing.assert_close(effective(tmp_path / "b", found)[name], expected[name])


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    adapter(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora", target_modules=["q_proj"], r=2)
    return tmp_path / "lora"


def change(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def resave(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA is read. Merge the adapter into its base with PEFT"),
        ({"use_dora": True}, "use_dora is set; an update that is scale · B A on an unchanged base is expected"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"lora_bias": True, "layer_replication": [[0, 1]]}, "lora_bias, layer_replication is set"),
        ({"r": "8"}, "r is '8'; a number is expected"),
        ({"lora_alpha": None}, "lora_alpha is None; a number is expected"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is {'q_proj': 'x'}; names with numbers are expected"),
        ({"alpha_pattern": {"(": 2}}, r"'\(' is no pattern"),
        ({"r": 4}, "'model.layers.0.self_attn.q_proj.weight' has rank 2, but adapter_config.json says 4"),
    ],
)
def test_adapters_that_are_no_plain_lora(lora: Path, values: dict[str, object], message: str) -> None:
    change(lora, **values)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(lora)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: x.pop(B), "'model.layers.0.self_attn.q_proj.weight' has only A; A and B are expected"),
        (lambda x: x.pop(A), "has only B; A and B are expected"),
        (
            lambda x: x.update({A: torch.zeros(3, 16)}),
            r"has A of \(3, 16\) and B of \(16, 2\); \(R, in\) and \(out, R\)",
        ),
        (lambda x: x.update({A: torch.zeros(32)}), "or saved from shards, cannot be read"),
        (lambda x: x.update({"other": torch.zeros(2)}), "tensor 'other'; names that start with 'base_model.model.'"),
        (
            lambda x: x.update({"base_model.model.model.norm.weight": torch.zeros(16)}),
            "tensor 'model.norm.weight' belongs to no update",
        ),
        (
            lambda x: x.update({B.replace("lora_B.weight", "lora_magnitude_vector"): torch.zeros(16)}),
            "q_proj.lora_magnitude_vector' belongs to no update",
        ),
        (
            lambda x: x.update({B.replace("weight", "bias"): torch.zeros(16)}),
            "q_proj.lora_B.bias' belongs to no update",
        ),
        (
            lambda x: x.update({A.replace("lora_A", "lora_A.default"): torch.zeros(2, 16)}),
            "two tensors A of 'model.layers.0.self_attn.q_proj.weight'",
        ),
        (lambda x: x.clear(), "no tensors; the A and B of some weight are expected"),
    ],
)
def test_adapter_files_that_do_not_fit(lora: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    resave(lora, edit)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(lora)


def test_names_with_the_name_of_the_adapter(lora: Path) -> None:
    expected = {name: (update.a.shape, update.scale) for name, update in read_adapter(lora).updates.items()}

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    resave(lora, rename)
    assert {name: (update.a.shape, update.scale) for name, update in read_adapter(lora).updates.items()} == expected


def test_adapters_without_their_file(lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors, but no adapter_model.safetensors"):
        read_adapter(lora)
    (lora / "x.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles \(adapter_model.bin\).*graftlm convert"):
        read_adapter(lora)
    (lora / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_config.json; an adapter of PEFT has one"):
        read_adapter(lora)


# --- names ------------------------------------------------------------------------------------------------------------


def renamed(base: Path, folder: Path, rename: Callable[[str], str], **more: Tensor) -> Path:
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    tensors = {rename(name): value for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors | more, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("rename", "prefix"),
    [
        (lambda name: name, ("", "")),
        (lambda name: f"language_model.{name}", ("", "language_model.")),
        (lambda name: name.replace("model.", "model.language_model.", 1), ("model.", "model.language_model.")),
        (lambda name: f"llm.{name}", ("", "llm.")),
        (lambda name: name.removeprefix("model."), ("model.", "")),
    ],
)
def test_a_language_model_is_found_in_a_larger_one(
    base: Path, tmp_path: Path, rename: Callable[[str], str], prefix: tuple[str, str]
) -> None:
    more = {"vision_tower.weight": torch.zeros(2), "multi_modal_projector.weight": torch.zeros(2)}
    weights, model = read_weights(base), read_weights(renamed(base, tmp_path / "vlm", rename, **more))
    found = align(weights, model)
    assert found.names == {name: rename(name) for name in weights.tensors}
    assert (found.missing, set(found.extra), found.prefix) == ((), set(more), prefix)


def test_an_adapter_of_a_larger_model_in_the_names_of_the_base(base: Path, lora: Path) -> None:
    expected = read_adapter(lora)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.model.", "model.model.language_model.")] = tensors.pop(name)

    resave(lora, rename)
    found, weights = read_adapter(lora), read_weights(base)
    assert not found.updates.keys() & weights.tensors.keys() and align(weights, found).extra == ()
    assert aligned(weights, found).updates.keys() == expected.updates.keys()


def test_constants_and_tied_heads_count_as_nothing(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    inert = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "lm_head.weight": torch.zeros(32, 16)}
    model = read_weights(renamed(base, tmp_path / "model", str, **inert))
    assert (align(read_weights(base), model).extra, align(model, read_weights(base)).missing) == ((), ())
    assert model.tied
