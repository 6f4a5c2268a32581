"""What a run would do: the same walk, counting instead of training."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar, cast

from graftlm import methods as shelf
from graftlm.core.errors import ConfigError
from graftlm.core.files import hash_json
from graftlm.data.types import Batch, Output, Phase, Sample, Stage, Stream
from graftlm.experiment import composing
from graftlm.experiment.cells import open_stream, start_schedule, union
from graftlm.experiment.settings import ComposerSettings
from graftlm.experiment.sizes import FORMULA, Sizes, TextLengths, count
from graftlm.experiment.spec import ExperimentSpec
from graftlm.learning.fit import FitLog, steps_of
from graftlm.learning.method import Context, Method, check_adapters, resolve
from graftlm.learning.phase import Schedule
from graftlm.model.adapters import StageAdapter
from graftlm.model.multimodal import MultimodalLM

T = TypeVar("T")

__all__ = ["PhasePlan", "Plan", "StagePlan", "plan", "plan_stream"]


@dataclass(frozen=True)
class PhasePlan:
    """One optimisation.

    Attributes:
        trained: parameters that move, per part.
        samples, tokens: over all epochs; tokens are positions inside the LLM, estimated.
        memory_bytes: estimated by `FORMULA`.

    """

    phase: str
    trained: dict[str, int]
    samples: int
    steps: int
    tokens: int
    memory_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage of an expert or a method.

    Attributes:
        cell: "expert" or the method's name.
        number: i, from 1; an expert learns its stage first, whatever its place in the stream.
        shared: the cell that learns exactly this already; nothing is trained twice.
        moments: the ingredients in order of consolidation.
        notes: what could not be counted without the model.

    """

    cell: str
    number: int
    stage: str
    phases: tuple[PhasePlan, ...]
    checkpoint_bytes: int
    shared: str | None = None
    moments: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A run before it runs. Totals count what is shared once.

    Attributes:
        compositions: what is composed, a sentence each; nothing is trained for it.
    """

    name: str
    stream: str
    sizes: Sizes
    stages: tuple[StagePlan, ...]
    features_bytes: int
    compositions: tuple[str, ...] = ()
    formula: str = FORMULA

    @property
    def own(self) -> list[StagePlan]:
        """The stages that are learned, not found."""
        return [stage for stage in self.stages if stage.shared is None]

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(phase.steps for stage in self.own for phase in stage.phases)

    @property
    def tokens(self) -> int:
        """Positions inside the LLM in all."""
        return sum(phase.tokens for stage in self.own for phase in stage.phases)

    @property
    def memory_bytes(self) -> int:
        """Of the most demanding phase."""
        return max(phase.memory_bytes for stage in self.stages for phase in stage.phases)

    @property
    def disk_bytes(self) -> int:
        """Checkpoints and cached encoder outputs."""
        return self.features_bytes + sum(stage.checkpoint_bytes for stage in self.own)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, totals included."""
        totals = {
            "steps": self.steps,
            "tokens": self.tokens,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }
        return asdict(self) | {"totals": totals}


def plan(spec: ExperimentSpec) -> Plan:
    """Plan an experiment. Its data are written or found on disk, since samples are counted.

    Raises:
        ConfigError: a setting is wrong, or a modality of the stream has no encoder.

    """
    spec.check()
    return plan_stream(spec, open_stream(spec))


