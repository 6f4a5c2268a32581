"""The groups of settings in an experiment file, each checked where it is declared."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from graftlm.core.errors import did_you_mean
from graftlm.experiment import tables

__all__ = [
    "ComposerSettings",
    "Composers",
    "ConnectorSettings",
    "CountSettings",
    "DataSettings",
    "EncoderSettings",
    "EvaluateSettings",
    "ExpertsSettings",
    "FolderName",
    "ForgettingSettings",
    "Jobs",
    "LoraSettings",
    "Mixes",
    "ModalitySettings",
    "ModelSettings",
    "PhaseSettings",
    "Phases",
    "ScheduleChanges",
    "Settings",
    "StreamName",
    "StudySettings",
    "SweepSettings",
    "TuningSettings",
    "wrong",
]

NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")
"""Names of experiments and methods: they become folders."""


def wrong(message: str, at: str = "") -> PydanticCustomError:
    """What a validator raises: a sentence, and where inside the value it belongs."""
    return PydanticCustomError("setting", "{message}", {"message": message, "at": at})


def _folder_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise wrong(f"'{name}' cannot be the name of a folder; letters, digits and _ . + - are expected.")
    return name


def _known_in(section: str) -> AfterValidator:
    """A name must be in the table of this section."""

    def check(name: str) -> str:
        table = tables.registry(section)
        if name not in table.table():
            raise wrong(f"no {table.noun} '{name}'; {did_you_mean(name, table.table())}")
        return name

    return AfterValidator(check)


class Settings(BaseModel):
    """A group of settings; an unknown one is an error that names the nearest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and cls.model_config.get("extra") == "forbid":
            for key in value:
                if key not in cls.model_fields:
                    raise wrong(f"no such setting; {did_you_mean(str(key), cls.model_fields)}", at=f".{key}")
        return value


def _written_out(value: Any) -> Any:
    """A mere name is the kind."""
    return {"kind": value} if isinstance(value, str) else value


def _gathered(value: Any) -> Any:
    """A connector's settings stand beside its kind."""
    value = _written_out(value)
    if isinstance(value, Mapping) and "settings" not in value:
        return {"settings": {k: v for k, v in value.items() if k != "kind"}} | {
            k: v for k, v in value.items() if k == "kind"
        }
    return value


class EncoderSettings(Settings):
    """A frozen encoder; its weights are a file, "miniworld" for those in the package, or none for random ones."""

    kind: Annotated[str, _known_in("encoders")]
    weights: str | None = None
    settings: dict[str, Any] = {}


class ConnectorSettings(Settings):
    """From encoder tokens to LLM tokens: ``mlp``, or ``{kind: qformer, queries: 8}``."""

    kind: Annotated[str, _known_in("connectors")]
    settings: dict[str, Any] = {}

    @model_serializer(mode="plain")
    def _flat(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.settings}


class ModalitySettings(Settings):
    """How one modality enters the LLM."""

    encoder: Annotated[EncoderSettings, BeforeValidator(_written_out)]
    connector: Annotated[ConnectorSettings, BeforeValidator(_gathered)]


class LoraSettings(Settings):
    """The low-rank adapter of every stage. ``targets``: all-linear, ends of layer names, or one regular expression."""

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"


class ModelSettings(Settings):
    """The model. ``lora: null`` tunes all weights of the LLM."""

    llm: str
    modalities: dict[str, ModalitySettings] = Field(min_length=1)
    lora: LoraSettings | None = LoraSettings()
    dtype: Literal["float32", "bfloat16"] = "float32"


class DataSettings(Settings):
    """Where samples come from. Size, seed and conflict shape the mini world; other streams are read from ``root``."""

    size: Literal["tiny", "smoke", "default"] = "default"
    seed: int | None = Field(default=None, ge=0)
    conflict: float = Field(default=0.0, ge=0, le=1)
    root: str | None = None
    skip_bad: bool = False


