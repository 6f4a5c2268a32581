"""Learning without Forgetting: answer the new data as the model before the stage would have.

    loss = L + λ KL_T(θ_{i-1} ‖ θ_i)        at the positions that predict an answer's tokens; KL_T holds T²

Paper:   Li and Hoiem, Learning without Forgetting, ECCV 2016, arXiv:1606.09282. For LLMs, positions take the place of old
    classifiers' outputs; as a baseline of multimodal LLMs: LLaVA-c, arXiv:2506.08666, without settings.
Differs: λ = 1 and T = 2 are the original's. θ_{i-1} is the LLM and the connectors of the past; a new modality had no
    connector, so the teacher shares the student's. The phase that only aligns a connector has no such term, and neither has
    a first stage that nothing was learned before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from graftlm.core.errors import ConfigError
from graftlm.data.types import Batch, Output
from graftlm.learning.distill import connectors_before, kl, soft_cross_entropy, teacher
from graftlm.learning.method import Context, Method

__all__ = ["LwF"]


@dataclass
class LwF(Method):
    """Distil the model before the stage on the data of the stage.

    Attributes:
        strength: λ.
        temperature: T, above 0.
        target: "kl", or "ce" for cross-entropy with soft targets: another value, the same gradient.
    """

    strength: float = 1.0
    temperature: float = 2.0
    target: Literal["kl", "ce"] = "kl"
    _knows: bool = field(default=False, init=False, repr=False, compare=False)
    _connectors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ConfigError(f"strength: {self.strength}; a number from 0 is expected (1 in the paper, 0 is off).")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature: {self.temperature}; a number above 0 is expected (2 in the paper).")

    def idle(self, number: int) -> bool:
        """Without strength. A first stage may follow what the stream learned at its start."""
        return self.strength == 0

    def prepare(self, ctx: Context) -> None:
        """Remember the connectors of θ_{i-1}."""
        self._knows = bool(ctx.past or ctx.model.adapter.ledger or ctx.model.specs.keys() - ctx.new)
        self._connectors = {} if self.idle(ctx.number) or not self._knows else connectors_before(ctx)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """λ KL_T(θ_{i-1} ‖ θ_i), while the LLM moves."""
        if self.idle(ctx.number) or not self._knows or not ctx.trains_llm:
            return {}
        with teacher(ctx, self._connectors):
            before = ctx.forward(batch).answer_logits
        distance = kl if self.target == "kl" else soft_cross_entropy
        return {"lwf": self.strength * distance(before, out.answer_logits, self.temperature).mean()}
