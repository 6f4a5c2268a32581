"""Adapter in adapter: a new expert beside every linear layer per stage, and small adapters inside the frozen older ones.

    y = W x + Σ_e gate_e(x) E_e(x)                  gate = softmax over all experts, per token; one expert has none
    E_e(x) = c_e up_e I_{m,e} down_e x              e < m: down, up and c frozen, I trained at stage m
    E_m(x) = c_m up_m down_m x                      trained

What stage m sees is a path: the experts up to m, and the in-adapters and the gate of stage m.

Paper:   Yu et al., LLMs Can Evolve Continually on Modality for X-Modal Reasoning (PathWeave), NeurIPS 2024, arXiv:2410.20178;
    in the LLM: Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §5.1.
Differs: see `methods.pathweave`.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import RunError
from graftlm.data.types import TEXT, Modality
from graftlm.model.experts import (
    Blend,
    ExtensionAdapter,
    Layer,
    LinearExperts,
    Stacked,
    apart,
    drawn,
    frozen,
    gated,
    linear_layers,
    shapes_of,
    uniform,
)
from graftlm.model.fusion import Fused
from graftlm.model.specs import LoraSpec

if TYPE_CHECKING:
    from graftlm.model.multimodal import MultimodalLM

__all__ = ["Expert", "InAdapter", "Passage", "WeaveLayer", "WeaveSpec", "WovenExperts", "open_weave"]


@dataclass(frozen=True)
class WeaveSpec:
    """What experts, in-adapters and gates are like.

    Attributes:
        rank: of every expert, b.
        alpha: each c_e starts at alpha / rank; None is at 1.
        in_adapter: "linear" b -> b, or "mlp" b -> 2b -> 2b -> b.
        noise: train gates with noise on their logits.
        switch_paths: positions of a modality take the path of its own stage, not the newest.
        learn_scale: whether c_e is trained.
    """

    rank: int = 128
    alpha: float | None = None
    in_adapter: Literal["linear", "mlp"] = "linear"
    noise: bool = False
    switch_paths: bool = False
    learn_scale: bool = True


class Expert(nn.Module):
    """down (b, in), drawn as the A of a LoRA; up (out, b), zero at the start; scale, one number."""

    def __init__(self, width: int, out: int, spec: WeaveSpec, seed: int | None, path: str) -> None:
        super().__init__()
        self.down = drawn((spec.rank, width), seed, "lora", f"{path}.weight")
        self.up = frozen(torch.zeros(out, spec.rank))
        self.scale = frozen(torch.tensor(1.0 if spec.alpha is None else spec.alpha / spec.rank))


class InAdapter(nn.Module):
    """The adapters inside of ``count`` older experts, of one stage.

    Attributes:
        weights, biases: of every linear layer, Float (count, out, in) and (count, out); drawn as `nn.Linear` is.
    """

    def __init__(self, count: int, spec: WeaveSpec, seed: int | None, path: str) -> None:
        super().__init__()
        b = spec.rank
        widths = [b, b] if spec.in_adapter == "linear" else [b, 2 * b, 2 * b, b]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for step, (before, after) in enumerate(itertools.pairwise(widths)):
            self.weights.append(drawn((count, after, before), seed, "inner", path, step))
            self.biases.append(uniform((count, after), before, seed, "inner", path, step, "bias"))

    def forward(self, low: Tensor) -> Tensor:
        """Float (..., count, b) -> the same shape."""
        return inner(low, list(self.weights), list(self.biases))


def inner(low: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Each expert's own layers: Float (..., E, b) -> the same shape; ReLU between them, of several a sigmoid at the end."""
    for step, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        low = torch.einsum("...eb,ecb->...ec", low, weight) + bias
        if len(weights) > 1:
            low = low.relu() if step < len(weights) - 1 else low.sigmoid()
    return low


