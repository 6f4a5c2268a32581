"""Pseudo targets of MoInCL: one question and its answer for every training item of a caption data set.

Paper:   Pian et al., Modality-Inconsistent Continual Learning of Multimodal Large Language Models (MoInCL), TMLR 2026,
    arXiv:2412.13050. Written offline by a text model that read the caption.
Files:   ``{Flickr30k,MSRVTT,AudioCaps}_pseudo_qa_dict.json``: id -> ``{Q, A}``; the id is the name of the media file
    without its suffix.
Differs: nothing; a pickled copy of the same name is refused.
"""

import dataclasses
import logging
from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.pickled import refuse_pickled
from graftlm.data.tasks.reading import read_json
from graftlm.data.types import Task

__all__ = ["attach", "read"]

log = logging.getLogger(__name__)


def read(path: Path) -> dict[str, tuple[str, str]]:
    """Question and answer by id.

    Raises:
        DataError: the file is missing, pickled, not JSON, or an entry is of another form.
    """
    refuse_pickled(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {str(content)[:80]!r}; id -> {{Q, A}} is expected. Restore the file.")
    for key, pair in content.items():
        if not (isinstance(pair, dict) and all(isinstance(pair.get(side), str) for side in ("Q", "A"))):
            raise DataError(
                f"{path}: the entry {key!r} is {str(pair)[:80]!r}; a text Q and a text A are expected. Restore the file."
            )
    return {key: (pair["Q"], pair["A"]) for key, pair in content.items()}


def attach(task: Task, path: Path) -> Task:
    """The task with the pairs of its training samples, as `Task.pseudo`.

    Raises:
        DataError: see `read`; or the file has no pair for any training sample.
    """
    pairs = read(path)
    keys = {sample.id: sample.media[0].source.stem for sample in task.train}
    pseudo = {sample: pairs[key] for sample, key in keys.items() if key in pairs}
    if not pseudo:
        raise DataError(
            f"{path}: no pair for any of the {len(keys)} training samples of {task.name}. Ids are expected to be names of "
            f"media files without suffix, such as {next(iter(keys.values()), '')!r}; this is the file of another data set."
        )
    if len(pseudo) < len(keys):
        log.warning(
            "%s: %d of %d training samples have no pseudo target", task.name, len(keys) - len(pseudo), len(keys)
        )
    return dataclasses.replace(task, pseudo=pseudo)
