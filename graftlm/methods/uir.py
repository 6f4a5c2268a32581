"""Unsupervised inquiry regularisation (UIR): keep what the LLM makes of plain questions.

    loss = L + λ mean over x, mean over its tokens of ‖h[f_θt(x)] - h[f_θ(t-1)(x)]‖₂      x: text without pictures or answers

h is what enters the LM head.

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §3.2, Eq. 8; variants: its ablations.
Differs: the norm is of each token, so that a text's length does not count (the paper leaves it open; ``norm: mse`` is what
    its §5.2 calls it). There are as many inquiries as rows in the micro-batch, from a loop of their own (open too). ``fkl``
    has temperature 1 (open) and the same mean over tokens. The phase that only aligns a connector has no such term: an LLM
    that is frozen cannot drift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, DataError
from graftlm.data.inquiries import read as read_inquiries
from graftlm.data.types import Batch, Output, Sample, Stream
from graftlm.learning.distill import kl, l2, mse, of_text, teacher, text_mean
from graftlm.learning.method import Context, Method

__all__ = ["UIR"]

POOL = 8
"""Inquiries are grouped by length within so many batches of them: padding costs as much as text."""


@dataclass
class UIR(Method):
    """Hold the LLM, on inquiries, to the model before the stage.

    Attributes:
        strength: λ.
        norm: per token, Euclidean "l2" or "mse", of the variant "hidden".
        variant: what is held: "hidden" states; "fkl", the next-token distribution, by forward KL; or "replay", where inquiries
            are learned with their answers, by cross-entropy, as part of the batch.
        inquiries: a JSON file of texts or LLaVA conversations, see `data.inquiries`; None are those of the stream.
        batch_size: inquiries per micro-batch; None is as many as it has rows.
    """

    reads = frozenset({"inquiries"})
    strength: float = 1.0
    norm: Literal["l2", "mse"] = "l2"
    variant: Literal["hidden", "fkl", "replay"] = "hidden"
    inquiries: str | None = None
    batch_size: int | None = None
    _texts: tuple[Sample, ...] = field(default=(), init=False, repr=False, compare=False)
    _queue: list[list[Sample]] = field(default_factory=list, init=False, repr=False, compare=False)
    _rng: np.random.Generator = field(default_factory=np.random.default_rng, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ConfigError(f"strength: {self.strength}; a number from 0 is expected (1 in the paper, 0 is off).")
        if self.variant == "replay" and self.strength not in (0, 1):
            raise ConfigError(
                f"strength: {self.strength}, but replayed inquiries are rows like any other; 1, or 0 for none, is expected. "
                f"Their number is batch_size."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size}; at least 1 is expected.")

    def files(self) -> list[Path]:
        """The inquiries, if they are not the stream's."""
        return [] if self.inquiries is None else [Path(self.inquiries)]

    def idle(self, number: int) -> bool:
        """Without strength; the first stage, too, can spoil what the LLM knows."""
        return self.strength == 0

    def check(self, stream: Stream) -> None:
        """There must be inquiries, for replay with answers."""
        if not self.idle(1):
            self._read(stream.inquiries)

    def prepare(self, ctx: Context) -> None:
        """Start the loop over inquiries."""
        if self.idle(ctx.number):
            return
        self._texts = self._read(ctx.inquiries)
        self._queue = []
        self._rng = seeds.rng(ctx.seed, ctx.stage.name, "inquiries")

    def batch(self, ctx: Context, samples: list[Sample]) -> list[Sample]:
        """Of the variant "replay": inquiries with their answers join the batch."""
        if self.variant != "replay" or self.idle(ctx.number) or not ctx.trains_llm:
            return samples
        several = 1 if ctx.phase is None else ctx.phase.accumulate
        return samples + self._draw(self.batch_size * several if self.batch_size else len(samples))

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """λ times the distance on the next inquiries, while the LLM moves."""
        if self.variant == "replay" or self.idle(ctx.number) or not ctx.trains_llm:
            return {}
        texts = ctx.model.batch(self._draw(self.batch_size or len(batch.input_ids)), answers=False)
        with teacher(ctx):
            before, mask = of_text(self._look(ctx, texts), texts)
        now, _ = of_text(self._look(ctx, texts), texts)
        return {"uir": self.strength * text_mean(self._distances(before, now), mask)}

    def _look(self, ctx: Context, texts: Batch) -> Tensor:
        out = ctx.forward(texts, logits=self.variant == "fkl", hidden=self.variant == "hidden")
        looked = out.logits if self.variant == "fkl" else out.hidden
        assert looked is not None
        return looked

    def _distances(self, before: Tensor, now: Tensor) -> Tensor:
        if self.variant == "fkl":
            return kl(before, now)
        return l2(now, before) if self.norm == "l2" else mse(now, before)

    def _draw(self, count: int) -> list[Sample]:
        """The next inquiries, most of like length: each once per round, every round in another order."""
        drawn: list[Sample] = []
        while (missing := count - len(drawn)) > 0:
            self._queue = self._queue or self._round(count)
            next_ones = self._queue.pop()
            drawn += next_ones[:missing]
            if next_ones[missing:]:  # at the end of the round, so that whole groups stay together until then
                self._queue.insert(0, next_ones[missing:])
        return drawn

    def _round(self, count: int) -> list[list[Sample]]:
        order = [self._texts[i] for i in self._rng.permutation(len(self._texts))]
        pools = [order[start : start + count * POOL] for start in range(0, len(order), count * POOL)]
        sorted_pools = [sorted(pool, key=lambda text: len(text.prompt)) for pool in pools]
        groups = [pool[k : k + count] for pool in sorted_pools for k in range(0, len(pool), count)]
        return [groups[i] for i in self._rng.permutation(len(groups))]

    def _read(self, given: Sequence[Sample]) -> tuple[Sample, ...]:
        found = tuple(given) if self.inquiries is None else read_inquiries(Path(self.inquiries))
        if not found:
            raise DataError(
                "uir: the stream has no inquiries; texts without labels are expected. Name a JSON file of them in `inquiries`."
            )
        if self.variant == "replay" and (silent := [s.id for s in found if not (s.answers and s.answers[0].strip())]):
            raise DataError(
                f"uir: {len(silent)} of {len(found)} inquiries have no answer (first: {silent[0]}), and the variant 'replay' "
                f"learns answers. Use variant: hidden, or inquiries with answers."
            )
        return found
