"""MCUB-4: one question over a picture, a clip, a sound and a point cloud, answered by a letter. A test only.

Paper:   Chen et al., Model Composition for Multimodal Large Language Models, ACL 2024, arXiv:2402.12750.
Files:   ``MCUB-4.json``: ``{id, modal_inputs: {vision, video, audio, point: [path]}, conversations}``; options are part of
    the question, the gold letter is the last turn, or that of ``MCUB-answer.json`` where the questions stand alone.
Differs: nothing.
"""

from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.entries import ID, TURN, Form, read_entries
from graftlm.data.tasks.reading import data_set, inside, task
from graftlm.data.types import Media, Sample, Task

__all__ = ["load"]

MODALITIES = {"vision": "image", "video": "video", "audio": "audio", "point": "point"}

QUESTION: dict[str, Form] = {
    "id": ID,
    "modal_inputs": {key: [str] for key in MODALITIES},
    "conversations": [TURN],
}

ANSWER: dict[str, Form] = {"id": ID, "conversations": [TURN]}


@data_set
def load(root: Path, *, skip_bad: bool = False, limit: int | None = None, name: str = "mcub") -> Task:
    """Read the data set; it has no training samples."""
    questions = read_entries(root / "MCUB-4.json", QUESTION)
    answered = questions
    if any(each["conversations"][-1]["from"] != "gpt" for each in questions):
        answered = read_entries(root / "MCUB-answer.json", ANSWER)
    letters = {each["id"]: each["conversations"][-1]["value"] for each in answered}
    samples = []
    for each in questions:
        unknown = [key for key in each["modal_inputs"] if key not in MODALITIES]
        if unknown or each["id"] not in letters:
            lack = f"inputs of unknown kinds {unknown}" if unknown else "no answer in MCUB-answer.json"
            raise DataError(f"{root / 'MCUB-4.json'}: question {each['id']} has {lack}. Restore the annotation files.")
        media = tuple(
            Media(MODALITIES[key], inside(root, path)) for key, paths in each["modal_inputs"].items() for path in paths
        )
        question = each["conversations"][0]["value"]
        samples.append(Sample(str(each["id"]), name, media, question, (letters[each["id"]],)))
    splits: list[list[Sample]] = [[], [], samples]
    return task(
        name,
        "choice",
        tuple(MODALITIES.values()),
        "letter",
        splits,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=4,
    )
