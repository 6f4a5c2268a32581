"""MoInCL: captions and questions of changing modalities, without samples of the past.

    loss  = L(batch and pseudo rows) + λ_kl KL_T(θ_{i-1} ‖ θ_i) on pseudo rows + KL_T(θ_{i-1} ‖ θ_i) on text instructions
    after every epoch      θ ← (1-α_f) θ_{i-1} + α_f θ        of the LoRA

Three ingredients: `PTGM`, pseudo targets of the type of task that is not learned now; `IKD`, distillation on instructions;
`Fuse`.

Paper:   Pian et al., Modality-Inconsistent Continual Learning of Multimodal Large Language Models (MoInCL), TMLR 2026,
    arXiv:2412.13050; what the abstract leaves out, the fusion too, is of its released code.
Differs: pseudo targets are of modalities that were learned with the other type before (the code tests the type alone:
    ``allow_unseen_modality``). Teacher and student are compared sample by sample at the same positions, padding left out; in
    the code they shift where lengths differ. "all" positions are those of text. Pseudo captions are greedy (the code has 5
    beams), and samples that share media share one. λ_kl, α_f and n_p have one default for all stages; the code has its own
    for every stage and order. The teacher has no dropout; a modality that no stage before had lends it the student's
    connector. Phases that leave the LLM alone are plain, and the first stage is. Connectors are not fused, an option of the
    code that is off. With accumulation, n_p and the number of instructions are per micro-batch, as in the code, but losses
    are averaged over micro-batches, not summed. IKD also counts the position after which the answer would begin.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, DataError
from graftlm.data.inquiries import read as read_inquiries
from graftlm.data.types import IGNORE, Batch, Media, Output, Sample, Stage, Stream, Task
from graftlm.learning.distill import connectors_before, kl, of_text, teacher
from graftlm.learning.method import Adapter, Context, Method, PerStage, at_stage, check_per_stage

__all__ = ["IKD", "PTGM", "Fuse", "earlier", "moincl"]

SUFFIX = "+pseudo"
"""Ends the id of a pseudo row."""

TOGETHER = 64
"""Samples that the teacher answers at once."""


@dataclass
class PTGM(Method):
    """Pseudo targets: inputs of the stage with the type of task that was learned before, and distillation on them.

    While questions are learned, θ_{i-1} captions the media of every training sample; while captions are learned, pairs of
    `Task.pseudo` are asked. The rows join the batch, and count as its own.

    Attributes:
        pseudo_rows: n_p, rows per micro-batch: of its last samples while questions are learned, of its first for captions.
        strength: λ_kl.
        temperature: T, above 0.
        allow_unseen_modality: whether the other type may have been learned of other modalities only.
        kd_positions: of a pseudo row, "all" of its text, or those that predict the "answer".
        max_new_tokens: length limit of a caption; None is that of the captions learned before.
    """

    reads = frozenset({"pseudo"})
    pseudo_rows: PerStage = 4
    strength: PerStage = 0.5
    temperature: float = 5.0
    allow_unseen_modality: bool = False
    kd_positions: Literal["all", "answer"] = "all"
    max_new_tokens: int | None = None
    _pseudo: dict[tuple[str, str], Sample] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rows: dict[str, Sample] = field(default_factory=dict, init=False, repr=False, compare=False)
    _captions: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _distils: bool = field(default=False, init=False, repr=False, compare=False)
    _connectors: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for rows in _values(self.pseudo_rows):
            if not (0 <= rows < math.inf and rows == int(rows)):
                raise ConfigError(f"pseudo_rows: {rows}; a whole number from 0 is expected (0 is off).")
        for strength in _values(self.strength):
            if not 0 <= strength < math.inf:
                raise ConfigError(f"strength: {strength}; a number from 0 is expected (0 is no distillation).")
        _check_temperature(self.temperature)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens}; at least 1 is expected.")

    @property
    def wants(self) -> frozenset[str]:  # type: ignore[override]
        """Logits, where all positions are distilled."""
        return frozenset({"logits"} if self._distils and self.kd_positions == "all" else ())

    def idle(self, number: int) -> bool:
        """At the first stage, and without rows."""
        return number == 1 or not _at("pseudo_rows", self.pseudo_rows, number) > 0

    def check(self, stream: Stream) -> None:
        """Stages that learn captions after questions need pairs."""
        for name in ("pseudo_rows", "strength"):
            check_per_stage(name, getattr(self, name), len(stream.stages))
        for index, stage in enumerate(stream.stages):
            if not self.idle(index + 1):
                self._active(stage, stream.stages[:index])

    def prepare(self, ctx: Context) -> None:
        """θ_{i-1} captions what questions are learned about; pairs are taken for captions."""
        self._pseudo, self._rows, self._captions, self._distils, self._connectors = {}, {}, set(), False, {}
        if self.idle(ctx.number):
            return
        for task, before in self._active(ctx.stage, ctx.past):
            new = self._asked(task) if task.kind == "caption" else self._captioned(ctx, task, before)
            self._pseudo |= {(task.name, id): row for id, row in new.items()}
            self._captions |= {task.name} if task.kind == "caption" else set()
        ctx.notes["ptgm"] = {task: sum(key[0] == task for key in self._pseudo) for task, _ in self._pseudo}
        self._distils = bool(self._pseudo) and _at("strength", self.strength, ctx.number) > 0
        self._connectors = connectors_before(ctx) if self._distils else {}

    def batch(self, ctx: Context, samples: list[Sample]) -> list[Sample]:
        """Pseudo rows at the end of each micro-batch."""
        self._rows = {}
        if not self._pseudo or not ctx.trains_llm:
            return samples
        count = int(_at("pseudo_rows", self.pseudo_rows, ctx.number))
        size = math.ceil(len(samples) / (1 if ctx.phase is None else ctx.phase.accumulate))
        joined: list[Sample] = []
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            able = [sample for sample in chunk if (sample.task, sample.id) in self._pseudo]
            first = [sample for sample in able if sample.task in self._captions][:count]
            last = [sample for sample in able if sample.task not in self._captions][-count:]
            rows = [self._pseudo[sample.task, sample.id] for sample in [*first, *last][:count]]
            self._rows |= {row.id: row for row in rows}
            joined += [*chunk, *rows]
        return joined

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """λ_kl KL_T(θ_{i-1} ‖ θ_i), on the pseudo rows of the micro-batch."""
        places = [place for place, id in enumerate(batch.ids) if id in self._rows]
        if not self._distils or not ctx.trains_llm or not places:
            return {}
        alone = ctx.model.batch([self._rows[batch.ids[place]] for place in places])
        everywhere = self.kd_positions == "all"
        with teacher(ctx, self._connectors):
            before = ctx.forward(alone, logits=everywhere)
        if everywhere:
            pairs = zip(_text(before, range(len(places))), _text(out, places), strict=True)
            distances = torch.cat([kl(old, new, self.temperature) for old, new in pairs])
        else:
            row_of = (out.labels[:, 1:] != IGNORE).nonzero()[:, 0]
            chosen = torch.isin(row_of, torch.tensor(places, device=row_of.device))
            distances = kl(before.answer_logits, out.answer_logits[chosen], self.temperature)
        return {"ptgm": at_stage(self.strength, ctx.number) * distances.mean()}

    def _active(self, stage: Stage, past: Sequence[Stage]) -> list[tuple[Task, Task]]:
        """Tasks that get pseudo rows, each with the task of the other type that was learned before."""
        found = []
        for task in stage.tasks:
            before = earlier(task, past, self.allow_unseen_modality)
            if before is None:
                continue
            if task.kind == "caption" and not task.pseudo:
                raise DataError(
                    f"ptgm: task {task.name} of stage {stage.name} learns captions after {before.name} learned questions, "
                    f"but has no pseudo targets. A question and its answer for every training sample are expected: a file "
                    f"id -> {{Q, A}}, such as pseudo_targets/<data set>_pseudo_qa_dict.json, see `Task.pseudo`. Add it, or "
                    f"set pseudo_rows to 0 at this stage."
                )
            found.append((task, before))
        return found

    def _asked(self, task: Task) -> dict[str, Sample]:
        return {sample.id: _row(sample, *task.pseudo[sample.id]) for sample in task.train if sample.id in task.pseudo}

    def _captioned(self, ctx: Context, task: Task, before: Task) -> dict[str, Sample]:
        """Every training sample with a caption prompt of the past and what θ_{i-1} says; once per media."""
        prompts = list(dict.fromkeys(sample.prompt for sample in before.train)) or ["describe this ."]
        rng = seeds.rng(ctx.seed, ctx.stage.name, "ptgm", task.name)
        unique: dict[tuple[Media, ...], Sample] = {}
        for sample in task.train:
            if sample.media not in unique:
                prompt = _moved(prompts[int(rng.integers(len(prompts)))], before, task)
                unique[sample.media] = dataclasses.replace(sample, prompt=prompt)
        limit = before.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        captions = dict(zip(unique, _generate(ctx, list(unique.values()), limit), strict=True))
        return {s.id: _row(s, unique[s.media].prompt, captions[s.media]) for s in task.train}


@dataclass
class IKD(Method):
    """Distil θ_{i-1} on text instructions, so that the LLM keeps to what it does with text.

    Attributes:
        strength: of the term.
        texts: instructions per micro-batch, drawn with replacement.
        temperature: T, above 0.
        variant: "kl"; or "pseudo", where θ_{i-1} answers instructions and its answers are learned as rows of the batch.
        pool: instructions that θ_{i-1} answers before the stage, of the variant "pseudo".
        max_new_tokens: length limit of these answers.
        inquiries: a JSON file of instructions, see `data.inquiries`; None are those of the stream.
    """

    reads = frozenset({"inquiries"})
    strength: float = 1.0
    texts: int = 4
    temperature: float = 5.0
    variant: Literal["kl", "pseudo"] = "kl"
    pool: int = 256
    max_new_tokens: int = 32
    inquiries: str | None = None
    _texts: tuple[Sample, ...] = field(default=(), init=False, repr=False, compare=False)
    _draws: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"strength: {self.strength}; a number from 0 is expected (1 in the paper, 0 is off).")
        if self.variant == "pseudo" and self.strength not in (0, 1):
            raise ConfigError(
                f"strength: {self.strength}, but pseudo answers are rows like any other; 1, or 0 for none, is expected. "
                f"Their number is `texts`."
            )
        _check_temperature(self.temperature)
        for name in ("texts", "pool", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; at least 1 is expected.")

    def files(self) -> list[Path]:
        """The inquiries, if they are not the stream's."""
        return [] if self.inquiries is None else [Path(self.inquiries)]

    def idle(self, number: int) -> bool:
        """At the first stage, and without strength."""
        return number == 1 or self.strength == 0

    def check(self, stream: Stream) -> None:
        """There must be instructions, if there is a second stage."""
        if not self.idle(len(stream.stages)):
            self._read(stream.inquiries)

    def prepare(self, ctx: Context) -> None:
        """Take the instructions; of the variant "pseudo", θ_{i-1} answers some."""
        if self.idle(ctx.number):
            return
        self._texts, self._draws = self._read(ctx.inquiries), 0
        if self.variant == "pseudo":
            order = seeds.rng(ctx.seed, ctx.stage.name, "ikd", "pool").permutation(len(self._texts))[: self.pool]
            chosen = [self._texts[i] for i in order]
            answers = _generate(ctx, chosen, self.max_new_tokens)
            self._texts = tuple(_row(text, text.prompt, answer) for text, answer in zip(chosen, answers, strict=True))

    def batch(self, ctx: Context, samples: list[Sample]) -> list[Sample]:
        """Of the variant "pseudo": instructions that differ, with the answers of θ_{i-1}, for every micro-batch."""
        if self.variant != "pseudo" or self.idle(ctx.number) or not ctx.trains_llm:
            return samples
        several = 1 if ctx.phase is None else ctx.phase.accumulate
        return samples + [text for _ in range(several) for text in self._draw(ctx, replace=False)]

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """KL_T(θ_{i-1} ‖ θ_i) at every position of the next instructions, while the LLM moves."""
        if self.variant != "kl" or self.idle(ctx.number) or not ctx.trains_llm:
            return {}
        texts = ctx.model.batch(self._draw(ctx, replace=True), answers=False)
        with teacher(ctx):
            before = ctx.forward(texts, logits=True).logits
        now = ctx.forward(texts, logits=True).logits
        assert before is not None and now is not None
        old, mask = of_text(before, texts)
        new, _ = of_text(now, texts)
        return {"ikd": self.strength * kl(old[mask], new[mask], self.temperature).mean()}

    def _draw(self, ctx: Context, *, replace: bool) -> list[Sample]:
        rng = seeds.rng(ctx.seed, ctx.stage.name, "ikd", self._draws)
        self._draws += 1
        count = self.texts if replace else min(self.texts, len(self._texts))
        return [self._texts[i] for i in rng.choice(len(self._texts), count, replace=replace)]

    def _read(self, given: Sequence[Sample]) -> tuple[Sample, ...]:
        found = tuple(given) if self.inquiries is None else read_inquiries(Path(self.inquiries))
        if not found:
            raise DataError(
                "ikd: the stream has no inquiries; instructions without labels are expected. Name a JSON file of them in "
                "`inquiries`, or leave ikd out."
            )
        return found


