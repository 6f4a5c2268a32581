"""CIDEr-D against hand-made vectors and against pycocoevalcap; accuracies against their rules."""

import random

import pytest

from graftlm.core.errors import DataError
from graftlm.evaluation.metrics import METRICS
from graftlm.evaluation.metrics.accuracy import exact, letter, normalise, vqa, vqa_official
from graftlm.evaluation.metrics.cider import cider_d, tokenise


def tokens(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


@pytest.mark.parametrize(
    ("candidates", "references", "items", "mean"),
    [
        (["a b c d", "e f g h"], [["a b c d"], ["e f g h"]], [10, 10], 10),
        (["a b c", "d e f"], [["a b c"], ["d e f"]], [7.5, 7.5], 7.5),
        (["a b c d", "x y z w"], [["a b c d"], ["a f g h"]], [10, 0], 5),
        (
            ["a dog runs", "a cat sleeps now", "a bird fly"],
            [["a dog runs fast"], ["a cat sleeps now"], ["two birds fly high"]],
            [5.791299, 10, 0.843443],
            5.544914,
        ),
        (
            ["the dog runs fast", "a cat is sleeping"],
            [["a dog runs fast", "the dog is running"], ["a cat sleeps now", "the cat is sleeping"]],
            None,
            3.635310,
        ),
        (["a a a a b c d", "e f g h"], [["a b c d"], ["e f g h"]], [4.397822, 10], None),
        (["a b c d"], [["a b c d"]], [0], 0),
        (["a b c d", "e"], [["a b"], ["c"]], [3.037611, 0], 1.518805),  # no reference has an n-gram of 3 or 4 words
        (["", "a"], [["a b"], [""]], [0, 0], 0),
    ],
)
def test_vectors(
    candidates: list[str], references: list[list[str]], items: list[float] | None, mean: float | None
) -> None:
    value, per_item = cider_d(tokens(*candidates), [tokens(*texts) for texts in references])
    if mean is not None:
        assert value == pytest.approx(mean, abs=1e-6)
    if items is not None:
        assert per_item == pytest.approx(items, abs=1e-6)


def test_equal_to_pycocoevalcap() -> None:
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="the extra 'caption' is not installed")
    rng = random.Random(0)
    words = [f"w{i}" for i in range(30)]

    def sentence() -> str:
        return " ".join(rng.choices(words, weights=range(30, 0, -1), k=rng.randint(0, 12)))

    candidates = [sentence() for _ in range(60)]
    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in candidates]
    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for candidate, texts in zip(candidates, references, strict=True):
        theirs += (candidate, texts)
    expected, per_item = theirs.compute_score()
    value, ours = cider_d(tokens(*candidates), [tokens(*texts) for texts in references])
    assert value == pytest.approx(expected, abs=1e-6)
    assert ours == pytest.approx(list(per_item), abs=1e-6)


def test_tokens_are_like_those_of_the_penn_treebank() -> None:
    assert tokenise("A dog's ball, isn't it?") == ["a", "dog", "'s", "ball", "is", "n't", "it"]
    assert tokenise("Two well-known dogs (3.5 kg).") == ["two", "well-known", "dogs", "3.5", "kg"]
    assert tokenise("black/white cats, 50% off -- “cannot” be.") == (
        ["black/white", "cats", "50", "%", "off", "can", "not", "be"]
    )
    assert tokenise("At 10:30 a.m. in the U.S.A they're gonna…") == (
        ["at", "10:30", "a.m.", "in", "the", "u.s.a", "they", "'re", "gon", "na"]
    )


def test_papers_print_cider_times_100() -> None:
    score = METRICS.get("cider").score(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert score.value == pytest.approx(1000) and score.per_item == pytest.approx([1000, 1000])


def test_accuracies() -> None:
    assert normalise("The Two dogs!") == "2 dogs"
    assert normalise("don't") == normalise("dont") and normalise("1,000.5 m.") == "1000.5 m"
    assert exact("", ["A"]) == exact("the", ["A"]) == 0 and exact("a.", ["A"]) == 1  # a letter is not an article
    assert exact("two", ["2"]) == 1 and exact("three", ["2"]) == 0
    assert vqa("dog", ["dog"] * 2 + ["cat"] * 8) == pytest.approx(2 / 3)
    assert vqa("dog", ["dog"] * 4 + ["cat"] * 6) == 1
    assert vqa_official("dog", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(0.9)
    assert letter(" B. a dog", ["B"]) == 1 and letter("a dog", ["A"]) == 0 and letter("", ["A"]) == 0


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="0 predictions"):
        cider_d([], [])
    with pytest.raises(DataError, match="2 predictions but 1 reference sets"):
        METRICS.get("exact").score(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="have no reference"):
        METRICS.get("letter").score(["a"], [[]])
    with pytest.raises(DataError, match="2 reference answers"):
        vqa("dog", ["dog", "cat"])
    with pytest.raises(DataError, match="3 reference answers"):
        vqa_official("dog", ["dog"] * 3)


def test_the_official_accuracy_leaves_every_answer_out_once() -> None:
    for matches in range(11):
        answers = ["dog"] * matches + ["cat"] * (10 - matches)
        subsets = [answers[:i] + answers[i + 1 :] for i in range(10)]
        expected = sum(min(1, subset.count("dog") / 3) for subset in subsets) / 10
        assert vqa_official("Dog.", answers) == pytest.approx(expected)
