"""Learned positions that stand before a text, chosen for every sample by what it shows and asks; the LLM stays frozen.

Two kinds. A pool (L2P) has M prompts with a key each, and a sample takes the k whose keys are closest to its query. A shelf
(ModalPrompt) has the prompts of each task, with a prototype, and a sample takes those of the tasks whose prototypes are
closest to its media and its text.

Prompts stand after a beginning-of-sequence token, else first; they are text (id 0) without labels. When answers are
generated they are in the first pass only, and in the KV cache after it.

Paper:   Wang et al., Learning to Prompt for Continual Learning (L2P), CVPR 2022, arXiv:2112.08654; Zeng et al., ModalPrompt,
    EMNLP 2025, arXiv:2410.05849.
Differs: see `methods.l2p` and `methods.modalprompt`.
"""

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import seeds
from graftlm.core.errors import CheckpointError, RunError
from graftlm.data.types import IGNORE, SLOT, TEXT, Batch, Modality
from graftlm.model.extension import Extension
from graftlm.model.fusion import Fused

if TYPE_CHECKING:
    from graftlm.model.multimodal import MultimodalLM

__all__ = [
    "PoolSpec",
    "PromptPool",
    "PromptShelf",
    "Prompts",
    "Query",
    "ShelfSpec",
    "TaskPrompts",
    "cosine",
    "open_pool",
    "open_shelf",
    "prepend",
    "query_of",
]

ROWS = 4096
"""Of the embedding that are looked at to know its spread."""


@dataclass(frozen=True)
class Query:
    """What samples are known by, from frozen weights alone, in float32.

    Attributes:
        text: Float (B, D), the mean of the embeddings of the prompt's tokens.
        media: by modality, the rows whose first item is of it, Int (n,), and the mean of each item's tokens as the encoder
            gives them, Float (n, E).
    """

    text: Tensor
    media: Mapping[Modality, tuple[Tensor, Tensor]]


@torch.no_grad()
def query_of(embed: nn.Module, batch: Batch) -> Query:
    """The query of every row.

    Args:
        embed: the LLM's input embedding.
        batch: with encoder outputs, on the LLM's device. An answer in it is not looked at.
    """
    ids = batch.input_ids
    asked = batch.attention_mask & (batch.labels == IGNORE) & (ids != SLOT)
    words = embed(ids.clamp_min(0)).float() * asked.unsqueeze(-1)
    text = words.sum(1) / asked.sum(1, keepdim=True).clamp_min(1)
    first = torch.full((len(ids),), ids.shape[1], device=ids.device)
    for places in batch.places.values():
        first = first.scatter_reduce(0, places[:, 0], places[:, 1], "amin")
    media = {}
    for modality, tokens in batch.media.items():
        row, column = batch.places[modality].unbind(1)
        chosen = column == first[row]
        if bool(chosen.any()):
            media[modality] = (row[chosen], tokens[chosen].float().mean(1))
    return Query(text, media)


def cosine(features: Tensor, others: Tensor) -> Tensor:
    """Float (n, E), Float (M, E) -> Float (n, M); 0 where a vector is zero."""
    return F.normalize(features, dim=1) @ F.normalize(others, dim=1).T


def exact(query: Query) -> torch.autocast:
    """Inside, sums are float32: under autocast, training would choose otherwise than answering."""
    return torch.autocast(query.text.device.type, enabled=False)


def prepend(fused: Fused, vectors: Tensor, after: Tensor) -> Fused:
    """Put learned positions into every row, before its first token or behind that; padding stays on its side.

    Args:
        vectors: Float (B, P, D).
        after: Int (B,), how many tokens of the row stand before them.
    """
    rows, length = fused.attention_mask.shape
    count = vectors.shape[1]
    start = (fused.attention_mask.int().argmax(1) + after)[:, None]
    column = torch.arange(length + count, device=start.device).expand(rows, -1)
    new = length + column - start  # where the vectors are once they are appended
    index = torch.where(column < start, column, torch.where(column < start + count, new, column - count))
    row = torch.arange(rows, device=start.device)[:, None]

    def placed(values: Tensor, added: Tensor) -> Tensor:
        return torch.cat([values, added.to(values.dtype)], 1)[row, index]

    def constant(values: Tensor, fill: int) -> Tensor:
        return placed(values, values.new_full((rows, count), fill))

    return Fused(
        placed(fused.embeds, vectors),
        constant(fused.attention_mask, True),
        constant(fused.labels, IGNORE),
        constant(fused.modality_ids, 0),
    )


