"""EProj: train the new connector only; the LLM is never touched.

Paper:   He et al., Continual Instruction Tuning for LMMs, arXiv:2311.16206, in the reading of Zhang et al., Merge then
    Realign, EMNLP 2025, arXiv:2503.07663, §5.1.
Differs: one connector per modality and no task keys, as MERA runs it; the original keeps a projector per task.
"""

from dataclasses import dataclass

from graftlm.learning.method import Context, Method

__all__ = ["EProj"]


@dataclass
class EProj(Method):
    """Take the LLM out of every phase."""

    def trainable(self, ctx: Context, parts: frozenset[str]) -> frozenset[str]:
        """Everything but the LLM."""
        return frozenset(part for part in parts if part != "llm" and not part.startswith("llm."))