def _part(name: str) -> str:
    if name not in ("llm", "connectors") and not name.startswith("connectors."):
        known = ["llm", "connectors", "connectors.current", "connectors.<modality>"]
        raise wrong(f"no part '{name}' that can be trained; {did_you_mean(name, known)}")
    return name


Part = Annotated[str, AfterValidator(_part)]


class PhaseSettings(Settings):
    """A phase, or what to change about one: the fields of `graftlm.Phase`; what is not given stays."""

    name: str | None = None
    trainable: list[Part] | None = Field(default=None, min_length=1)
    lr: dict[Part, Annotated[float, Field(ge=0)]] | None = None
    kinds: list[Literal["caption", "qa", "choice", "instruction"]] | None = None
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    warmup: float | None = Field(default=None, ge=0, le=1)
    schedule: Literal["cosine", "constant"] | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    clip: float | None = Field(default=None, ge=0)
    accumulate: int | None = Field(default=None, ge=1)

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


class ScheduleChanges(Settings):
    """A named schedule with changes: ``{schedule: miniworld, finetune: {epochs: 1}}``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, PhaseSettings]

    schedule: str


def _whole_phases(phases: list[PhaseSettings]) -> list[PhaseSettings]:
    for index, phase in enumerate(phases):
        for field in ("name", "trainable", "lr"):
            if field not in phase.model_fields_set:
                raise wrong("missing; a phase that is written out needs it.", at=f"[{index}].{field}")
    return phases


def _form(value: Any) -> str:
    return "list" if isinstance(value, list) else "changes" if isinstance(value, Mapping | ScheduleChanges) else "name"


Phases = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[list[PhaseSettings], AfterValidator(_whole_phases), Tag("list")]
    | Annotated[ScheduleChanges, Tag("changes")],
    Discriminator(_form),
]


def _mixes(value: Any) -> Any:
    """A list of ingredients, or names of methods with a list each."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        _ingredients(value, "")
        return value
    if not isinstance(value, Mapping):
        raise wrong(f"{value!r} does not fit; a list of ingredients, or a mapping of names to such lists, is expected.")
    if not value:
        raise wrong("no method is named; at least one is expected.")
    for name, entries in value.items():
        _folder_name(name)
        _ingredients([entries] if isinstance(entries, str) else entries, f".{name}")
    return {name: [entries] if isinstance(entries, str) else entries for name, entries in value.items()}


def _ingredients(entries: Any, at: str) -> None:
    table = tables.registry("methods").table()
    if not isinstance(entries, list) or not entries:
        raise wrong(f"{entries!r} does not fit; a list of ingredients is expected, for example [merge, realign].", at)
    for index, entry in enumerate(entries):
        here = f"{at}[{index}]"
        one = (
            isinstance(entry, Mapping)
            and len(entry) == 1
            and all(isinstance(v, Mapping | None) for v in entry.values())
        )
        if not isinstance(entry, str) and not one:
            raise wrong(f"{entry!r} does not fit; name, or {{name: {{setting: value}}}}, is expected.", here)
        name = entry if isinstance(entry, str) else next(iter(entry))
        if name not in table:
            raise wrong(f"no method '{name}'; {did_you_mean(name, table)}", here)


class EvaluateSettings(Settings):
    """What is asked of every model. ``limit``: at most so many items per task."""

    split: Literal["test", "val"] = "test"
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)


