"""MoELoRA: one LoRA split into experts, mixed by a router per token; all go on learning at every stage.

    y = W x + s Σ_e softmax(x W_r)_e B_e A_e x      s = alpha / rank, E experts of rank / E

Paper:   Chen et al., CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large Language Models, NeurIPS 2024,
    arXiv:2403.08350.
Differs: the router's start is PyTorch's for a linear layer without bias, and dropout is off unless it is set.
"""

from dataclasses import dataclass

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.learning.method import Context, Method
from graftlm.model.adapters import StageAdapter
from graftlm.model.mixture import MixtureSpec, open_mixture

__all__ = ["MoELoRA"]


@dataclass
class MoELoRA(Method):
    """Experts that all stages share.

    Attributes:
        experts: E; 1 is a plain LoRA for the run.
        rank: of all experts together.
        alpha: the sum is scaled by alpha / rank.
        dropout: of what enters the experts.
    """

    adapter = "own"
    experts: int = 8
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.experts < 1 or self.rank < 1 or self.rank % self.experts:
            raise ConfigError(
                f"rank: {self.rank} does not split into {self.experts} experts; a multiple of experts is expected."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: {self.dropout} is no share; a number from 0 to below 1 is expected.")

    def open(self, ctx: Context) -> StageAdapter:
        """The experts of the stages before; at the first, new ones."""
        spec = MixtureSpec(self.experts, self.rank, self.alpha, self.dropout)
        return open_mixture(ctx.model, spec, seed=seeds.derive(ctx.seed, ctx.stage.name, "adapter"))
