"""Fusion equals a loop over positions, whatever the layout."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graftlm.core.errors import DataError
from graftlm.data.types import IGNORE, SLOT, Batch
from graftlm.model.fusion import Fused, fuse

WIDTH, WORDS, PAD = 4, 11, 0
INDEX = {"text": 0, "image": 1, "audio": 2, "touch": 3}


@dataclass
class Layout:
    """Rows of token ids and names of modalities; how many tokens an item of each becomes."""

    rows: list[list[int | str]]
    sizes: dict[str, int]
    left: bool


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    sizes = {name: draw(st.integers(1, 5)) for name in ("image", "audio", "touch")}
    piece = st.one_of(st.integers(1, WORDS - 1), st.sampled_from(sorted(sizes)))
    rows = draw(st.lists(st.lists(piece, min_size=1, max_size=8), min_size=1, max_size=5))
    return Layout(rows, sizes, draw(st.booleans()))


def embedding() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(WORDS, WIDTH)


def batch_of(layout: Layout) -> tuple[Batch, dict[str, Tensor]]:
    """A batch as collating makes it, with labels that name their position, and random connector outputs."""
    length = max(map(len, layout.rows))
    ids, labels = torch.full((len(layout.rows), length), PAD), torch.full((len(layout.rows), length), IGNORE)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    places: dict[str, list[tuple[int, int]]] = {}
    for r, row in enumerate(layout.rows):
        start = length - len(row) if layout.left else 0
        for c, piece in enumerate(row, start):
            mask[r, c] = True
            if isinstance(piece, str):
                ids[r, c] = SLOT
                places.setdefault(piece, []).append((r, c))
            else:
                ids[r, c], labels[r, c] = piece, 1000 * r + c
    tokens = {name: torch.randn(len(where), layout.sizes[name], WIDTH) for name, where in places.items()}
    where = {name: torch.tensor(cells) for name, cells in places.items()}
    return Batch(ids, mask, labels, {}, where, ids=tuple(f"s{r}" for r in range(len(layout.rows)))), tokens


def by_hand(embed: nn.Embedding, batch: Batch, tokens: dict[str, Tensor], left: bool) -> Fused:
    """One position after the other."""
    rows = []
    for r in range(len(batch.input_ids)):
        row = []
        for c in range(batch.input_ids.shape[1]):
            item = [
                (name, values[i])
                for name, values in tokens.items()
                for i, cell in enumerate(batch.places[name].tolist())
                if cell == [r, c]
            ]
            if item:
                ((name, values),) = item
                row += [(vector, True, IGNORE, INDEX[name]) for vector in values]
            else:
                word = embed.weight[batch.input_ids[r, c]]
                row.append((word, bool(batch.attention_mask[r, c]), int(batch.labels[r, c]), 0))
        rows.append(row)
    length = max(map(len, rows))
    nothing = (torch.zeros(WIDTH), False, IGNORE, 0)
    full = [[nothing] * (length - len(r)) + r if left else r + [nothing] * (length - len(r)) for r in rows]
    return Fused(
        torch.stack([torch.stack([cell[0] for cell in row]) for row in full]),
        torch.tensor([[cell[1] for cell in row] for row in full]),
        torch.tensor([[cell[2] for cell in row] for row in full]),
        torch.tensor([[cell[3] for cell in row] for row in full]),
    )


def assert_same(a: Fused, b: Fused) -> None:
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert torch.equal(x, y)


@settings(deadline=None)
@given(layouts())
def test_fusion_is_the_loop(layout: Layout) -> None:
    embed, (batch, tokens) = embedding(), batch_of(layout)
    side = "left" if layout.left else "right"
    assert_same(fuse(embed, batch, tokens, INDEX, padding=side), by_hand(embed, batch, tokens, layout.left))


@settings(deadline=None)
@given(layouts())
def test_padding_stays_on_its_side(layout: Layout) -> None:
    embed, (batch, tokens) = embedding(), batch_of(layout)
    padded_left = layout.left and not bool(batch.attention_mask.all())
    assert_same(fuse(embed, batch, tokens, INDEX), by_hand(embed, batch, tokens, padded_left))
    mask = fuse(embed, batch, tokens, INDEX, padding="left" if layout.left else None).attention_mask.int()
    assert bool((mask.diff(dim=1) >= 0).all() if layout.left else (mask.diff(dim=1) <= 0).all())


@settings(deadline=None)
@given(layouts())
def test_labels_of_text_are_kept_in_order(layout: Layout) -> None:
    batch, tokens = batch_of(layout)
    fused = fuse(embedding(), batch, tokens, INDEX)
    assert fused.labels[fused.labels != IGNORE].tolist() == batch.labels[batch.labels != IGNORE].tolist()
    for r, row in enumerate(layout.rows):
        length = sum(layout.sizes[p] if isinstance(p, str) else 1 for p in row)
        assert int(fused.attention_mask[r].sum()) == length


def test_gradients_reach_every_item_and_word() -> None:
    batch, tokens = batch_of(Layout([["image", 1, 2, "image"], ["audio", 3]], {"image": 2, "audio": 3}, False))
    embed, tokens = embedding(), {name: x.requires_grad_() for name, x in tokens.items()}
    fused = fuse(embed, batch, tokens, INDEX)
    weights = torch.randn_like(fused.embeds)
    (fused.embeds * weights).sum().backward()
    for name, values in tokens.items():
        at = fused.modality_ids == INDEX[name]
        assert values.grad is not None and torch.equal(values.grad.flatten(0, 1), weights[at])
    assert embed.weight.grad is not None and torch.equal(embed.weight.grad[3], weights[1, 3])


def test_connectors_of_another_dtype() -> None:
    batch, tokens = batch_of(Layout([["image", 1]], {"image": 2}, False))
    fused = fuse(embedding().bfloat16(), batch, tokens, INDEX)
    assert fused.embeds.dtype == torch.bfloat16
    assert torch.equal(fused.embeds[0, :2], tokens["image"][0].bfloat16())


def test_text_alone() -> None:
    batch, _ = batch_of(Layout([[1, 2, 3], [4]], {}, False))
    fused = fuse(embedding(), batch, {}, INDEX)
    assert torch.equal(fused.attention_mask, batch.attention_mask) and torch.equal(fused.labels, batch.labels)
    assert not fused.modality_ids.any()


LAYOUT = Layout([["image", 1, "image"], [2, "audio", 3]], {"image": 2, "audio": 1}, False)


def test_slots_and_items_of_one_modality() -> None:
    batch, tokens = batch_of(LAYOUT)
    with pytest.raises(
        DataError, match=r"image: 2 slots in the text, but 1 items; one item per slot .* samples s0, s1"
    ):
        fuse(embedding(), batch, tokens | {"image": tokens["image"][:1]}, INDEX)
    with pytest.raises(DataError, match="touch: 0 slots in the text, but 1 items"):
        fuse(embedding(), batch, tokens | {"touch": torch.zeros(1, 1, WIDTH)}, INDEX)


def test_a_slot_without_any_item() -> None:
    batch, tokens = batch_of(LAYOUT)
    with pytest.raises(DataError, match=r"3 media slots in the text, but 2 items of \['image'\]"):
        fuse(embedding(), batch, {"image": tokens["image"]}, INDEX)


@pytest.mark.parametrize("places", [[[0, 0], [0, 1]], [[0, 0], [0, 0]]], ids=["a word", "twice"])
def test_an_item_that_is_not_on_a_slot(places: list[list[int]]) -> None:
    batch, tokens = batch_of(LAYOUT)
    moved = replace(batch, places={**batch.places, "image": torch.tensor(places)})
    with pytest.raises(DataError, match="3 media slots in the text, but the items have other places"):
        fuse(embedding(), moved, tokens, INDEX)
