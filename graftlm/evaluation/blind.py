"""The blind floor: what a model scores when it is shown other samples' media.

Zero is not the floor. Questions and captions have habits, and a model that knows them scores without looking.
"""

import dataclasses

from graftlm.data.replay import mispair
from graftlm.data.types import Task

__all__ = ["blind"]


def blind(task: Task, seed: int) -> Task:
    """The task with every measured sample's media exchanged for another's (a seeded derangement)."""
    return dataclasses.replace(task, val=tuple(mispair(task.val, 1.0, seed)), test=tuple(mispair(task.test, 1.0, seed)))
