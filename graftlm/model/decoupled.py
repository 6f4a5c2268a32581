"""Training with decoupled parameters: one LoRA for the positions of a modality, another for those of text.

    y_t = (W + s B_{r(t)} A_{r(t)}) x_t         W frozen; A and B of every route and of text are trained

Learned vectors stand before and after every media item, and count as positions of its modality. When training is over the
layers become those of `model.composition`, so that a stage ends as what its checkpoint loads to, bit by bit.

Paper:   Chen et al., Model Composition for Multimodal Large Language Models (DAMC), ACL 2024, arXiv:2402.12750, §3.2.
Differs: see `methods.damc`.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core import seeds
from graftlm.core.errors import RunError
from graftlm.data.types import TEXT, Modality
from graftlm.model.adapters import StageAdapter
from graftlm.model.composed import DTYPES, BaseFiles, RoutingFiles
from graftlm.model.composition import EXPAND, Composition
from graftlm.model.manifest import RouteSpec, RoutingSpec
from graftlm.model.routing import Route
from graftlm.model.rule import Rule, keep_new
from graftlm.model.specs import LoraSpec
from graftlm.model.variants import LowRankUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graftlm.model.multimodal import MultimodalLM

__all__ = ["BranchedLinear", "DecoupledAdapter", "Decoupling", "HeldRouting", "decouple"]

FILE = "routing/00001.safetensors"

NAMES = {dtype: name for name, dtype in DTYPES.items()}

ROWS = 4096
"""Of the embedding that are looked at to know its spread."""

SIDES = ("prefix", "suffix")

PROMPTS = "prompts"
"""Name of the module inside the LLM that holds the learned positions while they are trained."""


class HeldRouting(RoutingFiles):
    """What routes add, in memory instead of in files: of a model that was just trained.

    Args:
        spec: names one file, the one that `write` makes.
        tensors: as in that file.
    """

    def __init__(self, spec: RoutingSpec, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        super().__init__(Path("memory"), spec)

    def write(self, path: Path) -> None:
        """Make the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors, path)

    def _index(self, path: Path) -> None:
        for key, tensor in self._tensors.items():
            self._files[key], self._shapes[key], self._dtypes[key] = path, tuple(tensor.shape), NAMES[tensor.dtype]

    def _read(self, key: str) -> Tensor:
        return self._tensors[key]


