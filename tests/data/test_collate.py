"""Batches: padding on the side that is needed, labels only at answers, every item beside its slot."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from graftlm.core.errors import DataError
from graftlm.data.collate import collate
from graftlm.data.prompts import encode
from graftlm.data.types import IGNORE, SLOT, Batch, Media, Sample

WORDS = ["<pad>", "<bos>", "<eos>", "<ask>", "<say>", "<unk>", "what", "is", "this", "red", "blue"]
PAD, EOS = 0, 2
IMAGE, OTHER, SOUND = Media("image", Path("a.png")), Media("image", Path("b.png")), Media("audio", Path("c.wav"))


def make_tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "<bos> <ask> {{ messages[0]['content'] }} <say>"
    return tokenizer


TOKENIZER = make_tokenizer()


def ask(prompt: str, *media: Media, answers: tuple[str, ...] = ("red",), name: str = "7") -> Sample:
    return Sample(name, "t", media, prompt, answers)


ROWS = [
    ask("what is this", IMAGE, name="one"),
    ask("<image> is <audio> is <image>", OTHER, SOUND, IMAGE, answers=("red blue", "blue"), name="three"),
    ask("what", name="none"),
]


def load(modality: str, items: Sequence[Media]) -> Tensor:
    assert {item.modality for item in items} == {modality}
    return torch.tensor([[float(ord(item.source.stem))] for item in items])


def expect_places(batch: Batch, rows: Sequence[Sample]) -> None:
    """Every slot has one item, and the items of a row stand in the order of its prompt."""
    found = []
    for modality, places in batch.places.items():
        names = [chr(int(value)) for value in batch.media[modality].flatten()]
        found += [(row, column, modality, name) for (row, column), name in zip(places.tolist(), names, strict=True)]
    assert sorted([row, column] for row, column, *_ in found) == (batch.input_ids == SLOT).nonzero().tolist()
    expected = [(i, m.modality, m.source.stem) for i, row in enumerate(rows) for m in row.media]
    assert [(row, modality, value) for row, _, modality, value in sorted(found)] == expected


def test_training_pads_on_the_right() -> None:
    batch = collate(ROWS, TOKENIZER, load)
    for i, row in enumerate(ROWS):
        ids, labels, _ = encode(row, TOKENIZER, answer=True)
        assert batch.input_ids[i, : len(ids)].tolist() == ids and batch.labels[i, : len(ids)].tolist() == labels
        assert batch.attention_mask[i].tolist() == [True] * len(ids) + [False] * (batch.input_ids.shape[1] - len(ids))
        assert (batch.input_ids[i, len(ids) :] == PAD).all() and (batch.labels[i, len(ids) :] == IGNORE).all()
    assert batch.attention_mask.all(dim=1).sum() == 1


def test_generation_pads_on_the_left_and_has_no_answer() -> None:
    batch = collate(ROWS, TOKENIZER, load, answers=False)
    for i, row in enumerate(ROWS):
        ids, _, _ = encode(row, TOKENIZER, answer=False)
        start = batch.input_ids.shape[1] - len(ids)
        assert batch.input_ids[i, start:].tolist() == ids and (batch.input_ids[i, :start] == PAD).all()
        assert batch.attention_mask[i].tolist() == [False] * start + [True] * len(ids)
    assert (batch.labels == IGNORE).all() and EOS not in batch.input_ids


def test_labels_are_the_first_answer_and_the_end() -> None:
    batch = collate(ROWS, TOKENIZER, load)
    said = [[WORDS[i] for i in row[row != IGNORE].tolist()] for row in batch.labels]
    assert said == [["red", "<eos>"], ["red", "blue", "<eos>"], ["red", "<eos>"]]
    learned = batch.labels != IGNORE
    assert (batch.labels[learned] == batch.input_ids[learned]).all()


@pytest.mark.parametrize("answers", [True, False])
def test_items_stand_beside_their_slots(answers: bool) -> None:
    batch = collate(ROWS, TOKENIZER, load, answers=answers)
    expect_places(batch, ROWS)
    assert batch.places["image"][:, 0].tolist() == [0, 1, 1] and batch.places["audio"][:, 0].tolist() == [1]
    assert batch.ids == ("one", "three", "none") and batch.encoded
    assert batch.input_ids.dtype == batch.labels.dtype == batch.places["image"].dtype == torch.int64


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from(["what", "is", IMAGE, OTHER, SOUND]), max_size=6), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_mixture_keeps_items_and_slots_together(content: list[list[str | Media]], answers: bool) -> None:
    rows = []
    for i, parts in enumerate(content):
        prompt = " ".join(part if isinstance(part, str) else f"<{part.modality}>" for part in parts)
        rows.append(ask(prompt, *(part for part in parts if isinstance(part, Media)), name=str(i)))
    batch = collate(rows, TOKENIZER, load, answers=answers)
    expect_places(batch, rows)
    assert (batch.input_ids[~batch.attention_mask] == PAD).all()
    order = random.Random(len(rows)).sample(range(len(rows)), len(rows))
    turned = collate([rows[i] for i in order], TOKENIZER, load, answers=answers)
    assert torch.equal(turned.input_ids, batch.input_ids[order]) and torch.equal(turned.labels, batch.labels[order])


def test_text_alone_loads_nothing() -> None:
    batch = collate([ask("what")], TOKENIZER, load, encoded=False)
    assert batch.media == {} and batch.places == {} and not batch.encoded


def test_without_a_padding_token_the_end_pads() -> None:
    batch = collate(ROWS, make_tokenizer(pad=None), load)
    assert (batch.input_ids[~batch.attention_mask] == EOS).all() and (
        batch.labels[~batch.attention_mask] == IGNORE
    ).all()


def test_a_batch_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="a batch of no samples; at least one is expected"):
        collate([], TOKENIZER, load)


def test_a_row_whose_slots_and_media_differ_is_named() -> None:
    with pytest.raises(DataError, match=r"sample t/bad: the prompt has 2 media slots .* but there are 1 media"):
        collate([*ROWS, ask("<image> <image>", IMAGE, name="bad")], TOKENIZER, load)
