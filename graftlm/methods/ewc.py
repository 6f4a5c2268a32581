"""Online EWC: hold on to the weights that mattered.

    loss = L + λ/2 Σ Ω (θ - θ*)²        Ω_i = γ Ω_{i-1} + F_i,   F = mean over samples of g²,   g = ∇ L(θ*, one sample)

Paper:   Kirkpatrick et al., EWC, PNAS 2017, arXiv:1612.00796; the single anchor θ* = θ_{i-1}: Huszár, arXiv:1712.03847; the
    decay γ: Schwarz et al., Progress & Compress, ICML 2018. Settings: Zhang et al., Merge then Realign, EMNLP 2025,
    arXiv:2503.07663, App. C.3, whose Ω is an outer product and whose sum starts at j = 0.
Differs: Ω is the diagonal, of per-sample gradients, in float32, and the sum starts at j = 1. F_{i-1} is measured when stage i
    begins, at the very θ_{i-1} that it starts from (after realigning, if that is in the mix): a share of D_{i-1} must still
    be there. One LoRA lives through the whole run, because Ω is of its factors; ``on: weights`` takes the weights that the
    factors stand for instead, with a fresh LoRA per stage, so that stages can be merged; Ω then has the LLM's size. Several
    anchors need no more memory than one: a sum of parabolas is a parabola about their weighted centre, plus a constant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graftlm.core.errors import ConfigError, DataError
from graftlm.data.types import Batch, Output, Sample
from graftlm.learning.method import Adapter, Context, Method
from graftlm.model.adapters import StageAdapter

__all__ = ["EWC", "fisher"]


@dataclass
class EWC(Method):
    """Penalise what moves away from θ*, by how much it mattered.

    Attributes:
        strength: λ. The paper's 1 does nothing where losses are small: choose it on validation, in powers of ten.
        fraction: share of the last stage that Ω is measured on, in (0, 1].
        decay: γ, what remains of the older Ω.
        anchors: "last" is θ_{i-1} for all of Ω; "all" holds every F_j to its own θ_j, as in the first paper.
        on: "factors" of one LoRA, or the "weights" that a fresh one changes.
    """

    strength: float = 1.0
    fraction: float = 0.01
    decay: float = 1.0
    anchors: Literal["last", "all"] = "last"
    on: Literal["factors", "weights"] = "factors"
    _anchor: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def adapter(self) -> Adapter:  # type: ignore[override]
        """One LoRA for the run; of weights, a fresh one per stage, whose whole update is the drift."""
        return "run" if self.on == "factors" else "stage"

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ConfigError(f"strength: {self.strength}; a number from 0 is expected.")
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"fraction: {self.fraction} leaves no sample to measure on; a share above 0, up to 1, is expected."
            )
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay: {self.decay} is not a share; a number from 0 to 1 is expected (1 keeps all).")
        if self.anchors == "all" and self.on == "weights":
            raise ConfigError("anchors: 'all' needs the centre of every weight; use on: factors, or anchors: last.")

    def idle(self, number: int) -> bool:
        """The first stage has nothing to hold on to; what a stream's start has learned is not measured."""
        return number == 1 or self.strength == 0

    def prepare(self, ctx: Context) -> None:
        """Measure F_{i-1}, and remember θ_{i-1}."""
        if self.idle(ctx.number):
            return
        adapter = ctx.open()
        watched = adapter.parameters() if self.on == "factors" else adapter.changing()
        samples = ctx.replay([ctx.past[-1]], self.fraction)
        if not samples:
            raise DataError(f"ewc: stage {ctx.past[-1].name} has no sample to measure on; at least one is expected.")
        new = fisher(ctx, watched, samples)
        for name, parameter in watched.items():
            self._remember(name, parameter.detach().float(), new[name])
        self._anchor = self._anchors(adapter, watched)

    def _anchors(self, adapter: StageAdapter, watched: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """θ*, or nothing where the drift is what a fresh LoRA adds. No copy where one is kept already."""
        if self.anchors == "all":
            return {name: self.state[f"centre.{name}"] for name in watched}
        if self.on == "weights" and adapter.factors():
            return {}
        return adapter.opened() or {name: parameter.detach().float().clone() for name, parameter in watched.items()}

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """λ/2 Σ Ω (θ - θ*)², while the LLM moves."""
        if self.idle(ctx.number) or not ctx.trains_llm:
            return {}
        terms = [(self.state[f"omega.{name}"] * moved**2).sum() for name, moved in self._drift(ctx).items()]
        total = torch.stack(terms).sum()
        if self.anchors == "all":
            total = total + self.state["constant"].to(total)
        return {"ewc": 0.5 * self.strength * total}

    def _drift(self, ctx: Context) -> dict[str, Tensor]:
        adapter = ctx.model.adapter
        if self._anchor:
            now = adapter.parameters() if self.on == "factors" else adapter.changing()
            return {name: now[name].float() - anchor for name, anchor in self._anchor.items()}
        return {name: scale * (b.float() @ a.float()) for name, (a, b, scale) in adapter.factors().items()}

    def _remember(self, name: str, anchor: Tensor, new: Tensor) -> None:
        old = self.decay * self.state.get(f"omega.{name}", torch.zeros_like(new))
        omega = old + new
        if self.anchors == "all":
            before = self.state.get(f"centre.{name}", anchor)
            centre = torch.where(omega > 0, (old * before + new * anchor) / omega.clamp_min(1e-38), anchor)
            # of two parabolas with weights a and b, distance d apart, the lowest point is at a b / (a + b) d²
            apart = (old * new / omega.clamp_min(1e-38) * (before - anchor) ** 2).double().sum()
            self.state["constant"] = self.decay * self.state.get("constant", torch.zeros((), dtype=torch.float64))
            self.state["constant"] = self.state["constant"] + apart.cpu()
            self.state[f"centre.{name}"] = centre
        self.state[f"omega.{name}"] = omega


def fisher(ctx: Context, parameters: Mapping[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of one sample's loss, in float32: not the square of the mean."""
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    training = ctx.model.training
    ctx.model.eval()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for sample in samples:
            loss = ctx.forward(ctx.model.batch([sample])).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for sums, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    sums.addcmul_(gradient.float(), gradient.float(), value=1 / len(samples))
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        ctx.model.train(training)
    return total
