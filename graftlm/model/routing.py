"""Routed inference: every position of the sequence is computed with the weights of its own modality.

    y_t = (θ_pre + m_{r(t)} ∘ τ*) x_t        text: m̄, the mean of the masks; one joint attention over all positions

The text weight is an ordinary parameter, and decoded tokens are text: decoding runs as without routing. Other positions
matter at prefill only. Their weight is had in one of three ways:

    dense    held for every route: fastest, (N + 1) times the memory
    build    made from the text weight in every layer of a prefill, block by block, and multiplied at once
    correct  the text weight for all positions, and a second product with the difference on those of a modality

Paper:   Li et al., MMER, ACL 2025, arXiv:2505.17110, §3.2.1, Eq. 4-7; DAMC: Chen et al., ACL 2024, arXiv:2402.12750.
Differs: the paper writes out attention's projections only; here all linear layers are routed, and norms whose output is
    proportional to their weight. Embeddings, the head and whatever else has weights take the text weight (`unrouted`).
    m̄ is the mean over all routes, later tasks of a modality included.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from graftlm.core.errors import RunError
from graftlm.model.variants import Job, Update, Workspace, product

__all__ = ["Group", "Route", "RoutedLinear", "RoutedNorm", "Way", "is_proportional"]

Way = Literal["auto", "dense", "build", "correct"]
"""How the weights of modality positions are had; auto is dense while memory allows, else the cheaper of the others."""


@dataclass(frozen=True)
class Group:
    """The positions of one route: a slice where they are contiguous, else their numbers, Int (P,).

    Attributes:
        route: its number; None is text.
    """

    route: int | None
    rows: slice | Tensor

    @property
    def size(self) -> int:
        """How many."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def take(self, x: Tensor) -> Tensor:
        """Their rows; a view of a slice."""
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)

    def put(self, out: Tensor, values: Tensor) -> None:
        """Write what `take` copied back."""
        if not isinstance(self.rows, slice):
            out.index_copy_(0, self.rows, values)


class Route:
    """Says which route each position takes, for one forward pass of one model.

    Attributes:
        groups: the routes that are present, text first; None while every position is text.
        numbers: 1 + route of every position, text 0: Int (B S,).
        work: buffers that weights are built in.
    """

    def __init__(self) -> None:
        self.groups: list[Group] | None = None
        self.numbers = torch.zeros(0, dtype=torch.long)
        self.work = Workspace()
        self._shape: tuple[int, ...] = ()

    @contextlib.contextmanager
    def over(self, modality_ids: Tensor, serving: Sequence[int | None]) -> Iterator[None]:
        """Inside, the LLM's layers route these positions.

        Args:
            modality_ids: Int (B, S), 0 is text.
            serving: route of each id; None, or an id beyond them, is the text weight.
        """
        table = torch.tensor([*(0 if route is None else 1 + route for route in serving), 0])
        numbers = table[modality_ids.reshape(-1).cpu().clamp_max(len(serving))]
        if bool(numbers.any()):
            device = modality_ids.device
            self._shape, self.numbers = tuple(modality_ids.shape), numbers.to(device)
            self.groups = [
                Group(number - 1 if number else None, _rows(numbers == number, device))
                for number in sorted(set(numbers.tolist()))
            ]
        try:
            yield
        finally:
            self.clear()

    @contextlib.contextmanager
    def prefill(self, llm: nn.Module, modality_ids: Tensor, serving: Sequence[int | None]) -> Iterator[None]:
        """As `over`, but for the first forward pass of the LLM only: what is decoded later is text."""
        with self.over(modality_ids, serving):
            hook = llm.register_forward_hook(lambda *_: self.clear())
            try:
                yield
            finally:
                hook.remove()

    def clear(self) -> None:
        """Every position is text again."""
        self.groups = None

    def flat(self, x: Tensor) -> Tensor:
        """Positions in one dimension: (B, S, ...) or (B S, ...) -> (B S, ...).

        Raises:
            RunError: these are not the positions that were announced.
        """
        if tuple(x.shape[:2]) == self._shape:
            return x.flatten(0, 1)
        if x.dim() > 1 and x.shape[0] == len(self.numbers):
            return x
        raise RunError(
            f"a routed layer sees a tensor of {tuple(x.shape)}, but the modalities of {self._shape} positions are known; "
            f"layers that see every position in order are expected. This LLM cannot be routed: load it with mode='retain:...'."
        )

    def inverse(self) -> Tensor:
        """Where each position is when the groups stand one after the other, Int (B S,)."""
        return self.numbers.argsort(stable=True).argsort()


