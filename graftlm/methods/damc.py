"""DAMC: experts whose parameters are decoupled by modality, to be composed without training.

Every linear layer of the LLM has two LoRAs: one for the positions of the modality, one for those of text. Five learned
vectors stand before and five after every media item. What is composed of such experts keeps each modality's LoRA and
vectors as they are, and mixes the LoRAs of text (`merging.damc`).

Paper:   Chen et al., Model Composition for Multimodal Large Language Models (DAMC), ACL 2024, arXiv:2402.12750, §3.2, with
    rates, ranks and numbers of vectors of its released scripts.
Differs: learned vectors start at random, as spread as the embedding's rows, where the released code has zeros (``spread=0``):
    a norm's gradient at zero is 1/√ε times its usual size, and in the mini world that costs a tenth of the scores. Open:
    these vectors count as positions of their modality, and padding as text, as in the released code. The head and the
    embedding are not tuned. The released scripts have another rate for text per modality (image: 1e-5 against 2e-4; audio
    and video: one rate); here it is a setting. The phase that aligns the connector has neither LoRAs nor vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, RunError
from graftlm.learning.method import Context, Method
from graftlm.model.adapters import StageAdapter
from graftlm.model.decoupled import decouple
from graftlm.model.specs import LoraSpec

__all__ = ["DAMC"]


@dataclass
class DAMC(Method):
    """Train an expert of one modality with decoupled parameters.

    Attributes:
        rank, alpha, dropout: of every LoRA; the model's own LoRA settings are not used.
        prefix, suffix: learned vectors before and after every media item.
        spread: of these vectors at the start, as a share of the embedding's standard deviation.
        text_rate: learning rate of text's LoRA, as a share of the LLM's.
    """

    adapter = "own"
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0
    prefix: int = 5
    suffix: int = 5
    spread: float = 1.0
    text_rate: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank: {self.rank}; at least 1 is expected (the paper's scripts have 128).")
        if self.prefix < 0 or self.suffix < 0:
            raise ConfigError(
                f"prefix, suffix: {self.prefix}, {self.suffix}; numbers of vectors from 0 are expected (5 in the paper)."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: {self.dropout} is no share to drop; from 0 and below 1 is expected.")
        for name, value in (("spread", self.spread), ("text_rate", self.text_rate)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}: {value} is out of range; a number from 0 is expected.")

    def prepare(self, ctx: Context) -> None:
        """Refuse what DAMC has no answer for: a second stage, or one of several modalities."""
        if ctx.past or len(ctx.model.specs) != 1 or len(ctx.stage.modalities) != 1:
            raise RunError(
                f"stage {ctx.stage.name}: learns {', '.join(ctx.stage.modalities) or 'text'} after {len(ctx.past)} stages; "
                f"DAMC learns one modality, from the base. Learn one expert per modality, then compose them: "
                f"`graftlm compose damc`."
            )

    def open(self, ctx: Context) -> StageAdapter:
        """A LoRA for the modality, a LoRA for text, and vectors around items."""
        return decouple(
            ctx.model,
            ctx.stage.modalities[0],
            LoraSpec(self.rank, self.alpha, self.dropout),
            prefix=self.prefix,
            suffix=self.suffix,
            spread=self.spread,
            seed=seeds.derive(ctx.seed, ctx.stage.name, "adapter"),
        )

    def rates(self, ctx: Context, lr: Mapping[str, float]) -> Mapping[str, float]:
        """Text's LoRA learns at a rate of its own."""
        return {**lr, "llm.text": lr["llm"] * self.text_rate} if "llm" in lr else lr
