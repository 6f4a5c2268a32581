"""Put media into the text: every slot of a batch becomes the tokens of its item."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graftlm.core.errors import DataError
from graftlm.data.types import IGNORE, SLOT, Batch, Modality

__all__ = ["Fused", "fuse"]


@dataclass(frozen=True)
class Fused:
    """A batch as the LLM sees it.

    Shapes: embeds Float (B, S, D), attention_mask Bool (B, S), labels Int (B, S), modality_ids Int (B, S), 0 is text.
    """

    embeds: Tensor
    attention_mask: Tensor
    labels: Tensor
    modality_ids: Tensor


def fuse(
    embed: Callable[[Tensor], Tensor],
    batch: Batch,
    tokens: Mapping[Modality, Tensor],
    modality_index: Mapping[Modality, int],
    *,
    padding: Literal["left", "right"] | None = None,
) -> Fused:
    """Expand every slot to its item's L' positions; padding stays on its side.

    Args:
        embed: the LLM's input embedding, Int (...) -> Float (..., D).
        tokens: connector outputs per modality, Float (N, L', D), in the order of ``batch.places``.
        modality_index: id of each modality, from 1.
        padding: side of it; None is where the batch has its own. Rows of one length have none until their items become
            different numbers of tokens, so who generates must say left.

    Raises:
        DataError: slots and items do not match.
    """
    ids = batch.input_ids
    rows, columns = ids.shape
    _check(batch, tokens)
    width = torch.ones_like(ids)
    for modality, values in tokens.items():
        row, column = batch.places[modality].unbind(1)
        width[row, column] = values.shape[1]
    padding_left = padding == "left" if padding else bool((~batch.attention_mask[:, 0]).any())
    ends = width.cumsum(1)
    length = int(ends[:, -1].max())
    starts = ends - width + (length - ends[:, -1:] if padding_left else 0)
    text = ids != SLOT
    words = embed(ids.clamp_min(0))
    embeds = words.new_zeros(rows, length, words.shape[-1])
    mask = torch.zeros(rows, length, dtype=torch.bool, device=ids.device)
    labels = torch.full((rows, length), IGNORE, device=ids.device)
    modality_ids = torch.zeros(rows, length, dtype=torch.long, device=ids.device)
    row_of = torch.arange(rows, device=ids.device)[:, None].expand(rows, columns)
    embeds = embeds.index_put((row_of[text], starts[text]), words[text])
    mask[row_of[text], starts[text]] = batch.attention_mask[text]
    labels[row_of[text], starts[text]] = batch.labels[text]
    for modality, values in tokens.items():
        row, column = batch.places[modality].unbind(1)
        where = starts[row, column][:, None] + torch.arange(values.shape[1], device=ids.device)
        at = (row[:, None].expand_as(where), where)
        embeds = embeds.index_put(at, values.to(words.dtype))
        mask[at] = True
        modality_ids[at] = modality_index[modality]
    return Fused(embeds, mask, labels, modality_ids)


def _check(batch: Batch, tokens: Mapping[Modality, Tensor]) -> None:
    slots = batch.input_ids == SLOT
    placed = torch.zeros_like(slots)
    check = f"one item per slot is expected. Check the samples {', '.join(batch.ids[:4])}."
    for modality, values in tokens.items():
        where = batch.places.get(modality, batch.input_ids.new_zeros(0, 2))
        if len(where) != len(values):
            raise DataError(f"{modality}: {len(where)} slots in the text, but {len(values)} items; {check}")
        placed[where.unbind(1)] = True
    items = sum(len(values) for values in tokens.values())
    if int(slots.sum()) != items:
        raise DataError(f"{int(slots.sum())} media slots in the text, but {items} items of {sorted(tokens)}; {check}")
    if not torch.equal(placed, slots):
        raise DataError(f"{items} media slots in the text, but the items have other places; {check}")
