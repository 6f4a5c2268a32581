"""Plain fine-tuning: every stage trains on from the last one, and nothing protects what came before.

Paper:   the naive baseline of Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §5.1.
Differs: nothing.
"""

from dataclasses import dataclass

from graftlm.learning.method import Method

__all__ = ["FineTune"]


@dataclass
class FineTune(Method):
    """The ingredient that adds nothing."""

    def idle(self, number: int) -> bool:
        """At every stage."""
        return True
