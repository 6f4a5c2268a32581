"""Replay: mix a little of the past into the fine-tuning of every stage.

Paper:   the Replay(r) baseline of Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.2, §5.1.
Differs: nothing while ``repeat`` is 1, which is the paper's. r is taken of every past D_j; the phase that only aligns the
    new connector sees D_i alone (the paper leaves both open).
"""

from dataclasses import dataclass

from graftlm.core.errors import ConfigError
from graftlm.data.types import Sample
from graftlm.learning.method import Context, Method

__all__ = ["Replay"]


@dataclass
class Replay(Method):
    """Train the LLM and all connectors on D_i and a share of D_1 ... D_{i-1}.

    Attributes:
        fraction: r, the share of every past stage, in [0, 1].
        repeat: how often an epoch shows each replayed sample; once, in the paper.
    """

    fraction: float = 0.10
    repeat: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ConfigError(
                f"fraction: {self.fraction} is not a share; a number from 0 to 1 is expected (0.1 is 10 %)."
            )
        if self.repeat < 1:
            raise ConfigError(f"repeat: {self.repeat}; at least 1 is expected.")

    def idle(self, number: int) -> bool:
        """The first stage has no past."""
        return number == 1 or self.fraction == 0

    def data(self, ctx: Context, samples: list[Sample]) -> list[Sample]:
        """D_i and R_i, in phases that move the LLM."""
        return samples + self._old(ctx) * self.repeat

    def trainable(self, ctx: Context, parts: frozenset[str]) -> frozenset[str]:
        """The connectors of replayed modalities move as well."""
        return parts | {f"connectors.{media.modality}" for sample in self._old(ctx) for media in sample.media}

    def _old(self, ctx: Context) -> list[Sample]:
        moves_llm = ctx.phase is not None and "llm" in ctx.phase.trainable
        return ctx.replay(ctx.past, self.fraction) if moves_llm else []