class Prompts(Extension):
    """An extension that chooses prompts by a query."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: tuple[tuple[str, ...], Query] | None = None

    @abc.abstractmethod
    def choose(self, query: Query) -> Tensor | None:
        """The prompts of every row, Float (B, P, D); None of none."""

    def fuse(self, fused: Fused, batch: Batch) -> Fused:
        """See `Extension.fuse`."""
        query = query_of(self.model.llm.get_input_embeddings(), batch)
        self._asked = (batch.ids, query)
        with exact(query):
            vectors = self.choose(query)
        if vectors is None or not vectors.shape[1]:
            return fused
        first = batch.attention_mask.int().argmax(1, keepdim=True)
        bos = self.model.tokenizer.bos_token_id
        begun = torch.zeros_like(first) if bos is None else (batch.input_ids.gather(1, first) == bos).long()
        return prepend(fused, vectors, begun[:, 0])

    def query(self, batch: Batch) -> Query:
        """The query of a batch; of the one that was fused last it is at hand."""
        if self._asked is not None and batch.ids and self._asked[0] is batch.ids:
            return self._asked[1]
        return query_of(self.model.llm.get_input_embeddings(), self.model.encoded(batch))

    def detach(self, model: "MultimodalLM") -> None:
        """See `Extension.detach`."""
        self._asked = None
        super().detach(model)


# --- a pool -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolSpec:
    """What a pool is like.

    Attributes:
        pool: prompts, M.
        top: prompts that a sample takes, k.
        length: vectors of a prompt.
        selection: while it learns, a batch takes what each "sample" needs, or for all what most of the "batch" need.
    """

    pool: int = 10
    top: int = 5
    length: int = 5
    selection: Literal["sample", "batch"] = "sample"


class PromptPool(Prompts):
    """The pool of L2P.

    Args:
        width: of the LLM's embedding, D.

    Attributes:
        prompts: Float (M, length, D).
        keys: by modality Float (M, E); "text", Float (M, D), is for rows without media, or with those that have no keys.
    """

    kind = "l2p"

    def __init__(self, spec: PoolSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.prompts = nn.Parameter(torch.zeros(spec.pool, spec.length, width))
        self.keys = nn.ParameterDict({TEXT: nn.Parameter(torch.zeros(spec.pool, width))})

    def settings(self) -> dict[str, Any]:
        """See `Extension.settings`."""
        return {**asdict(self.spec), "modalities": [name for name in self.keys if name != TEXT]}

    @classmethod
    def build(cls, model: "MultimodalLM", settings: Mapping[str, Any]) -> Self:
        """See `Extension.build`."""
        values = dict(settings)
        modalities = values.pop("modalities")
        found = cls(PoolSpec(**values), embedding_of(model).shape[1])
        for modality in modalities:
            found.add_keys(modality, width_of(model, modality))
        return found

    def add_keys(self, modality: Modality, width: int) -> None:
        """Keys of one more modality, zero until they are drawn or loaded; nothing happens when it has some."""
        if modality not in self.keys:
            keys = torch.zeros(self.spec.pool, width, device=self.prompts.device)
            self.keys[modality] = nn.Parameter(keys, requires_grad=False)

    def similarity(self, query: Query) -> Tensor:
        """Of every row to every key: Float (B, M)."""
        found = query.text.new_zeros(len(query.text), self.spec.pool)
        rest = torch.ones(len(query.text), dtype=torch.bool, device=found.device)
        for modality, (rows, features) in query.media.items():
            if modality in self.keys:
                found = found.index_put((rows,), cosine(features, self.keys[modality]))
                rest[rows] = False
        if bool(rest.any()):
            found = found.index_put((rest,), cosine(query.text[rest], self.keys[TEXT]))
        return found

    def select(self, similarity: Tensor) -> Tensor:
        """Which prompts each row takes, the closest first: Int (B, k)."""
        order = similarity.detach().argsort(dim=1, descending=True, stable=True)[:, : self.spec.top]
        if self.spec.selection == "batch" and self.training:
            votes = order.flatten().bincount(minlength=self.spec.pool)
            order = votes.argsort(descending=True, stable=True)[: self.spec.top].expand(len(similarity), -1)
        return order

    def choose(self, query: Query) -> Tensor | None:
        """See `Prompts.choose`."""
        return self.prompts[self.select(self.similarity(query))].flatten(1, 2)

    def closeness(self, query: Query) -> Tensor:
        """How close rows are to the keys they take: the sum over these of the cosine, the mean over rows."""
        with exact(query):
            similarity = self.similarity(query)
        return similarity.gather(1, self.select(similarity)).sum() / len(similarity)


def open_pool(model: "MultimodalLM", spec: PoolSpec, *, spread: float = 1.0, seed: int = 0) -> PromptPool:
    """The pool of a model, which gets one if it has none, with keys for all its modalities.

    Args:
        spread: standard deviation of new prompts, as a share of that of the embedding.
        seed: what is drawn depends on it and on names alone.

    Raises:
        RunError: the model has another extension, or a pool that is not like that.
    """
    made = model.extension is None
    if made:
        model.extend(PromptPool(spec, embedding_of(model).shape[1]))
    found = model.extension
    if not isinstance(found, PromptPool) or found.spec != spec:
        raise another("l2p", found, spec)
    fresh = [name for name in model.specs if name not in found.keys]
    for modality in fresh:
        found.add_keys(modality, width_of(model, modality))
    with torch.no_grad():
        if made:
            found.prompts.copy_(drawn(model, tuple(found.prompts.shape), spread, seed))
        for name in [*fresh, TEXT] if made else fresh:
            keys = found.keys[name]
            generator = torch.Generator().manual_seed(seeds.derive(seed, "keys", name))
            keys.copy_(torch.rand(keys.shape, generator=generator) * 2 - 1)
    return found


# --- a shelf of tasks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShelfSpec:
    """What the prompts of tasks are like.

    Attributes:
        prompts: vectors of each task.
        top: tasks whose prompts a sample takes; while a task is learned, it is one of these.
        media: how much media say about which tasks, from 0 to 1; text says the rest.
    """

    prompts: int = 10
    top: int = 3
    media: float = 0.5


class TaskPrompts(nn.Module):
    """The prompts of one task, and the transform that makes prototypes of them.

    Args:
        widths: of the features of each modality of the task, and of text.

    Attributes:
        vectors: Float (n, D).
        hidden, heads: D -> D, then SiLU, then D -> E of each modality, or of text.
    """

    def __init__(self, count: int, width: int, widths: Mapping[Modality, int]) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(count, width))
        self.hidden = nn.Linear(width, width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, features) for name, features in widths.items()})
        self.requires_grad_(False)

    def prototype(self, name: Modality) -> Tensor:
        """What the task looks like in a modality, or in text: Float (E,)."""
        found: Tensor = self.heads[name](F.silu(self.hidden(self.vectors))).mean(0)
        return found


class PromptShelf(Prompts):
    """The prompts of ModalPrompt.

    Args:
        width: of the LLM's embedding, D.

    Attributes:
        tasks: in the order of learning; the last learns, if one does.
        names: of these.
    """

    kind = "modalprompt"

    def __init__(self, spec: ShelfSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.names: list[str] = []
        self.tasks = nn.ModuleList()
        self._width = width

    def settings(self) -> dict[str, Any]:
        """See `Extension.settings`."""
        tasks = [
            {"name": name, "modalities": [each for each in task.heads if each != TEXT]}
            for name, task in zip(self.names, self.shelf(), strict=True)
        ]
        return {**asdict(self.spec), "tasks": tasks}

    @classmethod
    def build(cls, model: "MultimodalLM", settings: Mapping[str, Any]) -> Self:
        """See `Extension.build`."""
        values = dict(settings)
        tasks = values.pop("tasks")
        found = cls(ShelfSpec(**values), embedding_of(model).shape[1])
        for task in tasks:
            found.add_task(task["name"], {name: width_of(model, name) for name in task["modalities"]})
        return found

    def add_task(self, name: str, widths: Mapping[Modality, int]) -> TaskPrompts:
        """One more task; its vectors are zero until they are drawn or loaded.

        Args:
            widths: of the encoder's features of each of its modalities.
        """
        task = TaskPrompts(self.spec.prompts, self._width, {**widths, TEXT: self._width})
        self.names.append(name)
        self.tasks.append(task)
        return task

    def shelf(self) -> Iterator[TaskPrompts]:
        """`tasks`, by their type."""
        for task in self.tasks:
            assert isinstance(task, TaskPrompts)
            yield task

    @property
    def newest(self) -> TaskPrompts:
        """The task that was begun last."""
        return list(self.shelf())[-1]

    @property
    def learns(self) -> bool:
        """Whether its prompts move now."""
        return self.training and len(self.tasks) > 0 and self.newest.vectors.requires_grad

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """See `Extension.trainable_parameters`: those of the newest task."""
        number = len(self.tasks) - 1
        return {f"tasks.{number}.{name}": p for name, p in self.newest.named_parameters()} if number >= 0 else {}

    def guidance(self, query: Query, tasks: Iterable[TaskPrompts]) -> Tensor:
        """How close each row is to each task, Float (B, J). Media that a task did not learn say nothing about it."""
        tasks = list(tasks)
        text = torch.stack([task.prototype(TEXT) for task in tasks])
        found = (1 - self.spec.media) * cosine(query.text, text)
        for modality, (rows, features) in query.media.items():
            known = [number for number, task in enumerate(tasks) if modality in task.heads]
            if known:
                seen = torch.stack([tasks[number].prototype(modality) for number in known])
                columns = torch.tensor(known, device=found.device)
                found[rows[:, None], columns] += self.spec.media * cosine(features, seen)
        return found

    def choose(self, query: Query) -> Tensor | None:
        """See `Prompts.choose`: the closest task last; after all, the one that learns."""
        old = list(self.shelf())
        chosen = []
        if self.learns:
            chosen.append(old.pop().vectors.expand(len(query.text), -1, -1))
        count = min(self.spec.top - len(chosen), len(old))
        if count:
            with torch.no_grad():
                order = self.guidance(query, old).argsort(dim=1, descending=True, stable=True)[:, :count].flip(1)
            chosen.insert(0, torch.stack([task.vectors for task in old])[order].flatten(1, 2))
        return torch.cat(chosen, 1) if chosen else None

    def misfit(self, query: Query) -> Tensor:
        """Of the newest task's prototypes to the rows: 1 - cos of media, and 1 - cos of text; the mean over rows."""
        task = self.newest
        with exact(query):
            total = (1 - cosine(query.text, task.prototype(TEXT)[None])).sum()
            for modality, (_, features) in query.media.items():
                if modality in task.heads:
                    total = total + (1 - cosine(features, task.prototype(modality)[None])).sum()
        return total / len(query.text)


