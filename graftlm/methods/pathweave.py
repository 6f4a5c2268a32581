"""PathWeave: one more expert per stage beside the frozen LLM's linear layers, and small adapters inside the older experts.

    y = W x + Σ_e gate_e(x) c_e up_e I_{m,e} down_e x       stage m trains expert m, I_{m,1} ... I_{m,m-1} and a new gate

At a new stage up_m is zero, and the m experts share the gate equally: what older experts add shrinks to 1/m, through new
in-adapters, and training has to make up for it. Nothing is merged: `merge` beside it is a conflict, `realign` is not.

Paper:   Yu et al., LLMs Can Evolve Continually on Modality for X-Modal Reasoning (PathWeave), NeurIPS 2024, arXiv:2410.20178,
    §3; inside the LLM, rank 128, nothing bypassed: Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, §5.1.
Differs: as MERA ports it, beside the layers of the LLM and not of a Q-Former. down and up have no bias, so that the first
    expert is a plain LoRA. The port leaves open, and we chose: a gate per token, made anew at every stage, the newest for
    all modalities; in-adapters of rank x rank. The original's paths, where a modality bypasses what came after it, are an
    option; there text takes the newest path among the modalities of its sample, and a modality that was learned twice that
    of the later stage.
"""

from dataclasses import dataclass
from typing import Literal

from graftlm.core import seeds
from graftlm.core.errors import ConfigError
from graftlm.learning.method import Context, Method
from graftlm.model.adapters import StageAdapter
from graftlm.model.weave import WeaveSpec, open_weave

__all__ = ["PathWeave"]


@dataclass
class PathWeave(Method):
    """An expert per stage.

    Attributes:
        rank: of every expert.
        alpha: c_e starts at alpha / rank; None is at 1.
        in_adapter: "linear", or "mlp" of three layers.
        noise: train the gate with noise, as the original's code can.
        switch_paths: a modality takes the path of its own stage, as in the original: nothing is forgotten, but experts of
            later stages cannot help.
        learn_scale: whether c_e is trained.
    """

    adapter = "own"
    rank: int = 128
    alpha: float | None = None
    in_adapter: Literal["linear", "mlp"] = "linear"
    noise: bool = False
    switch_paths: bool = False
    learn_scale: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank: {self.rank}; at least 1 is expected.")

    def open(self, ctx: Context) -> StageAdapter:
        """One more expert, its in-adapters and its gate."""
        spec = WeaveSpec(self.rank, self.alpha, self.in_adapter, self.noise, self.switch_paths, self.learn_scale)
        seed = seeds.derive(ctx.seed, ctx.stage.name, "adapter")
        return open_weave(ctx.model, ctx.stage.modalities, spec, seed=seed)
