"""Small Hugging Face folders: a base and models that continue it, in every storage dtype."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.mlp.up_proj.weight": (33, 17),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.conv.weight": (7, 3, 5),
    "model.layers.1.mlp.up_proj.weight": (128, 64),
}

Folders = Callable[..., tuple[Path, list[Path]]]


def base_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in SHAPES.items()}


def continued(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (weight.float() + torch.randn(weight.shape, generator=generator) * 1e-3).to(weight.dtype)
        for name, weight in base.items()
    }


def write(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["TestModel"], "model_type": "test"}')
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def flat(weights: dict[str, Tensor]) -> Tensor:
    """One tensor of a whole model, in the order of the base's file."""
    return torch.cat([weights[name].flatten() for name in sorted(SHAPES)])


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    def make(dtype: torch.dtype = torch.float32, models: int = 3) -> tuple[Path, list[Path]]:
        base = base_weights(dtype)
        return write(tmp_path / "base", base), [
            write(tmp_path / f"m{i}", continued(base, i)) for i in range(1, models + 1)
        ]

    return make
