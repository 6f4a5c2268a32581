"""A composed LLM in one of its modes: expanded (every position with its own modality's weights), or one original retained.

Paper:   Li et al., MMER, ACL 2025, arXiv:2505.17110, §3.2.
Differs: see `model.routing`. A retained weight is θ_pre + s m∘τ*, summed in float32 and rounded to the dtype in which the
    models were stored, then to the working dtype; in expansion it is rounded to the working dtype alone.
"""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError, RunError, did_you_mean
from graftlm.data.types import Modality
from graftlm.model.adapters import StageAdapter
from graftlm.model.composed import BaseFiles, RoutingFiles, route_rows
from graftlm.model.manifest import RoutingSpec
from graftlm.model.routing import Route, RoutedLinear, RoutedNorm, Way, is_proportional
from graftlm.model.variants import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BUDGET", "EXPAND", "Composition", "SealedAdapter", "check_mode", "retained"]

EXPAND = "expand"
"""Mode in which every position has its own modality's weights."""

RETAIN = "retain:"
"""Beginning of a mode in which the LLM is one of the original ones."""

BUDGET = 4 * 2**30
"""Bytes up to which the weights of every route are held. Fixed, not a share of what is free: the last bits of an answer
depend on the way that weights are had."""


def check_mode(spec: RoutingSpec | None, mode: str | None, where: Path) -> str | None:
    """The mode to open a checkpoint in; "expand" by default, None of an ordinary checkpoint.

    Raises:
        CheckpointError: there is no such mode.
    """
    if spec is None:
        if mode is not None:
            raise CheckpointError(f"{where}: mode '{mode}', but this is no composed checkpoint. Leave the mode out.")
        return None
    kept = spec.text_weights() if spec.kind == "damc" else [route.name for route in spec.routes]
    known = [EXPAND, *(f"{RETAIN}{name}" for name in kept)]
    if mode is not None and mode not in known:
        what = did_you_mean(mode, known)
        why = " DAMC keeps no original: the text halves are merged." if spec.kind == "damc" and not kept else ""
        raise CheckpointError(f"{where}: no mode '{mode}'; {what}{why}")
    return mode or EXPAND


def retained(mode: str) -> str | None:
    """The route that a mode retains; None of expansion."""
    return mode.removeprefix(RETAIN) if mode.startswith(RETAIN) else None


class SealedAdapter(StageAdapter):
    """Of an LLM that no stage may change: its weights are of several models at once."""

    def open(self, seed: int, *, resume: bool = False) -> None:
        """Refuse.

        Raises:
            RunError: always.
        """
        raise RunError(
            "open: the LLM is of a composed checkpoint, whose weights no stage can change; an ordinary one is expected. "
            "Write one original with `graftlm restore`, or compose with a rule that makes one dense LLM."
        )