@dataclass
class Fuse(Method):
    """After every epoch, go back part of the way to θ_{i-1}; training continues from there.

    Attributes:
        weight: α_f, the share of the current model, above 0 up to 1 (off).
        on: "factors": A and B of one LoRA for the run, apart, as in the released code; "delta": what a fresh LoRA per stage
            adds to the weights.
    """

    weight: PerStage = 0.5
    on: Literal["factors", "delta"] = "factors"

    def __post_init__(self) -> None:
        for weight in _values(self.weight):
            if weight == 0:
                raise ConfigError(
                    "weight: 0 undoes after every epoch all that the LoRA learned, so that no stage is learned. A share of the "
                    "current model above 0 is expected; 1 is no fusion."
                )
            if not 0 < weight <= 1:
                raise ConfigError(f"weight: {weight} is not a share; a number above 0 up to 1 is expected.")

    @property
    def adapter(self) -> Adapter:  # type: ignore[override]
        """One LoRA for the run if factors are fused, a fresh one per stage if deltas are; any if nothing is."""
        if all(weight == 1 for weight in _values(self.weight)):
            return "any"
        return "run" if self.on == "factors" else "stage"

    def idle(self, number: int) -> bool:
        """At the first stage and where the weight is 1; but a LoRA that goes on is another than a fresh one."""
        return number == 1 or (self._off(number) and self.adapter != "run")

    def check(self, stream: Stream) -> None:
        """One weight, or one per stage."""
        check_per_stage("weight", self.weight, len(stream.stages))

    def after_epoch(self, ctx: Context) -> None:
        """θ ← (1-α_f) θ_{i-1} + α_f θ."""
        if ctx.number > 1 and not self._off(ctx.number) and ctx.trains_llm:
            ctx.model.adapter.blend(at_stage(self.weight, ctx.number), on=self.on)

    def _off(self, number: int) -> bool:
        weight = _at("weight", self.weight, number)
        return math.isnan(weight) or weight == 1