def _rows(mask: Tensor, device: torch.device) -> slice | Tensor:
    rows = mask.nonzero()[:, 0]
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows.to(device)


class RoutedLinear(nn.Linear):
    """A linear layer whose weight depends on the position's route.

    Args:
        linear: the layer; its parameters, which hold the text weights, become this one's.
        route: of the model.
        way: "auto" decides between building and correcting in every pass.
        update: what routes add to the weight, prepared. None: every route has the text weight, or ``held`` has its own.
        held: weight (out, in) by route, for "dense".
        biases: text's and every route's, Float (1 + N, out); None where all are alike.
    """

    biases: Tensor | None

    def __init__(
        self, linear: nn.Linear, route: Route, way: Way, *, update: Update | None = None,
        held: Mapping[int, Tensor] | None = None, biases: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.route = route
        self.way = way
        self.update = update
        for number, weight in (held or {}).items():
            self.register_buffer(f"weight_{number}", weight, persistent=False)
        self.register_buffer("biases", biases, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Float (B, S, in) -> (B, S, out)."""
        if self.route.groups is None:
            return F.linear(input, self.weight, self.bias)
        x = self.route.flat(input)
        # a buffer that is built into again cannot be kept for a backward pass, nor does out= know autocast
        if (torch.is_grad_enabled() and input.requires_grad) or torch.is_autocast_enabled(input.device.type):
            out = self._apart(x)
        elif self.update is not None and self._corrects(len(x)):
            out = self._corrected(x, self.update)
        else:
            out = self._together(x)
        return out.view(*input.shape[:-1], self.out_features)

    def _together(self, x: Tensor) -> Tensor:
        """Every group's product goes to its place."""
        out = x.new_empty(len(x), self.out_features)
        written, jobs = [], []
        for group in self.route.groups or []:
            to = out[group.rows] if isinstance(group.rows, slice) else x.new_empty(len(group.rows), self.out_features)
            written.append((group, to))
            if group.route is not None and self.update is not None:
                jobs.append((group.route, group.take(x), to, self._bias(group.route)))
            else:
                product(group.take(x), self._weight(group.route), self._bias(group.route), to)
        if self.update is not None:
            self.update.build(self.weight, jobs, self.route.work)
        for group, to in written:
            group.put(out, to)
        return out

    def _corrected(self, x: Tensor, update: Update) -> Tensor:
        """The text weight's product for all, then the differences."""
        out = F.linear(x, self.weight, self.bias)
        groups = [group for group in self.route.groups or [] if group.route is not None]
        jobs: list[Job] = [(group.route or 0, group.take(x), group.take(out), None) for group in groups]
        update.correct(self.weight, jobs, self.route.work)
        for group, (route, _, to, _) in zip(groups, jobs, strict=True):
            if self.biases is not None:
                to += self.biases[1 + route] - self.biases[0]
            group.put(out, to)
        return out

    def _apart(self, x: Tensor) -> Tensor:
        """Differentiable: weights in memory of their own, products put in order at the end."""
        parts = [F.linear(g.take(x), self._weight(g.route), self._bias(g.route)) for g in self.route.groups or []]
        return torch.cat(parts).index_select(0, self.route.inverse())

    def _corrects(self, positions: int) -> bool:
        if self.way == "auto" and self.update is not None:
            text = sum(group.size for group in self.route.groups or [] if group.route is None)
            return self.update.thin(positions - text)
        return self.way == "correct"

    def _weight(self, route: int | None) -> Tensor:
        held = None if route is None else self._buffers.get(f"weight_{route}")
        if route is None or (held is None and self.update is None):
            return self.weight
        if held is not None:
            return held
        assert self.update is not None
        with torch.no_grad():
            return self.update.weight(self.weight, route, self.route.work)

    def _bias(self, route: int | None) -> Tensor | None:
        if self.biases is None:
            return self.bias
        return self.biases[0 if route is None else 1 + route]


class RoutedNorm(nn.Module):
    """A norm whose weight depends on the position's route.

    Args:
        norm: the module; its parameters, which hold the text weights, become this one's.
        route: of the model.
        weights, biases: text's and every route's, Float (1 + N, D); None where all are alike.
    """

    weights: Tensor | None
    biases: Tensor | None
    neutral: Tensor

    def __init__(self, norm: nn.Module, route: Route, *, weights: Tensor | None, biases: Tensor | None) -> None:
        super().__init__()
        self._norm = (norm,)  # in a tuple: its parameters have one name, the one that they had
        self.route = route
        self.weight = norm.get_parameter("weight")
        self.bias = norm.get_parameter("bias") if "bias" in dict(norm.named_parameters()) else None
        self.train(norm.training)
        self.register_buffer(
            "neutral", torch.stack([torch.ones_like(self.weight), torch.zeros_like(self.weight)]), persistent=False
        )
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("biases", biases, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Float (B, S, ..., D) -> the same shape."""
        (norm,) = self._norm
        if self.route.groups is None:
            out: Tensor = norm(hidden)
            return out
        neutral = {"weight": self.neutral[0]} | ({} if self.bias is None else {"bias": self.neutral[1]})
        plain: Tensor = functional_call(norm, neutral, (hidden,))
        flat, numbers = self.route.flat(plain), self.route.numbers
        middle = [1] * (flat.dim() - 2)
        scaled = flat * self._of("weight", numbers).view(-1, *middle, flat.shape[-1])
        if self.bias is not None:
            scaled = scaled + self._of("bias", numbers).view(-1, *middle, flat.shape[-1])
        return scaled.view(plain.shape)

    def _of(self, name: str, numbers: Tensor) -> Tensor:
        """Of every position, (P, D)."""
        values = self.weights if name == "weight" else self.biases
        return self.get_parameter(name).expand(1, -1) if values is None else values.index_select(0, numbers)


@torch.no_grad()
def is_proportional(module: nn.Module) -> bool:
    """Whether a module is a norm that multiplies by its weight last, and perhaps adds a bias; found by trying.

    Such a module can be routed. One that, for instance, multiplies by 1 + weight cannot.
    """
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if weight is None or weight.dim() != 1 or not own.keys() <= {"weight", "bias"} or list(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)
    hidden, drawn, shift = (torch.randn(*shape, len(weight), generator=generator) for shape in ((2, 3), (), ()))
    given = {"weight": drawn, "bias": shift} if "bias" in own else {"weight": drawn}
    neutral = {"weight": torch.ones_like(drawn), "bias": torch.zeros_like(drawn)}
    try:
        found, plain = (
            functional_call(module, {name: values[name].to(weight) for name in own}, (hidden.to(weight),))
            for values in (given, neutral)
        )
    except (TypeError, ValueError, RuntimeError):
        return False
    if not isinstance(found, Tensor) or found.shape != hidden.shape:
        return False
    expected = plain.float() * drawn.to(weight.device) + given.get("bias", torch.zeros(1)).to(weight.device)
    return torch.allclose(found.float(), expected, rtol=0.02, atol=0.02)
