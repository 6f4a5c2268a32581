"""Audio scenes as one second of sound at 8 kHz."""

import numpy as np
from numpy.typing import NDArray

from graftlm.data.miniworld.canvas import Array, Labels
from graftlm.data.miniworld.scenes import AudioScene

__all__ = ["RATE", "render_audio"]

RATE = 8000
"""Samples per second, and of a clip."""

Wave = NDArray[np.float64]

_PITCHES = ((130, 190), (320, 460), (780, 1100))
_GAIN = 0.4
_MELODY = (1.0, 1.22, 1 / 1.22)
_RHYTHM = (0.0, -0.55, 0.55)


def render_audio(scene: AudioScene, rng: np.random.Generator) -> tuple[Array, Labels]:
    """A scene as a waveform.

    Returns:
        Float (8000,) in [-1, 1], and labels, all (): ``instrument``, ``pitch``, ``count`` (number - 1), ``envelope``,
        ``background``, ``rhythm``, ``melody``, ``second``.
    """
    wave = np.zeros(RATE)
    base = rng.uniform(*_PITCHES[scene.pitch])
    step = _MELODY[max(scene.melody, 0)]
    for note, (start, length) in enumerate(_timing(scene, rng)):
        frequency = base * step ** (note - (scene.count - 1) / 2) * rng.uniform(0.97, 1.03)
        _add(wave, _tone(scene.instrument, frequency, length, rng), start, rng)
    if scene.second >= 0:
        _add(wave, _tone(scene.second, base * rng.uniform(0.97, 1.03), int(0.28 * RATE), rng), int(0.71 * RATE), rng)
    time = np.arange(RATE) / RATE
    if scene.envelope:
        wave *= 0.12 + 1.1 * (time if scene.envelope == 1 else 1 - time) ** 1.3
    wave = wave * rng.uniform(0.5, 1.0) + _noise(scene.background, rng) + 0.004 * rng.normal(0, 1, RATE)
    labels = {
        "instrument": np.array(scene.instrument),
        "pitch": np.array(scene.pitch),
        "count": np.array(scene.count - 1),
        "envelope": np.array(scene.envelope),
        "background": np.array(scene.background),
        "rhythm": np.array(scene.rhythm),
        "melody": np.array(scene.melody),
        "second": np.array(scene.second),
    }
    return np.clip(_GAIN * wave, -1, 1).astype(np.float32), labels


def _timing(scene: AudioScene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Start and length of every note, in samples."""
    span = RATE if scene.second < 0 else int(0.68 * RATE)
    weights = 1 + _RHYTHM[max(scene.rhythm, 0)] * np.linspace(-1, 1, scene.count)
    slots = weights / weights.sum() * span
    starts = np.concatenate([[0], np.cumsum(slots)[:-1]]) + rng.uniform(0, 0.06) * RATE
    lengths = np.minimum(slots * rng.uniform(0.7, 0.85, scene.count), 0.55 * RATE)
    return [(int(start), int(min(length, RATE - start))) for start, length in zip(starts, lengths, strict=True)]


def _add(wave: Wave, tone: Wave, start: int, rng: np.random.Generator) -> None:
    wave[start : start + len(tone)] += tone * rng.uniform(0.85, 1.1)


def _tone(instrument: int, frequency: float, length: int, rng: np.random.Generator) -> Wave:
    """One note, (length,): flute, organ, guitar, bell, violin or drum."""
    time = np.arange(length) / RATE
    phase = 2 * np.pi * frequency * time
    match instrument:
        case 0:
            sound = np.sin(phase) + 0.08 * np.sin(2 * phase) + 0.05 * rng.normal(0, 1, length)
            attack = np.minimum(1, time / 0.03)
        case 1:
            sound, attack = np.sign(np.sin(phase)) * 0.6, np.minimum(1, time / 0.01)
        case 2:
            orders = np.arange(1, 7)[:, None]
            sound = (np.sin(orders * phase) / orders * np.exp(-time * 6 * orders**0.5)).sum(0)
            attack = np.exp(-time * 9)
        case 3:
            partials, decays = np.array([[1], [2.76], [5.4]]), np.array([[3], [6], [9]])
            sound = (np.sin(phase * partials) * np.exp(-time * decays)).sum(0) * 0.6
            attack = np.exp(-time * 5)
        case 4:
            orders = np.arange(1, 8)[:, None]
            sound = (np.sin(orders * (phase + 0.9 * np.sin(2 * np.pi * 7 * time))) / orders).sum(0) * 0.6
            attack = np.minimum(1, time / 0.06)
        case _:
            boom = np.sin(2 * np.pi * frequency * 0.35 * time * np.exp(-time * 6)) * 1.2
            sound, attack = rng.normal(0, 1, length) * np.exp(-time * 40) + boom, np.exp(-time * 14)
    release = np.clip((length / RATE - time) / 0.015, 0, 1)
    return np.asarray(sound * attack * release, np.float64)


def _noise(kind: int, rng: np.random.Generator) -> Wave:
    """The background, (8000,): silence, rain, humming or clicks."""
    loudness = rng.uniform(0.7, 1.3)
    time = np.arange(RATE) / RATE
    match kind:
        case 1:
            return loudness * 0.10 * rng.normal(0, 1, RATE)
        case 2:
            hum = np.sin(2 * np.pi * 60 * time) + 0.6 * np.sin(2 * np.pi * 100 * time)
            return np.asarray(loudness * 0.16 * hum, np.float64)
        case 3:
            clicks = np.zeros(RATE)
            for start in rng.integers(0, RATE - 40, 12):
                clicks[start : start + 24] += loudness * rng.choice([-1, 1]) * 0.9 * np.exp(-np.arange(24) / 6)
            return clicks
        case _:
            return np.zeros(RATE)
