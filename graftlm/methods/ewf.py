"""EWF: fuse the models before and after a stage, by how much each has learned.

    θ_i ← (1-β) θ_{i-1} + β θ_i        β = sqrt(n_new / (n_new + n_old))

Paper:   Xiao et al., Endpoints Weight Fusion, CVPR 2023; its released code.
Differs: n counts classes there; here training samples, or stages (``count``). Only the LLM is fused, as effective weights.
"""

from dataclasses import dataclass
from typing import Literal

from graftlm.data.types import Stage
from graftlm.learning.method import Context, Method
from graftlm.merging import RULES

__all__ = ["EWF"]


@dataclass
class EWF(Method):
    """Fold by β.

    Attributes:
        count: what n counts, "samples" or "stages".
    """

    adapter = "stage"
    folds = True
    count: Literal["samples", "stages"] = "samples"

    def idle(self, number: int) -> bool:
        """Without a past β is 1."""
        return number == 1

    def consolidate(self, ctx: Context) -> None:
        """Weigh what was seen before against this stage."""
        if not self.idle(ctx.number) and ctx.model.adapter.is_open:
            old = sum(self._size(stage) for stage in ctx.past)
            ctx.model.adapter.fold(RULES.get("ewf"), new=self._size(ctx.stage), old=old)

    def _size(self, stage: Stage) -> int:
        return len(stage.samples()) if self.count == "samples" else 1