def plan_stream(spec: ExperimentSpec, stream: Stream) -> Plan:
    """`plan` for a stream that is at hand."""
    for stage in stream.stages:
        for modality in stage.modalities:
            if modality not in spec.model.modalities:
                raise ConfigError(
                    f"model.modalities.{modality}: missing; stage '{stage.name}' of stream {stream.name} needs an "
                    f"encoder and a connector for it. Add them."
                )
    walker = _Walker(spec.schedule(), count(spec.model_spec()), TextLengths(spec.model.llm, stream), spec.seed)
    walker.inquiries = stream.inquiries
    if stream.start is not None:
        walker.start(stream.start, stream.aligned, start_schedule(spec))
    for stage in stream.stages:
        walker.walk("expert", [stage], [])
    compositions: list[str] = []
    if spec.composers is not None:
        for chain in composing.chains(spec, stream):
            walker.later(chain, composing.later_phase(spec))
        for name, composer in spec.composers.items():
            walker.own(name, composer, spec, stream)
        compositions = composing.sentences(spec, stream)
    for name, entries in spec.mixes().items():
        methods = shelf.build(entries, f"methods.{name}")
        walker.walk(name, [union(stream)] if any(each.joint for each in methods) else stream.stages, methods)
    media = {
        media for stage in stream.stages for task in stage.tasks for s in (*task.train, *task.test) for media in s.media
    }
    features = 4 * sum(walker.sizes.features[item.modality] for item in media)
    return Plan(spec.name, stream.name, walker.sizes, tuple(walker.stages), features, tuple(compositions))


class _ModelNeededError(Exception):
    """An ingredient looked at the model, which a plan does not have."""


