"""Memory of the past: nested, stratified, seeded subsets.

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.2 (r of D_1 ... D_i), App. A.5 (mis-pairing).
Differs: r is taken of every D_j, rounded half up, at least one sample; mis-pairing is a derangement inside a modality.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.data.types import Media, Sample, Stage

__all__ = ["mispair", "replay", "subset"]


def subset(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """A share of the samples: 1 % is part of 10 %, whatever else is asked for.

    Raises:
        ConfigError: the fraction is not a share.
    """
    count = _count(len(samples), fraction)
    if count == 0:
        return []
    return sorted(samples, key=lambda sample: _rank(sample, seed))[: max(1, count)]


def replay(stages: Sequence[Stage], fraction: float, seed: int) -> list[Sample]:
    """The share of every stage, its tasks taken together."""
    return [sample for stage in stages for sample in subset(stage.samples(), fraction, seed)]


def mispair(samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """A share of the samples gets the media of another: a derangement among those with media of the same modalities.

    Nobody keeps its own: several samples about one file (captions of a clip, questions about a picture) do not trade
    among themselves. Those that find no other file among the chosen swap with samples that were not chosen; if there
    are none, they stay.

    Raises:
        ConfigError: the share is not one.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"mis-paired share: {share}; a number from 0 to 1 is expected.")
    order = sorted(range(len(samples)), key=lambda i: _rank(samples[i], seed))
    able = [i for i in order if samples[i].media]
    chosen = set(able[: _share(len(able), share)])
    result = list(samples)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in able:
        groups.setdefault(tuple(media.modality for media in samples[i].media), []).append(i)
    for name, members in groups.items():
        moving = [i for i in members if i in chosen]
        if moving:
            most, count = Counter(samples[i].media for i in moving).most_common(1)[0]
            others = (i for i in members if i not in chosen and samples[i].media != most)
            moving += itertools.islice(others, max(0, 2 * count - len(moving)))
        if len(moving) > 1:
            for i, j in _turned(moving, samples, seed, "/".join(name)):
                result[i] = dataclasses.replace(samples[i], media=samples[j].media)
    return result


def _turned(members: list[int], samples: Sequence[Sample], seed: int, name: str) -> list[tuple[int, int]]:
    """Who gets whose media. Sorted by file and turned by the largest group, nobody meets its own file."""
    shift = int(seeds.rng(seed, "mispair", name).integers(1, len(members)))
    pairs = list(zip(members, members[shift:] + members[:shift], strict=True))
    if any(samples[i].media == samples[j].media for i, j in pairs):
        groups: dict[tuple[Media, ...], list[int]] = {}
        for i in members:
            groups.setdefault(samples[i].media, []).append(i)
        ordered = [i for group in sorted(groups.values(), key=len, reverse=True) for i in group]
        shift = max(map(len, groups.values())) % len(members)
        pairs = list(zip(ordered, ordered[shift:] + ordered[:shift], strict=True))
    return pairs


def _count(size: int, fraction: float) -> int:
    if not 0 <= fraction <= 1:
        raise ConfigError(f"replay fraction: {fraction}; a number from 0 to 1 is expected (0.1 is 10 %).")
    if fraction == 0 or size == 0:
        return 0
    return max(1, _share(size, fraction))


def _share(size: int, fraction: float) -> int:
    """``fraction * size``, rounded half up in decimals: 0.29 of 50 is 14.5 and so 15, in binary it is less."""
    return int((Decimal(str(float(fraction))) * size).to_integral_value(ROUND_HALF_UP))


def _rank(sample: Sample, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{sample.task}/{sample.id}".encode()).digest()