class BranchedLinear(nn.Linear):
    """A frozen linear layer with a LoRA for text and one for every route.

    Args:
        linear: the layer; its parameters become this one's.
        route: of the model.
        update: the LoRAs to start from; one that is missing is never applied.
        dropout: of what enters the LoRAs.

    Attributes:
        a, b: factors by number: "0" is text, "1" the first route.
    """

    def __init__(self, linear: nn.Linear, route: Route, update: LowRankUpdate, dropout: float = 0.0) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.route = route
        self.dropout = dropout
        self.off = False
        known = [update.text, *(update.branches.get(number) for number in range(update.routes))]
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.scales = [0.0 if branch is None else branch[2] for branch in known]
        for number, branch in enumerate(known):
            if branch is not None:
                for factors, factor in zip((self.a, self.b), branch[:2], strict=True):
                    held = factor.detach().to(linear.weight.device, torch.float32, copy=True)
                    factors[str(number)] = nn.Parameter(held, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Float (B, S, in) -> (B, S, out)."""
        out = F.linear(input, self.weight, self.bias)
        if self.off:
            return out
        if self.route.groups is None:
            update = self._update(0, input)
            return out if update is None else out + update.to(out.dtype)
        x, flat = self.route.flat(input), self.route.flat(out)
        for group in self.route.groups:
            update = self._update(0 if group.route is None else 1 + group.route, group.take(x))
            if update is None:
                continue
            if isinstance(group.rows, slice):
                flat[group.rows] += update.to(out.dtype)
            else:
                flat.index_add_(0, group.rows, update.to(out.dtype))
        return flat.view(out.shape)

    def _update(self, number: int, x: Tensor) -> Tensor | None:
        """What one LoRA adds: s B A x."""
        if str(number) not in self.a:
            return None
        a, b = self.a[str(number)], self.b[str(number)]
        low = F.linear(F.dropout(x.to(a.dtype), self.dropout, self.training), a)
        return F.linear(low, b) * self.scales[number]


class Decoupling(Composition):
    """A base LLM in which LoRAs per route and learned positions are trained.

    Args:
        llm: the base LLM.
        files: what to start from; with every B zero the LLM computes what it did.
        base: θ_pre as stored.
        dropout: of what enters the LoRAs.

    Attributes:
        folder: of the base.
    """

    def __init__(self, llm: "PreTrainedModel", files: RoutingFiles, base: BaseFiles, dropout: float = 0.0) -> None:
        super().__init__(llm, files, base)
        self.folder = base.folder
        self._dropout = dropout
        self._off = False

    def begin(self, modalities: Sequence[Modality]) -> None:
        """Put the LoRAs into the LLM; ``modalities`` in the order of their ids, from 1."""
        self.expand(modalities, "correct")
        held = nn.ParameterDict()
        for modality, pair in self.files.prompts().items():
            for side, tensor in zip(SIDES, pair, strict=True):
                if tensor is not None:
                    copy = tensor.detach().to(self._llm.device, torch.float32, copy=True)
                    held[f"{modality}-{side}"] = nn.Parameter(copy, requires_grad=False)
            prefix, suffix = (held[key] if (key := f"{modality}-{side}") in held else None for side in SIDES)
            self._prompts[modality] = prefix, suffix
        self._llm.add_module(PROMPTS, held)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: "text.<layer>.A", "<route>.<layer>.B", "prompt.<modality>.prefix" ..."""
        names = [TEXT, *(route.name for route in self.spec.routes)]
        found = {
            f"{names[int(number)]}.{path}.{side}": factor
            for path, layer in self._branched()
            for side, factors in (("A", layer.a), ("B", layer.b))
            for number, factor in factors.items()
        }
        for modality, pair in self._prompts.items():
            for side, tensor in zip(SIDES, pair, strict=True):
                if isinstance(tensor, nn.Parameter):
                    found[f"prompt.{modality}.{side}"] = tensor
        return found

    def tensors(self) -> dict[str, Tensor]:
        """As in the routing files of a checkpoint."""
        names = [TEXT, *(route.name for route in self.spec.routes)]
        found: dict[str, Tensor] = {}
        for path, layer in self._branched():
            for number in layer.a:
                branch = f"{path}.weight.{names[int(number)]}"
                found |= {f"{branch}.A": layer.a[number], f"{branch}.B": layer.b[number]}
                found[f"{branch}.scale"] = torch.tensor(layer.scales[int(number)])
        return found | {name: p for name, p in self.parameters().items() if name.startswith("prompt.")}

    @torch.no_grad()
    def blend(self, weight: float) -> None:
        """Every B is scaled in place."""
        for _, layer in self._branched():
            for factor in layer.b.values():
                factor.mul_(weight)

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """Inside, the LLM is θ_pre, and nothing stands around items."""
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=False)

    def surround(self, modality: Modality, tokens: Tensor) -> Tensor:
        """See `Composition.surround`."""
        return tokens if self._off else super().surround(modality, tokens)

    def remove(self) -> None:
        """See `Composition.remove`."""
        super().remove()
        if PROMPTS in self._llm._modules:
            del self._llm._modules[PROMPTS]

    def _linear(self, path: str, module: nn.Linear, names: object, served: object) -> nn.Module:
        update = self._update(f"{path}.weight")
        assert isinstance(update, LowRankUpdate)
        return BranchedLinear(module, self.route, update, self._dropout)

    def _branched(self) -> Iterator[tuple[str, BranchedLinear]]:
        for path in self._plain:
            layer = self._llm.get_submodule(path)
            assert isinstance(layer, BranchedLinear)
            yield path, layer

    def _switch(self, *, off: bool) -> None:
        self._off = off
        for _, layer in self._branched():
            layer.off = off


