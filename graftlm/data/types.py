"""The nouns of the library: what is learned, from what, and in which order.

Shape letters of the project: B batch, T text tokens, S sequence inside the LLM, N media items, L tokens per
item, E encoder width, D LLM width, V vocabulary, R adapter rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

__all__ = [
    "IGNORE",
    "SLOT",
    "TEXT",
    "Batch",
    "Media",
    "Modality",
    "Output",
    "Phase",
    "Sample",
    "Stage",
    "Stream",
    "Task",
]

Modality = str
"""A name such as "image", "video", "audio", "point"; any new name is a new modality."""

TEXT: Modality = "text"
"""The modality of every position that is not media; its id in `Output.modality_ids` is 0."""

SLOT = -1
"""Token id of a media slot in `Batch.input_ids`: one position per media item, however many tokens it becomes."""

IGNORE = -100
"""Label of a position that is not learned."""

Kind = Literal["caption", "qa", "choice", "instruction"]


@dataclass(frozen=True, slots=True)
class Media:
    """One media item: a file of a modality."""

    modality: Modality
    source: Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to learn or to be asked.

    Attributes:
        id: unique within its task and split.
        task: name of the task.
        media: the items, in the order of their slots in the prompt.
        prompt: the question. ``<image>``, ``<audio>`` ... say where an item goes; a prompt without any slot gets
            its media in front. Slots and media must agree in number and modality.
        answers: ``answers[0]`` is the training target; all of them are references.
    """

    id: str
    task: str
    media: tuple[Media, ...]
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A data set: one kind of question about one combination of modalities.

    Attributes:
        metric: name in `evaluation.metrics` ("cider", "exact", "vqa", "letter").
        max_new_tokens: length limit of an answer.
        source: where the data come from: paper, licence, or the folder's content hash.
        pseudo: for captions, a question and its answer about the media of a training sample, by the sample's id; what
            MoInCL's pseudo targets are made of.
    """

    name: str
    kind: Kind
    modalities: tuple[Modality, ...]
    metric: str
    train: Sequence[Sample]
    val: Sequence[Sample]
    test: Sequence[Sample]
    max_new_tokens: int = 32
    source: str = ""
    pseudo: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def measured(self, split: str) -> Sequence[Sample]:
        """The samples of a split that models are measured on, "val" or "test"."""
        return self.test if split == "test" else self.val


@dataclass(frozen=True)
class Stage:
    """What is learned together. MERA: one modality with its captions and questions."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Every modality that the tasks use, in order of first use."""
        return tuple(dict.fromkeys(m for task in self.tasks for m in task.modalities))

    def samples(self, kinds: frozenset[str] | None = None) -> list[Sample]:
        """The training samples of the tasks of these kinds (None: all)."""
        return [sample for task in self.tasks if kinds is None or task.kind in kinds for sample in task.train]


@dataclass(frozen=True)
class Stream:
    """Stages in order of learning, and probes: tasks that are measured but never learned.

    Attributes:
        later: tasks that may come after the stages, one each, for models that were composed.
        start: what the model has learned before the first stage, without any method; no stage itself, and never replayed.
        aligned: whether the start moved connectors alone, and the LLM is still the base.
        inquiries: text without labels for regularisation; an answer, if there is one, is what data replay learns.
    """

    name: str
    stages: tuple[Stage, ...]
    probes: tuple[Task, ...] = ()
    later: tuple[Stage, ...] = ()
    start: Stage | None = None
    aligned: bool = False
    inquiries: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Phase:
    """One optimisation: which parts move, on what, how fast.

    Attributes:
        trainable: parts, as prefixes of parameter names. "connectors" is all connectors, "connectors.current"
            those of the stage's modalities, "llm" the LLM's adapter (or all its weights when tuned in full).
        kinds: kinds of task to learn from; None is all.
        epochs: passes over the samples.
        batch_size: samples per optimiser step.
        lr: peak learning rate per part; the longest matching prefix counts.
        warmup: share of the steps with a rising learning rate.
        clip: bound on the gradient's norm; 0 is none.
        accumulate: micro-batches that make up one batch.
    """

    name: str
    trainable: frozenset[str]
    lr: Mapping[str, float]
    kinds: frozenset[str] | None = None
    epochs: int = 1
    batch_size: int = 16
    warmup: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1


@dataclass(frozen=True)
class Batch:
    """Samples as tensors.

    Attributes:
        input_ids: Int (B, T). A media slot is `SLOT`.
        attention_mask: Bool (B, T), False at padding.
        labels: Int (B, T), aligned with ``input_ids`` (not shifted); `IGNORE` everywhere but at answers.
        media: per modality, (N, ...) raw inputs, or (N, L, E) encoder outputs when ``encoded``.
        places: per modality, Int (N, 2): row and column of each item's slot.
        encoded: whether ``media`` holds encoder outputs (frozen encoders: from the feature cache).
        ids: sample ids, for logs and errors.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media: Mapping[Modality, Tensor] = field(default_factory=dict)
    places: Mapping[Modality, Tensor] = field(default_factory=dict)
    encoded: bool = True
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """What the model says about a batch. Media lengthen the sequence, so S >= T: use these labels, not the batch's.

    Attributes:
        loss: cross-entropy, mean over answer tokens.
        answer_logits: Float (K, V), the logits of the K positions whose next token is an answer's, row by row.
        labels: Int (B, S).
        modality_ids: Int (B, S); 0 is text.
        attention_mask: Bool (B, S).
        logits: Float (B, S, V), only when asked for (memory).
        hidden: Float (B, S, D), the tensor that enters the LM head, only when asked for.
    """

    loss: Tensor
    answer_logits: Tensor
    labels: Tensor
    modality_ids: Tensor
    attention_mask: Tensor
    logits: Tensor | None = None
    hidden: Tensor | None = None
