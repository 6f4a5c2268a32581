"""An ingredient of continual learning, and what it may see.

A method is a list of ingredients; each answers at some of nine moments. It returns values and never edits a shared
blackboard. How several combine: prepare, after_epoch and consolidate run in the order written; data, trainable, rates and
batch pass from left to right; losses are summed, and two terms of one name are an error; the LLM is opened by the one
ingredient that asks for a way of its own.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, MethodConflict
from graftlm.data import replay
from graftlm.data.types import Batch, Output, Phase, Sample, Stage, Stream
from graftlm.learning.fit import FitLog, Progress, autocast, fit
from graftlm.learning.phase import Schedule
from graftlm.model.adapters import StageAdapter
from graftlm.model.multimodal import MultimodalLM

__all__ = ["Context", "Method", "PerStage", "at_stage", "check_adapters", "check_per_stage", "opener", "resolve"]

Adapter = Literal["any", "stage", "run", "own"]

PerStage = float | list[float | None]
"""One value, or one per stage; None where a stage has no use for it."""


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
        inquiries: text without labels, see `Stream.inquiries`.
        new: modalities that the model did not have before this stage.
        plastic: who opens the LLM; None is the way of every stage.
        logs: one entry per finished phase.
        notes: what ingredients want to be read later, as JSON; kept with the stage.
    """

    model: MultimodalLM
    stage: Stage
    past: tuple[Stage, ...]
    schedule: Schedule
    seed: int
    progress: Progress | None = None
    phase: Phase | None = None
    parts: frozenset[str] = frozenset()
    inquiries: tuple[Sample, ...] = ()
    new: frozenset[str] = frozenset()
    plastic: "Method | None" = None
    logs: list[FitLog] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """i, counted from 1."""
        return len(self.past) + 1

    @property
    def seen(self) -> tuple[Stage, ...]:
        """D_1 ... D_i."""
        return (*self.past, self.stage)

    @property
    def trains_llm(self) -> bool:
        """Whether the LLM, or some of its layers, move now."""
        return any(part == "llm" or part.startswith("llm.") for part in self.parts)

    def open(self) -> StageAdapter:
        """Make the LLM plastic for this stage, in the way of the mix, unless it is."""
        if not self.model.adapter.is_open:
            self.model.adapter = (self.plastic or Method()).open(self)
        return self.model.adapter

    def replay(self, stages: Sequence[Stage], fraction: float) -> list[Sample]:
        """R_i: ``fraction`` of every stage, nested (1 % is part of 10 %), the same whichever method asks."""
        return replay.replay(stages, fraction, seeds.derive(self.seed, "replay"))

    def forward(self, batch: Batch, *, logits: bool = False, hidden: bool = False) -> Output:
        """A forward pass that carries gradients."""
        with autocast(self.model):
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

    wants: ClassVar[frozenset[str]] = frozenset()
    """"logits", "hidden": what `loss` looks at in `Output` beyond the answers; all positions take memory."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """"inquiries", "pseudo": what, beside samples, decides what this ingredient does."""

    folds: ClassVar[bool] = False
    """Whether `consolidate` says how the stage becomes part of the LLM; one of a mix can."""

    closes: ClassVar[bool] = False
    """Whether `consolidate` needs the stage to be part of the LLM, as training left it if nobody folded it before."""

    joint: ClassVar[bool] = False
    """Whether all stages are learned at once, instead of one after the other."""

    state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def check(self, stream: Stream) -> None:
        """Refuse, before any work, a stream that this ingredient cannot learn.

        Raises:
            ConfigError: a setting does not fit the stages.
            DataError: something that it needs is missing.
        """

    def files(self) -> list[Path]:
        """Files that decide, by their content, what this ingredient does."""
        return []

    def idle(self, number: int) -> bool:
        """Whether this ingredient changes nothing at stage ``number``, so that stages learned alike can be shared."""
        return False

    def prepare(self, ctx: Context) -> None:
        """The model is still θ_{i-1}: look, label, extend."""

    def open(self, ctx: Context) -> StageAdapter:
        """Make the LLM plastic, at the first phase of a stage that moves it.

        Asked of the ingredient whose `adapter` is "own" or "run"; of none, a fresh LoRA is opened as here (or every weight).
        An ingredient of the "run" goes on with the LoRA of the stage before.

        Returns:
            an open adapter, which becomes ``ctx.model.adapter``: `parameters` are what training moves, inside `previous` the
            LLM is θ_{i-1}, and `fold` ends the stage with weights, or a composition, that a checkpoint can hold.
        """
        resume = self.adapter == "run" and ctx.number > 1
        ctx.model.adapter.open(seeds.derive(ctx.seed, ctx.stage.name, "adapter"), resume=resume)
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

    def batch(self, ctx: Context, samples: list[Sample]) -> list[Sample]:
        """What an optimiser step learns from: the samples of a batch, and what goes with them."""
        return samples

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
        MethodConflict: two ingredients ask for different ways, or both bring their own, or both fold.
    """
    asking = [method for method in methods if method.adapter != "any"]
    for first, second in itertools.pairwise(asking):
        if first.adapter != second.adapter or first.adapter == "own":
            raise MethodConflict(
                f"{type(first).__name__} (adapter = '{first.adapter}') and {type(second).__name__} (adapter = "
                f"'{second.adapter}') cannot share the LLM: one way of making it plastic is expected per mix. Use one "
                f"of them, or write a learner that says how they share."
            )
    folding = [type(method).__name__ for method in methods if method.folds]
    if len(folding) > 1:
        raise MethodConflict(
            f"{' and '.join(folding)} each say how a stage becomes part of the LLM; one way is expected per mix. Use one of "
            f"them."
        )
    for first, second in itertools.combinations(methods, 2):
        if first.closes and second.folds:
            raise MethodConflict(
                f"{type(first).__name__} stands before {type(second).__name__}, which would find the stage folded already. "
                f"Write {type(second).__name__} first."
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


def at_stage(value: PerStage, number: int) -> float:
    """The value of stage ``number``, counted from 1; nan where it has none."""
    if not isinstance(value, list):
        return value
    chosen = value[number - 1]
    return math.nan if chosen is None else chosen


def check_per_stage(name: str, value: PerStage, stages: int) -> None:
    """One value, or as many as there are stages.

    Raises:
        ConfigError: another number of values.
    """
    if isinstance(value, list) and len(value) != stages:
        raise ConfigError(
            f"{name}: {len(value)} values, but the stream has {stages} stages. One value, or one per stage (null where a "
            f"stage has none), is expected."
        )
