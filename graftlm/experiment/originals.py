"""All experts in one model, nothing left out: every position of a modality has its expert's exact weights, text their mean.

What no storage is spared for, and so the ceiling of every composition that routes: what MMER loses against it, its masks
lose; what is lost already here, joint attention and the mean for text lose.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graftlm.merging.compose import compose
from graftlm.merging.recipe import Recipe
from graftlm.model.composed import BaseFiles, RoutingFiles
from graftlm.model.composition import EXPAND, Composition
from graftlm.model.manifest import RouteSpec, RoutingSpec
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.variants import Update, Workspace

__all__ = ["expand_originals"]

Open = Callable[[Path], MultimodalLM]
"""Opens a checkpoint as a model of its own."""


class _Exact(Update):
    """What every expert adds to a weight, as it is."""

    deltas: Tensor

    def __init__(self, deltas: Tensor) -> None:
        super().__init__(deltas.shape[1:], len(deltas))
        self.hold(deltas=deltas)

    def route_delta(self, route: int, rows: slice) -> Tensor:
        return self.deltas[route][rows] if self.shape else self.deltas[route]

    def text_delta(self, rows: slice) -> Tensor:
        return self.deltas[:, rows].mean(0)

    def prepare(self, base: Tensor, dtype: torch.dtype) -> None:
        """Nothing: exact weights are held for every route."""

    def weights(self, text: Tensor, rows: slice, routes: Sequence[int], work: Workspace):  # type: ignore[no-untyped-def]
        """Of dense routing alone."""
        raise NotImplementedError


class _Originals(RoutingFiles):
    """The experts' weights, in memory."""

    def __init__(self, routes: Sequence[RouteSpec], deltas: Mapping[str, Tensor]) -> None:
        super().__init__(Path("originals"), RoutingSpec("mmer", tuple(routes), ()))
        self._deltas = deltas
        self.parameters = list(deltas)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """They are of this LLM."""

    def update(self, name: str, shape: torch.Size) -> Update:
        return _Exact(self._deltas[name])


def expand_originals(experts: Mapping[str, Path], work: Path, opened: Open) -> MultimodalLM:
    """One model of all experts, which answers each position of a modality with its expert's weights.

    Args:
        experts: checkpoint of each, by the modality that it serves.
        work: a folder for what is made on the way.
    """
    tuned = {name: dict(opened(folder).llm.named_parameters()) for name, folder in experts.items()}
    if not (work / "manifest.json").is_file():
        compose(Recipe("signs", {name: str(folder) for name, folder in experts.items()}), work, threads=1)
    model = opened(work)  # for its encoders and connectors
    model.compose(None)
    assert model.folder is not None  # a checkpoint's base is in a folder
    base = BaseFiles(model.folder)
    deltas = {}
    for name in dict(model.llm.named_parameters()):
        before = base.read(name).float()
        stacked = torch.stack([tuned[expert][name].detach().float().cpu() - before for expert in experts])
        if bool(stacked.any()):
            deltas[name] = stacked
    composition = Composition(model.llm, _Originals([RouteSpec(name, name) for name in experts], deltas), base)
    model.compose(composition)
    composition.enter(EXPAND, list(model.specs), "dense")
    return model
