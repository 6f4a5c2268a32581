"""CIDEr-D: how much of what people say about an item, weighted by how telling it is, does a caption say?

    g_n(x)[w] = tf_w(x) · (ln N − ln max(1, df_w))                       n-grams w of length n = 1 … 4
    sim_n(c, s) = Σ_w min(g_n(c)[w], g_n(s)[w]) · g_n(s)[w] / (‖g_n(c)‖ ‖g_n(s)‖) · exp(−(l_c − l_s)² / 2σ²)
    CIDEr-D = 10 · mean over n and references of sim_n

Paper:   Vedantam, Zitnick, Parikh, CIDEr: Consensus-based Image Description Evaluation, CVPR 2015, arXiv:1411.5726, §4, §6.
Differs: as in the released code (pycocoevalcap), tf is a raw count and l counts bigrams. One item alone has no
         document frequencies (ln N = 0), so its score is 0, as there. Tokens are made here, without Java, and
         without brackets, which the released tokeniser means to remove but leaves as "-lrb-".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from graftlm.evaluation.metrics import Score, check_items

__all__ = ["CIDER", "Cider", "cider_d", "tokenise"]

_ORDERS = 4
_SIGMA = 6.0

_CURLY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})  # single and double quotes
_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_COMPOUNDS = re.compile(r"\b(?:(can)(not)|(gim|lem)(me)|(gon|wan)(na)|(got)(ta))\b")
_TOKEN = re.compile(
    r"""(?:[^\W\d_]\.){2,}(?:[^\W\d_]\b)?                 # u.s.  a.m.
    | \b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc)\.         # abbreviations keep their dot
    | n't\b | '(?:s|m|d|re|ve|ll)\b                     # clitics, already split off
    | \d+(?:[.,:/]\d+)+                                 # 1,000  3.5  10:30  1/2
    | \w+(?:[-'&./]\w+)*                                # words; hyphens and slashes stay inside
    | [^\w\s]""",
    re.VERBOSE,
)
_REMOVED = frozenset(".?!,:;-'\"`()[]{}\u2013\u2014\u2026")

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


def tokenise(text: str) -> list[str]:
    """Lower-case words in the manner of the Penn Treebank, without punctuation: "A dog's ball." -> a dog 's ball."""
    text = _CLITICS.sub(r" \1", text.lower().translate(_CURLY))
    text = _COMPOUNDS.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [token for token in _TOKEN.findall(text) if token not in _REMOVED]


@dataclass(frozen=True)
class _Texts:
    """All sentences end to end: candidates first, then the references.

    Attributes:
        words: word id per position.
        sentence: sentence per position.
        length: words per sentence.
        item: item per sentence.
    """

    words: _Ints
    sentence: _Ints
    length: _Ints
    item: _Ints


def _lay_out(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> _Texts:
    sentences = [*candidates, *chain.from_iterable(references)]
    vocabulary: dict[str, int] = {}
    words = [vocabulary.setdefault(word, len(vocabulary)) for sentence in sentences for word in sentence]
    length = np.array([len(sentence) for sentence in sentences], dtype=np.int64)
    items = np.arange(len(candidates), dtype=np.int64)
    return _Texts(
        words=np.array(words, dtype=np.int64),
        sentence=np.repeat(np.arange(len(sentences), dtype=np.int64), length),
        length=length,
        item=np.concatenate([items, np.repeat(items, [len(item) for item in references])]),
    )


def _extend(grams: _Ints, texts: _Texts, order: int) -> tuple[_Ints, _Ints]:
    """Ids of the n-grams that start at each position with room for them, from those of the (n-1)-grams there.

    Returns:
        ids: one per starting position of an n-gram.
        starts: those positions.
    """
    starts = np.flatnonzero(texts.sentence[: len(texts.words) - order + 1] == texts.sentence[order - 1 :])
    last = texts.words[starts + order - 1]
    key = grams[starts] * (int(texts.words.max(initial=0)) + 1) + last
    return np.unique(key, return_inverse=True)[1].astype(np.int64), starts


def _similarity(grams: _Ints, sentence: _Ints, texts: _Texts, items: int) -> _Floats:
    """sim_n of each reference with its candidate, without the length penalty. Shape: (references,)."""
    sentences, kinds = len(texts.length), int(grams.max(initial=-1)) + 1
    if not kinds:
        return np.zeros(sentences - items)
    key, count = np.unique(sentence * kinds + grams, return_counts=True)
    owner, gram = np.divmod(key, kinds)
    reference = owner >= items
    seen = np.unique(texts.item[owner[reference]] * kinds + gram[reference])
    df = np.bincount(seen % kinds, minlength=kinds)
    weight = count * (np.log(items) - np.log(np.maximum(df, 1)))[gram]
    norm = np.sqrt(np.bincount(owner, weight**2, minlength=sentences))
    # The candidate's weight of each n-gram of its references: candidates come first, so their keys are sorted first.
    mine, wanted = key[~reference], texts.item[owner[reference]] * kinds + gram[reference]
    place = np.minimum(np.searchsorted(mine, wanted), max(len(mine) - 1, 0))
    theirs = weight[reference]
    shared = np.where(mine[place] == wanted, weight[~reference][place], 0.0) if len(mine) else np.zeros(len(wanted))
    dot = np.bincount(owner[reference] - items, np.minimum(shared, theirs) * theirs, minlength=sentences - items)
    scale = norm[texts.item[items:]] * norm[items:]
    cosine: _Floats = np.divide(dot, scale, out=np.zeros(len(dot)), where=scale != 0)
    return cosine


def cider_d(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, list[float]]:
    """Score tokenised captions against the tokenised references of their items, on the scale 0 to 10.

    Args:
        candidates: one list of tokens per item.
        references: one or more lists of tokens per item.

    Returns:
        The mean, and the score of each item. A single item scores 0: every word is in every document.

    Raises:
        DataError: no items, another number of reference sets, or an item without references.
    """
    check_items("cider", candidates, references)
    items = len(candidates)
    texts = _lay_out(candidates, references)
    grams = np.zeros(len(texts.words), dtype=np.int64)
    total = np.zeros(len(texts.length) - items)
    for order in range(1, _ORDERS + 1):
        ids, starts = _extend(grams, texts, order)
        total += _similarity(ids, texts.sentence[starts], texts, items)
        grams = np.zeros_like(grams)
        grams[starts] = ids
    owner = texts.item[items:]
    bigrams = np.maximum(texts.length - 1, 0)
    total *= np.exp(-((bigrams[owner] - bigrams[items:]) ** 2) / (2 * _SIGMA**2))
    scores = 10 / _ORDERS * np.bincount(owner, total, minlength=items) / np.bincount(owner, minlength=items)
    return float(scores.mean()), scores.tolist()


@dataclass(frozen=True)
class Cider:
    """CIDEr-D of texts, times 100 as papers print it: 100.76 is 1.0076 on the library's scale of 0 to 10."""

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        """Tokenise and score; see `Metric`."""
        mean, scores = cider_d(
            [tokenise(text) for text in predictions], [[tokenise(text) for text in texts] for texts in references]
        )
        return Score(100 * mean, [100 * score for score in scores])


CIDER = Cider()
