"""MERA: merge, then realign.

Teaching the shared LLM a new modality breaks two things: it forgets, and the connectors of earlier modalities no
longer fit it. MERA repairs each cheaply:

    merge      θ_i ← (i-1)/i · θ_{i-1} + 1/i · θ_i      the LLM only
    realign    tune all connectors on r of D_1 … D_i     the LLM frozen

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4; noise: App. A.5.
Differs: nothing that the paper fixes. It leaves open, and we chose: effective weights are averaged, not LoRA factors, every
    stage has a fresh LoRA, and r is taken of every D_j.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.data.replay import mispair
from graftlm.learning.method import Context, Method
from graftlm.merging import RULES
from graftlm.merging.spectral import decompose, spectrum
from graftlm.model.parts import select

__all__ = ["Merge", "Realign", "mera"]


@dataclass
class Merge(Method):
    """Fold the stage into the LLM by a merging rule: a running average, or what else keeps part of an update.

    Attributes:
        rule: "average"; "model_mix", which is an average with alpha as weight; "sac", by the update's spectrum.
        weight: of an average, the share of the new weights, in [0, 1]; None is 1/i, so that the LLM stays the plain mean
            of what every stage made of it.
        alpha: of the other rules, in [0, 1]; None is 0.2, LLaVA-c's.
        window: of "sac", see `merging.spectral`.
        connectors: also fold what the stage made of connectors that were there before it.
    """

    adapter = "stage"
    folds = True
    rule: Literal["average", "model_mix", "sac"] = "average"
    weight: float | None = None
    alpha: float | None = None
    window: Literal["mean", "eq6", "alg1"] = "mean"
    connectors: bool = False
    _before: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("alpha", self.alpha)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(
                    f"{name}: {value} is not a share; a number from 0 to 1, or nothing for the default, is expected."
                )
        if self.alpha is not None and self.rule == "average":
            raise ConfigError("alpha: an average has a weight instead; set weight, or another rule.")
        if self.weight is not None and self.rule != "average":
            raise ConfigError(f"weight: rule '{self.rule}' has an alpha instead; set alpha.")

    def idle(self, number: int) -> bool:
        """A share of 1 is the new weights themselves."""
        return (
            (self.weight == 1 or (self.weight is None and number == 1)) if self.rule == "average" else self.alpha == 1
        )

    def prepare(self, ctx: Context) -> None:
        """Remember the connectors that may change."""
        if self.connectors:
            old = {f"connectors.{name}" for name in ctx.model.specs if name not in ctx.new}
            self._before = {name: p.detach().clone() for name, p in select(ctx.model, old).items()}

    def consolidate(self, ctx: Context) -> None:
        """θ_i ← rule(θ_{i-1}, θ_i): of the average (1-w) θ_{i-1} + w θ_i."""
        if self.idle(ctx.number):
            return
        rule, settings = RULES.get(self.rule), self._settings(ctx.number)
        if ctx.model.adapter.is_open:
            if self.rule == "sac":
                ctx.notes.setdefault("spectra", []).extend(spectra(ctx.model.adapter.factors(), settings))
            ctx.model.adapter.fold(rule, **settings)
        with torch.no_grad():
            for name, before in self._before.items():
                parameter = ctx.model.get_parameter(name)
                if not torch.equal(before, parameter):
                    parameter.copy_(rule(before, [parameter], **settings))

    def _settings(self, number: int) -> dict[str, Any]:
        if self.rule == "average":
            return {"weight": 1 / number if self.weight is None else self.weight}
        alpha = 0.2 if self.alpha is None else self.alpha
        return {"alpha": alpha} | ({"window": self.window} if self.rule == "sac" else {})


def spectra(
    factors: Mapping[str, tuple[Tensor, Tensor, float]], settings: Mapping[str, Any], count: int = 6
) -> list[dict[str, Any]]:
    """Singular values of a few updates, evenly chosen, before and after SAC, to be drawn."""
    names = list(factors)
    found = []
    for name in names[:: max(1, len(names) // count)][:count]:
        a, b, scale = factors[name]
        sigma = decompose(a.detach().cpu(), b.detach().cpu(), scale).sigma
        if not len(sigma):
            continue
        window, after = spectrum(sigma, settings["alpha"], settings["window"])
        found.append(
            {
                "name": name,
                "before": sigma.tolist(),
                "after": after.tolist(),
                "k": window,
                "reached": float(after[0] / sigma[0]),
            }
        )
    return found


@dataclass
class Realign(Method):
    """Fit every connector to the LLM again, on a little of everything seen.

    Attributes:
        fraction: r, the share of every D_j up to the current one, in [0, 1].
        noise: share of the replayed samples whose media are swapped within their modality, in [0, 1] (App. A.5).
        epochs, lr: of this phase; None is what the schedule says.
    """

    closes = True
    fraction: float = 0.10
    noise: float = 0.0
    epochs: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("fraction", "noise"):
            value = {"fraction": self.fraction, "noise": self.noise}[name]
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}: {value} is not a share; a number from 0 to 1 is expected (0.1 is 10 %).")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs: {self.epochs}; at least 1 is expected.")

    def idle(self, number: int) -> bool:
        """After the first stage nothing is misaligned."""
        return number == 1 or self.fraction == 0

    def consolidate(self, ctx: Context) -> None:
        """Train the connectors of everything seen, the LLM frozen at its folded weights."""
        if self.idle(ctx.number):
            return
        if ctx.model.adapter.is_open:  # no ingredient before this one folded: realign to what training left
            ctx.model.adapter.fold()
        samples = ctx.replay(ctx.seen, self.fraction)
        samples = mispair(samples, self.noise, seeds.derive(ctx.seed, ctx.stage.name, "noise"))
        phase = ctx.schedule.realign
        ctx.fit(
            samples,
            dataclasses.replace(
                phase,
                epochs=self.epochs or phase.epochs,
                lr=phase.lr if self.lr is None else dict.fromkeys(phase.lr, self.lr),
            ),
        )


def mera(
    fraction: float = 0.10, noise: float = 0.0, epochs: int | None = None, lr: float | None = None
) -> list[Method]:
    """Merge by 1/i, then realign on ``fraction`` of everything seen."""
    return [Merge(), Realign(fraction, noise, epochs, lr)]
