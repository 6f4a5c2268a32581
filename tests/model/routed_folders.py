"""Composed checkpoints for tests, and what they mean, computed naively."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from graftlm.core.files import hash_file
from graftlm.data.types import Media, Sample
from graftlm.model.checkpoint import save
from graftlm.model.manifest import hash_llm
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, ModalitySpec, ModelSpec

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(28))]
CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
IMAGE = ModalitySpec("image", EncoderSpec("mini-image"), ConnectorSpec("linear", {"pool": 2}))
AUDIO = ModalitySpec("audio", EncoderSpec("mini-audio"), ConnectorSpec("linear", {"pool": 4}))
POINT = ModalitySpec("point", EncoderSpec("mini-point"), ConnectorSpec("linear"))
ROUTES = ("image", "audio", "image_captions")
MODALITIES = ("image", "audio", "image")


def write_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A small random LLM whose answers are far from ties."""
    torch.manual_seed(0)
    values = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    llm = AutoModelForCausalLM.from_config(CONFIGS[family](**values | changes))
    for name, parameter in llm.named_parameters():
        if parameter.dim() == 1:  # norms and biases, else ones and zeros
            parameter.data += 0.25 * torch.randn(parameter.shape)
            assert name
    llm.to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def base_weights(base: Path) -> dict[str, Tensor]:
    return load_file(base / "model.safetensors")


def pack(bits: Tensor) -> Tensor:
    """Bit j of byte b is entry 8 b + j."""
    flat = bits.flatten().tolist()
    flat += [False] * (-len(flat) % 8)
    return torch.tensor(
        [sum(int(flat[i + j]) << j for j in range(8)) for i in range(0, len(flat), 8)], dtype=torch.uint8
    )


def updates(
    weights: dict[str, Tensor],
    kind: str = "mmer",
    *,
    scales: bool = False,
    seed: int = 1,
    routes: Sequence[str] = ROUTES,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Random routing tensors, and what they mean: the weights of every route and of text, in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    originals: list[dict[str, Tensor]] = [{} for _ in routes]
    text: dict[str, Tensor] = {}
    for name, base in weights.items():
        if kind == "damc" and base.dim() != 2:
            continue
        if kind == "mmer":
            shared = (0.25 * torch.randn(base.shape, generator=generator)).to(base.dtype)
            bits = [torch.rand(base.shape, generator=generator) < 0.5 for _ in routes]
            factors = torch.rand(len(routes), generator=generator) + 0.5 if scales else torch.ones(len(routes))
            deltas = [s * (bit * shared.float()) for s, bit in zip(factors, bits, strict=True)]
            tensors |= {f"{name}.shared": shared, f"{name}.masks": torch.stack([pack(bit) for bit in bits])}
            if scales:
                tensors[f"{name}.scales"] = factors
            mean = sum(deltas) / len(deltas)
        elif kind == "signs":
            bits = [torch.rand(base.shape, generator=generator) < 0.5 for _ in routes]
            factors = 0.25 * torch.rand(len(routes), len(base) if base.dim() > 1 else 1, generator=generator)
            shape = (-1, *[1] * (base.dim() - 1)) if base.dim() > 1 else (1,)
            deltas = [s.view(shape) * (2.0 * bit - 1) for s, bit in zip(factors, bits, strict=True)]
            tensors |= {f"{name}.signs": torch.stack([pack(bit) for bit in bits]), f"{name}.scales": factors}
            mean = sum(deltas) / len(deltas)
        else:
            deltas = []
            for route in ("text", *routes):
                a, b = (0.3 * torch.randn(*s, generator=generator) for s in ((2, base.shape[1]), (base.shape[0], 2)))
                tensors |= {f"{name}.{route}.A": a, f"{name}.{route}.B": b}
                tensors[f"{name}.{route}.scale"] = torch.tensor(1.5)
                deltas.append(1.5 * b @ a)
            mean = deltas.pop(0)
        for original, delta in zip(originals, deltas, strict=True):
            original[name] = base.float() + delta
        text[name] = base.float() + mean
    return tensors, originals, text


def compose(
    folder: Path,
    base: Path,
    tensors: dict[str, Tensor],
    kind: str = "mmer",
    *,
    dtype: str = "float32",
    routes: Sequence[str] = ROUTES,
    modalities: Sequence[str] = MODALITIES,
    files: int = 2,
) -> Path:
    """A composed checkpoint: an ordinary one with routing files and their entry in the manifest."""
    model = MultimodalLM.build(ModelSpec(str(base), (IMAGE, AUDIO, POINT), None, dtype))
    for number, spec in enumerate((IMAGE, AUDIO, POINT)):
        model.add_modality(spec, number)
    for parameter in model.connectors.parameters():
        parameter.data *= 3
    save(model, folder, history=[{"compose": {"rule": kind}}])
    (folder / "routing").mkdir()
    names = [f"routing/{number:05}.safetensors" for number in range(1, files + 1)]
    keys = sorted(tensors)
    for number, name in enumerate(names):
        save_file({key: tensors[key].contiguous() for key in keys[number::files]}, folder / name)
    table = [{"name": r, "modality": m} for r, m in zip(routes, modalities, strict=True)]
    edit(
        folder,
        lambda m: m.update(routing={"kind": kind, "routes": table, "files": names, "settings": {"density": 0.8}}),
    )
    for name in names:
        rehash(folder, name)
    return folder


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rehash(folder: Path, file: str) -> None:
    """Let the manifest agree with a file that was written anew."""
    described = {"sha256": hash_file(folder / file), "bytes": (folder / file).stat().st_size}
    edit(folder, lambda m: m["files"].update({file: described}))


def put_inside(folder: Path, base: Path) -> Path:
    """Turn a checkpoint that refers to its LLM into one that holds it."""
    (folder / "llm").mkdir()
    for path in base.iterdir():
        (folder / "llm" / path.name).write_bytes(path.read_bytes())
        rehash(folder, f"llm/{path.name}")
    edit(
        folder, lambda m: (m["llm"].update(source="llm", sha256=hash_llm(folder / "llm")), m["model"].update(llm="llm"))
    )
    return folder


def samples(folder: Path) -> list[Sample]:
    """Media of the mini world's encoders in many layouts."""
    import numpy as np
    import soundfile
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", rng.standard_normal(8000).astype(np.float32) / 4, 8000)
    images = [Media("image", folder / f"{number}.png") for number in range(2)]
    sounds = [Media("audio", folder / f"{number}.wav") for number in range(2)]
    return [
        Sample("0", "t", (images[0], sounds[0]), "w1 <image> w2 w3 <audio> w4", ("w5 w6",)),
        Sample("1", "t", (), "w7 w8 w9", ("w1",)),
        Sample("2", "t", (sounds[1],), "w1 w2", ("w3",)),
        Sample("3", "t", (images[1], sounds[0], images[0]), "<image> <audio> w5 <image> w6", ("w7 w8 w9",)),
    ]