def open_shelf(
    model: "MultimodalLM",
    name: str,
    modalities: Iterable[Modality],
    spec: ShelfSpec,
    *,
    spread: float = 1.0,
    seed: int = 0,
) -> PromptShelf:
    """Begin a task on the shelf of a model, which gets a shelf if it has none.

    Args:
        name, modalities: of the task.
        spread: standard deviation of its vectors, as a share of that of the embedding.
        seed: what is drawn depends on it and on names alone.

    Raises:
        RunError: the model has another extension, or a shelf that is not like that.
    """
    if model.extension is None:
        model.extend(PromptShelf(spec, embedding_of(model).shape[1]))
    found = model.extension
    if not isinstance(found, PromptShelf) or found.spec != spec:
        raise another("modalprompt", found, spec)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seeds.derive(seed, "transform"))
        task = found.add_task(name, {each: width_of(model, each) for each in modalities})
        task.vectors.copy_(drawn(model, tuple(task.vectors.shape), spread, seed))
    task.to(model.device).train(model.training)
    return found


# --- both -------------------------------------------------------------------------------------------------------------


def embedding_of(model: "MultimodalLM") -> Tensor:
    """The LLM's input embedding, Float (V, D)."""
    return model.llm.get_input_embeddings().get_parameter("weight").detach()


def width_of(model: "MultimodalLM", modality: Modality) -> int:
    """Of an encoder's features.

    Raises:
        CheckpointError: the model has no such modality.
    """
    if modality not in model.specs:
        raise CheckpointError(
            f"extension: it knows samples by '{modality}', which is no modality of this model ({list(model.specs)}). Add it, "
            f"or use another copy of the checkpoint."
        )
    return model.encoder(modality).width


def drawn(model: "MultimodalLM", shape: tuple[int, ...], spread: float, seed: int) -> Tensor:
    """Vectors at the start: Float (..., D), on the CPU."""
    generator = torch.Generator().manual_seed(seeds.derive(seed, "prompts"))
    return torch.randn(shape, generator=generator) * spread * float(embedding_of(model)[:ROWS].float().std())


def another(kind: str, found: Extension | None, spec: PoolSpec | ShelfSpec) -> RunError:
    """The error of a model that has grown otherwise."""
    have = asdict(found.spec) if isinstance(found, PromptPool | PromptShelf) else "other modules"
    return RunError(
        f"{kind}: the model has an extension '{found.kind if found else None}' of {have}, but {asdict(spec)} is asked for; the "
        f"same is expected at every stage. Start from a model without it."
    )
