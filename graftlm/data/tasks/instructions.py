"""Text-only instructions in the format of LLaVA: what the base could do before it got senses.

Files:   ``{train,val,test}.json``: ``{id, format, conversations: [{from: human|gpt, value}]}``.
Differs: of a conversation of several turns, only the first question and its answer.
"""

from pathlib import Path

from graftlm.data.tasks.entries import ID, TURN, read_entries
from graftlm.data.tasks.reading import data_set, task
from graftlm.data.types import Sample, Task

__all__ = ["load"]


@data_set
def load(root: Path, *, skip_bad: bool = False, limit: int | None = None, name: str = "instructions") -> Task:
    """Read the data set; the answer must be exact, in the asked format."""

    def samples(split: str) -> list[Sample]:
        return [
            Sample(str(each["id"]), name, (), each["conversations"][0]["value"], (each["conversations"][1]["value"],))
            for each in read_entries(root / f"{split}.json", {"id": ID, "conversations": [TURN, TURN]})
        ]

    splits = [samples(s) for s in ("train", "val", "test")]
    return task(name, "instruction", (), "exact", splits, root=root, skip_bad=skip_bad, limit=limit)
