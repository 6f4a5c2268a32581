"""Pickles become safetensors with the same numbers; hostile and damaged ones become a message."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.core.errors import CheckpointError, MergeError
from graftlm.merging.convert import _convert_file, convert
from graftlm.merging.headers import read_adapter, read_header, read_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]


class Shell:
    """What a hostile pickle holds."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def llama(folder: Path, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **settings)).to(torch.bfloat16)
    folder.mkdir()
    model.config.save_pretrained(folder)
    return model


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        x.dtype == expected[name].dtype and torch.equal(x, expected[name]) for name, x in found.items()
    )


def one(folder: Path, content: object, name: str = "pytorch_model.bin", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name, **settings)
    return folder / name


# --- folders, by the other process ------------------------------------------------------------------------------------


def test_shards_become_shards(tmp_path: Path) -> None:
    state = llama(tmp_path / "m").state_dict()
    names, where = list(state), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        one(tmp_path / "m", {name: state[name] for name in part}, file)
        where |= dict.fromkeys(part, file)
    (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for name in ("tokenizer.json", "LICENSE", "modeling.py", "optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / "m" / name).write_text("x")
    one(tmp_path / "m", {"0.weight": torch.ones(2)}, "mm_projector.bin")
    lines: list[str] = []
    assert convert(tmp_path / "m", tmp_path / "out", progress=lines.append) == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("config.json", "generation_config.json", "tokenizer.json", "LICENSE", "mm_projector.safetensors", "done"),
    } - {"generation_config.json"}
    weights = read_weights(tmp_path / "out")
    assert same({name: load_file(info.file)[name] for name, info in weights.tensors.items()}, state)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == weights.bytes
    assert same(load_file(tmp_path / "out" / "mm_projector.safetensors"), {"0.weight": torch.ones(2)})
    assert lines[1] == "pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors: 5 tensors (2/3)"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same(loaded.state_dict(), state)


def test_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(llama(tmp_path / "m"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "safe")
    shutil.copytree(tmp_path / "safe", tmp_path / "a")
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    one(tmp_path / "a", state, "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    convert(tmp_path / "a", tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "adapter_model.safetensors"), state)
    assert read_adapter(tmp_path / "out").updates.keys() == read_adapter(tmp_path / "safe").updates.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_do_nothing(tmp_path: Path, zipped: bool) -> None:
    one(tmp_path / "m", {"a": Shell(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"asks for posix.system; only tensors are read, and nothing was run"):
        convert(tmp_path / "m", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_killed_conversion_leaves_nothing(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    for number in (1, 2):
        one(tmp_path / "m", {f"x{number}": torch.ones(3)}, f"pytorch_model-0000{number}-of-00002.bin")
    code = "import sys; from pathlib import Path; from graftlm.merging.convert import convert; convert(*map(Path, sys.argv[1:]))"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GRAFTLM_KILL_AT": "convert.file:2"},
        capture_output=True,
    )
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 10
    while still := [path for path in Path("/proc").glob("[0-9]*") if str(tmp_path) in cwd(path)]:
        assert time.monotonic() < deadline, f"{still} outlived its parent"
        time.sleep(0.05)
    convert(tmp_path / "m", tmp_path / "out")
    assert set(read_weights(tmp_path / "out").tensors) == {"x1", "x2"}
    assert not list(tmp_path.glob(".*"))


def cwd(process: Path) -> str:
    try:
        return os.readlink(process / "cwd")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "was killed, as the system does when memory runs out. Nothing was written"),
        ("kill -11 $$", "died of signal 11 and said: nothing. Nothing was written"),
        ("echo no luck >&2; exit 3", "ended with 3 and said: no luck. Nothing was written"),
    ],
)
def test_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    one(tmp_path / "m", {"a": torch.ones(2)})
    (tmp_path / "python").write_text(f"#!/bin/sh\nenv > {tmp_path / 'env'}\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m", tmp_path / "out")
    assert "secret" not in (tmp_path / "env").read_text()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


# --- folders that are refused at once ---------------------------------------------------------------------------------


def empty(folder: Path) -> None:
    (folder / "training_args.bin").touch()


def safe(folder: Path) -> None:
    (folder / "model.safetensors").touch()
    (folder / "pytorch_model.bin").touch()


def incomplete(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00003.bin").touch()
    (folder / "pytorch_model-00002-of-00003.bin").touch()


def index_of_more(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def index_of_elsewhere(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00001.bin").touch()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../pytorch_model.bin"}}')


def link(folder: Path) -> None:
    (folder.parent / "secret.bin").touch()
    (folder / "pytorch_model.bin").symlink_to("../secret.bin")


def clash(folder: Path) -> None:
    (folder / "a.bin").touch()
    (folder / "a.pt").touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, r"no pickled weights \(.bin, .pt, .pth\); there is nothing to convert"),
        (safe, r"already safetensors \(model.safetensors\); there is nothing to convert"),
        (incomplete, r"2 of 3 shards \(pytorch_model-00001-of-00003.bin, .*Complete the download"),
        (index_of_more, "pytorch_model-00002-of-00002.bin: missing"),
        (index_of_elsewhere, "'../pytorch_model.bin' leads out of the folder"),
        (link, "'pytorch_model.bin' leads out of the folder"),
        (clash, "a.safetensors, which is there too"),
    ],
)
def test_folders_that_cannot_be_converted(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    (tmp_path / "m").mkdir()
    make(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m", tmp_path / "out")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    one(tmp_path / "m", {"a": torch.ones(2)})
    with pytest.raises(MergeError, match="the output is the folder"):
        convert(tmp_path / "m", tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(MergeError, match="exists; a new folder is expected"):
        convert(tmp_path / "m", tmp_path / "out")


# --- single files -----------------------------------------------------------------------------------------------------


def convert_file(source: Path, *, tied: bool = False) -> dict[str, Tensor]:
    target = source.with_suffix(".safetensors")
    assert _convert_file(source, target, tied=tied) == len(read_header(target))
    return load_file(target)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_every_dtype_and_shape(tmp_path: Path, wrapper: str | None) -> None:
    state = OrderedDict(
        (str(dtype), torch.ones(3, 2).to(dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    )
    state |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), "column": torch.arange(6.0).reshape(2, 3).T}
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    found = convert_file(one(tmp_path / "m", state if wrapper is None else {wrapper: state, "epoch": 3}))
    assert same(found, {name: tensor.detach() for name, tensor in state.items()})
    starts = {info.dtype: info.start for info in read_header(tmp_path / "m" / "pytorch_model.safetensors").values()}
    assert starts["F64"] % 8 == starts["F32"] % 4 == starts["BF16"] % 2 == 0


def test_files_of_old_versions(tmp_path: Path) -> None:
    state = {"a": torch.randn(3)}
    assert same(convert_file(one(tmp_path / "m", state, _use_new_zipfile_serialization=False)), state)


def test_weights_that_share_memory(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    state = {"model.embed_tokens.weight": whole, "lm_head.weight": whole, "upper": whole[:2], "lower": whole[1:]}
    source = one(tmp_path / "m", state)
    assert same(convert_file(source), state)
    assert same(convert_file(source, tied=True), {name: x for name, x in state.items() if name != "lm_head.weight"})
    apart = {"model.embed_tokens.weight": whole, "lm_head.weight": whole.clone()}
    assert same(convert_file(one(tmp_path / "n", apart), tied=True), apart)


def truncated(path: Path) -> None:
    one(path.parent, {"a": torch.randn(5000)})
    path.write_bytes(path.read_bytes()[:9000])


def garbled(path: Path) -> None:
    one(path.parent, {"a": torch.randn(5000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def packed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, "truncated, the archive's end is missing. Complete the download"),
        (garbled, r"the checksum of '\w+/data/0' is wrong. The file is damaged"),
        (packed, "'archive/data.pkl' is compressed, which PyTorch never does"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18)), "The file is damaged"),
        (lambda path: path.touch(), "cannot be read .*The file is damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "more than tensors|damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": Shell(path.with_name("ran"))})), "It may be hostile"),
        (lambda path: one(path.parent, {"a": Shell(path.with_name("ran"))}), "asks for posix.system"),
        (lambda path: one(path.parent, {"a": print}), "asks for builtins.print|asks for print"),
        (lambda path: one(path.parent, torch.nn.Linear(1, 1)), r"asks for torch.nn.modules.linear.Linear"),
        (lambda path: one(path.parent, torch.ones(2)), "a Tensor; tensors by name are expected"),
        (lambda path: one(path.parent, {}), "a dict; tensors by name are expected. It holds no weights"),
        (lambda path: one(path.parent, {"a": torch.ones(2), "epoch": 3}), "entry 'epoch' is a int"),
        (lambda path: one(path.parent, {1: torch.ones(2)}), "entry 1 is a Tensor"),
        (lambda path: one(path.parent, {"a": torch.ones(2).to_sparse()}), r"'a' is torch.sparse_coo; plain tensors"),
        (lambda path: one(path.parent, {"a": torch.ones(2, device="meta")}), "'a' is without data; plain tensors"),
        (lambda path: one(path.parent, {"a": torch.ones(2, dtype=torch.complex128)}), "'a' is torch.complex128, which"),
        (
            lambda path: one(path.parent, {"a": torch.ones(1).expand(1 << 40)}),
            "'a' has 4398046511104 bytes, of which 4 are stored; all are expected. The file is hostile",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    source = tmp_path / "m" / "pytorch_model.bin"
    source.parent.mkdir()
    make(source)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_file(source)
    assert str(caught.value).startswith(f"{source}: ")
    assert {path.name for path in source.parent.iterdir()} == {source.name}


def test_torch_without_the_corrected_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        CheckpointError, match=r"torch 2.9.1\+cpu can be made to run programs .*; 2.10 or later is expected"
    ):
        convert_file(one(tmp_path / "m", {"a": torch.ones(2)}))
