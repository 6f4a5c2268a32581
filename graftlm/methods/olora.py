"""O-LoRA: every stage learns in a subspace that is orthogonal to those of earlier stages.

    loss = L + λ₁ Σ_{t'<t} Σ |A_{t'} A_tᵀ| + λ₂ Σ ‖new factor‖₂

Paper:   Wang et al., O-LoRA, EMNLP Findings 2023, arXiv:2310.14152, Eq. 6-8; its released code.
Differs: the entry-wise absolute sum of the code; the paper writes a squared norm (``norm: squared``). Old pairs are folded
    into the LLM, which computes what their concatenation does, and are kept in the ledger, from where their A is read: no
    layer grows. A merging rule in the mix may rewrite A; then the new one counts. Published values: λ₁ 0.5, λ₂ 0, rank 8
    (their code); 0.05 (a port to LLaVA).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graftlm.core.errors import ConfigError, RunError
from graftlm.data.types import Batch, Output
from graftlm.learning.method import Context, Method

__all__ = ["OLoRA", "overlap"]


def overlap(old: Tensor, new: Tensor, norm: str = "abs") -> Tensor:
    """How much two subspaces share: Float (R', in), (R, in) -> ()."""
    product = old @ new.T
    return product.abs().sum() if norm == "abs" else product.square().sum()


@dataclass
class OLoRA(Method):
    """Penalise the overlap of A with the A of every stage before.

    Attributes:
        strength: λ₁.
        l2: λ₂, of the length of every new factor.
        norm: "abs" of the code, or "squared" of the paper.
    """

    adapter = "stage"
    strength: float = 0.5
    l2: float = 0.0
    norm: Literal["abs", "squared"] = "abs"
    _old: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("strength", self.strength), ("l2", self.l2)):
            if value < 0:
                raise ConfigError(f"{name}: {value}; a number from 0 is expected.")

    def idle(self, number: int) -> bool:
        """The first stage is free to go anywhere."""
        return self.l2 == 0 and (number == 1 or self.strength == 0)

    def prepare(self, ctx: Context) -> None:
        """The A of earlier stages, one under the other."""
        entries = ctx.model.adapter.ledger[max(0, len(ctx.model.adapter.ledger) - len(ctx.past)) :] if ctx.past else []
        found: dict[str, list[Tensor]] = {}
        for entry, name in itertools.chain.from_iterable(((e, n) for n in e.names()) for e in entries):
            if f"{name}.A" not in entry.tensors:
                raise RunError(
                    f"olora: the ledger has no factors of '{name}' for an earlier stage; LoRA stages are expected. Leave out "
                    f"rules that make dense updates, and set model.lora."
                )
            found.setdefault(name, []).append(entry.tensors[f"{name}.A"].to(ctx.model.device))
        self._old = {name: torch.cat(parts) for name, parts in found.items()}

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """Orthogonality, and length if asked for, while the LLM moves."""
        if not ctx.trains_llm:
            return {}
        factors = ctx.model.adapter.factors()
        terms = {}
        if self.strength and self._old:
            shared = [overlap(old, factors[name][0].float(), self.norm) for name, old in self._old.items()]
            terms["orthogonality"] = self.strength * torch.stack(shared).sum()
        if self.l2:
            lengths = [factor.float().norm() for a, b, _ in factors.values() for factor in (a, b)]
            terms["length"] = self.l2 * torch.stack(lengths).sum()
        return terms
