"""Distillation: how far a student is from its teacher, and the teacher, which is the student's own past.

    KL_T(p ‖ q) = T² Σ_v softmax(p/T) (log softmax(p/T) - log softmax(q/T))

Paper:   Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
Differs: nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graftlm.data.types import Batch
from graftlm.learning.method import Context

__all__ = ["connectors_before", "kl", "l2", "mse", "of_text", "soft_cross_entropy", "teacher", "text_mean"]

EPSILON = 1e-12
"""Below the root of a norm, whose gradient at zero is then zero."""


def l2(student: Tensor, before: Tensor) -> Tensor:
    """Euclidean distance per token: Float (..., D) -> (...), in float32."""
    return ((student.float() - before.float()).square().sum(-1) + EPSILON).sqrt()


def mse(student: Tensor, before: Tensor) -> Tensor:
    """Mean squared difference per token: Float (..., D) -> (...), in float32."""
    return (student.float() - before.float()).square().mean(-1)


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL_T(p ‖ q) of two sets of logits: Float (..., V) -> (...), in float32.

    ``kl(teacher, student)`` is the forward one, which distillation minimises; ``kl(student, teacher)`` the reverse.
    """
    log_p = torch.log_softmax(p.float() / temperature, -1)
    log_q = torch.log_softmax(q.float() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def soft_cross_entropy(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL_T without the entropy of p, which is constant where p is a teacher: Float (..., V) -> (...)."""
    log_q = torch.log_softmax(q.float() / temperature, -1)
    return -(temperature**2) * (torch.softmax(p.float() / temperature, -1) * log_q).sum(-1)


def text_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of each text, then over texts, so that a long text counts as much as a short one.

    Float (B, T), Bool (B, T) -> ().
    """
    return (torch.where(mask, values, 0).sum(1) / mask.sum(1)).mean()


def of_text(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """What belongs to the tokens of texts without media: Float (B, T, ...), and Bool (B, T), False at padding.

    Positions that an extension puts before a text are left out: teacher and student may have different ones.
    """
    return values[:, -batch.input_ids.shape[1] :], batch.attention_mask.to(values.device)


def connectors_before(ctx: Context) -> dict[str, Tensor]:
    """Parameters of the connectors that stages before have left, copied; to be called before anything moves."""
    return {
        name: parameter.detach().clone()
        for name, parameter in ctx.model.connectors.named_parameters()
        if name.split(".")[0] not in ctx.new
    }


@contextlib.contextmanager
def teacher(ctx: Context, connectors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside, the model is θ_{i-1}, without dropout and without gradients. There is no second LLM.

    Args:
        connectors: what `connectors_before` returned. Connectors that it lacks, such as those of a modality that no stage
            before knew, are the student's.
    """
    model, training = ctx.model, ctx.model.training
    swapped: list[tuple[torch.nn.Parameter, Tensor]] = []
    model.eval()
    try:
        with torch.no_grad(), model.adapter.previous():
            for name, before in (connectors or {}).items():
                parameter = model.connectors.get_parameter(name)
                swapped.append((parameter, parameter.data))
                parameter.data = before
            yield
    finally:
        for parameter, now in swapped:
            parameter.data = now
        model.train(training)
