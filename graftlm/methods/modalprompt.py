"""ModalPrompt: prompts of a task of their own, beside a frozen LLM, chosen by how close tasks are to a sample's media and text.

    prototype_j = mean over the vectors of task j of transform_j(vector)
    guidance_j  = 0.5 cos(prototype_j, media) + 0.5 cos(prototype_j, text)
    learning t  the prompts of the two closest old tasks, frozen, the closest last, then those of t
                loss = cross-entropy + (1 - cos(prototype_t, media)) + (1 - cos(prototype_t, text))
    answering   the prompts of the three closest tasks, the closest last

A stage is a task. Nothing of an old one moves, so what is forgotten is what is no longer chosen.

Paper:   Zeng et al., ModalPrompt: Towards Efficient Multimodal Continual Instruction Tuning with Dual-Modality Guided Prompt,
    EMNLP 2025, arXiv:2410.05849, and its code (AuroraZengfh/ModalPrompt); it trains for 10 epochs at a rate of 2e-4, which
    is the schedule's business here.
Differs: features are not CLIP's, which sees images alone: media are known by the mean of the encoder's tokens of the first
    item, text by the mean of the LLM's embeddings of the prompt's tokens. These lie in different spaces, so a transform has
    a head for each. Media that a task did not learn count as cos = 0 in its guidance, and add nothing to the loss. The code
    has prompts as new tokens of the vocabulary; here they start at random, as spread as the embedding's rows. Without a
    beginning-of-sequence token they stand first, where the code puts them after the first token. Phases and connectors are
    as in `methods.l2p`: what does not move the LLM is left as it is, and before a task's first phase that does, the tasks
    before it answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, RunError
from graftlm.data.types import Batch, Output
from graftlm.learning.method import Context
from graftlm.methods.l2p import PART, Prompting
from graftlm.model.prompts import PromptShelf, ShelfSpec, open_shelf

__all__ = ["ModalPrompt"]


@dataclass
class ModalPrompt(Prompting):
    """Prompts of each task.

    Attributes:
        prompts: vectors of a task.
        top: tasks whose prompts a sample takes; in training, the one that is learned is among them.
        media: weight of media in the guidance, from 0 to 1; that of text is the rest.
        align: weight of the two terms that draw the prototype to the task's samples.
    """

    prompts: int = 10
    top: int = 3
    media: float = 0.5
    align: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("prompts", self.prompts), ("top", self.top)):
            if value < 1:
                raise ConfigError(f"{name}: {value}; at least 1 is expected.")
        if not 0 <= self.media <= 1:
            raise ConfigError(
                f"media: {self.media} is not a share; a number from 0 to 1 is expected (0.5 in the paper)."
            )
        if not 0 <= self.align < float("inf"):
            raise ConfigError(f"align: {self.align} is out of range; a number from 0 is expected (1 in the paper).")

    def begin(self, ctx: Context) -> None:
        """The prompts of this stage, and their transform."""
        spec = ShelfSpec(self.prompts, self.top, self.media)
        seed = seeds.derive(ctx.seed, ctx.stage.name, "prompts")
        open_shelf(ctx.model, ctx.stage.name, ctx.stage.modalities, spec, spread=self.spread, seed=seed)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """The prototype is drawn to the task's samples."""
        if PART not in ctx.parts:
            return {}
        found = ctx.model.extension
        if not isinstance(found, PromptShelf):
            raise RunError(
                f"modalprompt: the model's extension is {type(found).__name__}; its prompts are expected. Leave them attached."
            )
        return {"alignment": self.align * found.misfit(found.query(batch))}
