"""From a sample to token ids: the chat template around it, a slot for every media item inside."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from graftlm.core.errors import DataError
from graftlm.data.types import IGNORE, SLOT, Media, Modality, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode", "pieces"]

KNOWN: tuple[Modality, ...] = ("image", "video", "audio", "point")
"""A prompt that names one of these expects an item of it, whatever media the sample has."""


def pieces(sample: Sample, text: str | None = None) -> list[str | Media]:
    """The prompt, cut at its slots, with the media in their places; without any slot the media come first.

    Args:
        text: the prompt, with its slots, inside its chat template; None is the prompt itself.

    Raises:
        DataError: slots and media differ in number or modality, or the chat template adds or drops slots.
    """
    text = _content(sample) if text is None else text
    names = dict.fromkeys(item.modality for item in sample.media)
    if not names:
        return [text]
    cut = re.split(_slots(names), text)
    if cut[1::2] != [item.modality for item in sample.media]:
        raise DataError(
            f"sample {sample.task}/{sample.id}: the chat template makes media slots {cut[1::2]} of "
            f"{[item.modality for item in sample.media]}. A template that keeps the prompt as it is is expected."
        )
    return [part for pair in zip(cut[::2], sample.media, strict=False) for part in pair] + [cut[-1]]


def encode(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", *, answer: bool
) -> tuple[list[int], list[int], list[Media]]:
    """Token ids with `SLOT` where an item goes, labels of the same length, and the items in order.

    The chat template of the tokenizer goes around the prompt; a tokenizer without one gets the prompt and a new line.

    Args:
        answer: append ``answers[0]`` and the end-of-sequence token, which alone have labels.

    Raises:
        DataError: slots and media do not match; there is nothing to read; there is no answer, or no end-of-sequence
            token, to learn.
    """
    content = _content(sample)
    text = f"{content}\n"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": content}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids: list[int] = []
    items: list[Media] = []
    for piece in pieces(sample, text):
        if isinstance(piece, Media):
            ids.append(SLOT)
            items.append(piece)
        elif piece.strip():
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"sample {sample.task}/{sample.id}: an empty prompt without media. A question is expected.")
    labels = [IGNORE] * len(ids)
    if answer:
        said = _answer(sample, tokenizer)
        ids, labels = ids + said, labels + said
    return ids, labels, items


def _content(sample: Sample) -> str:
    """The prompt with a slot for every item, before any template: a template may trim it or repeat its words."""
    media = [item.modality for item in sample.media]
    slots = re.findall(_slots([*KNOWN, *media]), sample.prompt)
    if not slots:
        return "".join(f"<{name}>" for name in media) + sample.prompt
    if slots != media:
        raise DataError(
            f"sample {sample.task}/{sample.id}: the prompt has {len(slots)} media slots {slots}, but there are "
            f"{len(media)} media {media}. One item per slot, in order, is expected."
        )
    return sample.prompt


def _slots(names: Iterable[Modality]) -> str:
    return f"<({'|'.join(re.escape(name) for name in dict.fromkeys(names))})>"


def _answer(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if not sample.answers:
        raise DataError(f"sample {sample.task}/{sample.id}: no answer to learn. At least one is expected.")
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so an answer would never end. Set eos_token in "
            "tokenizer_config.json of the base."
        )
    return [*tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
