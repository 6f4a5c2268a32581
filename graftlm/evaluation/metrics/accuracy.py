"""Right or wrong: short answers compared after normalisation, and letters of multiple choice.

Paper:   Antol et al., VQA: Visual Question Answering, ICCV 2015, arXiv:1505.00468, §3 (accuracy), and its released evaluation.
Differs: normalisation drops every apostrophe ("dont" = "don't") instead of looking contractions up, and always turns
         the other punctuation into spaces; an answer that is nothing but articles keeps them ("A" stays "a").
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftlm.core.errors import DataError
from graftlm.evaluation.metrics import Score, check_items

__all__ = [
    "EXACT",
    "LETTER",
    "VQA",
    "VQA_OFFICIAL",
    "Accuracy",
    "exact",
    "letter",
    "normalise",
    "vqa",
    "vqa_official",
]

_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}

_NOTHING = re.compile(r"['\u2018\u2019`]|(?<=\d),(?=\d)")  # don't -> dont, 1,000 -> 1000
_SPACE = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_")  # 3.5 keeps its point


def normalise(answer: str) -> str:
    """A short answer reduced to what counts: lower case, no punctuation, no articles, number words as digits."""
    words = _SPACE.sub(" ", _NOTHING.sub("", answer.lower())).split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in kept)


def exact(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after `normalise`, else 0."""
    return float(normalise(prediction) in map(normalise, references))


def _enough(references: Sequence[str], needed: int) -> None:
    if len(references) < needed:
        raise DataError(
            f"vqa: {len(references)} reference answers for a question; an answer counts in full from {needed} on, and "
            "the data sets give 10. Use the metric 'exact' for questions with few answers."
        )


def vqa(prediction: str, references: Sequence[str]) -> float:
    """min(1, matches / 3) over all answers that people gave.

    Raises:
        DataError: fewer than three references, so that no answer could be right.
    """
    _enough(references, 3)
    said = normalise(prediction)
    return min(1.0, sum(normalise(reference) == said for reference in references) / 3)


def vqa_official(prediction: str, references: Sequence[str]) -> float:
    """The mean of min(1, matches / 3) over every choice of all answers but one, as the VQA server computes it.

    Raises:
        DataError: fewer than four references, so that no answer could be right.
    """
    _enough(references, 4)
    said, total = normalise(prediction), len(references)
    matches = sum(normalise(reference) == said for reference in references)
    # Leaving out one of the matches leaves one fewer; leaving out any other answer leaves them all.
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


def letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the first character that is not a space is the reference's letter, else 0.

    Case counts: "a dog" is a sentence, not the choice A.
    """
    return float(prediction.strip()[:1] in {reference.strip()[:1] for reference in references} - {""})


@dataclass(frozen=True)
class Accuracy:
    """A rule for one item, averaged: a share between 0 and 1."""

    name: str
    rule: Callable[[str, Sequence[str]], float]

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        """Judge every item; see `Metric`."""
        check_items(self.name, predictions, references)
        items = [self.rule(text, texts) for text, texts in zip(predictions, references, strict=True)]
        return Score(sum(items) / len(items), items)


EXACT = Accuracy("exact", exact)
VQA = Accuracy("vqa", vqa)
VQA_OFFICIAL = Accuracy("vqa-official", vqa_official)
LETTER = Accuracy("letter", letter)
