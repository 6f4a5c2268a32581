"""Modules that a method leaves in the model: experts beside linear layers, or learned positions in the sequence.

A model has one extension at most. It is a part of its own, ``extension``, saved with the checkpoint in one file; the LLM's
own weights, and the ledger of what stages folded into them, stay as they are. Attaching one, and detaching it again, changes
no bit of the model.
"""

import abc
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from graftlm.core.errors import RunError
from graftlm.core.registry import Registry
from graftlm.data.types import Batch
from graftlm.model.fusion import Fused

if TYPE_CHECKING:
    from graftlm.model.multimodal import MultimodalLM

__all__ = ["KINDS", "Extension"]

KINDS = Registry(
    "kind of extension",
    {
        "pathweave": "graftlm.model.weave:WovenExperts",
        "moelora": "graftlm.model.mixture:ExpertMixture",
        "l2p": "graftlm.model.prompts:PromptPool",
        "modalprompt": "graftlm.model.prompts:PromptShelf",
    },
    "graftlm.extensions",
)
"""What a checkpoint may hold beside connectors and ledger."""


class Extension(nn.Module, abc.ABC):
    """What a method added to a model for good.

    Parameters and persistent buffers are what a checkpoint holds; `settings` says how to build modules of these shapes.
    """

    kind: ClassVar[str]
    """Its name in `KINDS`."""

    def __init__(self) -> None:
        super().__init__()
        self._home: tuple[MultimodalLM, ...] = ()  # in a tuple: the model is no module inside its own part

    @property
    def model(self) -> "MultimodalLM":
        """The model that it is attached to.

        Raises:
            RunError: it is attached to none.
        """
        if not self._home:
            raise RunError(f"extension '{self.kind}': attached to no model; call model.extend(extension) first.")
        return self._home[0]

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """As JSON: `build` makes of it an extension of the same shapes."""

    @classmethod
    @abc.abstractmethod
    def build(cls, model: "MultimodalLM", settings: Mapping[str, Any]) -> Self:
        """An extension of these settings, not attached yet; its parameters are loaded after that.

        Args:
            model: with the modalities of the checkpoint; it is not changed.

        Raises:
            CheckpointError: the settings do not fit the model.
        """

    def attach(self, model: "MultimodalLM") -> None:
        """Become part of what the model computes. Called by `MultimodalLM.extend`; extend it to wrap layers."""
        self._home = (model,)

    def detach(self, model: "MultimodalLM") -> None:
        """Undo `attach`, to the bit."""
        self._home = ()

    def fuse(self, fused: Fused, batch: Batch) -> Fused:
        """The sequence with what this puts into it; called at the end of `MultimodalLM.fuse`, before every pass of the LLM.

        Args:
            batch: what ``fused`` was made of, on the model's device, its media as encoder outputs.
        """
        return fused

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What training may move now where a phase trains the part ``extension``, by name in here; all, unless said otherwise."""
        return dict(self.named_parameters())

    def over(self, fused: Fused) -> contextlib.AbstractContextManager[None]:
        """Surrounds the LLM's pass over ``fused``; when answers are generated, decoding too."""
        return contextlib.nullcontext()
