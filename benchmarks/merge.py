"""Merge speed and memory, side by side with mergekit, on synthetic checkpoints of about 1.1 billion parameters.

    python benchmarks/merge.py make  DATA              # one base and four tunes in bfloat16, 2.2 GB each
    python benchmarks/merge.py run   DATA [--peer BIN] # CPU seconds, wall seconds, memory; BIN is another environment's bin
    python benchmarks/merge.py table                   # benchmarks/results/merge.md

The checkpoints have the shape of TinyLlama-1.1B; a tune is the base plus N(0, 1e-3) on a random half of the weights
("half"), or on all of them ("dense"). Everything is measured in fresh processes, warm page cache, by the kernel's own
accounting: CPU seconds are user + system of the process and its children, memory is the largest anonymous size (RssAnon),
sampled, and the peak of all resident pages.
"""

import json
import sys
from pathlib import Path

import numpy as np

HIDDEN, LAYERS, MLP, KV, VOCABULARY = 2048, 22, 5632, 256, 32000
MODELS = 5


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the file."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        result |= {
            f"{start}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{start}self_attn.k_proj.weight": (KV, HIDDEN),
            f"{start}self_attn.v_proj.weight": (KV, HIDDEN),
            f"{start}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{start}mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{start}mlp.up_proj.weight": (MLP, HIDDEN),
            f"{start}mlp.down_proj.weight": (HIDDEN, MLP),
            f"{start}input_layernorm.weight": (HIDDEN,),
            f"{start}post_attention_layernorm.weight": (HIDDEN,),
        }
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def config(layers: int) -> dict[str, object]:
    """A Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Rounded, as raw uint16."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make(data: Path, kind: str = "half", layers: int = LAYERS) -> None:
    """Write base, t1 … t4 under ``data``."""
    listed = shapes(layers)
    header, end = {}, 0
    for name, shape in listed.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    names = ["base", *(f"t{i}" for i in range(1, MODELS))]
    files = []
    for name in names:
        folder = data / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config(layers)))
        file = (folder / "model.safetensors").open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        files.append(file)
    for index, shape in enumerate(listed.values()):
        rng = np.random.default_rng(index)
        size = int(np.prod(shape))
        base = bfloat16(rng.standard_normal(size, np.float32) * np.float32(0.02))
        numbers = (base.astype(np.uint32) << 16).view(np.float32)
        files[0].write(base.tobytes())
        for file in files[1:]:
            change = rng.standard_normal(size, np.float32) * np.float32(1e-3)
            if kind == "half":
                change *= rng.integers(0, 2, size, np.uint8)
            file.write(bfloat16(numbers + change).tobytes())
    for file in files:
        file.close()


if __name__ == "__main__":
    verb, data = sys.argv[1], Path(sys.argv[2])
    if verb == "make":
        make(data, *sys.argv[3:4])
