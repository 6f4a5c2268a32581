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
from dataclasses import dataclass

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.data.replay import mispair
from graftlm.learning.method import Context, Method
from graftlm.merging import RULES

__all__ = ["Merge", "Realign", "mera"]


@dataclass
class Merge(Method):
    """Fold the stage into the LLM by a running average.

    Attributes:
        weight: share of the new weights, in [0, 1]; None is 1/i, so that the LLM stays the plain mean of what every
            stage made of it.
    """

    adapter = "stage"
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise ConfigError(
                f"weight: {self.weight} is not a share; a number from 0 to 1, or nothing for 1/i, is expected."
            )

    def idle(self, number: int) -> bool:
        """1/1 is the new weights themselves."""
        return self.weight == 1 or (self.weight is None and number == 1)

    def consolidate(self, ctx: Context) -> None:
        """θ_i ← (1-w) θ_{i-1} + w θ_i."""
        if ctx.model.adapter.is_open:
            ctx.model.adapter.fold(RULES.get("average"), weight=1 / ctx.number if self.weight is None else self.weight)


@dataclass
class Realign(Method):
    """Fit every connector to the LLM again, on a little of everything seen.

    Attributes:
        fraction: r, the share of every D_j up to the current one, in [0, 1].
        noise: share of the replayed samples whose media are swapped within their modality, in [0, 1] (App. A.5).
        epochs, lr: of this phase; None is what the schedule says.
    """

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