class _DryAdapter:
    """Keeps track of whether a stage is open; folding costs nothing."""

    def __init__(self) -> None:
        self.is_open = False

    def fold(self, *_: object, **__: object) -> None:
        self.is_open = False

    def factors(self) -> dict[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        raise _ModelNeededError(f"adapter.{name}")


class _DryModel:
    """Stands where the model would."""

    def __init__(self) -> None:
        self.adapter = _DryAdapter()

    def __getattr__(self, name: str) -> Any:
        raise _ModelNeededError(name)


@dataclass
class _DryContext(Context):
    """A context that writes down what it is asked to train."""

    record: Callable[[Phase, frozenset[str], Sequence[Sample]], None] = field(
        default=lambda phase, parts, samples: None
    )

    def open(self) -> StageAdapter:
        self.model.adapter.is_open = True  # type: ignore[misc]
        return self.model.adapter

    def fit(self, samples: Sequence[Sample], phase: Phase) -> FitLog:
        self.record(phase, resolve(phase.trainable, self.stage), samples)
        return FitLog(phase.name, 0, 0, 0, 0.0, 0.0, 0, 0.0, 0.0, 0)

    def forward(self, batch: Batch, *, logits: bool = False, hidden: bool = False) -> Output:
        raise _ModelNeededError("forward")


class _Walker:
    """Collects stage plans; knows what was planned before under the same content."""

    def __init__(self, schedule: Schedule, sizes: Sizes, lengths: TextLengths, seed: int) -> None:
        self.schedule = schedule
        self.sizes = sizes
        self.lengths = lengths
        self.seed = seed
        self.inquiries: tuple[Sample, ...] = ()
        self.stages: list[StagePlan] = []
        self._planned: dict[str, str] = {}

    def walk(self, cell: str, stages: Sequence[Stage], methods: Sequence[Method]) -> None:
        """Plan a chain of stages."""
        key = "base"
        for index, stage in enumerate(stages):
            active = [method for method in methods if not method.idle(index + 1)]
            way = ["run"] if index and check_adapters(methods) == "run" else []
            key = hash_json([key, stage.name, shelf.describe(active), *way])
            planned = self._stage(cell, stage, tuple(stages[:index]), methods, self._planned.get(key))
            self._planned.setdefault(key, f"{cell} {stage.name}")
            self.stages.append(planned)

    def start(self, stage: Stage, aligned: bool, schedule: Schedule) -> None:
        """Plan what the stream has learned before its first stage."""
        plain, self.schedule = self.schedule, schedule
        try:
            self.walk("start", [stage], shelf.build(["eproj"] if aligned else []))
        finally:
            self.schedule = plain

    def later(self, chain: Sequence[Stage], phase: Phase) -> None:
        """Plan the last of new tasks that an expert's LLM learns one after another."""
        plain, self.schedule = self.schedule, Schedule((phase,), self.schedule.realign)
        try:
            self.stages.append(self._stage("later", chain[-1], tuple(chain[:-1]), [], None))
        finally:
            self.schedule = plain

    def own(self, name: str, composer: ComposerSettings, spec: ExperimentSpec, stream: Stream) -> None:
        """Plan the experts that a composer needs of its own."""
        if composer.experts is None:
            return
        plain, self.schedule = self.schedule, composing.own_schedule(spec, composer)
        methods = shelf.build(composer.experts.methods, f"composers.{name}.experts.methods")
        try:
            for stage in stream.stages:
                planned = self._stage(f"expert of {name}", stage, (), methods, None)
                if any(method.adapter == "own" for method in methods):
                    note = f"{name}: its experts have an adapter of their own; the LLM's own parameters are counted instead."
                    planned = replace(planned, notes=(*planned.notes, note))
                self.stages.append(planned)
        finally:
            self.schedule = plain

    def _stage(
        self, cell: str, stage: Stage, past: tuple[Stage, ...], methods: Sequence[Method], shared: str | None
    ) -> StagePlan:
        model, notes, phases = _DryModel(), [], []
        seen = list(dict.fromkeys(m for each in (*past, stage) for m in each.modalities))

        def record(phase: Phase, parts: frozenset[str], samples: Sequence[Sample]) -> None:
            phases.append(self._phase(phase, parts, samples, seen))

        ctx = _DryContext(cast(MultimodalLM, model), stage, past, self.schedule, self.seed, record=record)
        ctx.new = frozenset(stage.modalities) - {m for each in past for m in each.modalities}
        ctx.inquiries = self.inquiries

        def ask(moment: Callable[..., T], value: T, *arguments: Any) -> T:
            """What an ingredient answers; what was there before, and a note, if it would have to look at the model."""
            try:
                return moment(*arguments)
            except _ModelNeededError as need:
                name = type(getattr(moment, "__self__", moment)).__name__
                note = f"{name} looks at the model ({need}); what follows from it is not counted."
                notes.extend([] if note in notes else [note])
                return value

        for method in methods:
            ask(method.prepare, None, ctx)
        for phase in self.schedule.phases:
            samples, parts = stage.samples(phase.kinds), resolve(phase.trainable, stage)
            ctx.phase = phase
            for method in methods:
                samples = ask(method.data, samples, ctx, samples)
                parts = ask(method.trainable, parts, ctx, parts)
            ctx.parts = parts
            if ctx.trains_llm:
                ctx.open()
            if "extension" in parts:
                notes.append(f"{cell}: what it adds to the model is not counted.")
            record(phase, parts, samples)
        ctx.phase, ctx.parts = None, frozenset()
        for method in methods:
            ask(method.consolidate, None, ctx)
        return StagePlan(
            cell=cell,
            number=len(past) + 1,
            stage=stage.name,
            phases=tuple(phases),
            checkpoint_bytes=self.sizes.checkpoint(any("llm" in phase.trained for phase in phases), seen),
            shared=shared,
            moments=tuple(type(method).__name__ for method in methods),
            notes=tuple(notes),
        )

    def _phase(self, phase: Phase, parts: frozenset[str], samples: Sequence[Sample], seen: Sequence[str]) -> PhasePlan:
        trained = self.sizes.trained(parts, seen)
        media = sum(self.sizes.tokens[item.modality] for sample in samples for item in sample.media)
        positions = (media + sum(map(self.lengths.text, samples))) / max(1, len(samples))
        answers = sum(map(self.lengths.answer, samples)) / max(1, len(samples))
        return PhasePlan(
            phase=phase.name,
            trained=trained,
            samples=len(samples) * phase.epochs,
            steps=steps_of(len(samples), phase),
            tokens=round(positions * len(samples) * phase.epochs),
            memory_bytes=self.sizes.memory(trained, seen, phase, positions, answers),
        )
