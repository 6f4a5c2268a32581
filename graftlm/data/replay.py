"""Memory of the past: nested, stratified, seeded subsets.

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.2 (r of D_1 ... D_i), App. A.5 (mis-pairing).
Differs: r is taken of every D_j, rounded half up, at least one sample; mis-pairing is a derangement inside a modality.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.data.types import Sample, Stage

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

    A sample that is chosen alone in its group swaps with one that was not chosen; if there is none, it stays.

    Raises:
        ConfigError: the share is not one.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"mis-paired share: {share}; a number from 0 to 1 is expected.")
    order = sorted(range(len(samples)), key=lambda i: _rank(samples[i], seed))
    able = [i for i in order if samples[i].media]
    chosen = set(able[: int(share * len(able) + 0.5)])
    result = list(samples)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in able:
        groups.setdefault(tuple(media.modality for media in samples[i].media), []).append(i)
    for name, members in groups.items():
        moving = [i for i in members if i in chosen]
        if len(moving) == 1:
            moving += [i for i in members if i not in chosen][:1]
        if len(moving) > 1:
            turned = _turned(moving, seed, "/".join(name))
            for i, j in zip(moving, turned, strict=True):
                result[i] = dataclasses.replace(samples[i], media=samples[j].media)
    return result


def _turned(members: list[int], seed: int, name: str) -> list[int]:
    shift = int(seeds.rng(seed, "mispair", name).integers(1, len(members)))
    return members[shift:] + members[:shift]


def _count(size: int, fraction: float) -> int:
    if not 0 <= fraction <= 1:
        raise ConfigError(f"replay fraction: {fraction}; a number from 0 to 1 is expected (0.1 is 10 %).")
    if fraction == 0 or size == 0:
        return 0
    return max(1, int(fraction * size + 0.5))


def _rank(sample: Sample, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{sample.task}/{sample.id}".encode()).digest()
