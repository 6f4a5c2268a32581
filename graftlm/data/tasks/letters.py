"""Questions with lettered options about any inputs, in the entries of MCUB, one file per split.

Paper:   the form of MCUB: Chen et al., Model Composition for Multimodal Large Language Models, ACL 2024, arXiv:2402.12750.
Files:   ``{train,val,test}.json``, each optional but the last: ``{id, modal_inputs: {vision, video, audio, point: [path]},
    conversations}``; options are part of the question, the gold letter is the last turn.
Differs: MCUB is a test only and fixes which inputs there are; here every entry of a file has the same ones.
"""

from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.entries import ID, TURN, Form, read_entries
from graftlm.data.tasks.mcub import MODALITIES
from graftlm.data.tasks.reading import data_set, inside, task
from graftlm.data.types import Media, Sample, Task

__all__ = ["load"]

QUESTION: dict[str, Form] = {"id": ID, "modal_inputs": {}, "conversations": [TURN, TURN]}


@data_set
def load(
    root: Path, *, skip_bad: bool = False, limit: int | None = None, name: str = "letters", media: Path | None = None
) -> Task:
    """Read the data set; an answer is right when it begins with the letter.

    Args:
        media: what the paths of the entries are relative to; ``root`` by default.
    """
    splits = [_samples(root / f"{split}.json", name, media or root) for split in ("train", "val", "test")]
    inputs = list(dict.fromkeys(tuple(item.modality for item in each.media) for split in splits for each in split))
    if len(inputs) > 1:
        raise DataError(
            f"{root}: questions over {inputs[0]} and over {inputs[1]}. One task asks over the same inputs throughout; "
            f"divide the files."
        )
    return task(
        name,
        "choice",
        tuple(dict.fromkeys(inputs[0])) if inputs else (),
        "letter",
        splits,
        root=root,
        skip_bad=skip_bad,
        limit=limit,
        max_new_tokens=4,
    )


def _samples(path: Path, name: str, media: Path) -> list[Sample]:
    if not path.is_file() and path.name != "test.json":
        return []
    samples = []
    for each in read_entries(path, QUESTION):
        if unknown := [key for key in each["modal_inputs"] if key not in MODALITIES]:
            raise DataError(f"{path}: question {each['id']} has inputs of unknown kinds {unknown}. Restore the file.")
        if wrong := [key for key, paths in each["modal_inputs"].items() if not _are_paths(paths)]:
            raise DataError(
                f"{path}: question {each['id']} has modal_inputs.{wrong[0]} = {each['modal_inputs'][wrong[0]]!r}; a list of "
                f"paths is expected. Restore the file."
            )
        items = tuple(
            Media(MODALITIES[key], inside(media, source))
            for key, paths in each["modal_inputs"].items()
            for source in paths
        )
        question, letter = (turn["value"] for turn in each["conversations"][:2])
        samples.append(Sample(str(each["id"]), name, items, question, (letter,)))
    return samples


def _are_paths(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value)
