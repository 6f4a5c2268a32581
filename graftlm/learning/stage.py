"""Learning a stage: the continual-learning algorithm, to be read aloud."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.data.types import Modality, Sample, Stage
from graftlm.learning.fit import Progress, fit
from graftlm.learning.method import Context, Method, opener, resolve
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
    inquiries: Sequence[Sample] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Context:
    """Learn one stage, in place.

    Args:
        past: the stages learned before, in order.
        methods: the ingredients of the mix, in order.
        modalities: how to build what the stage needs and the model lacks.
        inquiries: text without labels, for ingredients that regularise on it.

    Returns:
        What the ingredients saw; its `logs` has one entry per phase, extra phases included, its `notes` what they noted.
    """
    plastic = opener(methods)
    new = frozenset(stage.modalities) - model.specs.keys()
    for modality in stage.modalities:
        if modality in new:
            model.add_modality(_spec(modality, modalities, stage), seeds.derive(seed, "connector", modality))
    ctx = Context(
        model, stage, tuple(past), schedule, seed, progress, inquiries=tuple(inquiries), new=new, plastic=plastic
    )
    for method in methods:
        method.prepare(ctx)
    for phase in schedule.phases:
        samples, parts, lr = stage.samples(phase.kinds), resolve(phase.trainable, stage), phase.lr
        ctx.phase = phase
        for method in methods:
            samples = method.data(ctx, samples)
            parts = method.trainable(ctx, parts)
            lr = method.rates(ctx, lr)
        ctx.parts = parts
        if ctx.trains_llm:
            ctx.open()
        log = fit(
            model,
            samples,
            dataclasses.replace(phase, lr=lr),
            parts,
            seed=seeds.derive(seed, stage.name, phase.name),
            terms=[partial(method.loss, ctx) for method in methods],
            wants=frozenset().union(*(method.wants for method in methods)),
            extend=partial(_extend, methods, ctx),
            after_epoch=partial(_after_epoch, methods, ctx),
            progress=progress,
        )
        ctx.logs.append(log)
    ctx.phase, ctx.parts = None, frozenset()
    for method in methods:
        method.consolidate(ctx)
    if model.adapter.is_open:
        model.adapter.fold()
    return ctx


def _extend(methods: Sequence[Method], ctx: Context, samples: list[Sample]) -> list[Sample]:
    for method in methods:
        samples = method.batch(ctx, samples)
    return samples


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