class Composition:
    """Turns a base LLM into a composed one, in place, and back.

    Args:
        llm: the base LLM, holding θ_pre.
        files: what routes add.
        base: θ_pre as stored.

    Attributes:
        mode: "expand" or "retain:<route>"; "" before the first.
        asked, way: how routed weights should be had, and how they are.
        unrouted: parameters with updates that take the text weight at every position.
        route: says the modality of each position.

    Raises:
        CheckpointError: the files do not fit the LLM.
    """

    def __init__(self, llm: "PreTrainedModel", files: RoutingFiles, base: BaseFiles) -> None:
        files.check({name: parameter.shape for name, parameter in llm.named_parameters(remove_duplicate=False)})
        base.check(files.parameters)
        self.files = files
        self.mode = ""
        self.asked: Way = "auto"
        self.way: Way = "auto"
        self.unrouted: tuple[str, ...] = ()
        self.route = Route()
        self._llm = llm
        self._base = base
        self._serving: list[int | None] = [None]
        self._plain: dict[str, nn.Module] = {}
        self._prompts: dict[Modality, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def spec(self) -> RoutingSpec:
        """Routes and files."""
        return self.files.spec

    def enter(self, mode: str, modalities: Sequence[Modality], way: Way = "auto", budget: int = BUDGET) -> None:
        """`expand` or `retain`, by the name of the mode."""
        route = retained(mode)
        if route is None or self.spec.kind == "damc":
            self.files.own = route
            self.expand(modalities, way, budget)
            self.mode = mode
        else:
            self.retain(route)

    @torch.no_grad()
    def expand(self, modalities: Sequence[Modality], way: Way = "auto", budget: int = BUDGET) -> None:
        """The LLM's weights become those of text, and its layers get routes.

        Args:
            modalities: in the order of their ids, from 1.
            way: how to have the weights of modality positions.
            budget: bytes up to which "auto" holds them.

        Raises:
            ConfigError: no such way.
        """
        ways: tuple[Way, ...] = ("auto", "dense", "build", "correct")
        if way not in ways:
            raise ConfigError(f"way of routing '{way}'; {did_you_mean(way, ways)}")
        self._serving = [None, *(self.spec.serving(modality) for modality in modalities)]
        modules, unrouted = self._routable()
        served = sorted({route for route in self._serving if route is not None})
        weights = [
            self._llm.get_parameter(f"{path}.weight") for path, names in modules.items() if f"{path}.weight" in names
        ]
        large = sum(p.nbytes for p in weights if p.dim() > 1) * len(served)
        self.asked, self.way = way, "dense" if way == "auto" and large <= budget else way
        self.unrouted = tuple(unrouted)
        for name in unrouted:
            self._write(name, self._update(name), None)
        for path, names in modules.items():
            module = self._llm.get_submodule(path)
            routed = (
                self._linear(path, module, names, served)
                if isinstance(module, nn.Linear)
                else self._norm(path, module, names)
            )
            self._plain[path] = module
            _replace(self._llm, path, routed)
        dtype, device = self._llm.dtype, self._llm.device
        self._prompts = {
            modality: (_to(before, dtype, device), _to(after, dtype, device))
            for modality, (before, after) in self.files.prompts().items()
        }
        self.mode = EXPAND

    @torch.no_grad()
    def retain(self, name: str) -> None:
        """The LLM's weights become those of one original model.

        Raises:
            CheckpointError: no such route.
        """
        route = self.spec.route(name, str(self.files.folder))
        for parameter in self.files.parameters:
            self._write(parameter, self._update(parameter), route, stored=True)
        self.mode = f"{RETAIN}{name}"

    @torch.no_grad()
    def remove(self) -> None:
        """The LLM is the base again."""
        for path, module in self._plain.items():
            _replace(self._llm, path, module)
        self._plain, self._prompts, self.mode = {}, {}, ""
        for name in self.files.parameters:
            self._llm.get_parameter(name).copy_(self._base.read(name))

    def over(self, modality_ids: Tensor, *, prefill: bool = False) -> contextlib.AbstractContextManager[None]:
        """Inside, positions take their routes; with ``prefill`` in the LLM's first forward pass only."""
        if not self._plain:  # one dense LLM
            return contextlib.nullcontext()
        if prefill:
            return self.route.prefill(self._llm, modality_ids, self._serving)
        return self.route.over(modality_ids, self._serving)

    def surround(self, modality: Modality, tokens: Tensor) -> Tensor:
        """Items with the learned positions that stand around them: (N, L, D) -> (N, L', D)."""
        before, after = self._prompts.get(modality, (None, None))
        parts = [None if part is None else part.expand(len(tokens), -1, -1).to(tokens) for part in (before, after)]
        return torch.cat([part for part in (parts[0], tokens, parts[1]) if part is not None], 1)

    def nbytes(self) -> int:
        """Memory of the LLM's parameters and of everything that routes need."""
        tensors = itertools.chain(self._llm.parameters(), self._llm.buffers())
        return sum(tensor.nbytes for tensor in tensors)

    def _routable(self) -> tuple[dict[str, list[str]], list[str]]:
        """Modules that can be routed, with their parameters that differ; and the parameters that cannot."""
        modules: dict[str, list[str]] = {}
        unrouted: list[str] = []
        can: dict[str, bool] = {}
        head = self._llm.get_output_embeddings()  # type: ignore[no-untyped-call]
        for name in self.files.parameters:
            path = name.rpartition(".")[0]
            module = self._llm.get_submodule(path)
            if path not in can:
                can[path] = module is not head and (type(module) is nn.Linear or is_proportional(module))
            if can[path]:
                modules.setdefault(path, []).append(name)
            else:
                unrouted.append(name)
        return modules, unrouted

    def _linear(self, path: str, module: nn.Linear, names: Iterable[str], served: Iterable[int]) -> nn.Module:
        held: dict[int, Tensor] = {}
        update: Update | None = None
        if f"{path}.weight" in names:
            name, weight = f"{path}.weight", module.weight
            update = self._update(name)
            self._write(name, update, None)
            if self.way == "dense":
                held = {route: self._rows(name, update, route, torch.empty_like(weight)) for route in served}
                update = None
            else:
                update.prepare(self._base.read(name).to(weight.device), weight.dtype)
        biases = self._vectors(f"{path}.bias") if f"{path}.bias" in names else None
        return RoutedLinear(module, self.route, self.way, update=update, held=held, biases=biases)

    def _norm(self, path: str, module: nn.Module, names: Iterable[str]) -> nn.Module:
        weights, biases = (
            self._vectors(name) if name in names else None for name in (f"{path}.weight", f"{path}.bias")
        )
        return RoutedNorm(module, self.route, weights=weights, biases=biases)

    def _vectors(self, name: str) -> Tensor:
        """A vector of text and of every route, Float (1 + N, n); text's is written too."""
        update, parameter = self._update(name), self._llm.get_parameter(name)
        rows = parameter.new_empty(1 + len(self.spec.routes), len(parameter))
        for number, out in enumerate(rows):
            self._rows(name, update, number - 1 if number else None, out)
        parameter.copy_(rows[0])
        return rows

    def _update(self, name: str) -> Update:
        parameter = self._llm.get_parameter(name)
        return self.files.update(name, parameter.shape).to(parameter.device)

    def _write(self, name: str, update: Update, route: int | None, *, stored: bool = False) -> None:
        self._rows(name, update, route, self._llm.get_parameter(name), stored=stored)

    def _rows(self, name: str, update: Update, route: int | None, out: Tensor, *, stored: bool = False) -> Tensor:
        """Compute a route's weight into ``out``."""
        base = self._base.read(name)
        dtype = self.files.restored_dtype(name, base.dtype)
        for rows, weight in route_rows(base.to(out.device), update, route):
            part = out[rows] if out.dim() else out
            part.copy_(weight.to(dtype) if stored else weight)
        return out


def _replace(llm: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(llm.get_submodule(parent), name, module)


def _to(tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, dtype, copy=True)
