"""Parts of a model: dotted prefixes of parameter names."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from graftlm.model.multimodal import MultimodalLM

__all__ = ["freeze_all", "select"]


def select(model: "MultimodalLM", parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters that training may move, by name.

    Args:
        parts: "connectors", "connectors.image", "llm" ... "llm" is what the open stage made plastic: LoRA factors, or
            every weight when tuning in full; "extension" is what that may move now, without what it froze.
    """
    wanted = set(parts)
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("llm.", "encoders.", "extension.")) and _inside(name, wanted)
    }
    plastic = dict(model.adapter.parameters())
    if model.extension is not None:
        plastic |= {f"extension.{name}": p for name, p in model.extension.trainable_parameters().items()}
    return chosen | {name: parameter for name, parameter in plastic.items() if _inside(name, wanted)}


def freeze_all(model: nn.Module) -> None:
    """No parameter moves."""
    model.requires_grad_(False)


def _inside(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
