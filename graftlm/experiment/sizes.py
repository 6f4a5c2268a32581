"""How large a model is and how much memory a phase needs, without its weights.

The LLM is built on torch's meta device from its config, so that counting an 8B model needs no memory.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from graftlm.core.errors import ConfigError
from graftlm.data import prompts
from graftlm.data.types import IGNORE, Phase, Sample, Stream, Task
from graftlm.model.connectors import build_connector
from graftlm.model.encoders.base import build_encoder
from graftlm.model.multimodal import base_folder
from graftlm.model.specs import EncoderSpec, LoraSpec, ModelSpec

__all__ = ["FORMULA", "Sizes", "TextLengths", "count"]

FORMULA = (
    "memory = weights (LLM in its dtype; encoders, connectors and LoRA in float32) + 12 bytes per trained parameter "
    "(gradient and two moments of AdamW in float32) + 17 values per position and layer of the LLM's width (activations "
    "kept for the backward pass, no checkpointing) + 8 bytes per answer token and vocabulary entry (logits and their "
    "gradient). Neither CUDA's context, workspaces nor loss terms of methods are counted: expect up to a third more."
)
"""What an estimate holds, for readers of a plan."""

MEASURED = 48
"""Samples per task whose text is tokenised to estimate its length."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and the shapes that memory depends on.

    Attributes:
        llm: parameters of the LLM; ``plastic`` of them, or of its LoRA, move when it trains.
        encoders, connectors: parameters per modality.
        tokens: positions that one item of a modality takes in the LLM.
        features: numbers that the feature cache keeps per item.
        value_bytes: of one number in the LLM's dtype.

    """

    llm: int
    plastic: int
    layers: int
    width: int
    vocabulary: int
    encoders: Mapping[str, int]
    connectors: Mapping[str, int]
    tokens: Mapping[str, int]
    features: Mapping[str, int]
    lora: bool
    value_bytes: int

    def trained(self, parts: Iterable[str], seen: Sequence[str]) -> dict[str, int]:
        """Parameters that move, per part; "connectors" is every connector there is."""
        found: dict[str, int] = {}
        for part in sorted(parts):
            if part == "llm":
                found[part] = self.plastic
            elif part == "connectors":
                found |= {f"connectors.{modality}": self.connectors[modality] for modality in seen}
            elif part != "extension":
                found[part] = self.connectors[part.removeprefix("connectors.")]
        return found

    def memory(
        self, trained: Mapping[str, int], seen: Sequence[str], phase: Phase, positions: float, answers: float
    ) -> int:
        """Bytes of a phase by `FORMULA`; ``positions`` and ``answers`` are per sample."""
        side = sum(self.encoders[m] + self.connectors[m] for m in seen)
        weights = self.llm * self.value_bytes + 4 * side + (4 * self.plastic if self.lora and "llm" in trained else 0)
        rows = -(-phase.batch_size // phase.accumulate)
        activations = rows * positions * self.layers * self.width * 17 * self.value_bytes
        logits = rows * answers * self.vocabulary * 8
        return round(weights + 12 * sum(trained.values()) + activations + logits)

    def checkpoint(self, trains_llm: bool, seen: Sequence[str]) -> int:
        """Bytes that a stage adds on disk: all connectors, and one change of the LLM (earlier ones are linked)."""
        return 4 * (sum(self.connectors[m] for m in seen) + (self.plastic if trains_llm else 0))


def count(spec: ModelSpec) -> Sizes:
    """Count a model.

    Raises:
        CheckpointError: no LLM is there.
        ConfigError: its config is not one of an LLM, or LoRA or connectors do not fit.

    """
    folder = base_folder(spec.llm)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.llm: {folder}/config.json is of no LLM ({error}). A Hugging Face folder is expected."
        ) from error
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    width = int(llm.get_input_embeddings().embedding_dim)
    encoders, joined, tokens, features = {}, {}, {}, {}
    made: list[nn.Module] = []
    for modality in spec.modalities:
        encoder = build_encoder(EncoderSpec(modality.encoder.kind, None, modality.encoder.settings))
        connector = build_connector(modality.connector, encoder, width, made)
        made.append(connector)
        encoders[modality.name], joined[modality.name] = _parameters(encoder), _parameters(connector)
        tokens[modality.name], features[modality.name] = connector.tokens, encoder.tokens * encoder.width
    return Sizes(
        llm=_parameters(llm),
        plastic=_parameters(llm) if spec.lora is None else _lora(llm, spec.lora),
        layers=int(config.num_hidden_layers),
        width=width,
        vocabulary=int(config.vocab_size),
        encoders=encoders,
        connectors=joined,
        tokens=tokens,
        features=features,
        lora=spec.lora is not None,
        value_bytes=torch.empty(0, dtype=torch.float32 if spec.dtype == "float32" else torch.bfloat16).element_size(),
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lora(llm: nn.Module, spec: LoraSpec) -> int:
    """Parameters of the LoRA: r (in + out) per adapted layer."""
    linear = {name: layer for name, layer in llm.named_modules() if isinstance(layer, nn.Linear)}
    chosen = [layer for name, layer in linear.items() if _is_target(name, spec.targets)]
    if not chosen:
        raise ConfigError(f"model.lora.targets: {spec.targets!r} is no layer of this LLM. Try all-linear.")
    return sum(spec.rank * (layer.in_features + layer.out_features) for layer in chosen)


def _is_target(name: str, targets: str | list[str]) -> bool:
    """Whether PEFT would adapt this layer; the LM head is left out of all-linear."""
    if targets == "all-linear":
        return not name.endswith("lm_head")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


class TextLengths:
    """Mean numbers of text tokens and of answer tokens per task, measured on some of its samples."""

    def __init__(self, llm: str, stream: Stream) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base_folder(llm), local_files_only=True)
        start = (stream.start,) if stream.start else ()
        tasks = [task for stage in (*start, *stream.stages, *stream.later) for task in stage.tasks]
        self._means = {task.name: _lengths(task, tokenizer) for task in tasks if task.train}

    def text(self, sample: Sample) -> float:
        """Positions of the sample without its media."""
        return self._means[sample.task][0]

    def answer(self, sample: Sample) -> float:
        """Positions of the answer."""
        return self._means[sample.task][1]


def _lengths(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    some = task.train[:: max(1, len(task.train) // MEASURED)]
    encoded = [prompts.encode(sample, tokenizer, answer=True) for sample in some]
    text = sum(len(ids) - len(media) for ids, _, media in encoded) / len(some)
    return text, sum(label != IGNORE for _, labels, _ in encoded for label in labels) / len(some)
