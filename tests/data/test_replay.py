"""Memory: nested, stratified, seeded; and pairs torn apart on purpose."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError
from graftlm.data.replay import mispair, replay, subset
from graftlm.data.types import Media, Sample, Stage, Task


def samples(count: int, modality: str = "image", task: str = "t") -> list[Sample]:
    return [Sample(str(i), task, (Media(modality, Path(f"{task}{i}")),), "?", ("a",)) for i in range(count)]


def stage(name: str, count: int) -> Stage:
    half = count // 2
    tasks = [
        Task(f"{name}{i}", "qa", (name,), "exact", samples(n, name, f"{name}{i}"), (), ())
        for i, n in enumerate((half, count - half))
    ]
    return Stage(name, tuple(tasks))


def test_sizes_of_the_paper_reading() -> None:
    stages = [stage("image", 200), stage("video", 50)]
    counts = {r: Counter(s.media[0].modality for s in replay(stages, r, 0)) for r in (0.01, 0.10)}
    assert counts[0.01] == {"image": 2, "video": 1}
    assert counts[0.10] == {"image": 20, "video": 5}
    assert replay(stages, 0.0, 0) == [] and len(replay(stages, 1.0, 0)) == 250


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
def test_a_smaller_share_is_part_of_a_larger(count: int, a: float, b: float, seed: int) -> None:
    small, large = (subset(samples(count), r, seed) for r in sorted((a, b)))
    assert small == large[: len(small)]
    assert len({s.id for s in large}) == len(large)


def test_the_seed_decides() -> None:
    assert subset(samples(50), 0.2, 0) == subset(samples(50), 0.2, 0) != subset(samples(50), 0.2, 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_what_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        subset(samples(3), fraction, 0)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        mispair(samples(3), fraction, 0)


def test_half_of_ten_are_torn_apart() -> None:
    before = samples(10)
    after = mispair(before, 0.5, 0)
    assert sum(a.media != b.media for a, b in zip(before, after, strict=True)) == 5
    assert Counter(s.media for s in after) == Counter(s.media for s in before)


@given(st.integers(0, 12), st.integers(0, 12), st.floats(0, 1), st.integers(0, 5))
def test_media_are_exchanged_within_a_modality_and_never_lost(a: int, b: int, share: float, seed: int) -> None:
    before = samples(a, "image", "i") + samples(b, "audio", "s")
    after = mispair(before, share, seed)
    assert Counter(s.media for s in after) == Counter(s.media for s in before)
    for old, new in zip(before, after, strict=True):
        assert [m.modality for m in old.media] == [m.modality for m in new.media]
        assert (old.id, old.prompt, old.answers) == (new.id, new.prompt, new.answers)
    if share == 1 and a > 1 and b > 1:
        assert all(old.media != new.media for old, new in zip(before, after, strict=True))
    if share == 0:
        assert after == before


@given(st.lists(st.integers(0, 5), max_size=24), st.sampled_from([0.1, 0.3, 0.5, 1.0]), st.integers(0, 5))
def test_nobody_keeps_its_own_file_where_several_share_one(files: list[int], share: float, seed: int) -> None:
    before = [Sample(str(i), "t", (Media("image", Path(str(f))),), "?", ("a",)) for i, f in enumerate(files)]
    after = mispair(before, share, seed)
    assert Counter(s.media for s in after) == Counter(s.media for s in before)
    foreign = sum(a.media != b.media for a, b in zip(before, after, strict=True))
    most = max(Counter(files).values(), default=0)
    assert foreign >= min(int(share * len(files) + 0.5), 2 * (len(files) - most))
    if share == 1 and 2 * most <= len(files):
        assert foreign == len(files)


def test_shares_are_rounded_in_decimals() -> None:
    assert len(subset(samples(50), 0.29, 0)) == 15 and len(subset(samples(50), 0.01, 0)) == 1


def test_text_has_no_media_to_exchange() -> None:
    plain = [Sample("1", "t", (), "?", ("a",))]
    assert mispair(plain, 1.0, 0) == plain
