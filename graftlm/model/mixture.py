"""One LoRA split into experts, mixed by a dense router per token; all of it learns at every stage.

    y = W x + s Σ_e softmax(x W_r)_e B_e A_e x        s = alpha / rank; A_e (rank / E, in), B_e (out, rank / E)

Paper:   Chen et al., CoIN: A Benchmark of Continual Instruction Tuning for Multimodal LLMs, NeurIPS 2024, arXiv:2403.08350.
Differs: see `methods.moelora`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import RunError
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
)
from graftlm.model.specs import LoraSpec

if TYPE_CHECKING:
    from graftlm.model.multimodal import MultimodalLM

__all__ = ["ExpertMixture", "MixtureLayer", "MixtureSpec", "open_mixture"]


@dataclass(frozen=True)
class MixtureSpec:
    """How the LoRA is split: ``experts`` of rank ``rank / experts``, their sum scaled by ``alpha / rank``."""

    experts: int = 8
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0


class MixtureLayer(Layer):
    """Beside one linear layer.

    Attributes:
        a: Float (rank, in), expert by expert; the whole is drawn as the A of a LoRA.
        b: Float (out, rank); zero at the start.
        router: Float (E, in); None of one expert.
    """

    def __init__(self, width: int, out: int, spec: MixtureSpec, seed: int | None, path: str) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.a = drawn((spec.rank, width), seed, "lora", f"{path}.weight")
        self.b = frozen(torch.zeros(out, spec.rank))
        self.router = drawn((spec.experts, width), seed, "router", path) if spec.experts > 1 else None

    def added(self, x: Tensor, path: int, *, trains: bool) -> Tensor:
        """See `Layer.added`."""
        x = x.to(self.a.dtype)
        low = F.linear(F.dropout(x, self.spec.dropout, trains), self.a)
        if self.router is not None:
            low = apart(low, self.spec.experts)
            low = (low * gated(F.linear(x, self.router)).unsqueeze(-1)).flatten(-2)
        return F.linear(low, self.b) * self.scale

    def stacked(self, path: int, dtype: torch.dtype) -> Stacked:
        """See `Layer.stacked`."""
        down = self.a if self.router is None else torch.cat([self.a, self.router])
        return Stacked(down.to(dtype), (self.b * self.scale).to(dtype), self.spec.experts)

    def of_path(self, path: int) -> Iterator[nn.Parameter]:
        """See `Layer.of_path`."""
        return self.parameters()


class ExpertMixture(LinearExperts[MixtureLayer]):
    """The experts of MoELoRA.

    Args:
        seed: of As and routers; None leaves them to be loaded.
    """

    kind = "moelora"

    def __init__(self, shapes: Mapping[str, tuple[int, int]], spec: MixtureSpec, seed: int | None = None) -> None:
        super().__init__({path: MixtureLayer(*shape, spec, seed, path) for path, shape in shapes.items()})
        self.spec = spec
        self.stages = 0
        self._before: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """See `Extension.settings`."""
        return {**asdict(self.spec), "stages": self.stages, "layers": [path for path, _ in self.named_layers()]}

    @classmethod
    def build(cls, model: "MultimodalLM", settings: Mapping[str, Any]) -> Self:
        """See `Extension.build`."""
        values = dict(settings)
        stages, layers = int(values.pop("stages")), values.pop("layers")
        found = cls(shapes_of(model.llm, layers), MixtureSpec(**values))
        found.stages = stages
        return found

    @property
    def newest(self) -> int:
        """There is one path, once a stage is open."""
        return 1

    @property
    def path(self) -> int:
        """See `LinearExperts.path`."""
        return 0 if self._in_previous and self.stages == 1 else 1

    def begin(self) -> None:
        """Open a stage; of a later one, what θ_{i-1} was is kept on the device until it is over."""
        self.forget()
        self.is_open = True
        self.stages += 1
        if self.stages > 1:
            self._before = {name: p.detach().clone() for name, p in self.trained().items()}

    def trained(self) -> dict[str, nn.Parameter]:
        """See `LinearExperts.trained`."""
        return {
            f"{path}.experts.{name}": parameter
            for path, layer in self.named_layers()
            for name, parameter in layer.named_parameters()
        }

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """See `LinearExperts.previous`."""
        trained = {name: p.data for name, p in self.trained().items()} if self._before else {}
        try:
            with super().previous():
                for name in trained:
                    self.trained()[name].data = self._before[name]
                yield
        finally:
            for name, parameter in self.trained().items() if trained else ():
                parameter.data = trained[name]

    def blend(self, weight: float, on: Blend) -> None:
        """Of the first stage its update; of a later one As, Bs and routers apart.

        Raises:
            RunError: the other of the two, which is no mixture of this many experts.
        """
        if (on == "factors") != (self.stages > 1):
            raise RunError(
                f"blend on {on}: {'the experts go on from the stage before' if self.stages > 1 else 'the experts are new'}, so "
                f"{'factors' if self.stages > 1 else 'their update'} can be blended alone. Ask for that."
            )
        for name, parameter in self.trained().items():
            if self.stages > 1:
                parameter.copy_(torch.lerp(self._before[name], parameter, weight))
            elif name.endswith(".b"):
                parameter.mul_(weight)

    def close(self) -> None:
        """See `LinearExperts.close`."""
        super().close()
        self._before = {}

    @torch.no_grad()
    def undo(self) -> bool:
        """See `LinearExperts.undo`."""
        for name, before in self._before.items():
            self.trained()[name].copy_(before)
        self.stages -= 1
        return self.stages > 0


def open_mixture(model: "MultimodalLM", spec: MixtureSpec, *, seed: int = 0) -> ExtensionAdapter:
    """Make an LLM plastic by the experts of MoELoRA: new ones, or those that the model has.

    Args:
        model: its adapter is not replaced, the result is to be put there.
        seed: of new ones; what is drawn depends on it and on names alone.

    Raises:
        RunError: a stage is open, or the model has another extension, or experts of another kind.
        ConfigError: the LoRA's targets match no layer.
    """
    if model.extension is None:
        shapes = linear_layers(model.llm, (model.spec.lora or LoraSpec()).targets)
        model.extend(ExpertMixture(shapes, spec, seed))
    found = model.extension
    if not isinstance(found, ExpertMixture) or found.spec != spec:
        raise RunError(
            f"moelora: the model has an extension '{found.kind if found else None}' of {_described(found)}, but "
            f"{asdict(spec)} are asked for; the same are expected at every stage. Start from a model without it."
        )
    adapter = ExtensionAdapter(model, found)
    found.begin()
    return adapter


def _described(extension: object) -> str:
    return str(asdict(extension.spec)) if isinstance(extension, ExpertMixture) else "other experts"
