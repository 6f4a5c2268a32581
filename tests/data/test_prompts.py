"""From samples to token ids: slots, templates, labels."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftlm.core.errors import DataError
from graftlm.data.prompts import encode, pieces
from graftlm.data.types import IGNORE, SLOT, Media, Sample

WORDS = ["<pad>", "<bos>", "<eos>", "<ask>", "<say>", "<unk>", "what", "is", "this", "and", "red", "blue", "circle"]
IMAGE, OTHER, SOUND = Media("image", Path("a.png")), Media("image", Path("b.png")), Media("audio", Path("a.wav"))


def make_tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = "<bos> <ask> {{ messages[0]['content'] }} <say>"
    return tokenizer


TOKENIZERS = {template: make_tokenizer(template) for template in (True, False)}


def sample(prompt: str, *media: Media, answers: tuple[str, ...] = ("red circle",)) -> Sample:
    return Sample("7", "t", media, prompt, answers)


def words(ids: Sequence[int]) -> list[str]:
    return ["@" if i == SLOT else WORDS[i] for i in ids]


def test_media_go_where_the_slots_are() -> None:
    asked = sample("what is <image> and <audio> and <image> ?", IMAGE, SOUND, OTHER)
    ids, labels, items = encode(asked, make_tokenizer(), answer=False)
    assert words(ids) == ["<bos>", "<ask>", "what", "is", "@", "and", "@", "and", "@", "<unk>", "<say>"]
    assert items == [IMAGE, SOUND, OTHER] and set(labels) == {IGNORE}


def test_without_a_slot_media_come_first() -> None:
    ids, _, items = encode(sample("what is this", IMAGE, SOUND), make_tokenizer(), answer=False)
    assert words(ids) == ["<bos>", "<ask>", "@", "@", "what", "is", "this", "<say>"]
    assert items == [IMAGE, SOUND]
    assert pieces(sample("what", IMAGE)) == ["", IMAGE, "what"]


def test_only_the_answer_has_labels() -> None:
    ids, labels, _ = encode(sample("what", answers=("red", "blue")), make_tokenizer(), answer=True)
    assert words(ids)[-2:] == ["red", "<eos>"]
    assert labels == [IGNORE] * (len(ids) - 2) + ids[-2:]


def test_a_tokenizer_without_a_template_gets_the_prompt_alone() -> None:
    ids, _, _ = encode(sample("what is this", IMAGE), make_tokenizer(template=False), answer=False)
    assert words(ids) == ["@", "what", "is", "this"]


@pytest.mark.parametrize(
    ("prompt", "media"),
    [
        ("<image> and <image>", (IMAGE,)),
        ("<image>", (IMAGE, OTHER)),
        ("<audio> <image>", (IMAGE, SOUND)),
        ("<video>", ()),
    ],
)
def test_slots_and_media_that_differ_are_named(prompt: str, media: tuple[Media, ...]) -> None:
    with pytest.raises(DataError, match=r"sample t/7: the prompt has \d media slots"):
        encode(sample(prompt, *media), make_tokenizer(), answer=False)


@pytest.mark.parametrize("prompt", ["what\n", " what ", "this what"])
def test_a_template_that_trims_or_says_the_same_words_keeps_the_prompt_once(prompt: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<bos> this is what <ask> {{ messages[0]['content'] | trim }} <say>"
    ids, _, _ = encode(sample(prompt, IMAGE), tokenizer, answer=False)
    assert words(ids) == ["<bos>", "this", "is", "what", "<ask>", "@", *prompt.split(), "<say>"]


def test_media_alone_are_a_prompt() -> None:
    ids, _, _ = encode(sample("", IMAGE), make_tokenizer(), answer=False)
    assert words(ids) == ["<bos>", "<ask>", "@", "<say>"]


def test_any_name_is_a_modality() -> None:
    depth = Media("depth-map.v2", Path("d.png"))
    ids, _, items = encode(sample("what <depth-map.v2> is", depth), make_tokenizer(), answer=False)
    assert words(ids) == ["<bos>", "<ask>", "what", "@", "is", "<say>"] and items == [depth]


def test_a_template_with_slots_of_its_own_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<bos> <image> {{ messages[0]['content'] }}"
    with pytest.raises(DataError, match=r"the chat template makes media slots \['image', 'image'\] of \['image'\]"):
        encode(sample("what", IMAGE), tokenizer, answer=False)


def test_what_cannot_be_learned_is_named() -> None:
    with pytest.raises(DataError, match="sample t/7: no answer to learn"):
        encode(sample("what", answers=()), make_tokenizer(), answer=True)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(sample("what"), tokenizer, answer=True)


def test_an_empty_prompt_without_media_is_nothing_to_ask() -> None:
    with pytest.raises(DataError, match="sample t/7: an empty prompt without media"):
        encode(sample(" "), make_tokenizer(template=False), answer=True)


PARTS = st.lists(st.sampled_from(["what", "is", IMAGE, OTHER, SOUND]), max_size=8)


@given(PARTS, st.booleans())
def test_items_stand_where_the_prompt_has_them(parts: list[str | Media], template: bool) -> None:
    prompt = " ".join(part if isinstance(part, str) else f"<{part.modality}>" for part in ["this", *parts])
    asked = sample(prompt, *(part for part in parts if isinstance(part, Media)))
    ids, labels, items = encode(asked, TOKENIZERS[template], answer=False)
    around = (["<bos>", "<ask>"], ["<say>"]) if template else ([], [])
    middle = ["this", *("@" if isinstance(part, Media) else part for part in parts)]
    assert words(ids) == [*around[0], *middle, *around[1]]
    assert tuple(items) == asked.media and labels == [IGNORE] * len(ids)
    assert "".join(p if isinstance(p, str) else f"<{p.modality}>" for p in pieces(asked)) == prompt
