"""A multimodal LLM: encode, connect, fuse, and let the LLM speak.

Three named parts, ``encoders.<modality>``, ``connectors.<modality>`` and ``llm``, and a fourth, ``extension``, where a method
left modules in the model; a part is a prefix of parameter names. No modality is special: each is one `ModalitySpec`.
"""

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import CheckpointError, ConfigError, DataError, RunError
from graftlm.core.files import hash_file, hash_json
from graftlm.data.collate import collate
from graftlm.data.types import IGNORE, TEXT, Batch, Media, Modality, Output, Sample
from graftlm.model.adapters import StageAdapter
from graftlm.model.base import DTYPES, base_folder, read_llm, read_tokenizer
from graftlm.model.composition import Composition, SealedAdapter
from graftlm.model.connectors import Connector, build_connector
from graftlm.model.encoders.base import Encoder, build_encoder
from graftlm.model.extension import Extension
from graftlm.model.features import FeatureCache
from graftlm.model.fusion import Fused, fuse
from graftlm.model.generate import decode, forget_habits
from graftlm.model.specs import ModalitySpec, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MultimodalLM", "base_folder"]

TAKEN = frozenset(dir(nn.ModuleDict()))
"""Names that a module of PyTorch cannot give to a part."""


class MultimodalLM(nn.Module):
    """Encoders, connectors and one causal LLM.

    Attributes:
        specs: the modalities, in the order of learning.
        adapter: the life of a stage of the LLM: open, previous, blend, fold.
        features: cache of encoder outputs; None encodes in every forward pass.
        composition: what routes or restores the weights of a composed LLM; None of an ordinary one.
        extension: modules that a method left in the model; None of an ordinary one.
    """

    def __init__(
        self,
        llm: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        spec: ModelSpec,
        *,
        folder: Path | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.connectors = nn.ModuleDict()
        self.llm = llm.requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec = spec
        self.folder = folder
        self.features = features
        self.specs: dict[Modality, ModalitySpec] = {}
        self.adapter = StageAdapter(llm, spec.lora, folder, llm.dtype)
        self.composition: Composition | None = None
        self.extension: Extension | None = None
        self._trims_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters
        forget_habits(llm)

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        *,
        seed: int = 0,
        device: str = "cpu",
        features: FeatureCache | None = None,
        folder: Path | None = None,
    ) -> "MultimodalLM":
        """The base LLM of a spec, without any modality yet.

        Args:
            folder: of the LLM, when it is not where the spec says: inside a checkpoint.

        Raises:
            CheckpointError: the LLM's folder is missing, incomplete or cannot be read.
            ConfigError: the dtype is not one of `ModelSpec`.
        """
        if spec.dtype not in DTYPES:
            raise ConfigError(f"model.dtype: '{spec.dtype}'; one of {', '.join(DTYPES)} is expected.")
        folder = base_folder(spec.llm if folder is None else str(folder))
        llm = read_llm(folder, DTYPES[spec.dtype])
        return cls(llm, read_tokenizer(folder, llm), spec, folder=folder, features=features).to(device).eval()

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return torch.device(self.llm.device)

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's working dtype."""
        return self.adapter.dtype

    @property
    def modality_index(self) -> dict[Modality, int]:
        """Id of each modality in `Output.modality_ids`; 0 is text."""
        return {TEXT: 0} | {name: i for i, name in enumerate(self.specs, start=1)}

    @property
    def mode(self) -> str:
        """Of a composed LLM "expand" or "retain:<route>"; of an ordinary one "dense"."""
        return self.composition.mode if self.composition else "dense"

    def set_mode(self, mode: str) -> None:
        """Another mode of a composed checkpoint, in place: its weights are read again, tensor by tensor.

        Raises:
            CheckpointError: the model is of no composed checkpoint, or that has no such mode.
        """
        from graftlm.model import checkpoint

        if self.composition is None:
            raise CheckpointError(f"set_mode('{mode}'): the model is not composed; one that was loaded so is expected.")
        checkpoint.load(self.composition.files.folder, model=self, mode=mode, way=self.composition.asked, verify=False)

    def compose(self, composition: Composition | None) -> None:
        """Take the weights of a composition for one's own, or with None those of the base again.

        Raises:
            RunError: the model has an extension, which is of one LLM.
        """
        if self.composition is composition:
            return
        if self.extension is not None:
            raise RunError(
                f"compose: the model has an extension '{self.extension.kind}', which was learned beside one LLM; a model "
                f"without one is expected. Call model.extend(None) first."
            )
        if self.composition is not None:
            self.composition.remove()
        self.composition = composition
        kind = StageAdapter if composition is None else SealedAdapter
        self.adapter = kind(self.llm, self.spec.lora, self.folder, self.adapter.dtype)

    def extend(self, extension: Extension | None) -> None:
        """Attach an extension in place of the present one, or with None take that out.

        Raises:
            RunError: the LLM is composed, of several models at once.
        """
        if self.extension is extension:
            return
        if self.composition is not None:
            raise RunError(
                "extend: the LLM is of a composed checkpoint, which no module can be learned beside; an ordinary one is "
                "expected. Write one original with `graftlm restore`, or compose with a rule that makes one dense LLM."
            )
        if self.extension is not None:
            self.extension.detach(self)
        self.extension = None
        if extension is not None:
            extension.requires_grad_(False).to(self.device).train(self.training)
            extension.attach(self)
            self.extension = extension
        self.adapter.extension = None if extension is None else extension.kind

    def add_modality(self, spec: ModalitySpec, seed: int) -> None:
        """Build the encoder and a fresh connector. The connector depends on ``seed`` alone.

        Raises:
            ConfigError: the name is taken, or encoder or connector do not exist or fit.
        """
        if spec.name in self.specs or spec.name in TAKEN:
            raise ConfigError(f"modality '{spec.name}' is there already; a new name is expected ({list(self.specs)}).")
        encoder = build_encoder(spec.encoder)
        # not config.hidden_size: some LLMs embed in another width than that of their layers
        width = self.llm.get_input_embeddings().get_parameter("weight").shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            connector = build_connector(spec.connector, encoder, width, self.connectors.values())
        self.encoders[spec.name] = encoder.to(self.device)
        self.connectors[spec.name] = connector.requires_grad_(False).to(self.device).train(self.training)
        self.specs[spec.name] = spec

    def remove_modalities(self) -> None:
        """Back to the LLM alone, as before the first stage."""
        self.encoders, self.connectors, self.specs = nn.ModuleDict(), nn.ModuleDict(), {}

    def encoder(self, modality: Modality) -> Encoder:
        """The encoder of a modality.

        Raises:
            DataError: the model has no such modality.
        """
        if modality not in self.specs:
            raise DataError(
                f"modality '{modality}' has no encoder in this model, which knows {list(self.specs) or 'no modality yet'}. "
                f"Add it to model.modalities, or leave its samples out."
            )
        encoder = self.encoders[modality]
        assert isinstance(encoder, Encoder)
        return encoder

    def batch(self, samples: Sequence[Sample], *, answers: bool = True) -> Batch:
        """Samples as tensors: right-padded with labels to learn from, or left-padded to answer."""
        return collate(samples, self.tokenizer, self._load, answers=answers, encoded=self.features is not None)

    def _load(self, modality: Modality, items: Sequence[Media]) -> Tensor:
        encoder = self.encoder(modality)
        if self.features is not None:
            return self.features.get(encoder, items)
        inputs = [encoder.read(item.source) for item in items]
        if len(shapes := {tuple(each.shape) for each in inputs}) > 1:
            raise DataError(
                f"{modality}: raw inputs of shapes {sorted(shapes)} in one batch ({items[0].source} ...); one shape is "
                f"expected. Use a FeatureCache, which encodes file by file."
            )
        return torch.stack(inputs)

    def forward(self, batch: Batch, *, logits: bool = False, hidden: bool = False) -> Output:
        """Loss of the answers, and more if asked for.

        Args:
            logits: return the logits of all positions, Float (B, S, V).
            hidden: return what enters the LM head, Float (B, S, D).
        """
        fused = self.fuse(batch)
        targets = F.pad(fused.labels[:, 1:], (0, 1), value=IGNORE)
        kept = (targets != IGNORE).any(0).nonzero()[:, 0]
        body: nn.Module = self.llm.base_model
        trim = self._trims_logits and not logits and not (hidden and body is self.llm)
        arguments: dict[str, Any] = {"logits_to_keep": kept} if trim else {}
        seen: list[Tensor] = []
        hook = None
        if hidden and trim:  # the head sees answers alone: what it is given is cut from this
            hook = body.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
        elif hidden:
            hook = self._head().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            with self._routed(fused):
                scores = self.llm(inputs_embeds=fused.embeds, **self._masks(fused), use_cache=False, **arguments).logits
        finally:
            if hook is not None:
                hook.remove()
        wanted = targets[:, kept]
        picked = scores if trim else scores[:, kept]
        learned = wanted != IGNORE
        answer_logits = picked[learned]
        return Output(
            loss=_cross_entropy(answer_logits, wanted[learned]),
            answer_logits=answer_logits,
            labels=fused.labels,
            modality_ids=fused.modality_ids,
            attention_mask=fused.attention_mask,
            logits=scores if logits else None,
            hidden=seen[0] if hidden else None,
        )

    def fuse(self, batch: Batch, *, padding: Literal["left", "right"] | None = None) -> Fused:
        """A batch as the LLM sees it; see `fusion.fuse` for ``padding``.

        Raises:
            DataError: the model has no such modality, or the sequence is longer than the LLM's context.
        """
        batch = self.encoded(batch)
        tokens = {}
        for modality, values in batch.media.items():
            connector = self.connectors[modality]
            assert isinstance(connector, Connector)
            tokens[modality] = connector(values)
            if self.composition is not None:
                tokens[modality] = self.composition.surround(modality, tokens[modality])
        fused = fuse(self.llm.get_input_embeddings(), batch, tokens, self.modality_index, padding=padding)
        with_media = fused.embeds.shape[1]
        if self.extension is not None:
            fused = self.extension.fuse(fused, batch)
        self._check_length(fused, batch, with_media)
        return fused

    def encoded(self, batch: Batch) -> Batch:
        """A batch on the model's device, its media as encoder outputs.

        Raises:
            DataError: the model has no such modality.
        """
        batch = _moved(batch, self.device)
        media = {}
        for modality, values in batch.media.items():
            encoder = self.encoder(modality)
            if not batch.encoded:
                # without autocast, as in the cache: with or without one, a model is trained on the same features
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    values = encoder(values)
            media[modality] = values
        return replace(batch, media=media, encoded=True)

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int = 32,
        sample: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers of one batch: greedy, or sampled from ``seed``. The KV cache is the LLM's own.

        Returns:
            One text per sample, special tokens left out.
        """
        training = self.training
        self.eval()
        try:
            fused = self.fuse(self.batch(samples, answers=False), padding="left")
            with self._routed(fused, prefill=True):
                return decode(
                    self.llm,
                    self.tokenizer,
                    fused,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature if sample else None,
                    seed=seed,
                )
        finally:
            self.train(training)

    def fingerprint(self) -> str:
        """Hash of the base LLM's files, its tokenizer's too, and of the encoders that may join it."""
        from graftlm.model.checkpoint import hash_llm

        files = sorted(self.folder.iterdir()) if self.folder else []
        texts = {file.name: hash_file(file) for file in files if file.suffix in (".json", ".jinja", ".model", ".txt")}
        encoders = {each.name: build_encoder(each.encoder).fingerprint() for each in self.spec.modalities}
        return hash_json({"llm": hash_llm(self.folder) if self.folder else "", "texts": texts, "encoders": encoders})

    def _head(self) -> nn.Module:
        head: nn.Module = self.llm.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head

    def _routed(self, fused: Fused, *, prefill: bool = False) -> contextlib.AbstractContextManager[None]:
        """Inside, positions take the weights of their modality, in the first pass only when tokens are decoded after it."""
        if self.extension is not None:
            return self.extension.over(fused)
        if self.composition is None:
            return contextlib.nullcontext()
        return self.composition.over(fused.modality_ids, prefill=prefill)

    def _check_length(self, fused: Fused, batch: Batch, with_media: int) -> None:
        limit = getattr(self.llm.config.get_text_config(), "max_position_embeddings", None)
        length = fused.embeds.shape[1]
        if not limit or length <= limit:
            return
        beside = f", with extension '{self.extension.kind}' {length}" if self.extension is not None else ""
        raise DataError(
            f"samples {', '.join(batch.ids[:4])} ...: {length} positions (text and slots {batch.input_ids.shape[1]}, with media "
            f"{with_media}{beside}), but the LLM's context has {limit}; as many at most are expected. Shorten the prompts, use a "
            f"connector with fewer tokens, or an LLM with a longer context."
        )

    def _masks(self, fused: Fused) -> dict[str, Tensor]:
        """No mask at all when padding is on the right: causality already hides it, and attention is faster without."""
        mask = fused.attention_mask
        if bool(mask[:, 0].all()):
            return {}
        return {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.input_ids.to(device),
        batch.attention_mask.to(device),
        batch.labels.to(device),
        {m: x.to(device) for m, x in batch.media.items()},
        {m: x.to(device) for m, x in batch.places.items()},
        batch.encoded,
        batch.ids,
    )


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Float (K, V), Int (K,) -> the mean in float32; 0 of no labels."""
    return F.cross_entropy(scores.float(), labels) if len(labels) else scores.sum().float()
