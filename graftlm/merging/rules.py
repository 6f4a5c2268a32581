"""Merging rules: (before, [after ...]) -> one tensor, one tensor at a time.

A rule is pure, computes in float32, returns before's dtype and does not depend on the order of the models. Its low-rank
form acts on an update scale · B A and must equal the dense form. A rule that looks at a whole model (TIES trims over
all weights) looks at the one tensor that it is given.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.core.errors import MergeError, did_you_mean
from graftlm.merging import spectral, tall, vectors
from graftlm.model.rule import Rule, keep_new

__all__ = ["Rule", "arithmetic", "average", "consensus", "dare", "ewf", "keep_new", "model_mix", "sac", "ties"]

Factors = tuple[Tensor, Tensor, float]


def _average(before: Tensor, after: Sequence[Tensor], *, weight: float = 1.0) -> Tensor:
    """The sum before + weight · (mean(after) - before); weights 0 and 1 return their operand bit by bit."""
    _check_share("average", weight)
    _check_after("average", before, after)
    mean = (vectors.total(after) / len(after)).float()
    return _toward(before, mean, weight)


def _average_factored(a: Tensor, b: Tensor, scale: float, *, weight: float = 1.0) -> Factors:
    """W + weight · s · B A: scaling the update averages the products, which averaging A and B apart does not."""
    _check_share("average", weight)
    return a, b, scale * weight


def _toward(before: Tensor, after: Tensor, weight: float) -> Tensor:
    """A share of the way from one to the other, from the nearer end: at 0 and 1 no bit is lost.

    Not torch.lerp: whether it rounds once or twice depends on the processor and on where in the tensor an entry is.
    """
    weight = torch.tensor(weight, dtype=torch.float32).item()
    change = after - before.float()
    result = before.float() + weight * change if weight < 0.5 else after - (1 - weight) * change
    return result.to(before.dtype)


def _check_share(rule: str, weight: float) -> None:
    if not 0 <= weight <= 1:
        raise MergeError(f"{rule}: weight {weight} is not a share; a number from 0 to 1 is expected (1/i for stage i).")


def _check_after(rule: str, before: Tensor, after: Sequence[Tensor]) -> None:
    if not after:
        raise MergeError(f"{rule}: no tensor after; at least 1 is expected. Name the models to merge.")
    vectors.check_same(rule, [before, *after])


def _check_one(rule: str, before: Tensor, after: Sequence[Tensor]) -> None:
    if len(after) != 1:
        raise MergeError(f"{rule}: {len(after)} tensors after; exactly 1 is expected. Use 'average' for several.")
    vectors.check_same(rule, [before, *after])


average = Rule(
    "average", _average, _average_factored, "Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.1"
)
"""Share ``weight`` of the new weights, the rest of the old: θ_i ← (1-w) θ_{i-1} + w θ_i.

With w = 1/i at every stage i, θ_i is the plain mean of what every stage made of the LLM. Of several models with w = 1 it
is their plain mean, NaiveMC.

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §4.1. NaiveMC: Chen et al., Model Composition for
    Multimodal Large Language Models, ACL 2024, arXiv:2402.12750, §3.1.
Differs: nothing. Effective weights are averaged, not LoRA factors (the paper leaves it open; NaiveMC's released
    script averages A and B apart, which is not the mean of the models).
"""


def _arithmetic(before: Tensor, after: Sequence[Tensor], *, scale: float = 0.3) -> Tensor:
    _check_after("arithmetic", before, after)
    return _add(before, _sum_update(vectors.task_vectors(before, after), scale=scale))


def _arithmetic_factored(a: Tensor, b: Tensor, update: float, /, *, scale: float = 0.3) -> Factors:
    _check_scale("arithmetic", scale)
    return a, b, update * scale


def _sum_update(taus: Sequence[Tensor], *, scale: float = 0.3) -> Tensor:
    _check_scale("arithmetic", scale)
    return scale * vectors.total(taus).float()


def _check_scale(rule: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise MergeError(f"{rule}: scale {scale} is not finite; a number such as 0.3 or 1 is expected.")


def _add(before: Tensor, update: Tensor) -> Tensor:
    return (before.float() + update).to(before.dtype)


arithmetic = Rule(
    "arithmetic", _arithmetic, _arithmetic_factored, "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023"
)
"""Add every model's task vector: θ = θ_pre + λ Σ τ_i, λ the ``scale``.

