"""What every route adds to one weight of the LLM, and how to get a route's weight from the text weight quickly.

    mmer    route i: θ_pre + s_i m_i∘τ*                text: θ_pre + mean_i s_i m_i∘τ*         masks are bits
    signs   route i: θ_pre ± s_i, one s_i per row      text: θ_pre + mean_i ± s_i              signs are bits
    damc    route i: θ_pre + s_i B_i A_i               text: θ_pre + s_t B_t A_t

Weights are built block by block of rows, in buffers that are used again and stay in the processor's cache, where a product
follows at once. Bits are unpacked eight at a time: a table turns a byte into a 64-bit word of eight bytes 0 or -1. Widened
to the weight's own width these select between two weights by integer operations alone.

Paper:   Li et al., MMER, ACL 2025, arXiv:2505.17110, §3.1-3.2; Chen et al., Model Composition for MLLMs (DAMC), ACL 2024,
    arXiv:2402.12750.
Differs: nothing in the values. With mmer θ_pre is not held beside the text weight: text weight - mean update, rounded, gives
    it back exactly, but where an update is larger than the weight; there it is off by a rounding of the text weight at most.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["LowRankUpdate", "MaskedUpdate", "SignUpdate", "Update", "Workspace", "blocks", "product", "unpack"]

BLOCK = 2**21
"""Bytes of a block of one route's weight. Smaller ones fit a core's own cache, but calls then take longer than they save."""

ROWS = 256
"""Rows that a block has a multiple of: matrix products of fewer, or of an odd number, are slow."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by width in bytes."""

Job = tuple[int, Tensor, Tensor, Tensor | None]
"""A route, its inputs (P, in), where the outputs go (P, out), and its bias (out,)."""


