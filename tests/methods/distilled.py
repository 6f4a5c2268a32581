"""What tests of distillation have in common."""

import torch
from torch import Tensor

from graftlm.learning.method import Context
from graftlm.model.multimodal import MultimodalLM


@torch.no_grad()
def disturb(ctx: Context, size: float = 0.05) -> None:
    """Move what trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (*ctx.model.adapter.parameters().values(), *ctx.model.connectors.parameters()):
        parameter += size * torch.randn(parameter.shape, generator=generator)


def tensors(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: MultimodalLM, b: MultimodalLM) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
