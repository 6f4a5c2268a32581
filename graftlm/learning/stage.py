"""Learning a stage: the continual-learning algorithm, to be read aloud."""

from collections.abc import Mapping, Sequence
from functools import partial

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.data.types import Modality, Stage
from graftlm.learning.fit import FitLog, Progress, fit
from graftlm.learning.method import Context, Method, check_adapters, resolve
from graftlm.learning.phase import Schedule
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModalitySpec

__all__ = ["learn"]


def learn(
    model: MultimodalLM,
    stage: Stage,
    past: Sequence[Stage],
    methods: Sequence[Method],
    schedule: Schedule,
    *,
    modalities: Mapping[Modality, ModalitySpec],
    seed: int = 0,
    progress: Progress | None = None,
) -> list[FitLog]:
    """Learn one stage, in place.

    Args:
        past: the stages learned before, in order.
        methods: the ingredients of the mix, in order.
        modalities: how to build what the stage needs and the model lacks.

    Returns:
        One log per phase, extra phases of the ingredients included.
    """
    adapter = check_adapters(methods)
    for modality in stage.modalities:
        if modality not in model.specs:
            model.add_modality(_spec(modality, modalities, stage), seeds.derive(seed, "connector", modality))
    ctx = Context(model, stage, tuple(past), schedule, seed, progress)
    for method in methods:
        method.prepare(ctx)
    for phase in schedule.phases:
        samples, parts = stage.samples(phase.kinds), resolve(phase.trainable, stage)
        ctx.phase = phase
        for method in methods:
            samples = method.data(ctx, samples)
            parts = method.trainable(ctx, parts)
        ctx.parts = parts
        if adapter == "stage" and "llm" in parts and not model.adapter.is_open:
            model.adapter.open(seeds.derive(seed, stage.name, "adapter"))
        log = fit(
            model,
            samples,
            phase,
            parts,
            seed=seeds.derive(seed, stage.name, phase.name),
            terms=[partial(method.loss, ctx) for method in methods],
            after_epoch=partial(_after_epoch, methods, ctx),
            progress=progress,
        )
        ctx.logs.append(log)
    ctx.phase, ctx.parts = None, frozenset()
    for method in methods:
        method.consolidate(ctx)
    if model.adapter.is_open:
        model.adapter.fold()
    return ctx.logs


def _after_epoch(methods: Sequence[Method], ctx: Context) -> None:
    for method in methods:
        method.after_epoch(ctx)


def _spec(modality: Modality, modalities: Mapping[Modality, ModalitySpec], stage: Stage) -> ModalitySpec:
    if modality not in modalities:
        raise ConfigError(
            f"stage {stage.name}: modality '{modality}' has no encoder; the model names {sorted(modalities)}. "
            f"Add model.modalities.{modality} with an encoder and a connector."
        )
    return modalities[modality]
