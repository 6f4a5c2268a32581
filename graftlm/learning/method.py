"""An ingredient of continual learning, and what it may see.

A method is a list of ingredients; each answers at some of eight moments. It returns values and never edits a shared
blackboard. How several combine: prepare, after_epoch and consolidate run in the order written; data, trainable and rates
pass from left to right; losses are summed, and two terms of one name are an error; the LLM is opened by the one
ingredient that asks for a way of its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import MethodConflict
from graftlm.data import replay
from graftlm.data.types import Batch, Output, Phase, Sample, Stage
from graftlm.learning.fit import FitLog, Progress, fit
from graftlm.learning.phase import Schedule
from graftlm.model.adapters import StageAdapter
from graftlm.model.multimodal import MultimodalLM

__all__ = ["Context", "Method", "check_adapters", "opener", "resolve"]

Adapter = Literal["any", "stage", "run", "own"]


@dataclass
class Context:
    """What an ingredient may see and do while one stage is learned.

    Attributes:
        model: the model that learns.
        stage: D_i, the stage being learned.
        past: D_1 ... D_{i-1}.
        schedule: the phases of a stage and of realigning.
        seed: the run's seed; streams are derived from it by name.
        phase: the phase that trains now; None outside of training.
        parts: the parts that move now.
        logs: one entry per finished phase.
    """

    model: MultimodalLM
    stage: Stage
    past: tuple[Stage, ...]
    schedule: Schedule
    seed: int
    progress: Progress | None = None
    phase: Phase | None = None
    parts: frozenset[str] = frozenset()
    logs: list[FitLog] = field(default_factory=list)

    @property
    def number(self) -> int:
        """i, counted from 1."""
        return len(self.past) + 1

    @property
    def seen(self) -> tuple[Stage, ...]:
        """D_1 ... D_i."""
        return (*self.past, self.stage)

    def replay(self, stages: Sequence[Stage], fraction: float) -> list[Sample]:
        """R_i: ``fraction`` of every stage, nested (1 % is part of 10 %), the same whichever method asks."""
        return replay.replay(stages, fraction, seeds.derive(self.seed, "replay"))

    def forward(self, batch: Batch, *, logits: bool = False, hidden: bool = False) -> Output:
        """A forward pass that carries gradients."""
        output: Output = self.model(batch, logits=logits, hidden=hidden)
        return output

    def fit(self, samples: Sequence[Sample], phase: Phase) -> FitLog:
        """Train an extra phase (realigning, say) without the loss terms of the mix."""
        log = fit(
            self.model,
            samples,
            phase,
            resolve(phase.trainable, self.stage),
            seed=seeds.derive(self.seed, self.stage.name, phase.name),
            progress=self.progress,
        )
        self.logs.append(log)
        return log


@dataclass
class Method:
    """One ingredient of continual learning. Override only the moments the paper needs.

    Fields are the hyper-parameters. Whatever must survive to the next stage lives in ``state``, a flat dict of
    tensors that is saved beside the checkpoint.
    """

    adapter: ClassVar[Adapter] = "any"
    """How the LLM must be made plastic: fresh for every "stage", one for the "run", the method's "own", or "any"."""

    state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def idle(self, number: int) -> bool:
        """Whether this ingredient changes nothing at stage ``number``, so that stages learned alike can be shared."""
        return False

    def prepare(self, ctx: Context) -> None:
        """The model is still θ_{i-1}: look, label, extend."""

    def open(self, ctx: Context) -> StageAdapter:
        """Make the LLM plastic, at the first phase of a stage that moves it.

        Asked of the ingredient whose `adapter` is "own" or "run"; of none, a fresh LoRA is opened as here (or every weight).

        Returns:
            an open adapter, which becomes ``ctx.model.adapter``: `parameters` are what training moves, inside `previous` the
            LLM is θ_{i-1}, and `fold` ends the stage with weights, or a composition, that a checkpoint can hold.
        """
        ctx.model.adapter.open(seeds.derive(ctx.seed, ctx.stage.name, "adapter"))
        return ctx.model.adapter

    def data(self, ctx: Context, samples: list[Sample]) -> list[Sample]:
        """What this phase trains on."""
        return samples

    def trainable(self, ctx: Context, parts: frozenset[str]) -> frozenset[str]:
        """Which parts move in this phase."""
        return parts

    def rates(self, ctx: Context, lr: Mapping[str, float]) -> Mapping[str, float]:
        """Peak learning rates by part in this phase; the longest matching prefix of a parameter's name counts."""
        return lr

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """Extra named terms, already weighted."""
        return {}

    def after_epoch(self, ctx: Context) -> None:
        """An epoch of a phase is over."""

    def consolidate(self, ctx: Context) -> None:
        """Training is over: measure, fold, realign."""


def resolve(parts: frozenset[str], stage: Stage) -> frozenset[str]:
    """Replace "connectors.current" by the connectors of the stage's modalities."""
    current = frozenset(f"connectors.{modality}" for modality in stage.modalities)
    return (parts - {"connectors.current"}) | (current if "connectors.current" in parts else frozenset())


def check_adapters(methods: Sequence[Method]) -> Adapter:
    """The one way in which this mix makes the LLM plastic.

    Raises:
        MethodConflict: two ingredients ask for different ways, or both bring their own.
    """
    asking = [method for method in methods if method.adapter != "any"]
    for first, second in itertools.pairwise(asking):
        if first.adapter != second.adapter or first.adapter == "own":
            raise MethodConflict(
                f"{type(first).__name__} (adapter = '{first.adapter}') and {type(second).__name__} (adapter = "
                f"'{second.adapter}') cannot share the LLM: one way of making it plastic is expected per mix. Use one "
                f"of them, or write a learner that says how they share."
            )
    return asking[0].adapter if asking else "stage"


def opener(methods: Sequence[Method]) -> Method:
    """Who makes the LLM plastic: the first ingredient with a way of its own, else the way of every stage.

    Raises:
        MethodConflict: see `check_adapters`.
    """
    if check_adapters(methods) == "stage":
        return Method()
    return next(method for method in methods if method.adapter in ("own", "run"))