def _jobs(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise wrong(f"{value!r} does not fit; auto, or a number of processes from 1, is expected.")
    return value


FolderName = Annotated[str, AfterValidator(_folder_name)]


class ExpertsSettings(Settings):
    """Experts that a composer needs of its own: ``{methods: [{damc: {rank: 16}}], phase: {lr: {llm: 2e-3}}}``.

    Attributes:
        methods: ingredients that learn each stage alone.
        phase: what to change about the last phase of a stage.
    """

    methods: list[Any]
    phase: PhaseSettings = PhaseSettings()

    @model_validator(mode="after")
    def _known(self) -> "ExpertsSettings":
        _ingredients(self.methods, ".methods")
        return self


def _experts(value: Any) -> Any:
    """A mere list is of ingredients."""
    return {"methods": [value] if isinstance(value, str) else value} if isinstance(value, str | list) else value


COMPOSER_KEYS = ("rule", "experts", "per_model", "tune")
"""Keys of a composer that are not settings of its rule."""


def _composer(value: Any) -> Any:
    """A mere name is the rule; the rule's settings stand beside it."""
    if isinstance(value, str):
        return {"rule": value}
    if isinstance(value, Mapping) and "settings" not in value:
        own = {key: each for key, each in value.items() if key in COMPOSER_KEYS}
        return own | {"settings": {key: each for key, each in value.items() if key not in COMPOSER_KEYS}}
    return value


class ComposerSettings(Settings):
    """One way of composing the experts: ``{rule: ties, scale: 1.0, tune: {density: [0.2, 0.8]}}``.

    Attributes:
        rule: a composer of `graftlm.merging.recipe`, or "originals", which routes exact weights; ``settings`` are its own and
            stand beside it in the file.
        experts: what learned the models that are composed; None: all weights of the LLM, as the experts of the run.
        per_model: settings of single experts, by stage.
        tune: per setting the values to choose from, on validation data.
    """

    rule: str
    settings: dict[str, Any] = {}
    experts: Annotated[ExpertsSettings, BeforeValidator(_experts)] | None = None
    per_model: dict[str, dict[str, Any]] = {}
    tune: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @model_serializer(mode="plain")
    def _flat(self) -> dict[str, Any]:
        given = {key: each for key in ("per_model", "tune") if (each := getattr(self, key))}
        own = {"experts": self.experts.model_dump(mode="json")} if self.experts else {}
        return {"rule": self.rule, **self.settings, **own, **given}


Composers = Annotated[dict[FolderName, Annotated[ComposerSettings, BeforeValidator(_composer)]], Field(min_length=1)]


class TuningSettings(Settings):
    """How settings are chosen: by the mean retention on ``limit`` validation items per task."""

    limit: int | None = Field(default=60, ge=1)


class SweepSettings(Settings):
    """Accuracy over all combinations, on validation data, for every density K and significance λ (one for all experts)."""

    composer: str = "mmer"
    density: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [0.2, 0.4, 0.6, 0.8, 1.0]
    significance: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [0.3, 0.6, 0.9, 1.2, 1.5]


class CountSettings(Settings):
    """Retention against the number of experts: these composers, tuned anew, on every set of experts."""

    composers: list[str] = Field(min_length=1)
    sets: Annotated[list[Annotated[list[str], Field(min_length=2)]], Field(min_length=1)]
    limit: int | None = Field(default=100, ge=1)


class ForgettingSettings(Settings):
    """New tasks for a composition: the LLM of the matching expert learns each, and all are composed again.

    Attributes:
        composer: that must keep every original apart.
        phase: the optimisation; what it does not name is as in the last phase of a stage. It moves the LLM alone.
        scenarios: new tasks that come together, by name.
        share: sizes of Model Tailor's patch to choose from, on validation data.
        calibration: samples of the new task that Model Tailor looks at.
    """

    composer: str = "mmer"
    phase: PhaseSettings = PhaseSettings()
    scenarios: Annotated[dict[FolderName, Annotated[list[str], Field(min_length=1)]], Field(min_length=1)]
    share: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [0.05, 0.1, 0.2, 0.4]
    calibration: int = Field(default=128, ge=1)


class StudySettings(Settings):
    """What is asked about compositions beside expansion and retention; what is left out is not asked."""

    tuning: TuningSettings = TuningSettings()
    sweep: SweepSettings | None = None
    counts: CountSettings | None = None
    ablation: str | None = None
    forgetting: ForgettingSettings | None = None


StreamName = Annotated[str, _known_in("streams")]
Mixes = Annotated[list[Any] | dict[str, list[Any]], BeforeValidator(_mixes)]
Jobs = Annotated[int | str, BeforeValidator(_jobs)]
