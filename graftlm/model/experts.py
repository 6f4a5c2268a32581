"""Experts beside the LLM's linear layers, which stay frozen: what their kinds have in common, and the stage that trains them.

    y = W x + U (g(x) ⊙ D x)        D (K b, in) and U (out, K b): K experts of rank b, stacked; g: a gate per expert and token

Layers keep their modules: what experts add comes from a hook after the layer, so that weights, names and the ledger of the
LLM are those without experts. Where no gradient is taken, all of a layer's experts cost two products.
"""

import abc
import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from graftlm.core import seeds
from graftlm.core.errors import CheckpointError, ConfigError, RunError
from graftlm.model.adapters import StageAdapter
from graftlm.model.extension import Extension
from graftlm.model.fusion import Fused
from graftlm.model.rule import Rule, keep_new

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graftlm.model.multimodal import MultimodalLM

__all__ = [
    "Blend",
    "ExtensionAdapter",
    "Layer",
    "LinearExperts",
    "Stacked",
    "apart",
    "drawn",
    "frozen",
    "gated",
    "linear_layers",
    "shapes_of",
    "uniform",
]

Blend = Literal["delta", "factors"]

Shape = tuple[int, int]
"""Widths of a linear layer: in, out."""


class Stacked:
    """The experts of one layer as two matrices, for passes without gradients.

    Args:
        down: of the experts one below the other, then the gate's row of each, Float (K b + K, in); of one expert without gate.
        up: side by side, their scales in them, Float (out, K b).
        bias: of ``down``'s rows, in the LLM's dtype too.
        inner: between the two, Float (..., K, b) -> the same shape.
    """

    def __init__(
        self, down: Tensor, up: Tensor, experts: int, bias: Tensor | None = None,
        inner: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.down, self.bias, self.inner, self.experts = down, bias, inner, experts
        self.up = up.t().contiguous()  # a wide and flat product is read row by row

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """What the layer computed, Float (..., out), and what its experts add to that for Float (..., in)."""
        low = F.linear(x.to(self.down.dtype), self.down, self.bias)
        if self.experts > 1:
            low, logits = low[..., : -self.experts], low[..., -self.experts :]
            low = apart(low, self.experts)
            low = low if self.inner is None else self.inner(low)
            low = (low * gated(logits).to(low.dtype).unsqueeze(-1)).flatten(-2)
        if low.dtype != out.dtype:
            return out + (low @ self.up).to(out.dtype)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.up).view_as(out)


class Layer(nn.Module, abc.ABC):
    """The experts beside one linear layer. A path is a way through them; 1 is the first."""

    @abc.abstractmethod
    def added(self, x: Tensor, path: int, *, trains: bool) -> Tensor:
        """What they add to the layer's output, differentiable: Float (..., in) -> (..., out).

        Args:
            trains: the path learns now, so that dropout and noise act.
        """

    @abc.abstractmethod
    def stacked(self, path: int, dtype: torch.dtype) -> Stacked:
        """The same without gradients."""

    @abc.abstractmethod
    def of_path(self, path: int) -> Iterator[nn.Parameter]:
        """What a path is computed from."""


L = TypeVar("L", bound=Layer)


