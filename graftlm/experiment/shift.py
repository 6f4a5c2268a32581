"""How far a method moved what the LLM makes of plain text: the language shift of a stage.

    shift = mean over inquiries, mean over tokens of ‖h[f_θi(x)] - h[f_θ0(x)]‖₂      h enters the LM head, θ0 is the start

Paper:   Zhang et al., LLaVA-c, arXiv:2506.08666, §3.3: the distance that UIR keeps small.
Differs: the paper regularises it against the model before the stage; here it is only measured, against the model before the
    first stage, so that it adds up over stages, and without the token that every text begins with.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from graftlm.core.files import write_json
from graftlm.data.types import Sample
from graftlm.experiment.stages import LearnedStage, StageStore

__all__ = ["Shift"]

COUNT = 64
"""Inquiries that are looked at: the mean is stable to a few percent."""


class Shift:
    """Measures stages against a start.

    Args:
        stages: where models come from.
        start: the model to compare with; None is the bare base.
        inquiries: of the stream; without any nothing is measured.
    """

    def __init__(self, stages: StageStore, start: LearnedStage | None, inquiries: Sequence[Sample]) -> None:
        self._stages = stages
        self._start = start
        self._inquiries = list(inquiries[:COUNT])
        self._before: list[Tensor] = []

    @torch.no_grad()
    def write(self, learned: LearnedStage, folder: Path) -> None:
        """Measure a stage, unless it is, and write ``shift.json``: inquiries, l2, and relative to the states' own length."""
        path = folder / "shift.json"
        if path.is_file() or not self._inquiries:
            return
        self._before = self._before or self._hidden(self._start)
        # the first token is what every text begins with, and prompts that a method adds stand before or right after it
        pairs = [(a[1:], b[1 - len(a) :]) for a, b in zip(self._before, self._hidden(learned), strict=True)]
        l2 = sum(float((b - a).norm(dim=-1).mean()) for a, b in pairs) / len(pairs)
        length = sum(float(a.norm(dim=-1).mean()) for a, _ in pairs) / len(pairs)
        write_json(path, {"inquiries": len(pairs), "l2": l2, "relative": l2 / max(length, 1e-12)})

    def _hidden(self, learned: LearnedStage | None) -> list[Tensor]:
        model = self._stages.load(learned)
        model.eval()
        states = []
        for sample in self._inquiries:
            out = model(model.batch([sample], answers=False), hidden=True)
            states.append(out.hidden[0].float().cpu())
        return states