def moincl(
    pseudo_rows: PerStage = 4,
    strength: PerStage = 0.5,
    weight: PerStage = 0.5,
    temperature: float = 5.0,
    texts: int = 4,
    text_strength: float = 1.0,
    variant: Literal["kl", "pseudo"] = "kl",
    on: Literal["factors", "delta"] = "factors",
    allow_unseen_modality: bool = False,
    kd_positions: Literal["all", "answer"] = "all",
    max_new_tokens: int | None = None,
    inquiries: str | None = None,
) -> list[Method]:
    """The three together: n_p, λ_kl and α_f first, ``text_strength`` and what follows ``texts`` for IKD."""
    return [
        PTGM(pseudo_rows, strength, temperature, allow_unseen_modality, kd_positions, max_new_tokens),
        IKD(text_strength, texts, temperature, variant, inquiries=inquiries),
        Fuse(weight, on),
    ]


def earlier(task: Task, past: Sequence[Stage], allow_unseen_modality: bool = False) -> Task | None:
    """The latest task of the other type, if one was learned and so were the task's modalities (with either type).

    Captions are one type, questions the other; other kinds of task have none. One of the same modalities comes first.

    Args:
        allow_unseen_modality: the modalities may be new.
    """
    tasks = [each for stage in reversed(past) for each in stage.tasks]
    other = {"caption": ("qa", "choice"), "qa": ("caption",), "choice": ("caption",)}.get(task.kind, ())
    able = [each for each in tasks if each.kind in other and each.modalities]
    known = {modality for each in tasks for modality in each.modalities}
    if not able or not task.modalities or not (allow_unseen_modality or known.issuperset(task.modalities)):
        return None
    return next((each for each in able if each.modalities == task.modalities), able[0])