class Passage(nn.Module):
    """What stage m > 1 adds to the experts up to m: in-adapters of the older ones, and a gate, Float (m, in), zero at first.

    Attributes:
        noise: Float (m, in), which scales the gate's noise in training; None without.
    """

    def __init__(self, number: int, width: int, spec: WeaveSpec, seed: int | None, path: str) -> None:
        super().__init__()
        self.inner = InAdapter(number - 1, spec, seed, path)
        self.gate = frozen(torch.zeros(number, width))
        self.noise = frozen(torch.zeros(number, width)) if spec.noise else None

    def shares(self, x: Tensor, *, noisy: bool) -> Tensor:
        """Of each expert at each position: Float (..., in) -> (..., m)."""
        logits = F.linear(x, self.gate)
        if noisy and self.noise is not None:
            logits = logits + torch.randn_like(logits) * (F.softplus(F.linear(x, self.noise)) + 1e-2)
        return gated(logits)


class WeaveLayer(Layer):
    """Beside one linear layer.

    Attributes:
        experts: one per stage.
        passages: by the number of the stage; the first has none, and those that nothing can take are gone.
    """

    def __init__(self, width: int, out: int, path: str) -> None:
        super().__init__()
        self._shape, self._path = (width, out), path
        self.experts = nn.ModuleList()
        self.passages = nn.ModuleDict()

    def grow(self, spec: WeaveSpec, seed: int | None = None) -> None:
        """One more expert, and the passage of its stage; without a seed, to be loaded."""
        self.experts.append(Expert(*self._shape, spec, seed, self._path))
        if (number := len(self.experts)) > 1:
            self.passages[str(number)] = Passage(number, self._shape[0], spec, seed, self._path)

    def shrink(self) -> None:
        """Take the newest out."""
        number = len(self.experts)
        if str(number) in self.passages:
            del self.passages[str(number)]
        del self.experts[-1]

    def added(self, x: Tensor, path: int, *, trains: bool) -> Tensor:
        """See `Layer.added`. Frozen experts stand apart: their weights would take a gradient's product for nothing."""
        *old, new = self._experts(path)
        x = x.to(new.down.dtype)
        low = F.linear(x, new.down)
        if not old:
            return F.linear(low, new.up) * new.scale
        passage = self._passage(path)
        shares = passage.shares(x, noisy=trains)
        older = apart(F.linear(x, torch.cat([each.down for each in old])), len(old))
        scales = torch.stack([each.scale for each in old])
        older = passage.inner(older) * (shares[..., :-1] * scales).unsqueeze(-1)
        out = F.linear(older.flatten(-2), torch.cat([each.up for each in old], 1))
        return out + F.linear(low * (shares[..., -1:] * new.scale), new.up)

    def stacked(self, path: int, dtype: torch.dtype) -> Stacked:
        """See `Layer.stacked`; linear in-adapters go into what stands before them: I (down x) + bias = (I down) x + bias."""
        experts = self._experts(path)
        up = torch.cat([each.up * each.scale for each in experts], 1).to(dtype)
        downs: list[Tensor] = [each.down for each in experts]
        if path == 1:
            return Stacked(downs[0].to(dtype), up, 1)
        passage = self._passage(path)
        weights, biases = list(passage.inner.weights), list(passage.inner.biases)
        if len(weights) > 1:
            held, added = ([each.to(dtype) for each in values] for values in (weights, biases))

            def through(low: Tensor) -> Tensor:
                return torch.cat([inner(low[..., :-1, :], held, added), low[..., -1:, :]], -2)

            return Stacked(torch.cat([*downs, passage.gate]).to(dtype), up, path, inner=through)
        folded = (weights[0] @ torch.stack(downs[:-1])).flatten(0, 1)
        bias = F.pad(biases[0].flatten(), (0, len(downs[-1]) + path))
        return Stacked(torch.cat([folded, downs[-1], passage.gate]).to(dtype), up, path, bias.to(dtype))

    def of_path(self, path: int) -> Iterator[nn.Parameter]:
        """See `Layer.of_path`."""
        for expert in self._experts(path):
            yield from expert.parameters()
        if path > 1:
            yield from self._passage(path).parameters()

    def _experts(self, path: int) -> list[Expert]:
        return [each for each in self.experts[:path] if isinstance(each, Expert)]

    def _passage(self, path: int) -> Passage:
        found = self.passages[str(path)]
        assert isinstance(found, Passage)
        return found


