"""Samples to a batch of tensors."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftlm.core.errors import DataError
from graftlm.data.prompts import encode
from graftlm.data.types import IGNORE, Batch, Media, Modality, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Load", "collate"]

Load = Callable[[Modality, Sequence[Media]], Tensor]
"""Items of one modality as a tensor (N, ...): raw inputs or encoder outputs."""


def collate(
    samples: Sequence[Sample],
    tokenizer: "PreTrainedTokenizerBase",
    load: Load,
    *,
    answers: bool = True,
    encoded: bool = True,
) -> Batch:
    """A batch.

    Args:
        answers: append answers, with labels, and pad on the right, to learn; else pad on the left, to generate.
        encoded: whether ``load`` returns encoder outputs.

    Raises:
        DataError: no samples, or slots and media of one do not match.
    """
    if not samples:
        raise DataError("a batch of no samples; at least one is expected.")
    rows = [encode(sample, tokenizer, answer=answers) for sample in samples]
    length = max(len(ids) for ids, _, _ in rows)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.full((len(rows), length), 0 if pad is None else int(pad))
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    items: dict[Modality, list[Media]] = {}
    places: dict[Modality, list[tuple[int, int]]] = {}
    for row, (ids, targets, media) in enumerate(rows):
        start = 0 if answers else length - len(ids)
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
        labels[row, start : start + len(ids)] = torch.tensor(targets)
        mask[row, start : start + len(ids)] = True
        columns = (start + column for column, token in enumerate(ids) if token < 0)
        for item, column in zip(media, columns, strict=True):
            items.setdefault(item.modality, []).append(item)
            places.setdefault(item.modality, []).append((row, column))
    return Batch(
        input_ids,
        mask,
        labels,
        {modality: load(modality, members) for modality, members in items.items()},
        {modality: torch.tensor(where) for modality, where in places.items()},
        encoded,
        tuple(sample.id for sample in samples),
    )
