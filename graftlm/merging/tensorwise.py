"""Rules that look at one whole tensor at a time (SAC), and those that have no kernel of their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging import RULES, spectral
from graftlm.merging.output import Shards, WorkFolder
from graftlm.merging.sources import LowRank, Source, UpdatedSource
from graftlm.merging.stream import COPIES, RAM, Progress
from graftlm.model.rule import Rule

__all__ = ["TensorMerge", "stacked"]

WHOLE = frozenset({"sac"})
"""Rules that need all of a tensor; others take rows."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorMerge:
    """Apply a merging rule tensor by tensor; a matrix that is too tall for the memory is consolidated by rows."""

    def __init__(
        self,
        base: Source,
        models: Mapping[str, Source],
        names: Sequence[str],
        rule: str,
        settings: Mapping[str, Any],
        dtype: Mapping[str, str],
        shards: Shards,
        *,
        ram: int = RAM,
    ) -> None:
        self._base = base
        self._models = dict(models)
        self._names = list(names)
        self._rule: Rule = RULES.get(rule)
        self._settings = dict(settings)
        self._dtype = dtype
        self._shards = shards
        self._ram = ram

    def run(self, work: WorkFolder, progress: Progress) -> None:
        """Merge what is not merged yet.

        Raises:
            MergeError: the rule's settings are wrong, or a weight is not finite.
        """
        done = max((entry["tensors"] for entry in work.entries() if "tensors" in entry), default=0)
        sizes = [self._size(name) for name in self._names]
        for index, name in enumerate(self._names):
            if index < done:
                continue
            progress("merging", sum(sizes[:index]), sum(sizes))
            self._merge(name)
            self._shards.sync()
            work.note(tensors=index + 1)
        progress("merging", sum(sizes), sum(sizes))

    def _merge(self, name: str) -> None:
        if self._low_rank(name):
            return
        shape = self._base.shape(name)
        rows = shape[0] if shape else 1
        piece = self._size(name) * (len(self._models) + 1 + COPIES)
        whole = self._rule.name in WHOLE or self._settings.get("merge") == "ties"  # consensus may trim
        if piece <= self._ram or (not whole and rows > 1):
            step = rows if whole else max(1, rows * self._ram // piece)
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                before, after = self._read(name, part)
                same = self._rule.name == "sac" and torch.equal(before, after[0])  # an update of 0 has no spectrum
                self._write(name, part, before if same else self._rule(before, after, **self._settings))
            return
        if self._rule.name != "sac" or len(shape) < 2:
            raise MergeError(
                f"{self._rule.name}: '{name}' of shape {shape} needs {piece:,} bytes of memory, and {self._ram:,} are allowed."
            )
        width = int(np.prod(shape[1:]))
        (self._tall if rows >= width else self._wide)(name, rows)

    def _low_rank(self, name: str) -> bool:
        """Merge what a model with an adapter or a ledger adds to a tensor without ever forming it, if it is of low rank.

        Returns:
            Whether it was.
        """
        model = next(iter(self._models.values()))
        if len(self._models) > 1 or self._rule.factored is None or not isinstance(model, UpdatedSource):
            return False
        updates = model.factors(name)
        if updates is None:
            return False
        shape = self._base.shape(name)
        rows = shape[0] if shape else 1
        a, b, scale = self._rule.factored(*stacked(name, updates), **self._settings) if updates else (None, None, 0.0)
        step = max(1, rows * self._ram // (self._size(name) * COPIES)) if shape else 1
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            before = self._tensor(self._base, name, part)
            self._write(name, part, before if a is None or b is None else before.addmm_(b[part], a, alpha=scale))
        return True

    def _tall(self, name: str, rows: int) -> None:
        """SAC in two walks over the rows of a tall matrix: its Gram matrix says what to multiply the update with."""
        shape = self._base.shape(name)
        step = max(1, rows * self._ram // (self._size(name) * (2 + COPIES)))
        gram: Tensor | None = None
        for before, after, _ in self._pieces(name, rows, step):
            update = (after - before).reshape(len(before), -1).double()
            gram = update.T @ update if gram is None else gram.addmm_(update.T, update)
        assert gram is not None
        factor = spectral.right_factor(gram, shape[0], **self._settings)
        for before, after, part in self._pieces(name, rows, step):
            update = (after - before).reshape(len(before), -1).double() @ factor
            self._write(name, part, before + update.float().reshape(before.shape))

    def _wide(self, name: str, rows: int) -> None:
        """The same of a wide matrix, from the left: its update is held once, in float32."""
        shape = self._base.shape(name)
        width = int(np.prod(shape[1:]))
        step = max(1, rows * self._ram // (self._size(name) * (2 + COPIES)))
        update = torch.empty(rows, width)
        for before, after, part in self._pieces(name, rows, step):
            update[part] = (after - before).reshape(len(before), -1)
        gram = torch.zeros(rows, rows, dtype=torch.float64)
        columns = max(1, width * step // rows)
        for start in range(0, width, columns):
            piece = update[:, start : start + columns].double()
            gram.addmm_(piece, piece.T)
        factor = spectral.right_factor(gram, width, **self._settings)  # symmetric: it serves from either side
        for start in range(0, width, columns):
            piece = update[:, start : start + columns]
            piece.copy_(factor @ piece.double())
        for before, _, part in self._pieces(name, rows, step):
            self._write(name, part, before + update[part].reshape(before.shape))

    def _pieces(self, name: str, rows: int, step: int) -> Any:
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            before, after = self._read(name, part)
            yield before, after[0], part

    def _read(self, name: str, rows: slice) -> tuple[Tensor, list[Tensor]]:
        read: Callable[[Source], Tensor] = lambda source: self._tensor(source, name, rows)  # noqa: E731
        return read(self._base), [read(source) for source in self._models.values()]

    def _tensor(self, source: Source, name: str, rows: slice) -> Tensor:
        shape = source.shape(name)
        size = int(np.prod(shape[1:])) * (rows.stop - rows.start)
        numbers = np.empty(size, np.float32)
        source.read(name, rows, numbers)
        if not np.isfinite(numbers).all():
            raise MergeError(f"'{name}' holds numbers that are not finite. `graftlm doctor --deep` finds them.")
        return (
            torch.from_numpy(numbers).reshape(rows.stop - rows.start, *shape[1:]) if shape else torch.tensor(numbers[0])
        )

    def _write(self, name: str, rows: slice, result: Tensor) -> None:
        stored = result.to(DTYPES[self._dtype[name]]).contiguous()
        data = stored.reshape(-1).view(torch.uint8).numpy()
        per_row = data.size // (rows.stop - rows.start)
        self._shards.write(name, rows.start * per_row, data.data.cast("B"))

    def _size(self, name: str) -> int:
        return 4 * int(np.prod(self._base.shape(name)))


def stacked(name: str, updates: Sequence[LowRank]) -> tuple[Tensor, Tensor, float]:
    """Several low-rank updates of a tensor as one: every A below the other, every scale · B beside it.

    Args:
        name: of the tensor, for errors.

    Returns:
        A (R, in), B (out, R) and the scale.

    Raises:
        MergeError: a factor is not finite.
    """
    pairs = [(torch.from_numpy(a), torch.from_numpy(b), scale) for a, b, scale in updates]
    if not all(bool(torch.isfinite(factor).all()) for a, b, _ in pairs for factor in (a, b)):
        raise MergeError(f"'{name}': factors of its update are not finite. `graftlm doctor --deep` finds them.")
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _, _ in pairs]), torch.cat([scale * b for _, b, scale in pairs], dim=1), 1.0