class DecoupledAdapter(StageAdapter):
    """A stage of one modality, learned with decoupled parameters; folding it makes the LLM a composed one of one original.

    Args:
        model: its LLM is made plastic at once.
        decoupling: of that LLM.

    Raises:
        RunError: a stage is open, or the LLM is no longer the base.
    """

    def __init__(self, model: "MultimodalLM", decoupling: Decoupling) -> None:
        super().__init__(model.llm, model.spec.lora, model.folder, model.dtype)
        self._model = model
        self._decoupling = decoupling
        model.compose(decoupling)
        decoupling.begin(list(model.specs))

    @property
    def is_open(self) -> bool:
        """Until it is folded or dropped, when the model gets another adapter."""
        return True

    def open(self, seed: int, *, resume: bool = False) -> None:
        """Refuse: it is open.

        Raises:
            RunError: always.
        """
        self._expect_closed("open")

    def parameters(self) -> dict[str, nn.Parameter]:
        """See `StageAdapter.parameters`: "llm.text. ...", "llm.<route>. ...", "llm.prompt. ..."."""
        return {f"llm.{name}": parameter for name, parameter in self._decoupling.parameters().items()}

    @contextlib.contextmanager
    def previous(self) -> Iterator[None]:
        """See `StageAdapter.previous`: without LoRAs, and nothing stands around items."""
        with self._decoupling.previous():
            yield

    def blend(self, weight: float, *, on: Literal["delta", "factors"] = "delta") -> None:
        """See `StageAdapter.blend`: of deltas, as A stays; learned positions stay."""
        self._decoupling.blend(weight)

    def fold(self, rule: Rule = keep_new, **settings: float) -> None:
        """The layers become routed ones with what was learned; the model's adapter is then a sealed one.

        Raises:
            RunError: the rule would merge halves that are kept apart.
        """
        if rule is not keep_new:
            raise RunError(
                f"fold: rule '{rule.name}', but decoupled LoRAs are no update of one LLM; they are kept as they are. Leave "
                f"the rule out, and compose experts instead: `graftlm compose damc`."
            )
        model, files, folder = self._model, self._decoupling.files, self._decoupling.folder
        learned = HeldRouting(files.spec, self._decoupling.tensors())
        model.compose(None)
        model.compose(Composition(model.llm, learned, BaseFiles(folder)))
        assert model.composition is not None
        model.composition.enter(EXPAND, list(model.specs))

    def drop(self) -> None:
        """See `StageAdapter.drop`: the LLM is the base again."""
        self._model.compose(None)

    def _expect_closed(self, verb: str) -> None:
        raise RunError(
            f"{verb}: a stage is open; none is expected. Call fold() or drop() first, and use the model's adapter after."
        )


def decouple(
    model: "MultimodalLM",
    modality: Modality,
    lora: LoraSpec,
    *,
    prefix: int = 5,
    suffix: int = 5,
    spread: float = 1.0,
    seed: int = 0,
) -> DecoupledAdapter:
    """Make an LLM plastic with one LoRA for a modality and one for text.

    The LoRAs start as nothing, the vectors around items at random.

    Args:
        model: a base LLM with the modality; its adapter is not replaced, the result is to be put there.
        lora: rank, alpha and dropout; all linear layers but the head have LoRAs.
        prefix, suffix: learned positions before and after each item.
        spread: standard deviation at which these start, as a share of that of the embedding.
        seed: of the As and of these; what is drawn depends on it and on names alone.

    Raises:
        RunError: a stage is open, or the LLM is no longer the base, or of no folder.
    """
    if model.adapter.is_open or model.adapter.ledger or model.composition is not None or model.folder is None:
        state = "a stage is open" if model.adapter.is_open else "the LLM is of no folder" if not model.folder else ""
        raise RunError(
            f"decoupled parameters: {state or 'the LLM is no longer its base'}; a base LLM from a folder is expected. Learn "
            f"every modality from the base, then compose: `graftlm compose damc`."
        )
    scale = torch.tensor(lora.alpha / lora.rank)
    tensors: dict[str, Tensor] = {}
    head = model.llm.get_output_embeddings()  # type: ignore[no-untyped-call]
    for path, module in model.llm.named_modules():
        if type(module) is not nn.Linear or module is head:
            continue
        for branch in (TEXT, modality):
            a = torch.empty(lora.rank, module.in_features)
            generator = torch.Generator().manual_seed(seeds.derive(seed, "lora", branch, path))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            name = f"{path}.weight.{branch}"
            tensors |= {
                f"{name}.A": a,
                f"{name}.B": torch.zeros(module.out_features, lora.rank),
                f"{name}.scale": scale,
            }
    words = model.llm.get_input_embeddings().get_parameter("weight").detach()[:ROWS].float()
    for side, count in zip(SIDES, (prefix, suffix), strict=True):
        if count:
            generator = torch.Generator().manual_seed(seeds.derive(seed, "prompt", modality, side))
            drawn = torch.randn(count, words.shape[1], generator=generator)
            tensors[f"prompt.{modality}.{side}"] = drawn * spread * float(words.std())
    spec = RoutingSpec("damc", (RouteSpec(modality, modality),), (FILE,), {"rank": lora.rank, "alpha": lora.alpha})
    decoupling = Decoupling(model.llm, HeldRouting(spec, tensors), BaseFiles(model.folder), lora.dropout)
    return DecoupledAdapter(model, decoupling)