class WovenExperts(LinearExperts[WeaveLayer]):
    """The experts of PathWeave.

    Attributes:
        stages: number of the path of each modality's own stage, 0 where it has no experts; the newest for one that is not
            named.
    """

    kind = "pathweave"

    def __init__(self, shapes: Mapping[str, tuple[int, int]], spec: WeaveSpec) -> None:
        super().__init__({path: WeaveLayer(*shape, path) for path, shape in shapes.items()})
        self.spec = spec
        self.stages: dict[Modality, int] = {}
        self._former: dict[Modality, int] = {}
        self._groups: list[tuple[int, Tensor | None]] | None = None
        self._shape: tuple[int, ...] = ()

    def settings(self) -> dict[str, Any]:
        """See `Extension.settings`."""
        layer = self._any()
        return {
            **asdict(self.spec),
            "experts": len(layer.experts),
            "passages": sorted(int(number) for number in layer.passages),
            "stages": dict(self.stages),
            "layers": [path for path, _ in self.named_layers()],
        }

    @classmethod
    def build(cls, model: "MultimodalLM", settings: Mapping[str, Any]) -> Self:
        """See `Extension.build`."""
        values = dict(settings)
        count, passages, stages, layers = (values.pop(key) for key in ("experts", "passages", "stages", "layers"))
        found = cls(shapes_of(model.llm, layers), WeaveSpec(**values))
        for _, layer in found.named_layers():
            for _ in range(count):
                layer.grow(found.spec)
        found.stages = {str(modality): int(number) for modality, number in stages.items()}
        found._prune(passages)
        return found

    @property
    def newest(self) -> int:
        """See `LinearExperts.newest`."""
        return len(self._any().experts)

    @property
    def path(self) -> int:
        """See `LinearExperts.path`."""
        return self.newest - 1 if self._in_previous else self.newest

    # --- paths --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def over(self, fused: Fused) -> Iterator[None]:
        """See `Extension.over`; with switched paths, tokens that are decoded take the path of their row's text."""
        if not self.spec.switch_paths:
            with super().over(fused):
                yield
            return
        table = self._table()
        own = table[fused.modality_ids.cpu()]
        newest = own.amax(1, keepdim=True)
        rows = torch.where(newest < 0, self.path, newest)  # rows of text alone
        numbers = torch.where(own < 0, rows, own)
        hook = self.model.llm.register_forward_hook(lambda *_: self._take(rows, fused.embeds.device))
        try:
            self._take(numbers, fused.embeds.device)
            with self.ready({*numbers.flatten().tolist(), *rows.flatten().tolist()}):
                yield
        finally:
            hook.remove()
            self._groups = None

    def _table(self) -> Tensor:
        """Path of every id; -1 of text."""
        table = [-1]
        stages = self._former if self._in_previous and self.is_open else self.stages
        for modality in self.model.modality_index:
            if modality != TEXT:
                table.append(min(stages.get(modality, self.path), self.path))
        return torch.tensor(table)

    def _take(self, numbers: Tensor, device: torch.device) -> None:
        """The path of every position, Int (B, S) or (B, 1), in the passes that come now."""
        found = sorted(set(numbers.flatten().tolist()))
        flat = numbers.flatten()
        self._shape = tuple(numbers.shape)
        self._groups = [
            (number, None if len(found) == 1 else (flat == number).nonzero()[:, 0].to(device)) for number in found
        ]

    def _beside(self, layer: WeaveLayer, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._groups is None:
            return super()._beside(layer, module, inputs, output)
        if self._groups[0][1] is None:
            return self.add(layer, self._groups[0][0], inputs[0], output)
        if tuple(inputs[0].shape[:2]) != self._shape:
            raise RunError(
                f"a layer with experts sees a tensor of {tuple(inputs[0].shape)}, but the paths of {self._shape} positions are "
                f"known; layers that see every position in order are expected. Leave switch_paths out for this LLM."
            )
        x, out = inputs[0].flatten(0, 1), output.flatten(0, 1)
        parts = [self.add(layer, number, x[rows], out[rows]) for number, rows in self._groups]
        places = torch.cat([rows for _, rows in self._groups if rows is not None])
        return torch.cat(parts)[places.argsort()].view_as(output)

    # --- a stage ------------------------------------------------------------------------------------------------------

    def begin(self, modalities: Iterable[Modality], known: Iterable[Modality], seed: int) -> None:
        """Open a stage: one more expert.

        Args:
            modalities: of the stage; its path becomes theirs.
            known: all of the model; the path until now becomes that of those without one.
            seed: what is drawn depends on it and on names alone.
        """
        self.forget()
        self._former = dict(self.stages)
        before = self.newest
        self.stages = dict.fromkeys(known, before) | self.stages | dict.fromkeys(modalities, before + 1)
        for path, layer in self.named_layers():
            layer.grow(self.spec, seed)
            layer.to(self.model.llm.get_submodule(path).get_parameter("weight").device).train(self.training)
        self.is_open = True

    def trained(self) -> dict[str, nn.Parameter]:
        """See `LinearExperts.trained`."""
        found: dict[str, nn.Parameter] = {}
        number = self.newest
        for path, layer in self.named_layers():
            for name, parameter in layer.experts[-1].named_parameters():
                if name != "scale" or self.spec.learn_scale:
                    found[f"{path}.experts.{number}.{name}"] = parameter
            if number > 1:
                for name, parameter in layer.passages[str(number)].named_parameters():
                    found[f"{path}.passages.{number}.{name}"] = parameter
        return found

    def blend(self, weight: float, on: Blend) -> None:
        """Of the first stage, whose one expert is an update of the weights.

        Raises:
            RunError: a gate stands between the stages, or factors of a new expert are asked for.
        """
        if self.newest > 1 or on == "factors":
            raise RunError(
                f"blend on {on}: experts of {self.newest} stages; one fresh expert without a gate, on its delta, is expected: "
                f"else no weights lie between two stages. Leave the ingredient that blends out."
            )
        for _, layer in self.named_layers():
            layer.experts[-1].get_parameter("up").mul_(weight)

    def close(self) -> None:
        """See `LinearExperts.close`; passages that no position can take any more are dropped."""
        super().close()
        if not self.spec.switch_paths:
            self._prune({self.newest})

    def undo(self) -> bool:
        """See `LinearExperts.undo`."""
        for _, layer in self.named_layers():
            layer.shrink()
        self.stages = self._former
        return self.newest > 0

    def _prune(self, kept: Iterable[int]) -> None:
        for _, layer in self.named_layers():
            for number in {*layer.passages} - {str(each) for each in kept}:
                del layer.passages[number]

    def _any(self) -> WeaveLayer:
        return next(layer for _, layer in self.named_layers())


def open_weave(
    model: "MultimodalLM", modalities: Iterable[Modality], spec: WeaveSpec, *, seed: int = 0
) -> ExtensionAdapter:
    """Make an LLM plastic by one more expert of PathWeave beside each of its linear layers.

    Args:
        model: its adapter is not replaced, the result is to be put there.
        modalities: of the stage.
        seed: what is drawn depends on it and on names alone; the first expert's down is the A of a LoRA stage.

    Raises:
        RunError: a stage is open, or the model has another extension, or experts of another kind.
        ConfigError: the LoRA's targets match no layer.
    """
    if model.extension is None:
        model.extend(WovenExperts(linear_layers(model.llm, (model.spec.lora or LoraSpec()).targets), spec))
    found = model.extension
    if not isinstance(found, WovenExperts) or found.spec != spec:
        have = asdict(found.spec) if isinstance(found, WovenExperts) else "other modules"
        raise RunError(
            f"pathweave: the model has an extension '{found.kind if found else None}' of {have}, but {asdict(spec)} is asked "
            f"for; the same is expected at every stage. Start from a model without it."
        )
    adapter = ExtensionAdapter(model, found)
    found.begin(modalities, model.specs, seed)
    return adapter