Paper:   Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089, §2.
Differs: nothing. λ is tuned on validation data by the authors; 0.3 is what they find for several tasks.
"""


def _ties(
    before: Tensor,
    after: Sequence[Tensor],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    merge: str = "mean",
    compat_reference: bool = False,
) -> Tensor:
    _check_after("ties", before, after)
    taus = vectors.task_vectors(before, after)
    return _add(
        before, _ties_update(taus, density=density, scale=scale, merge=merge, compat_reference=compat_reference)
    )


def _ties_update(
    taus: Sequence[Tensor],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    merge: str = "mean",
    compat_reference: bool = False,
) -> Tensor:
    _check_scale("ties", scale)
    return scale * vectors.ties(taus, density, merge, compat_reference)


ties = Rule("ties", _ties, None, "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708, §4.2")
"""Trim every task vector to its largest entries, elect a sign per entry, merge those that have it.

``density`` is K, the share kept; ``scale`` is λ; ``merge`` is "mean", "sum" or "max" of the agreeing entries.

Paper:   Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708, §4.2.
Differs: exactly floor(K n + 1/2) entries are kept, of equal ones the first; an entry whose sum is exactly 0 stays 0.
    `compat_reference` does as the released code: one entry more, and such an entry takes the majority's sign.
"""


def _mean_update(taus: Sequence[Tensor], *, weight: float = 1.0) -> Tensor:
    _check_share("average", weight)
    return weight * (vectors.total(taus) / len(taus)).float()


THEN: dict[str, Callable[..., Tensor]] = {"average": _mean_update, "arithmetic": _sum_update, "ties": _ties_update}
"""What DARE can be followed by: task vectors -> the update."""


def _dare(
    before: Tensor,
    after: Sequence[Tensor],
    *,
    drop: float = 0.9,
    seed: int = 0,
    then: str = "average",
    names: Sequence[str] | None = None,
    tensor: str = "",
    **settings: Any,
) -> Tensor:
    _check_after("dare", before, after)
    if then not in THEN:
        raise MergeError(f"dare: no rule '{then}' to follow; {did_you_mean(then, THEN)}")
    known = inspect.signature(THEN[then]).parameters.keys() - {"taus"}
    for name in settings.keys() - known:
        raise MergeError(f"dare: no setting '{name}' of '{then}'; {did_you_mean(name, known)}")
    if then == "ties":
        settings = {"density": 1.0} | settings  # dropping takes the place of trimming
    names = [str(i) for i in range(len(after))] if names is None else list(names)
    if len(names) != len(after) or len(set(names)) < len(names):
        raise MergeError(f"dare: names {names} for {len(after)} models; a name of its own for each is expected.")
    taus = [
        vectors.drop(tau, drop, vectors.key(seed, name, tensor))
        for name, tau in zip(names, vectors.task_vectors(before, after), strict=True)
    ]
    return _add(before, THEN[then](taus, **settings))


dare = Rule("dare", _dare, None, "Yu et al., Language Models are Super Mario, ICML 2024, arXiv:2311.03099, §3.1")
"""Drop a random share of every task vector, rescale the rest by 1/(1-p), and merge.

``drop`` is p; ``then`` is "average", "arithmetic" or "ties", and takes its settings from here too; TIES does not trim
unless a density is given, which changes something only below 1-p. The coins of a model
depend on ``seed``, on its name in ``names`` and on the name ``tensor``, not on the order of the models; without
names the models are called "0", "1", … .

Paper:   Yu et al., Language Models are Super Mario, ICML 2024, arXiv:2311.03099, §3.1.
Differs: nothing. The coins are a hash (`graftlm.merging.vectors.kept`), not a generator's, so that a model can be
    merged piece by piece. p is tuned by the authors; 0.9 is what they find harmless for fine-tuned models.
