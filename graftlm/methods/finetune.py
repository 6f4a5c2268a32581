"""Plain fine-tuning: every stage trains on from the last one, and nothing protects what came before.

Paper:   the naive baseline of Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §5.1.
Differs: every stage has a fresh LoRA; the paper does not say. ``continuing`` keeps one LoRA for the whole run, which is what
    methods on factors (EWC, MoInCL) are to be compared with.
"""

from dataclasses import dataclass

from graftlm.learning.method import Adapter, Method

__all__ = ["FineTune"]


@dataclass
class FineTune(Method):
    """The ingredient that adds nothing.

    Attributes:
        continuing: one LoRA for the whole run, instead of a fresh one per stage.
    """

    continuing: bool = False

    @property
    def adapter(self) -> Adapter:  # type: ignore[override]
        """Of the run, or any."""
        return "run" if self.continuing else "any"

    def idle(self, number: int) -> bool:
        """At every stage."""
        return True
