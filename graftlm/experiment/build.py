"""From what an experiment file says to the objects of the rooms below."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from graftlm import methods as shelf
from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.data.types import Phase
from graftlm.experiment.settings import ModelSettings, PhaseSettings, ScheduleChanges
from graftlm.experiment.spec import ExperimentSpec
from graftlm.learning import phase as phases
from graftlm.learning.method import check_adapters
from graftlm.learning.phase import Schedule
from graftlm.model.connectors import CONNECTORS
from graftlm.model.encoders import ENCODERS
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

__all__ = ["changed", "check", "model_spec", "schedule"]


def check(spec: ExperimentSpec) -> None:
    """See `ExperimentSpec.check`."""
    for name, entries in spec.mixes().items():
        check_adapters(shelf.build(entries, f"methods.{name}" if isinstance(spec.methods, dict) else "methods"))
    if spec.composers is not None:
        from graftlm.experiment import composing

        composing.check(spec)
    _check_rates(spec.schedule())
    _check_modalities(spec.model)
    if spec.model.llm != "miniworld" and not Path(spec.model.llm).is_dir():
        raise ConfigError(
            f"model.llm: no folder '{spec.model.llm}'. 'miniworld' or a folder in the layout of Hugging Face "
            f"(config.json, tokenizer, safetensors) is expected; nothing is downloaded, so fetch the model first."
        )
    if spec.model.lora is None and spec.model.dtype != "float32":
        raise ConfigError(
            f"model.lora: null tunes every weight, and {spec.model.dtype} weights are too coarse for small steps. Use "
            f"model.dtype=float32, or a LoRA."
        )
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: 'cuda', but torch finds no GPU. Use cpu or auto, or install a torch build for your GPU."
        )
    _check_root(spec)


def schedule(choice: str | list[PhaseSettings] | ScheduleChanges) -> Schedule:
    """The phases of a stage: a named schedule, one with changes, or phases written out.

    Raises:
        ConfigError: no schedule or no phase of that name.

    """
    if isinstance(choice, str):
        return phases.schedule(choice)
    if isinstance(choice, list):
        return phases.schedule([Phase(**_fields(settings)) for settings in choice])
    plain = phases.schedule(choice.schedule)
    changes = dict(choice.__pydantic_extra__)
    known = [phase.name for phase in (*plain.phases, plain.realign)]
    for name in changes:
        if name not in known:
            raise ConfigError(f"phases.{name}: no phase of schedule '{choice.schedule}'; {did_you_mean(name, known)}")

    def each(phase: Phase) -> Phase:
        return changed(phase, changes[phase.name]) if phase.name in changes else phase

    return Schedule(tuple(each(phase) for phase in plain.phases), each(plain.realign))


def changed(phase: Phase, settings: PhaseSettings) -> Phase:
    """A phase with what the settings give."""
    return dataclasses.replace(phase, **_fields(settings))


def _fields(settings: PhaseSettings) -> dict[str, Any]:
    given: Mapping[str, Any] = settings.model_dump()
    return {key: frozenset(value) if isinstance(value, list) else value for key, value in given.items()}


def _check_rates(plan: Schedule) -> None:
    for phase in (*plan.phases, plan.realign):
        for part in sorted(phase.trainable):
            if not any(part == key or part.startswith(f"{key}.") for key in phase.lr):
                raise ConfigError(
                    f"phases.{phase.name}.lr: no learning rate for '{part}', which this phase trains; lr names "
                    f"{sorted(phase.lr)}. Add one."
                )


def _check_modalities(model: ModelSettings) -> None:
    for name, each in model.modalities.items():
        here, weights = f"model.modalities.{name}", each.encoder.weights
        _check_settings(ENCODERS.get(each.encoder.kind), each.encoder.settings, f"{here}.encoder.settings")
        _check_settings(CONNECTORS.get(each.connector.kind), each.connector.settings, f"{here}.connector")
        if weights not in (None, "miniworld") and not Path(weights).is_file():
            raise ConfigError(
                f"{here}.encoder.weights: no file '{weights}'; a safetensors file is expected. Correct it."
            )


def _check_settings(factory: Callable[..., Any], settings: Mapping[str, Any], path: str) -> None:
    """Settings are the parameters that have a default."""
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    known = [name for name, each in inspect.signature(factory).parameters.items() if each.default is not each.empty]
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{path}.{key}: no such setting; {did_you_mean(key, known)}")
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(f"{path}.{key}: {value!r} does not fit; {error.errors()[0]['msg']}.") from None


def _check_root(spec: ExperimentSpec) -> None:
    from graftlm.experiment.cells import is_generated

    if is_generated(spec.stream):
        if spec.data.root is not None:
            raise ConfigError(f"data.root: '{spec.data.root}', but stream {spec.stream} is generated. Leave it out.")
    elif spec.data.root is None or not Path(spec.data.root).is_dir():
        raise ConfigError(
            f"data.root: no folder '{spec.data.root}'. Stream {spec.stream} needs the folder that holds its data sets, "
            f"one sub-folder each; see the documentation of data sets."
        )


def model_spec(settings: ModelSettings) -> ModelSpec:
    """What the model room builds."""
    return ModelSpec(
        llm=settings.llm,
        modalities=tuple(
            ModalitySpec(
                name,
                EncoderSpec(each.encoder.kind, each.encoder.weights, each.encoder.settings),
                ConnectorSpec(each.connector.kind, each.connector.settings),
            )
            for name, each in settings.modalities.items()
        ),
        lora=LoraSpec(**settings.lora.model_dump()) if settings.lora else None,
        dtype=settings.dtype,
    )
