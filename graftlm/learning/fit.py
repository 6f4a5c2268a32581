"""The only training loop: samples, a phase, and the parts that move."""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from graftlm.core import seeds
from graftlm.core.errors import DataError, RunError
from graftlm.data.types import IGNORE, Batch, Output, Phase, Sample
from graftlm.model import parts as model_parts
from graftlm.model.multimodal import MultimodalLM

__all__ = ["FitLog", "Progress", "autocast", "fit", "plan_batches", "steps_of"]

Progress = Callable[[str, int, int], None]
"""Called with the phase's name, samples done and samples in all."""

Term = Callable[[Batch, Output], Mapping[str, Tensor]]

POOL = 8
"""Batches are grouped by length within pools of this many: little padding, and still a random order."""


@dataclass(frozen=True)
class FitLog:
    """What a phase did and what it cost.

    Attributes:
        samples, tokens: processed in all epochs; tokens are positions inside the LLM, padding not counted.
        seconds, cpu_seconds: wall and processor time.
        peak_memory_bytes: of the device, or of the process on a CPU (its high-water mark so far).
        parameters: number of trained parameters.
    """

    phase: str
    steps: int
    samples: int
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    first_loss: float
    last_loss: float
    parameters: int

    def to_dict(self) -> dict[str, float | int | str]:
        """As JSON."""
        return asdict(self)


def steps_of(samples: int, phase: Phase) -> int:
    """Optimiser steps of a phase."""
    return phase.epochs * math.ceil(samples / phase.batch_size)


