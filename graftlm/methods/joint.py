"""Joint training: every stage at once, as if there had been no order. What continual learning is measured against.

Paper:   the multi-task rows of Liu et al., LLaVA-c, arXiv:2506.08666, Table 2 and Table 10 (data-replay on all).
Differs: nothing; all samples are shuffled, and every phase has as many epochs as one stage would have.
"""

from dataclasses import dataclass

from graftlm.learning.method import Method

__all__ = ["Joint"]


@dataclass
class Joint(Method):
    """Learn the union of all stages in one."""

    joint = True

    def idle(self, number: int) -> bool:
        """The union is what it is: nothing is added to learning it."""
        return True