def blocks(shape: Sequence[int], count: int, unit: int = 8) -> list[slice]:
    """Rows of a weight in blocks of about ``count`` entries, a multiple of ``unit`` rows, at least one.

    A unit is a multiple of 8, so that every block begins at a whole byte of packed bits.
    """
    width = max(1, math.prod(shape[1:]))
    step = max(1, count // width // unit) * unit
    rows = shape[0] if shape else 1
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x Wᵀ + b into ``out``. Shapes: x (P, in), weight (R, in), bias (R,), out (P, R), of any strides."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class Workspace:
    """Buffers that are built into again and again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor of undefined content; the next taker of the name gets the same memory."""
        key = (name, dtype, device)
        if key not in self._buffers or len(self._buffers[key]) < count:
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                self._buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return self._buffers[key][:count]

    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def unpacked(self, packed: Tensor) -> Tensor:
        """Packed bits as bytes, each 0 or -1: uint8 (N, n) -> int8 (N, 8 n)."""
        index = self.take("index", packed.numel(), torch.int32, packed.device)
        words = self.take("words", packed.numel(), torch.int64, packed.device)
        index.view(packed.shape).copy_(packed)
        torch.index_select(_table(packed.device), 0, index, out=words)
        return words.view(torch.int8).view(len(packed), -1)


def unpack(packed: Tensor, start: int, count: int) -> Tensor:
    """Bits ``start`` (a multiple of 8) to ``start + count`` of a packed tensor, as float32 (count,) of 0 and 1."""
    part = packed[start // 8 : (start + count + 7) // 8]
    return _table(packed.device).index_select(0, part.int()).view(torch.int8)[:count].float().neg_()


@functools.cache
def _table(device: torch.device) -> Tensor:
    """Byte -> word of its bits, the lowest first, each a byte 0 or -1: int64 (256,)."""
    bits = -(torch.arange(256)[:, None] >> torch.arange(8) & 1)
    return bits.to(torch.int8).view(torch.int64).flatten().to(device)


class Update(nn.Module, ABC):
    """What every route adds to one weight.

    Its tensors are buffers that no state dict holds. `text_delta` and `route_delta` are exact as long as the tensors are as
    stored; `prepare` turns them into what `weights` needs.

    Args:
        shape: of the weight.
        routes: N, their number.
    """

    def __init__(self, shape: Sequence[int], routes: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.routes = routes
        self.row = max(1, math.prod(self.shape[1:]))

    def hold(self, **tensors: Tensor | None) -> None:
        """Keep tensors that follow the module to its device."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def span(self, rows: slice) -> tuple[int, int, tuple[int, ...]]:
        """First entry of some rows in the flattened weight, how many there are, and their shape."""
        count = (rows.stop - rows.start) * self.row
        return rows.start * self.row, count, (rows.stop - rows.start, *self.shape[1:]) if self.shape else ()

    @abstractmethod
    def route_delta(self, route: int, rows: slice) -> Tensor:
        """What a route adds to some rows, float32."""

    @abstractmethod
    def text_delta(self, rows: slice) -> Tensor:
        """What is added for text, float32."""

    @abstractmethod
    def prepare(self, base: Tensor, dtype: torch.dtype) -> None:
        """Get ready to build weights of ``dtype``; ``base`` is θ_pre."""

    @abstractmethod
    def weights(self, text: Tensor, rows: slice, routes: Sequence[int], work: Workspace) -> Iterator[Tensor]:
        """The rows of each route's weight in turn, each valid until the next is asked for.

        Args:
            text: the whole text weight (out, in).
        """

    def thin(self, positions: int) -> bool:
        """Whether a second product is cheaper than building the weight, for so many positions."""
        return False

    def build(self, text: Tensor, jobs: Sequence[Job], work: Workspace) -> None:
        """Outputs of each job with its route's weight, which is built block by block."""
        for rows in self._rows(text):
            built = self.weights(text, rows, [route for route, *_ in jobs], work)
            for (_, x, out, bias), weight in zip(jobs, built, strict=True):
                product(x, weight, None if bias is None else bias[rows], out[:, rows])

    def correct(self, text: Tensor, jobs: Sequence[Job], work: Workspace) -> None:
        """Add to each job's outputs, which hold x Wᵀ of the text weight, the product with the difference."""
        for rows in self._rows(text):
            built = self.weights(text, rows, [route for route, *_ in jobs], work)
            for (_, x, out, _), weight in zip(jobs, built, strict=True):
                part = out[:, rows]
                torch.addmm(part, x, weight.sub_(text[rows]).t(), out=part)

    def weight(self, text: Tensor, route: int, work: Workspace) -> Tensor:
        """A route's whole weight, in memory of its own."""
        return torch.cat(
            [part.clone() for rows in self._rows(text) for part in self.weights(text, rows, [route], work)]
        )

    def _rows(self, text: Tensor) -> list[slice]:
        return blocks(text.shape, BLOCK // text.element_size(), ROWS)


class MaskedUpdate(Update):
    """MMER: one merged task vector, one bit per route and weight, optionally one scale per route.

    Args:
        shared: τ*.
        masks: uint8 (N, ceil(numel / 8)).
        scales: float (N,); None is 1.
    """

    shared: Tensor
    masks: Tensor

    def __init__(self, shared: Tensor, masks: Tensor, scales: Tensor | None = None) -> None:
        super().__init__(shared.shape, len(masks))
        self.hold(shared=shared, masks=masks)
        self.scales: list[float] | None = None if scales is None else scales.tolist()

    def route_delta(self, route: int, rows: slice) -> Tensor:
        """s_i (m_i ∘ τ*)."""
        start, count, shape = self.span(rows)
        delta = unpack(self.masks[route], start, count).mul_(self.shared.reshape(-1)[start : start + count])
        return (delta if self.scales is None else delta.mul_(self.scales[route])).view(shape)

    def text_delta(self, rows: slice) -> Tensor:
        """mean_i s_i m_i, times τ*."""
        start, count, shape = self.span(rows)
        share = torch.zeros(count, device=self.shared.device)
        for route in range(self.routes):
            share.add_(unpack(self.masks[route], start, count), alpha=self.scales[route] if self.scales else 1.0)
        return share.div_(self.routes).mul_(self.shared.reshape(-1)[start : start + count]).view(shape)

    def prepare(self, base: Tensor, dtype: torch.dtype) -> None:
        """τ* in the working dtype; θ_pre is not kept."""
        # copies: what was read may be mapped to its file, which could change
        self.shared, self.masks = self.shared.to(dtype, copy=True), self.masks.clone()

    def weights(self, text: Tensor, rows: slice, routes: Sequence[int], work: Workspace) -> Iterator[Tensor]:
        """See `Update.weights`: where the bit is set base + s τ*, else base, bit by bit."""
        start, count, shape = self.span(rows)
        dtype, device = text.dtype, text.device
        tau = self.shared.view(-1)[start : start + count]
        masks = work.unpacked(self.masks[:, start // 8 : (start + count + 7) // 8])[:, :count]
        base, full, out = (work.take(name, count, dtype, device) for name in ("base", "full", "weight"))
        self._share(masks, base, work)
        torch.addcmul(text[rows].view(-1), base, tau, value=1 / self.routes, out=base)  # without the text's update
        bits, flips, steps, chosen = (x.view(INTEGERS[text.element_size()]) for x in (base, full, tau, out))
        if self.scales is None:
            torch.add(base, tau, out=full)
            flips.bitwise_xor_(bits)  # the bits in which both weights differ
        for route in routes:
            chosen.copy_(masks[route])
            if self.scales is None:
                chosen.bitwise_and_(flips).bitwise_xor_(bits)
            else:
                chosen.bitwise_and_(steps)
                torch.add(base, out, alpha=self.scales[route], out=out)
            yield out.view(shape)

    def _share(self, masks: Tensor, out: Tensor, work: Workspace) -> Tensor:
        """Σ_i -s_i m_i per weight into ``out``; masks are 0 and -1, int8 (N, n)."""
        if self.scales is None and self.routes < 128:
            total = work.take("total", len(out), torch.int8, out.device)
            total.copy_(masks[0])
            for mask in masks[1:]:
                total.add_(mask)
            return out.copy_(total)
        sums, bit = (work.take(name, len(out), torch.float32, out.device) for name in ("sums", "bit"))
        sums.zero_()
        for route, mask in enumerate(masks):
            sums.add_(bit.copy_(mask), alpha=self.scales[route] if self.scales else 1.0)
        return out.copy_(sums)


class SignUpdate(Update):
    """Signs and one scale per row: ± s.

    Args:
        signs: uint8 (N, ceil(numel / 8)), a bit is set where a task vector is positive.
        scales: float (N, rows of the weight), or (N, 1) of a vector.
    """

    signs: Tensor
    scales: Tensor
    base: Tensor

    def __init__(self, shape: Sequence[int], signs: Tensor, scales: Tensor) -> None:
        super().__init__(shape, len(signs))
        self.hold(signs=signs, scales=scales, base=None)

    def route_delta(self, route: int, rows: slice) -> Tensor:
        """± s: s (2 bit - 1)."""
        start, count, shape = self.span(rows)
        sign = unpack(self.signs[route], start, count).mul_(2).sub_(1)
        if len(self.shape) > 1:
            scale = self.scales[route, rows].float()
            return sign.view(len(scale), -1).mul_(scale[:, None]).view(shape)
        return sign.mul_(self.scales[route].float()).view(shape)

    def text_delta(self, rows: slice) -> Tensor:
        """The mean of all routes."""
        total = self.route_delta(0, rows)
        for route in range(1, self.routes):
            total += self.route_delta(route, rows)
        return total.div_(self.routes)

    def prepare(self, base: Tensor, dtype: torch.dtype) -> None:
        """θ_pre and the scales in the working dtype."""
        self.base, self.scales = base.to(dtype, copy=True), self.scales.to(dtype, copy=True)
        self.signs = self.signs.clone()

    def weights(self, text: Tensor, rows: slice, routes: Sequence[int], work: Workspace) -> Iterator[Tensor]:
        """See `Update.weights`."""
        start, count, shape = self.span(rows)
        # -1 -> 0 and 0 -> -1, an integer of all ones, of which the sign bit is kept
        masks = work.unpacked(self.signs[:, start // 8 : (start + count + 7) // 8]).bitwise_not_()[:, :count]
        out = work.take("weight", count, text.dtype, text.device).view(shape)
        signed = out.view(INTEGERS[text.element_size()])
        for route in routes:
            signed.copy_(masks[route].view(shape)).bitwise_and_(-(2 ** (8 * text.element_size() - 1)))
            signed.bitwise_xor_(self.scales[route, rows].view(signed.dtype)[:, None])
            yield out.add_(self.base[rows])


class LowRankUpdate(Update):
    """DAMC: one LoRA per route, and one for text.

    Args:
        branches: route -> A (R, in), B (out, R), scale; a route may have none.
        text: the same for text.
    """

    def __init__(
        self, shape: Sequence[int], routes: int, branches: Mapping[int, tuple[Tensor, Tensor, float]],
        text: tuple[Tensor, Tensor, float] | None,
    ) -> None:  # fmt: skip
        super().__init__(shape, routes)
        self.branches = dict(branches)
        self.text = text

    def route_delta(self, route: int, rows: slice) -> Tensor:
        """s_i B_i A_i."""
        return self._delta(self.branches.get(route), rows)

    def text_delta(self, rows: slice) -> Tensor:
        """s_t B_t A_t."""
        return self._delta(self.text, rows)

    def prepare(self, base: Tensor, dtype: torch.dtype) -> None:
        """Per route the factors of its difference from the text weight, [B_i, -B_t] and [A_i; A_t]."""
        for route in range(self.routes):
            parts = [(self.branches.get(route), 1.0), (self.text, -1.0)]
            known = [(a, b.float() * scale * sign) for part, sign in parts if part for a, b, scale in [part]]
            if known:
                a = torch.cat([a for a, _ in known]).to(base.device, dtype)
                self.hold(**{f"a{route}": a, f"b{route}": torch.cat([b for _, b in known], 1).to(base.device, dtype)})
        self.branches, self.text = {}, None

    def weights(self, text: Tensor, rows: slice, routes: Sequence[int], work: Workspace) -> Iterator[Tensor]:
        """See `Update.weights`."""
        _, count, shape = self.span(rows)
        out = work.take("weight", count, text.dtype, text.device).view(shape)
        for route in routes:
            factors = self._factors(route)
            yield (
                out.copy_(text[rows])
                if factors is None
                else torch.addmm(text[rows], factors[1][rows], factors[0], out=out)
            )

    def correct(self, text: Tensor, jobs: Sequence[Job], work: Workspace) -> None:
        """See `Update.correct`: two thin products."""
        for route, x, out, _ in jobs:
            if (factors := self._factors(route)) is not None:
                torch.addmm(out, x @ factors[0].t(), factors[1].t(), out=out)

    def thin(self, positions: int) -> bool:
        """Two thin products of rank R cost P R (in + out), building costs R in out."""
        out, width = self.shape
        return positions * (out + width) < out * width

    def _factors(self, route: int) -> tuple[Tensor, Tensor] | None:
        buffers = self._buffers
        a, b = buffers.get(f"a{route}"), buffers.get(f"b{route}")
        return None if a is None or b is None else (a, b)

    def _delta(self, branch: tuple[Tensor, Tensor, float] | None, rows: slice) -> Tensor:
        if branch is None:
            return torch.zeros(self.span(rows)[2])
        a, b, scale = branch
        return (b[rows].float() @ a.float()).mul_(scale)
