"""The life of a stage: the LLM is made plastic, trained, and folded.

    open      θ_{i-1} is frozen under a fresh LoRA (or every weight may move, when tuning in full); or the LoRA of the
              stage before goes on
    previous  inside, the LLM is exactly θ_{i-1}: the teacher that distillation needs costs no second model
    blend     θ ← θ_{i-1} + w (θ - θ_{i-1}), of weights or of factors; the stage stays open
    fold      θ ← rule(before = θ_{i-1}, after = [θ]), the stage is closed

Rules see effective weights, so that averaging A and B apart cannot be written. What a fold added goes to a ledger and
the LLM becomes round(base + Σ ledger): base and updates are summed in float32 and rounded once.

Paper:   Hu et al., LoRA, ICLR 2022, arXiv:2106.09685; merging of stages: Zhang et al., Merge then Realign, EMNLP 2025,
    arXiv:2503.07663, §4.1.
Differs: LoRA stages are kept as factors beside the base, never rounded into it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError, RunError
from graftlm.model.ledger import BaseWeights, LedgerEntry, effective
from graftlm.model.plastic import FullStage, LoraStage
from graftlm.model.rule import Rule, keep_new
from graftlm.model.specs import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LedgerEntry", "Rule", "StageAdapter", "keep_new"]


class StageAdapter:
    """Opens and folds the stages of one LLM.

    Args:
        llm: holds base weights in ``dtype``; changed in place, never copied.
        lora: the adapter of every stage; None tunes every weight, and keeps one float32 copy of them per folded stage.
        base_folder: Hugging Face folder that ``llm`` was read from: base weights are read again from there. None keeps
            a copy, on the CPU, of what stages change.
        dtype: working dtype.

    Attributes:
        dtype: working dtype of the LLM.
        ledger: one entry per fold. To be read; `fold`, `restore` and `set_ledger` change it.
        extension: kind of the modules that stand beside the LLM, which its weights do not hold; None of none.

    Raises:
        ConfigError: the LLM holds another dtype.
    """

    def __init__(
        self, llm: "PreTrainedModel", lora: LoraSpec | None, base_folder: Path | None, dtype: torch.dtype
    ) -> None:
        if llm.dtype != dtype:
            raise ConfigError(f"the LLM holds {llm.dtype}, but {dtype} was asked for. Load it with dtype={dtype}.")
        self.ledger: list[LedgerEntry] = []
        self._llm = llm
        self._lora = lora
        self.dtype = dtype
        self.extension: str | None = None
        self._base = BaseWeights(base_folder)
        self._stage: LoraStage | FullStage | None = None
        self._resumed: LedgerEntry | None = None
        self._in_previous = False

    @property
    def is_open(self) -> bool:
        """Whether a stage is being learned."""
        return self._stage is not None

    def open(self, seed: int, *, resume: bool = False) -> None:
        """Make the LLM plastic. It still computes what it did.

        Args:
            seed: of the LoRA's A; the global random state is neither used nor moved.
            resume: go on with the LoRA of the stage before, whose entry in the ledger the next fold replaces. Tuning in full
                always goes on.

        Raises:
            RunError: a stage is open, or there is no LoRA of the same layers and rank to go on with.
            ConfigError: the LoRA's targets match no layer.
        """
        self._expect_closed("open")
        if self._lora is None:
            self._stage = FullStage(self._llm)
            self._base.keep(self._stage.changing())
            return
        if resume:
            self._set_aside()
        self._stage = LoraStage(self._llm, self._lora, seed)
        self._base.keep(self._stage.changing())
        if self._resumed is not None and not self._stage.resume(self._resumed.tensors):
            self.drop()
            raise RunError(
                f"open: the last entry of the ledger is no LoRA of rank {self._lora.rank} on the same layers; one is expected "
                f"to go on with. An ingredient that keeps one LoRA for the whole run cannot follow a stage learned otherwise."
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """What training may move, by its name in the multimodal model ("llm. ..."); empty when no stage is open."""
        return {f"llm.{name}": p for name, p in self._stage.parameters().items()} if self._stage else {}

    def changing(self) -> dict[str, nn.Parameter]:
        """The LLM's own weights that the open stage changes, by their name in the LLM; empty when none is open."""
        return dict(self._stage.changing()) if self._stage else {}

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """A (R, in), B (out, R) and the scale of every layer's LoRA, by the name of the weight in the LLM.

        Empty when no stage is open, or every weight is tuned.
        """
        return self._stage.factors() if isinstance(self._stage, LoraStage) else {}

    def opened(self) -> dict[str, Tensor]:
        """What `parameters` held when the LoRA of the stage before went on, by the same names; not to be changed.

        Empty of a fresh LoRA and of weights that are tuned in full: those are kept by nobody.
        """
        return (
            {f"llm.{name}": x for name, x in self._stage.opened.items()} if isinstance(self._stage, LoraStage) else {}
        )

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """Inside, the LLM is exactly θ_{i-1}; when no stage is open, it already is.

        With LoRA the adapter is off, at no cost; one that goes on from the stage before has that stage's factors meanwhile.
        Full tuning swaps weights, so the device holds both meanwhile. When something is swapped, no gradient may be taken
        through what was computed inside.
        """
        if self._stage is None or self._in_previous:
            yield
            return
        self._in_previous = True
        try:
            with self._stage.previous(self._before):
                yield
        finally:
            self._in_previous = False

    @torch.no_grad()
    def blend(self, weight: float, *, on: Literal["delta", "factors"] = "delta") -> None:
        """θ ← θ_{i-1} + weight · (θ - θ_{i-1}); the stage stays open.

        Args:
            on: "delta" blends weights; "factors" blends A and B of a LoRA that goes on apart, towards what they were, which is
                another model than the blend of weights. Tuning in full has no factors: both are the same.

        Raises:
            RunError: no stage is open, or its LoRA cannot be blended so.
        """
        stage = self._expect_open("blend")
        if isinstance(stage, FullStage):
            stage.blend(weight, self._before)
        elif stage.goes_on != (on == "factors"):
            fresh = "is fresh, and has no earlier factors"
            later = "goes on from the stage before, and a blend of two updates has twice its rank"
            raise RunError(
                f"blend on {on}: the LoRA {later if stage.goes_on else fresh}. Factors are blended of a LoRA that goes on, "
                f"deltas of a fresh one."
            )
        elif stage.goes_on:
            stage.blend_factors(weight)
        else:
            stage.blend(weight, self._before)

    @torch.no_grad()
    def fold(self, rule: Rule = keep_new, **settings: float) -> None:
        """θ ← rule(θ_{i-1}, [θ]), and the stage is closed. If the rule fails, the stage stays open as it was.

        A rule with a low-rank form adds factors to the ledger; another adds a dense float32 update per layer.

        Args:
            settings: of the rule, such as ``weight``.

        Raises:
            RunError: no stage is open.
        """
        stage = self._expect_open("fold")
        if self._resumed is not None and rule is not keep_new:
            raise RunError(
                f"fold: rule '{rule.name}', but the LoRA goes on from the stage before and is kept as it is. Leave the rule out, "
                f"or open a fresh LoRA per stage."
            )
        entry = LedgerEntry(stage.merged(rule, settings, self._before))
        self._close()
        self._resumed = None
        self.ledger.append(entry)
        self._write(entry.names())

    @torch.no_grad()
    def drop(self) -> None:
        """Close the stage and forget it: the LLM is θ_{i-1}. Nothing happens when no stage is open."""
        if self._stage is not None:
            changed = sorted(self._stage.changing())
            self._close()
            if self._resumed is not None:
                self.ledger.append(self._resumed)
                self._resumed = None
            self._write(changed)

    def restore(self, count: int) -> None:
        """Go back: the LLM is base + the first ``count`` entries, exactly as it was then, and the later ones are gone.

        Raises:
            RunError: a stage is open, or there are fewer entries.
        """
        if not 0 <= count <= len(self.ledger):
            raise RunError(
                f"restore: {count} entries, but the ledger has {len(self.ledger)}. 0 (the base) to that is expected."
            )
        self.set_ledger(self.ledger[:count])

    @torch.no_grad()
    def set_ledger(self, entries: Sequence[LedgerEntry]) -> None:
        """The LLM becomes base + these entries.

        Raises:
            RunError: a stage is open.
            CheckpointError: an entry is of another LLM. Nothing is changed then.
        """
        self._expect_closed("set_ledger")
        self.check_ledger(entries)
        new = {name for entry in entries for name in entry.names()}
        changed = new | {name for entry in self.ledger for name in entry.names()}
        self._base.keep({name: self._llm.get_parameter(name) for name in new})
        self.ledger, self._resumed = list(entries), None
        self._write(sorted(changed))

    def check_ledger(self, entries: Sequence[LedgerEntry]) -> None:
        """Whether these entries fit the LLM.

        Raises:
            CheckpointError: an entry is of another LLM.
        """
        shapes = {name: parameter.shape for name, parameter in self._llm.named_parameters()}
        if self._stage is not None:  # an open LoRA stands in front of these
            shapes |= {name: parameter.shape for name, parameter in self._stage.changing().items()}
        for index, entry in enumerate(entries):
            entry.check(shapes, f"ledger entry {index}")

    @torch.no_grad()
    def dense_state(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the folded LLM, one at a time on the CPU, to be written as an ordinary checkpoint.

        Args:
            dtype: each weight is rounded to it once, from float32; None is the working dtype. Tied weights come once.

        Raises:
            RunError: a stage is open, or modules stand beside the LLM.
        """
        self._expect_closed("dense_state")
        if self.extension is not None:
            raise RunError(
                f"dense_state: the model has an extension '{self.extension}', which the LLM's weights do not hold; a model "
                f"without one is expected. Save a checkpoint, or take it out first: model.extend(None)."
            )
        for name, _ in self._llm.named_parameters():
            yield name, self._before(name).to("cpu", dtype or self.dtype)

    def export_peft(self, folder: Path, entry: LedgerEntry) -> None:
        """Write a low-rank entry as PEFT does: ``PeftModel.from_pretrained(llm, folder)`` adds it to an LLM.

        Raises:
            CheckpointError: the entry is dense, or its ranks differ.
        """
        from peft import LoraConfig

        ranks = {entry.tensors[key].shape[0] for key in entry.tensors if key.endswith(".A")}
        if len(ranks) != 1 or any(key.endswith((".delta", ".value")) for key in entry.tensors):
            raise CheckpointError(
                f"{folder}: only a low-rank entry of one rank can be written as a LoRA; this one has ranks "
                f"{sorted(ranks)} (none: it is dense). Export the whole LLM with dense_state."
            )
        rank = ranks.pop()
        tensors = {}
        modules = [name.removesuffix(".weight") for name in entry.names()]
        for module in modules:
            a, b, scale = (entry.tensors[f"{module}.weight.{kind}"] for kind in ("A", "B", "scale"))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
            # PEFT has one alpha for all layers: it is set to the rank, and the scale goes into B
            tensors[f"base_model.model.{module}.lora_B.weight"] = (b * scale.item()).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        LoraConfig(
            r=rank, lora_alpha=rank, target_modules=modules, task_type="CAUSAL_LM", inference_mode=True
        ).save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _expect_open(self, verb: str) -> LoraStage | FullStage:
        if self._stage is None or self._in_previous:
            state = "no stage is open" if self._stage is None else "the LLM is θ_{i-1} inside previous()"
            raise RunError(f"{verb}: {state}; an open stage is expected. Call open(seed) first, and leave previous().")
        return self._stage

    def _expect_closed(self, verb: str) -> None:
        if self._stage is not None:
            raise RunError(f"{verb}: a stage is open; none is expected. Call fold() or drop() first.")

    def _set_aside(self) -> None:
        """Take the last entry out of the LLM's weights, for a LoRA that goes on with it."""
        if not self.ledger:
            raise RunError("open: no stage to go on from, the ledger is empty. Open a fresh LoRA.")
        self._resumed = self.ledger.pop()
        with torch.no_grad():
            self._write(self._resumed.names())

    def _before(self, name: str) -> Tensor:
        """θ_{i-1} of one parameter, in float32 on its device; a fresh tensor. Without a LoRA that goes on."""
        parameter = self._llm.get_parameter(name)
        if name in self._base:
            return effective(name, self._base, self.ledger, parameter.device)
        return parameter.detach().to(torch.float32, copy=True)

    def _close(self) -> None:
        if self._stage is not None:
            self._stage.close()
        self._stage = None

    def _write(self, names: Sequence[str]) -> None:
        for name in names:
            self._llm.get_parameter(name).copy_(self._before(name))