"""


def _model_mix(before: Tensor, after: Sequence[Tensor], *, alpha: float) -> Tensor:
    spectral.check_alpha("model_mix", alpha)
    _check_one("model_mix", before, after)
    return _toward(before, after[0].float(), alpha)


def _model_mix_factored(a: Tensor, b: Tensor, scale: float, *, alpha: float) -> Factors:
    spectral.check_alpha("model_mix", alpha)
    return a, b, scale * alpha


model_mix = Rule("model_mix", _model_mix, _model_mix_factored, "Liu et al., LLaVA-c, arXiv:2506.08666, §4.1, Eq. 4")
"""Share ``alpha`` of what one stage changed: θ̃_t = θ̃_{t-1} + α (θ_t - θ̃_{t-1}).

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §4.1, Eq. 4.
Differs: nothing. It is `average` of one model, under the paper's name.
"""


def _sac(before: Tensor, after: Sequence[Tensor], *, alpha: float = 0.2, window: str = "mean") -> Tensor:
    _check_one("sac", before, after)
    spectral.check_alpha("sac", alpha)
    if before.dim() < 2:
        return _model_mix(before, after, alpha=alpha)
    if _is_identity(alpha, window):
        return after[0].to(before.dtype, copy=True)
    update, _ = spectral.consolidate(after[0].float() - before.float(), alpha, window)
    return _add(before, update)


def _sac_factored(a: Tensor, b: Tensor, scale: float, *, alpha: float = 0.2, window: str = "mean") -> Factors:
    spectral.check_alpha("sac", alpha)
    if _is_identity(alpha, window):
        return a, b, scale
    new_a, new_b, new_scale = spectral.decompose(a, b, scale).update(alpha, window)
    return new_a.to(a.dtype), new_b.to(b.dtype), new_scale


def _is_identity(alpha: float, window: str) -> bool:
    """The window has one term, so no bit need change."""
    return alpha == 1 and window == "mean"


sac = Rule("sac", _sac, _sac_factored, "Liu et al., LLaVA-c, arXiv:2506.08666, §4.1, Algorithm 1")
"""One stage's update with its large singular values damped to about ``alpha``, its small ones kept.

``window`` is "mean", "eq6" or "alg1". A tensor of one dimension gets `model_mix`, one of more than two counts as
(out, rest). alpha = 1 changes nothing.

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §4.1, Eq. 5-7, Algorithm 1.
Differs: see `graftlm.merging.spectral`, which has the mathematics and reports the window and what was reached.
"""


def _ewf(before: Tensor, after: Sequence[Tensor], *, new: float, old: float) -> Tensor:
    return _average(before, after, weight=_ewf_weight(new, old))


def _ewf_factored(a: Tensor, b: Tensor, scale: float, *, new: float, old: float) -> Factors:
    return a, b, scale * _ewf_weight(new, old)


def _ewf_weight(new: float, old: float) -> float:
    if not (0 < new < math.inf and 0 <= old < math.inf):
        raise MergeError(
            f"ewf: {new} new and {old} old; at least one new class, task or sample is expected, and no negative number."
        )
    return math.sqrt(new / (new + old))


ewf = Rule("ewf", _ewf, _ewf_factored, "Xiao et al., Endpoints Weight Fusion, CVPR 2023")
"""Share β = sqrt(new / (new + old)) of the new weights: θ = (1-β) θ_old + β θ_new.

``new`` and ``old`` count what the stage brought and what was there: classes, tasks or samples.

Paper:   Xiao et al., Endpoints Weight Fusion for Class Incremental Semantic Segmentation, CVPR 2023, as released.
Differs: nothing in the fusion. Its distillation is not here; tasks or samples take the place of classes.
"""


def _consensus(
    before: Tensor,
    after: Sequence[Tensor],
    *,
    scale: float = 0.3,
    significance: float | Sequence[float] = 0.4,
    uses: int = 2,
    merge: str = "sum",
    density: float = 0.2,
) -> Tensor:
    _check_after("consensus", before, after)
    _check_scale("consensus", scale)
    if merge not in ("sum", "ties"):
        raise MergeError(f"consensus: merge '{merge}' is unknown; {did_you_mean(merge, ('sum', 'ties'))}")
    taus = vectors.task_vectors(before, after)
    merged = vectors.total(taus).float() if merge == "sum" else vectors.ties(taus, density, "sum")
    mask = tall.consensus_mask(tall.tall_masks(merged, taus, significance), uses)
    return _add(before, scale * (merged * mask))


consensus = Rule("consensus", _consensus, None, "Wang et al., Localizing Task Information, ICML 2024")
"""Keep the entries of the merged task vector that serve at least ``uses`` tasks, and scale them.

``merge`` is "sum" (task arithmetic) or "ties", trimmed to ``density`` and summed; ``significance`` is λ of the TALL
masks, one for all models or one each, in the models' order.

Paper:   Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024,
    arXiv:2405.07813, §4.
Differs: λ is a setting; the authors search it per task by validation accuracy. The scale too.
"""
