"""What to build: a multimodal LLM as plain data that travels in checkpoints and experiment files."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.data.types import TEXT, Modality

__all__ = ["ConnectorSpec", "EncoderSpec", "LoraSpec", "ModalitySpec", "ModelSpec"]


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen encoder.

    Attributes:
        kind: name in `model.encoders.ENCODERS`.
        weights: a safetensors file, "miniworld" for the packaged ones, or None for random weights.
    """

    kind: str
    weights: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConnectorSpec:
    """A trained connector; ``kind`` is a name in `model.connectors.CONNECTORS`."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModalitySpec:
    """All it takes to give the LLM a new sense.

    Raises:
        ConfigError: the name cannot be a slot ``<name>`` of a prompt.
    """

    name: Modality
    encoder: EncoderSpec
    connector: ConnectorSpec

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z0-9_]+", self.name) or self.name == TEXT:
            raise ConfigError(
                f"modality '{self.name}': cannot be a slot <{self.name}> of a prompt; a-z, 0-9 and _ are expected, and "
                f"'{TEXT}' is taken. Rename it."
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModalitySpec":
        """From `to_dict`.

        Raises:
            CheckpointError: a key is missing or unknown.
        """
        try:
            return cls(values["name"], EncoderSpec(**values["encoder"]), ConnectorSpec(**values["connector"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"modality {values}: {error}; name, encoder and connector are expected. Use another copy."
            ) from None


@dataclass(frozen=True)
class LoraSpec:
    """The adapter of every stage: W + (alpha / rank) B A."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


@dataclass(frozen=True)
class ModelSpec:
    """A model to grow.

    Attributes:
        llm: "miniworld", or a folder in the layout of Hugging Face.
        modalities: how to build each modality when a stage needs it.
        lora: the adapter of every stage; None tunes the LLM in full.
        dtype: working dtype of the LLM, "float32" or "bfloat16".
    """

    llm: str
    modalities: tuple[ModalitySpec, ...] = ()
    lora: LoraSpec | None = field(default_factory=LoraSpec)
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """From `to_dict`.

        Raises:
            KeyError, TypeError: a key is missing or unknown; who read the file names it.
        """
        lora = values["lora"]
        return cls(
            values["llm"],
            tuple(ModalitySpec.from_dict(each) for each in values["modalities"]),
            None if lora is None else LoraSpec(**lora),
            values["dtype"],
        )