class LinearExperts(Extension, Generic[L]):
    """Experts beside linear layers of the LLM.

    Args:
        layers: by the layer's path in the LLM.

    Attributes:
        layers: by that path, "/" for ".".
    """

    def __init__(self, layers: Mapping[str, L]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({path.replace(".", "/"): layer for path, layer in layers.items()})
        self._held: dict[int, dict[Layer, Stacked]] = {}
        self._stamps: dict[int, int] = {}
        self._static: frozenset[int] = frozenset()
        self._handles: list[RemovableHandle] = []
        self._in_previous = False
        self.is_open = False

    @property
    @abc.abstractmethod
    def newest(self) -> int:
        """Number of the newest path; while a stage is open, of the one that learns. 0 is none."""

    @property
    def path(self) -> int:
        """Number of the path that positions take, if nothing says otherwise; 0 adds nothing."""
        return self.newest

    def named_layers(self) -> Iterator[tuple[str, L]]:
        """Path in the LLM, and the experts there."""
        for name, layer in self.layers.items():
            yield name.replace("/", "."), layer  # type: ignore[misc]

    def attach(self, model: "MultimodalLM") -> None:
        """See `Extension.attach`.

        Raises:
            RunError: a stage is open, whose layers are gone after it.
        """
        if model.adapter.is_open:
            raise RunError(
                "extend: a stage is open; a folded model is expected. Call model.adapter.fold() or drop() first."
            )
        super().attach(model)
        for path, layer in self.named_layers():
            module = model.llm.get_submodule(path)
            self._handles.append(module.register_forward_hook(partial(self._beside, layer)))

    def detach(self, model: "MultimodalLM") -> None:
        """See `Extension.detach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()
        super().detach(model)

    @contextlib.contextmanager
    def over(self, fused: Fused) -> Iterator[None]:
        """See `Extension.over`."""
        with self.ready({self.path}):
            yield

    @contextlib.contextmanager
    def ready(self, paths: set[int]) -> Iterator[None]:
        """Inside, where no gradients are taken, these paths are computed from stacked experts.

        Stacks are held until parameters change, so memory has the experts once more in the LLM's dtype.
        """
        if not torch.is_grad_enabled() and (self._in_previous or not self.training):
            for path in paths - {0}:
                self._stack(path)
            self._static = frozenset(paths)
        try:
            yield
        finally:
            self._static = frozenset()

    @torch.no_grad()
    def _stack(self, path: int) -> None:
        changes = self.is_open and path == self.newest
        parameters = (p for _, layer in self.named_layers() for p in layer.of_path(path))
        stamp = hash(tuple((p.data_ptr(), p._version) for p in parameters))
        if changes or self._stamps.get(path) != stamp:
            dtype = self.model.dtype
            self._held[path] = {layer: layer.stacked(path, dtype) for _, layer in self.named_layers()}
            self._stamps[path] = stamp

    def forget(self) -> None:
        """Drop what `ready` holds."""
        self._held, self._stamps, self._static = {}, {}, frozenset()

    def _beside(self, layer: L, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.add(layer, self.path, inputs[0], output)

    def add(self, layer: L, path: int, x: Tensor, out: Tensor) -> Tensor:
        """A layer's output with what a path adds."""
        if path == 0:
            return out
        if path in self._static:
            return self._held[path][layer](x, out)
        learns = self.training and self.is_open and not self._in_previous and path == self.newest
        return out + layer.added(x, path, trains=learns).to(out.dtype)

    # --- a stage ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """What the open stage moves, by name inside the LLM."""

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """Inside, the experts are those of θ_{i-1}."""
        self._in_previous = True
        try:
            yield
        finally:
            self._in_previous = False

    @abc.abstractmethod
    def blend(self, weight: float, on: Blend) -> None:
        """See `StageAdapter.blend`."""

    def close(self) -> None:
        """The open stage is over: what it learned stays, frozen."""
        self.is_open = False
        self.requires_grad_(False)
        self.forget()

    @abc.abstractmethod
    def undo(self) -> bool:
        """Forget the open stage; False when no expert is left."""


class ExtensionAdapter(StageAdapter):
    """A stage that experts learn; folding it leaves them in the model, and the ledger as it was.

    Args:
        model: the experts are its extension, opened; its adapter is not replaced, this is to be put there.
    """

    def __init__(self, model: "MultimodalLM", experts: LinearExperts[Any]) -> None:
        super().__init__(model.llm, model.spec.lora, model.folder, model.dtype)
        self._model = model
        self._experts = experts
        self._former = model.adapter
        self.ledger, self._base = self._former.ledger, self._former._base

    @property
    def is_open(self) -> bool:
        """Until it is folded or dropped, when the model has its former adapter again."""
        return self._experts.is_open

    def open(self, seed: int, *, resume: bool = False) -> None:
        """Refuse: it is open.

        Raises:
            RunError: always.
        """
        self._expect_closed("open")

    def parameters(self) -> dict[str, nn.Parameter]:
        """See `StageAdapter.parameters`: "llm.<layer>. ..."."""
        return {f"llm.{name}": parameter for name, parameter in self._experts.trained().items()} if self.is_open else {}

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """See `StageAdapter.previous`: with the experts, gates and in-adapters of the stage before."""
        if not self.is_open or self._in_previous:
            yield
            return
        self._in_previous = True
        try:
            with self._experts.previous():
                yield
        finally:
            self._in_previous = False

    @torch.no_grad()
    def blend(self, weight: float, *, on: Blend = "delta") -> None:
        """See `StageAdapter.blend`.

        Raises:
            RunError: no stage is open, or there is no such blend of its experts.
        """
        self._check("blend")
        self._experts.blend(weight, on)

    def fold(self, rule: Rule = keep_new, **settings: float) -> None:
        """The experts stay in the model, frozen; it has its former adapter again.

        Raises:
            RunError: no stage is open, or the rule would merge weights, of which the stage changed none.
        """
        self._check("fold")
        if rule is not keep_new:
            raise RunError(
                f"fold: rule '{rule.name}', but the stage was learned by experts beside the LLM ('{self._experts.kind}'), whose "
                f"weights are what they were; experts are kept as they are. Leave the rule out."
            )
        self._experts.close()
        self._model.adapter = self._former

    def drop(self) -> None:
        """See `StageAdapter.drop`."""
        if not self.is_open:
            return
        remain = self._experts.undo()
        self._experts.close()
        self._model.adapter = self._former
        if not remain:
            self._model.extend(None)

    def _check(self, verb: str) -> None:
        if not self.is_open or self._in_previous:
            state = "the LLM is θ_{i-1} inside previous()" if self.is_open else "the stage is closed"
            raise RunError(
                f"{verb}: {state}; an open stage is expected. Use the model's adapter, outside of previous()."
            )

    def _expect_closed(self, verb: str) -> None:
        if self.is_open:
            raise RunError(
                f"{verb}: a stage is open; none is expected. Call fold() or drop() first, and use the model's adapter after."
            )


def linear_layers(llm: "PreTrainedModel", targets: str | Sequence[str]) -> dict[str, Shape]:
    """Layers that experts can stand beside, by path in the LLM: those that a LoRA of these targets would have.

    Args:
        targets: "all-linear" is all but the head; else a pattern of whole paths, or endings of paths.

    Raises:
        ConfigError: there is none.
    """
    head = llm.get_output_embeddings()  # type: ignore[no-untyped-call]
    everything = {path: m for path, m in llm.named_modules() if isinstance(m, nn.Linear) and m is not head}
    found = {path: (m.in_features, m.out_features) for path, m in everything.items() if _targeted(path, targets)}
    if not found:
        raise ConfigError(
            f"lora.targets: {targets!r} names none of this LLM's {len(everything)} linear layers. Try 'all-linear'."
        )
    return found


def _targeted(path: str, targets: str | Sequence[str]) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def shapes_of(llm: nn.Module, paths: Sequence[str]) -> dict[str, Shape]:
    """The widths of these layers.

    Raises:
        CheckpointError: the LLM has no such linear layer.
    """
    modules = dict(llm.named_modules())
    found: dict[str, Shape] = {}
    for path in paths:
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise CheckpointError(
                f"extension: '{path}' is no linear layer of this LLM, but experts stand beside it. Load it on its own base."
            )
        found[path] = (module.in_features, module.out_features)
    return found


def drawn(shape: tuple[int, ...], seed: int | None, *name: str | int) -> nn.Parameter:
    """The start of a linear layer's weight, or of several, as PyTorch has it: uniform within 1 / √(its inputs).

    Args:
        shape: (..., in).
        seed: what is drawn depends on it and on the name alone; None draws nothing, the values are loaded after.
    """
    return uniform(shape, shape[-1], seed, *name)


def uniform(shape: tuple[int, ...], inputs: int, seed: int | None, *name: str | int) -> nn.Parameter:
    """As `drawn`, of a given number of inputs."""
    values = torch.empty(shape)
    if seed is not None:
        bound = math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(inputs))
        values.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seeds.derive(seed, *name)))
    return frozen(values)


def frozen(values: Tensor) -> nn.Parameter:
    """A parameter that does not move yet."""
    return nn.Parameter(values, requires_grad=False)


def apart(low: Tensor, experts: int) -> Tensor:
    """Float (..., K b) -> (..., K, b)."""
    return low.view(*low.shape[:-1], experts, -1)


def gated(logits: Tensor) -> Tensor:
    """Shares of the experts, in float32 at least: Float (..., K) -> (..., K), summing to 1."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
