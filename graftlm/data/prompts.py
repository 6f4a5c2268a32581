"""From a sample to token ids: the chat template around it, a slot for every media item inside."""

import re
from typing import TYPE_CHECKING

from graftlm.core.errors import DataError
from graftlm.data.types import IGNORE, SLOT, Media, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode", "pieces"]


def pieces(sample: Sample, text: str | None = None) -> list[str | Media]:
    """The prompt, cut at its slots, with the media in their places; without any slot the media come first.

    Args:
        text: the prompt inside its chat template; None is the prompt itself.

    Raises:
        DataError: slots and media differ in number or modality.
    """
    text = sample.prompt if text is None else text
    names = {media.modality for media in sample.media}
    found = re.findall(r"<([a-z0-9_]+)>", sample.prompt)
    slots = [name for name in found if name in names or name in ("image", "video", "audio", "point")]
    if slots and slots != [media.modality for media in sample.media]:
        raise DataError(
            f"sample {sample.task}/{sample.id}: the prompt has {len(slots)} media slots {slots}, but there are "
            f"{len(sample.media)} media {[m.modality for m in sample.media]}. One item per slot, in order, is expected."
        )
    if not slots:
        before, _, after = text.partition(sample.prompt)
        return [before, *sample.media, sample.prompt + after]
    media = iter(sample.media)
    cut = re.split("(" + "|".join(f"<{name}>" for name in dict.fromkeys(slots)) + ")", text)
    return [next(media) if part[1:-1] in names and part[:1] == "<" else part for part in cut]


def encode(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", *, answer: bool
) -> tuple[list[int], list[int], list[Media]]:
    """Token ids with `SLOT` where an item goes, labels of the same length, and the items in order.

    The chat template of the tokenizer goes around the prompt; a tokenizer without one gets the prompt and a new line.

    Args:
        answer: append ``answers[0]`` and the end-of-sequence token, which alone have labels.
    """
    text = f"{sample.prompt}\n"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": sample.prompt}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids: list[int] = []
    items: list[Media] = []
    for piece in pieces(sample, text):
        if isinstance(piece, Media):
            ids.append(SLOT)
            items.append(piece)
        elif piece.strip():
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    labels = [IGNORE] * len(ids)
    if answer:
        said = [*tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = ids + said, labels + said
    return ids, labels, items