def _row(sample: Sample, prompt: str, answer: str) -> Sample:
    return Sample(f"{sample.task}/{sample.id}{SUFFIX}", sample.task, sample.media, prompt, (answer,))


def _moved(prompt: str, before: Task, task: Task) -> str:
    """A prompt of one modality for another: slots and names are replaced."""
    for old, new in zip(before.modalities, task.modalities, strict=False):
        prompt = re.sub(rf"\b{re.escape(old)}\b", new, prompt)
    return prompt


def _generate(ctx: Context, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """What θ_{i-1} answers, before anything is opened: greedy."""
    return [
        answer
        for start in range(0, len(samples), TOGETHER)
        for answer in ctx.model.generate(samples[start : start + TOGETHER], max_new_tokens=max_new_tokens)
    ]


def _text(out: Output, rows: Sequence[int]) -> list[Tensor]:
    """Logits at the text of each of these rows, padding left out: Float (T_row, V)."""
    assert out.logits is not None
    text = out.attention_mask & (out.modality_ids == 0)
    return [out.logits[row][text[row]] for row in rows]


def _values(value: PerStage) -> list[float]:
    return [each for each in (value if isinstance(value, list) else [value]) if each is not None]


def _at(name: str, value: PerStage, number: int) -> float:
    """The value of a stage; nan where it has none."""
    if isinstance(value, list):
        check_per_stage(name, value, max(number, len(value)))
    return at_stage(value, number)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature: {temperature}; a number above 0 is expected (5 in the paper).")
