"""What to run: the experiment file.

`load` reads a file or a packaged experiment, applies ``a.b=c`` settings, and refuses unknown keys, names and values
with their full path, without importing torch. `ExperimentSpec.check` adds what only the ingredients themselves can
know, and is called before any work.
"""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.core.files import hash_json
from graftlm.experiment import reading
from graftlm.experiment.settings import (
    Composers,
    DataSettings,
    EvaluateSettings,
    FolderName,
    Jobs,
    Mixes,
    ModelSettings,
    Phases,
    Settings,
    StreamName,
    StudySettings,
    wrong,
)

if TYPE_CHECKING:
    from graftlm.learning.phase import Schedule
    from graftlm.methods import Entry
    from graftlm.model.specs import ModelSpec

__all__ = ["ExperimentSpec", "library", "load"]

MACHINE = frozenset({"jobs"})
"""Settings that say how fast a run goes, not what comes out."""


class ExperimentSpec(Settings):
    """One experiment: a model, a stream of stages, and the methods that learn it stage after stage, or composers.

    Composers learn nothing: they put together the experts, each of which learned one stage alone.
    """

    name: FolderName
    model: ModelSettings
    stream: StreamName
    order: Literal["given", "reverse"] | list[str] = "given"
    phases: Phases
    methods: Mixes = Field(default_factory=dict)
    composers: Composers | None = None
    study: StudySettings | None = None
    data: DataSettings = DataSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    seed: int = Field(default=0, ge=0)
    jobs: Jobs = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _one_kind(self) -> "ExperimentSpec":
        if self.composers is None and not self.methods:
            raise wrong("missing; this setting is required.", at="methods")
        if self.composers is not None and self.methods:
            raise wrong("an experiment has methods or composers, and this one has both; leave one out.", at="composers")
        if self.composers is None and self.study is not None:
            raise wrong("is about compositions, and there are no composers. Add some, or leave it out.", at="study")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Experiments with methods look as they did before there were composers."""
        gone = {"methods"} if self.composers is not None else {"composers", "study"}
        gone |= {"order"} if self.order == "given" else set()
        return {key: value for key, value in handler(self).items() if key not in gone}

    @classmethod
    def from_dict(cls, tree: Any) -> "ExperimentSpec":
        """A spec from a tree of settings.

        Raises:
            ConfigError: one line per wrong setting, each with its full path.

        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(reading.explain(error, tree)) from None

    @classmethod
    def from_yaml(cls, text: str, source: str = "experiment") -> "ExperimentSpec":
        """A spec from YAML text."""
        return cls.from_dict(reading.parse(text, source))

    def to_dict(self) -> dict[str, Any]:
        """Every setting, defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back as this spec."""
        return reading.write(self.to_dict())

    def identity(self) -> dict[str, Any]:
        """The settings on which results depend."""
        return {key: value for key, value in self.to_dict().items() if key not in MACHINE}

    @property
    def digest(self) -> str:
        """Eight hex digits of the identity."""
        return hash_json(self.identity())[:8]

    def mixes(self) -> "dict[str, list[Entry]]":
        """Methods by name; a plain list of ingredients is one method, named after them ("replay+realign")."""
        if isinstance(self.methods, dict):
            return dict(self.methods)
        return {
            "+".join(entry if isinstance(entry, str) else next(iter(entry)) for entry in self.methods): self.methods
        }

    def job_count(self) -> int:
        """Worker processes: one per usable core, or one on a GPU, unless the file says otherwise."""
        if isinstance(self.jobs, int):
            return self.jobs
        return 1 if self.device_name() == "cuda" else len(os.sched_getaffinity(0))

    def device_name(self) -> str:
        """The device, "auto" resolved."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def schedule(self) -> "Schedule":
        """The phases of a stage."""
        from graftlm.experiment.build import schedule

        return schedule(self.phases)

    def model_spec(self) -> "ModelSpec":
        """What the model room is asked to build."""
        from graftlm.experiment.build import model_spec

        return model_spec(self.model)

    def check(self) -> None:
        """Whatever can be known before any work: ingredients and their settings, conflicts, phases, folders, device.

        Raises:
            ConfigError: a setting is wrong; the message starts with its path.
            MethodConflict: two ingredients of one mix exclude each other.

        """
        from graftlm.experiment.build import check

        check(self)


def library() -> dict[str, Path]:
    """The packaged experiments: name -> file."""
    folder = Path(str(resources.files("graftlm.experiment") / "library"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(file_or_name: str | Path, overrides: Sequence[str] = ()) -> ExperimentSpec:
    """Read an experiment.

    Args:
        file_or_name: a YAML file, or the name of a packaged experiment.
        overrides: settings such as "model.lora.rank=8"; values are YAML.

    Raises:
        ConfigError: no such file or experiment, not YAML, or a wrong setting.

    """
    path = Path(file_or_name)
    if not path.is_file():
        packaged = library()
        if str(file_or_name) not in packaged:
            raise ConfigError(
                f"no file and no experiment '{file_or_name}'; {did_you_mean(str(file_or_name), packaged)}"
            )
        path = packaged[str(file_or_name)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). A YAML file in UTF-8 is expected.") from None
    tree = reading.parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {tree!r}. A mapping of settings is expected; see `graftlm run --help`.")
    tree = {"name": path.stem} | tree
    for override in overrides:
        reading.apply_override(tree, override)
    return ExperimentSpec.from_dict(tree)
