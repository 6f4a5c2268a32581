"""A multimodal LLM: encode, connect, fuse, and let the LLM speak.

Three named parts, ``encoders.<modality>``, ``connectors.<modality>`` and ``llm``; a part is a prefix of parameter names.
No modality is special: each is one `ModalitySpec`.
"""

import inspect
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import CheckpointError, ConfigError, DataError
from graftlm.core.files import hash_json
from graftlm.data.collate import collate
from graftlm.data.types import IGNORE, TEXT, Batch, Media, Modality, Output, Sample
from graftlm.model.adapters import StageAdapter
from graftlm.model.connectors import Connector, build_connector
from graftlm.model.encoders.base import Encoder, build_encoder
from graftlm.model.features import FeatureCache
from graftlm.model.fusion import Fused, fuse
from graftlm.model.specs import ModalitySpec, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MultimodalLM", "base_folder"]


def base_folder(llm: str) -> Path:
    """The folder of an LLM: "miniworld" is the packaged base, all else a path.

    Raises:
        CheckpointError: no such folder.
    """
    packaged = llm == "miniworld"
    folder = Path(str(resources.files("graftlm.data.miniworld"))) / "base" / "llm" if packaged else Path(llm)
    if not (folder / "config.json").is_file():
        do = (
            "Run `graftlm build-base`."
            if packaged
            else "Name a folder in the layout of Hugging Face; nothing is downloaded."
        )
        raise CheckpointError(f"no language model at {folder} (config.json is missing). {do}")
    return folder


class MultimodalLM(nn.Module):
    """Encoders, connectors and one causal LLM.

    Attributes:
        specs: the modalities, in the order of learning.
        adapter: the life of a stage of the LLM: open, previous, blend, fold.
        features: cache of encoder outputs; None encodes in every forward pass.
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
        self._trims_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters

    @classmethod
    def build(
        cls, spec: ModelSpec, *, seed: int = 0, device: str = "cpu", features: FeatureCache | None = None
    ) -> "MultimodalLM":
        """The base LLM of a spec, without any modality yet.

        Raises:
            CheckpointError: the LLM's folder is missing or cannot be read.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = base_folder(spec.llm)
        try:
            llm = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=getattr(torch, spec.dtype),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: cannot be read as a causal LLM ({error}). Check the folder.") from error
        return cls(llm, tokenizer, spec, folder=folder, features=features).to(device).eval()

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

    def add_modality(self, spec: ModalitySpec, seed: int) -> None:
        """Build the encoder and a fresh connector. The connector depends on ``seed`` alone.

        Raises:
            ConfigError: the modality is there already, or "text".
        """
        if spec.name in self.specs or spec.name == TEXT:
            raise ConfigError(f"modality '{spec.name}' is there already; a new name is expected ({list(self.specs)}).")
        encoder = build_encoder(spec.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            connector = build_connector(spec.connector, encoder.width, encoder.tokens, self.llm.config.hidden_size)
        self.encoders[spec.name] = encoder.to(self.device)
        self.connectors[spec.name] = connector.requires_grad_(False).to(self.device)
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
        return torch.stack([encoder.read(item.source) for item in items])

    def forward(self, batch: Batch, *, logits: bool = False, hidden: bool = False) -> Output:
        """Loss of the answers, and more if asked for.

        Args:
            logits: return the logits of all positions, Float (B, S, V).
            hidden: return what enters the LM head, Float (B, S, D).
        """
        fused = self.fuse(batch)
        targets = F.pad(fused.labels[:, 1:], (0, 1), value=IGNORE)
        kept = (targets != IGNORE).any(0).nonzero()[:, 0]
        trim = self._trims_logits and not logits and not hidden
        arguments: dict[str, Any] = {"logits_to_keep": kept} if trim else {}
        seen: list[Tensor] = []
        hook = self._head().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) if hidden else None
        try:
            scores = self.llm(inputs_embeds=fused.embeds, **self._masks(fused), use_cache=False, **arguments).logits
        finally:
            if hook is not None:
                hook.remove()
        wanted = targets[:, kept]
        picked = scores if trim else scores[:, kept]
        learned = wanted != IGNORE
        loss = (
            F.cross_entropy(picked[learned].float(), wanted[learned])
            if len(kept)
            else scores.new_zeros((), dtype=torch.float32)
        )
        return Output(
            loss=loss,
            labels=fused.labels,
            modality_ids=fused.modality_ids,
            attention_mask=fused.attention_mask,
            logits=scores if logits else None,
            hidden=seen[0] if hidden else None,
        )

    def fuse(self, batch: Batch) -> Fused:
        """A batch as the LLM sees it."""
        batch = _moved(batch, self.device)
        tokens = {}
        for modality, values in batch.media.items():
            encoder = self.encoder(modality)
            if not batch.encoded:
                with torch.no_grad():
                    values = encoder(values)
            connector = self.connectors[modality]
            assert isinstance(connector, Connector)
            tokens[modality] = connector(values)
        return fuse(self.llm.get_input_embeddings(), batch, tokens, self.modality_index)

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
        fused = self.fuse(self.batch(samples, answers=False))
        tokenizer = self.tokenizer
        arguments: dict[str, Any] = {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            tokens = self.llm.generate(
                inputs_embeds=fused.embeds,
                attention_mask=fused.attention_mask.long(),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                **arguments,
            )
        self.train(training)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def fingerprint(self) -> str:
        """Hash of the base LLM's files and of the encoders that may join it."""
        from graftlm.model.checkpoint import hash_llm

        base = hash_llm(self.folder) if self.folder else ""
        return hash_json(
            {"llm": base, "encoders": {m.name: build_encoder(m.encoder).fingerprint() for m in self.spec.modalities}}
        )

    def _head(self) -> nn.Module:
        head = self.llm.get_output_embeddings()
        assert head is not None
        return head

    def _masks(self, fused: Fused) -> dict[str, Tensor]:
        """No mask at all when padding is on the right: causality already hides it, and attention is faster without."""
        mask = fused.attention_mask
        if bool(mask[:, 0].all()):
            return {}
        return {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def _moved(batch: Batch, device: torch.device) -> Batch:
    if batch.input_ids.device == device:
        return batch
    return Batch(
        batch.input_ids.to(device),
        batch.attention_mask.to(device),
        batch.labels.to(device),
        {m: x.to(device) for m, x in batch.media.items()},
        {m: x.to(device) for m, x in batch.places.items()},
        batch.encoded,
        batch.ids,
    )
