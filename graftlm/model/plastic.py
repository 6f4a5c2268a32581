"""Two ways of making an LLM plastic for one stage: a fresh LoRA, or every weight.

Paper:   Hu et al., LoRA, ICLR 2022, arXiv:2106.09685.
Differs: the LoRA is PEFT's; A is drawn from the stage's seed, layer by layer, and both factors are float32 whatever the
    LLM's dtype.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.model.rule import Rule
from graftlm.model.specs import LoraSpec

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

__all__ = ["Before", "FullStage", "LoraStage"]

Before = Callable[[str], Tensor]
"""θ_{i-1} of one parameter: a fresh float32 tensor on the LLM's device."""

NAME = "stage"
"""PEFT's name of the LoRA; it shows in parameter names."""


class LoraStage:
    """θ_{i-1} is frozen under a fresh LoRA: W + s B A, with A random and B zero.

    Args:
        llm: gets LoRA layers in place; `close` takes them out.
        seed: of A; the global random state is neither used nor moved.

    Attributes:
        opened: what `parameters` held when the LoRA of the stage before went on; empty of a fresh one.

    Raises:
        ConfigError: the targets match no layer.
    """

    def __init__(self, llm: "PreTrainedModel", spec: LoraSpec, seed: int) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer, LoraModel

        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            target_modules=spec.targets,
            bias="none",
        )
        with torch.random.fork_rng(devices=[]):
            try:
                self._tuner = LoraModel(llm, config, NAME)
            except ValueError as error:
                raise ConfigError(
                    f"lora.targets: {spec.targets!r} does not fit this LLM ({error}). Try 'all-linear'."
                ) from error
        llm.train(llm.training)  # new layers start in training mode, where dropout acts
        self._layers = {f"{n}.weight": m for n, m in llm.named_modules() if isinstance(m, LoraLayer)}
        self.opened: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            a, b = _factors(layer)
            drawn = torch.empty(a.shape)
            generator = torch.Generator().manual_seed(seeds.derive(seed, "lora", name))
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            a.data, b.data = drawn.to(a.device), torch.zeros(b.shape, device=b.device)

    @torch.no_grad()
    def resume(self, tensors: Mapping[str, Tensor]) -> bool:
        """Go on with the LoRA of a ledger entry; False, and nothing happens, if it is of other layers or another rank."""
        wanted: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            a, b = _factors(layer)
            scale = tensors.get(f"{name}.scale")
            for side, factor in (("A", a), ("B", b)):
                found = tensors.get(f"{name}.{side}")
                if found is None or found.shape != factor.shape or scale is None:
                    return False
                # the entry's scale is another where a rule scaled it: that goes into B
                wanted[f"{name}.{side}"] = found if side == "A" else found * (scale.item() / layer.scaling[NAME])
        for name, layer in self._layers.items():
            for side, factor in zip("AB", _factors(layer), strict=True):
                factor.copy_(wanted[f"{name}.{side}"])
        self.opened = {name: factor.detach().clone() for name, factor in self.parameters().items()}
        return True

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """A, B and scale by the name of the weight."""
        return {name: (*_factors(layer), float(layer.scaling[NAME])) for name, layer in self._layers.items()}

    def changing(self) -> dict[str, nn.Parameter]:
        """The LLM's own parameters that a fold of this stage will change."""
        return {name: _weight(layer.get_base_layer()) for name, layer in self._layers.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What training moves, by name inside the LLM."""
        return {
            f"{name.removesuffix('.weight')}.lora_{side}.{NAME}.weight": factor
            for name, layer in self._layers.items()
            for side, factor in zip("AB", _factors(layer), strict=True)
        }

    @contextlib.contextmanager
    def previous(self, before: Before) -> Iterator[None]:
        """The adapter is off, or as the stage before left it; its factors train again afterwards if they did."""
        if self.opened:
            with self._swapped():
                yield
            return
        trains = {name: factor.requires_grad for name, factor in self.parameters().items()}
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)
            for name, factor in self.parameters().items():
                factor.requires_grad_(trains[name])

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        trained = {name: factor.data for name, factor in self.parameters().items()}
        try:
            for name, factor in self.parameters().items():
                factor.data = self.opened[name]
            yield
        finally:
            for name, factor in self.parameters().items():
                factor.data = trained[name]

    @property
    def goes_on(self) -> bool:
        """Whether this is the LoRA of the stage before."""
        return bool(self.opened)

    def blend_factors(self, weight: float) -> None:
        """A and B go apart towards what they were; in place, so that the optimiser keeps its moments."""
        for name, factor in self.parameters().items():
            factor.copy_(torch.lerp(self.opened[name], factor, weight))

    def blend(self, weight: float, before: Before) -> None:
        """B is scaled in place."""
        for layer in self._layers.values():
            _factors(layer)[1].mul_(weight)

    def merged(self, rule: Rule, settings: Mapping[str, float], before: Before) -> dict[str, Tensor]:
        """What the rule makes of the stage, as tensors of a ledger entry: factors, or dense updates."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            scale = float(layer.scaling[NAME])
            if rule.factored is None:
                old = before(name)
                a, b = _factors(layer)
                tensors[f"{name}.delta"] = (rule(old, [torch.addmm(old, b, a, alpha=scale)], **settings) - old).cpu()
                continue
            copies = (factor.detach().to("cpu", copy=True) for factor in _factors(layer))
            new_a, new_b, new_scale = rule.factored(*copies, scale, **settings)
            tensors |= {f"{name}.A": new_a.contiguous(), f"{name}.B": new_b.contiguous()}
            tensors[f"{name}.scale"] = torch.tensor(new_scale, dtype=torch.float64)
        return tensors

    def close(self) -> None:
        """Take the LoRA layers out; the LLM has its own modules and names again."""
        self._tuner.unload()
        self._layers = {}


class FullStage:
    """Every parameter of the LLM may move.

    θ_{i-1} is not copied: it is what the ledger says. A fold keeps the whole float32 weight of every parameter, so that
    keeping the new weights changes no bit.
    """

    def __init__(self, llm: "PreTrainedModel") -> None:
        self._llm = llm

    def changing(self) -> dict[str, nn.Parameter]:
        """See `LoraStage.changing`: all of them; tied weights once."""
        return dict(self._llm.named_parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        """See `LoraStage.parameters`."""
        return dict(self._llm.named_parameters())

    @contextlib.contextmanager
    def previous(self, before: Before) -> Iterator[None]:
        """θ_{i-1} is swapped in, so the device holds both meanwhile."""
        trained = {name: parameter.data for name, parameter in self._llm.named_parameters()}
        try:
            for name, parameter in self._llm.named_parameters():
                parameter.data = before(name).to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._llm.named_parameters():
                parameter.data = trained[name]

    def blend(self, weight: float, before: Before) -> None:
        """In float32, rounded once."""
        for name, parameter in self._llm.named_parameters():
            parameter.copy_(torch.lerp(before(name), parameter.float(), weight))

    def merged(self, rule: Rule, settings: Mapping[str, float], before: Before) -> dict[str, Tensor]:
        """See `LoraStage.merged`: dense weights, on the CPU."""
        return {
            f"{name}.value": rule(before(name), [parameter.detach().float()], **settings).to("cpu", copy=True)
            for name, parameter in self._llm.named_parameters()
        }

    def close(self) -> None:
        """Nothing was added to the LLM."""


def _factors(layer: "LoraLayer") -> tuple[nn.Parameter, nn.Parameter]:
    """A (R, in) and B (out, R)."""
    return _weight(layer.lora_A[NAME]), _weight(layer.lora_B[NAME])


def _weight(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")