def plan_batches(samples: Sequence[Sample], batch_size: int, seed: int, epoch: int) -> list[list[Sample]]:
    """A seeded order of one epoch, samples of like length together.

    The length is counted in characters plus media items: it only has to sort.
    """
    rng = seeds.rng(seed, "order", epoch)
    order = rng.permutation(len(samples))
    length = [len(s.prompt) + len(s.answers[0]) + 64 * len(s.media) for s in samples]
    batches = []
    for start in range(0, len(order), batch_size * POOL):
        pool = sorted(order[start : start + batch_size * POOL], key=lambda i: length[i])
        batches += [[samples[i] for i in pool[k : k + batch_size]] for k in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def fit(
    model: MultimodalLM,
    samples: Sequence[Sample],
    phase: Phase,
    parts: frozenset[str],
    *,
    seed: int,
    terms: Sequence[Term] = (),
    wants: frozenset[str] = frozenset(),
    extend: Callable[[list[Sample]], list[Sample]] | None = None,
    after_epoch: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> FitLog:
    """Train the parts of the model on the samples.

    Args:
        parts: prefixes of parameter names; everything else is frozen and stays bit-identical.
        seed: of this phase; sets order and dropout.
        terms: extra losses beside cross-entropy, each a dict of named, weighted scalars.
        wants: "logits", "hidden": what the terms look at in `Output` beyond the answers.
        extend: makes of a batch what the optimiser step learns from; it may append samples.
        after_epoch: called when an epoch is over.

    Raises:
        DataError: there is nothing to train on.
        RunError: the loss is not finite; the last saved stage is untouched.
    """
    if not samples:
        raise DataError(
            f"phase {phase.name}: no samples. At least one is expected; check the data set and its filters."
        )
    parameters = model_parts.select(model, parts)
    if idle := [part for part in sorted(parts) if not any(_inside(name, part) for name in parameters)]:
        raise RunError(f"phase {phase.name}: no parameter belongs to {idle}. Check `trainable` of the phase.")
    model_parts.freeze_all(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(_groups(parameters, phase), weight_decay=phase.weight_decay)
    peaks = [group["lr"] for group in optimiser.param_groups]
    total = steps_of(len(samples), phase)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    start, cpu = time.perf_counter(), time.process_time()
    losses: list[float] = []
    tokens = done = 0
    model.train()
    with _seeded(seed, model.device):
        for epoch in range(phase.epochs):
            for batch in plan_batches(samples, phase.batch_size, seed, epoch):
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["lr"] = peak * _rate(len(losses), total, phase)
                rows = extend(batch) if extend else batch
                loss, positions = _step(model, rows, phase, terms, wants)
                if not math.isfinite(loss):
                    raise RunError(
                        f"phase {phase.name}, epoch {epoch + 1}, step {len(losses) + 1} of {total}: the loss is {loss}, a "
                        f"finite number was expected (samples {', '.join(s.id for s in batch[:4])} ...). The last saved "
                        f"stage is intact; lower the learning rate {dict(phase.lr)} or check these samples."
                    )
                norm = nn.utils.clip_grad_norm_(parameters.values(), phase.clip or math.inf)
                if not torch.isfinite(norm):
                    raise RunError(
                        f"phase {phase.name}, epoch {epoch + 1}, step {len(losses) + 1} of {total}: the gradient's norm is "
                        f"{norm.item()}, a finite number was expected. The last saved stage is intact; lower the learning "
                        f"rate {dict(phase.lr)}."
                    )
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                losses.append(loss)
                tokens += positions
                done += len(batch)
                if progress:
                    progress(phase.name, done, len(samples) * phase.epochs)
            if after_epoch:
                after_epoch()
    model.eval()
    model_parts.freeze_all(model)
    tail = losses[-max(1, len(losses) // 20) :]
    return FitLog(
        phase=phase.name,
        steps=len(losses),
        samples=done,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        peak_memory_bytes=_peak_memory(model.device),
        first_loss=losses[0],
        last_loss=sum(tail) / len(tail),
        parameters=sum(p.numel() for p in parameters.values()),
    )


def _step(
    model: MultimodalLM, samples: list[Sample], phase: Phase, terms: Sequence[Term], wants: frozenset[str]
) -> tuple[float, int]:
    """Gradients of one batch, in micro-batches whose sum is exactly the batch's mean over answer tokens."""
    size = math.ceil(len(samples) / phase.accumulate)
    batches = [model.batch(samples[i : i + size]) for i in range(0, len(samples), size)]
    answers = [int((batch.labels != IGNORE).sum()) for batch in batches]
    loss, positions = 0.0, 0
    for batch, count in zip(batches, answers, strict=True):
        with autocast(model):
            out: Output = model(batch, logits="logits" in wants, hidden="hidden" in wants)
            losses = {"answers": out.loss}
            for term in terms:
                extra = term(batch, out)
                if clash := losses.keys() & extra.keys():
                    raise RunError(
                        f"two loss terms are named {sorted(clash)}. Names must differ: they are logged apart."
                    )
                losses |= extra
            value = torch.stack([x.float() for x in losses.values()]).sum() * (count / sum(answers))
        value.backward()  # type: ignore[no-untyped-call]
        loss += value.item()
        positions += int(out.attention_mask.sum())
    return loss, positions


def _groups(parameters: Mapping[str, nn.Parameter], phase: Phase) -> list[dict[str, object]]:
    """Optimiser groups: one per learning rate, the longest matching prefix of `Phase.lr` decides."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        prefixes = [part for part in phase.lr if _inside(name, part)]
        if not prefixes:
            raise RunError(
                f"phase {phase.name}: '{name}' is trained but has no learning rate. lr names {sorted(phase.lr)}; add one "
                f"for '{name.split('.')[0]}'."
            )
        groups.setdefault(max(prefixes, key=len), []).append(parameter)
    return [{"params": members, "lr": phase.lr[part]} for part, members in groups.items()]


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _rate(step: int, total: int, phase: Phase) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to zero (or constant)."""
    warm = max(1, round(phase.warmup * total))
    rise = min(1.0, (step + 1) / warm)
    return rise * (0.5 * (1 + math.cos(math.pi * step / total)) if phase.schedule == "cosine" else 1.0)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from the phase's seed; the caller's global state is given back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def autocast(model: MultimodalLM) -> contextlib.AbstractContextManager[object]:
    """The working dtype of a model's forward passes while it is trained."""
    if model.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=model.dtype)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
