"""The arithmetic of merging, fused: one walk over a chunk of weights, without temporaries of its size.

Each kernel takes the base and N models as raw numbers - ``uint16`` holds bfloat16, ``float32`` is itself - and computes in
float32, sums of models in float64, so that their order does not matter. Results are bit-equal to the rules of this room
applied to whole tensors. Loops run over blocks that stay in the first-level cache and are written so that the compiler
vectorises them; all kernels release the interpreter's lock. Magnitudes are compared as integers: without the sign bit, the
bits of float32 numbers are ordered as the numbers are.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

__all__ = [
    "BINS",
    "COMBINE",
    "NOT_FINITE",
    "THIN",
    "average",
    "equal",
    "histogram",
    "majority",
    "merge",
    "nth_equal",
    "signs",
]

BINS = 1 << 15
"""Bins of `histogram`: the exponent and the upper seven bits of the mantissa of a float32 magnitude."""

BLOCK = 1024
"""Numbers per block: a few float32 rows of it fit the first-level cache."""

NOT_FINITE = 0x7F800000
"""Bits of infinity: a magnitude from here on is none."""

THIN = {"none": 0, "trim": 1, "drop": 2}
"""How task vectors are thinned."""

COMBINE = {"average": 0, "arithmetic": 1, "mean": 2, "sum": 3, "max": 4}
"""How thinned task vectors become one: mean or sum of all; of those that agree with the elected sign, mean, sum or max."""


@intrinsic
def _float(_context, bits):
    """The float32 number of these 32 bits."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits(_context, number):
    """The 32 bits of a float32 number."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _load(raw):
    """A raw number as float32; compiled per type below."""


@overload(_load, inline="always")
def _load_raw(raw):
    if raw == types.uint16:
        return lambda raw: _float(np.uint32(np.uint32(raw) << np.uint32(16)))
    return lambda raw: raw


def _store(out, at, number):
    """Write a float32 number in the raw form of ``out``, rounded to nearest, ties to even; compiled per type below."""


@overload(_store, inline="always")
def _store_raw(out, at, number):
    if out.dtype == types.uint16:

        def rounded(out, at, number):
            bits = _bits(number)
            out[at] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return rounded

    def plain(out, at, number):
        out[at] = number

    return plain


_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def histogram(base, model, counts, first, fine):
    """Count the magnitudes of a task vector, model − base.

    Args:
        base, model: raw (n,).
        counts: int32 (4, BINS), grows; four tables, so that equal neighbours do not wait for each other. Their sum counts.
        first: number of the bin from which ``fine`` counts.
        fine: int64 (bins · 65536,), grows: single magnitudes of a few bins, but zeros: many in a row, each waiting for the
            one before, would be slow, and the first bin has them anyway.
    """
    upper_ = np.empty(BLOCK, np.uint32)
    single_ = np.empty(BLOCK, np.uint32)
    edge = first << np.uint32(16)
    wanted = np.uint32(fine.size)
    for start in range(0, base.size, BLOCK):
        b, m = base[start : start + BLOCK], model[start : start + BLOCK]
        size = b.size
        upper, single = upper_[:size], single_[:size]
        for j in range(size):
            bits = _bits(_load(m[j]) - _load(b[j])) & np.uint32(0x7FFFFFFF)
            upper[j] = bits >> np.uint32(16)
            single[j] = bits - edge if bits != 0 else np.uint32(0xFFFFFFFF)
        for j in range(0, size - size % 4, 4):
            counts[0, upper[j]] += 1
            counts[1, upper[j + 1]] += 1
            counts[2, upper[j + 2]] += 1
            counts[3, upper[j + 3]] += 1
        for j in range(size - size % 4, size):
            counts[0, upper[j]] += 1
        for j in range(size):
            if single[j] < wanted:
                fine[single[j]] += 1


@_compiled
def equal(base, model, wanted):
    """How many magnitudes of a task vector have these bits."""
    count = 0
    for start in range(0, base.size, BLOCK):
        b, m = base[start : start + BLOCK], model[start : start + BLOCK]
        here = np.int32(0)
        for j in range(b.size):
            here += np.int32((_bits(_load(m[j]) - _load(b[j])) & np.uint32(0x7FFFFFFF)) == wanted)
        count += here
    return count


@_compiled
def nth_equal(base, model, wanted, number):
    """The index of the n-th magnitude, from 1, with these bits; the length if there are fewer."""
    for j in range(base.size):
        if (_bits(_load(model[j]) - _load(base[j])) & np.uint32(0x7FFFFFFF)) == wanted:
            number -= 1
            if number == 0:
                return j
    return base.size


@_compiled
def average(base, models, shares, weight, out):
    """The rule `average`: base + weight · (weighted mean of models − base).

    Args:
        base: raw (n,). models: raw (N, n). shares: float64 (N,); their sum divides. weight: float32. out: raw (n,).

    Returns:
        How many results are not finite.
    """
    total_ = np.empty(BLOCK, np.float64)
    count, bad = shares.sum(), 0
    for start in range(0, base.size, BLOCK):
        b, o = base[start : start + BLOCK], out[start : start + BLOCK]
        size = b.size
        total = total_[:size]
        for j in range(size):
            total[j] = 0.0
        for i in range(models.shape[0]):
            m, share = models[i, start : start + BLOCK], shares[i]
            for j in range(size):
                total[j] += share * np.float64(_load(m[j]))
        here = np.int32(0)
        for j in range(size):
            old, mean = _load(b[j]), np.float32(total[j] / count)
            change = mean - old
            low, high = old + weight * change, mean - change * (np.float32(1) - weight)
            new = low if weight < np.float32(0.5) else high
            here += np.int32((_bits(new) & np.uint32(0x7FFFFFFF)) >= np.uint32(NOT_FINITE))
            _store(o, j, new)
        bad += here
    return bad


@_compiled
def _hashed(key, index):
    """24 bits that depend on nothing but key and index: splitmix64, see `vectors.kept`."""
    z = key + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(40)


@_compiled
def _thin(base, model, how, limit, key, offset, share, tau):
    """One block of a thinned task vector; how many of its numbers were not finite.

    ``limit`` is the least magnitude (trim) or hash (drop) that stays.
    """
    bad = np.int32(0)
    for j in range(tau.size):
        tau[j] = _load(model[j]) - base[j]
        bad += np.int32((_bits(tau[j]) & np.uint32(0x7FFFFFFF)) >= np.uint32(NOT_FINITE))
    if how == 1:
        for j in range(tau.size):
            kept = (_bits(tau[j]) & np.uint32(0x7FFFFFFF)) >= limit
            tau[j] = tau[j] if kept else np.float32(0)
    elif how == 2:
        for j in range(tau.size):
            kept = _hashed(key, np.uint64(offset + j)) >= np.uint64(limit)
            tau[j] = tau[j] / share if kept else np.float32(0)
    return bad


@_compiled
def _combine(taus, how, size, zero, total, count, merged):
    """One block: task vectors (N, BLOCK) to one, unscaled; ``total`` and ``count`` are room to work in."""
    for j in range(size):
        total[j] = 0.0
    for i in range(taus.shape[0]):
        tau = taus[i]
        for j in range(size):
            total[j] += np.float64(tau[j])
    if how <= 1:
        share = np.float64(taus.shape[0]) if how == 0 else 1.0
        for j in range(size):
            merged[j] = np.float32(total[j] / share)
        return
    for j in range(size):
        merged[j] = np.float32(total[j]) if total[j] != 0 else zero
        total[j] = 0.0
        count[j] = np.float32(0)
    for i in range(taus.shape[0]):
        tau = taus[i]
        for j in range(size):
            same = (_bits(tau[j]) ^ _bits(merged[j])) < np.uint32(0x80000000)
            agrees = same & (tau[j] != 0)
            value = np.float64(tau[j] if agrees else np.float32(0))
            if how == 4:
                total[j] = value if abs(value) > abs(total[j]) else total[j]
            else:
                total[j] += value
            count[j] += np.float32(1) if agrees else np.float32(0)
    for j in range(size):
        divisor = max(count[j], np.float32(1)) if how == 2 else np.float32(1)
        result = np.float32(total[j] / np.float64(divisor))
        merged[j] = result if merged[j] != 0 else np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})  # sums may be taken in vectors
def _moments(numbers, model, merged, mask):
    """One block: Σ m τ* τ and Σ m τ*², τ untrimmed."""
    both, square = 0.0, 0.0
    for j in range(merged.size):
        shared = np.float64(merged[j] if mask[j] else np.float32(0))
        both += shared * np.float64(_load(model[j]) - numbers[j])
        square += shared * shared
    return both, square


@_compiled
def merge(
    base,
    models,
    thin,
    limits,
    keys,
    offset,
    share,
    combine,
    zero,
    scale,
    out,
    congruence,
    halves,
    masks,
    moments,
):
    """Thin task vectors, combine them, and emit the merged weights, or the merged vector with masks.

    Args:
        base: raw (n,). models: raw (N, n).
        thin, combine: numbers of `THIN` and `COMBINE`.
        limits: uint32 (N,), see `_thin`. keys: uint64 (N,), of the hash. offset: index of the first weight in its tensor.
        share: float32, what is kept when dropping, 1 − p.
        zero: float32, the sign that a sum of exactly 0 elects: 0 for none.
        scale: float32, of the merged vector.
        out: raw (n,): base + scale · merged; with masks, scale · merged alone.
        congruence: whether a mask needs equal signs, MMER's directional congruence.
        halves: float32 (N,): λ_i / 2 of MMER's dominant significance.
        masks: bool (N, n), or (0, 0) for none.
        moments: float64 (N, 2), grows: Σ m_i τ* τ_i and Σ m_i τ*², of untrimmed τ_i; or (0, 0) for none.

    Returns:
        How many numbers are not finite, of the task vectors and of the merged one.
    """
    count_models = models.shape[0]
    numbers_ = np.empty(BLOCK, np.float32)
    merged_ = np.empty(BLOCK, np.float32)
    count_ = np.empty(BLOCK, np.float32)
    total_ = np.empty(BLOCK, np.float64)
    taus_ = np.empty((count_models, BLOCK), np.float32)
    bad = 0
    for start in range(0, base.size, BLOCK):
        b, o = base[start : start + BLOCK], out[start : start + BLOCK]
        size = b.size
        numbers, merged, count, total = numbers_[:size], merged_[:size], count_[:size], total_[:size]
        for j in range(size):
            numbers[j] = _load(b[j])
        for i in range(count_models):
            model = models[i, start : start + BLOCK]
            bad += _thin(numbers, model, thin, limits[i], keys[i], offset + start, share, taus_[i, :size])
        _combine(taus_, combine, size, zero, total, count, merged)
        here = np.int32(0)
        for j in range(size):
            merged[j] = scale * merged[j]
            here += np.int32((_bits(numbers[j] + merged[j]) & np.uint32(0x7FFFFFFF)) >= np.uint32(NOT_FINITE))
        bad += here
        if masks.shape[0] == 0:
            for j in range(size):
                _store(o, j, numbers[j] + merged[j])
            continue
        for j in range(size):
            _store(o, j, merged[j])
        for i in range(masks.shape[0]):
            tau, mask, half = taus_[i, :size], masks[i, start : start + BLOCK], halves[i]
            for j in range(size):
                same = ((_bits(tau[j]) ^ _bits(merged[j])) < np.uint32(0x80000000)) | (not congruence)
                mask[j] = same & (merged[j] != 0) & (tau[j] != 0) & (abs(tau[j]) >= half * abs(merged[j]))
            if moments.shape[0] == 0:
                continue
            both, square = _moments(numbers, models[i, start : start + BLOCK], merged, mask)
            moments[i, 0] += both
            moments[i, 1] += square
    return bad


@_compiled
def majority(base, models, limits):
    """The sum of the signs of the summed and trimmed task vectors; arguments as in `merge`."""
    numbers, tau, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    votes = 0
    for start in range(0, base.size, BLOCK):
        b = base[start : start + BLOCK]
        size = b.size
        for j in range(size):
            numbers[j] = _load(b[j])
            total[j] = 0.0
        for i in range(models.shape[0]):
            model = models[i, start : start + BLOCK]
            _thin(numbers[:size], model, 1, limits[i], np.uint64(0), 0, np.float32(1), tau[:size])
            for j in range(size):
                total[j] += np.float64(tau[j])
        for j in range(size):
            votes += int(total[j] > 0) - int(total[j] < 0)
    return votes


@_compiled
def signs(base, model, columns, positive, scales):
    """The sign of a task vector, and the mean magnitude of each of its rows.

    Args:
        base, model: raw (rows · columns,). positive: bool, of that size: whether τ > 0. scales: float32 (rows,).

    Returns:
        How many rows are not finite.
    """
    bad = 0
    for row in range(scales.size):
        start = row * columns
        b, m, p = base[start : start + columns], model[start : start + columns], positive[start : start + columns]
        total = 0.0
        for j in range(b.size):
            tau = _load(m[j]) - _load(b[j])
            p[j] = tau > 0
            total += np.float64(abs(tau))
        scales[row] = np.float32(total / np.float64(columns))
        bad += int(not np.isfinite(total))
    return bad
