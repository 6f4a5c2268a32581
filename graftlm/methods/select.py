"""Selective tuning: only chosen modules of the LLM learn.

Where a task is learned matters as much as how: tuning attention projections, or the gate and up projections of the MLP,
alone is reported to forget far less than tuning every layer, at little loss of what is learned.

Paper:   Zhu et al., How to Teach Large Multimodal Models New Skills, 2025, arXiv:2510.08564.
Differs: modules are LoRA layers, not full weights, unless the model tunes in full. Any ending of a module's name may be
    chosen; the paper's choices are ``[q_proj, k_proj, v_proj, o_proj]`` and ``[gate_proj, up_proj]``.
"""

from dataclasses import dataclass, field

from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.learning.method import Context, Method

__all__ = ["Select"]


@dataclass
class Select(Method):
    """Train these modules of the LLM and no others.

    Attributes:
        modules: last parts of the names of modules.
    """

    modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self) -> None:
        if not self.modules:
            raise ConfigError("modules: none; at least one is expected. To train none of the LLM, use eproj.")

    def trainable(self, ctx: Context, parts: frozenset[str]) -> frozenset[str]:
        """In place of the LLM, these modules."""
        if "llm" not in parts:
            return parts
        names = [name for name, _ in ctx.model.llm.named_modules()]
        chosen = {name for name in names if name.rpartition(".")[2] in self.modules}
        ends = {name.rpartition(".")[2] for name in names if name and not name.rpartition(".")[2].isdigit()}
        for module in self.modules:
            if module not in ends:
                raise ConfigError(f"select.modules: the LLM has no module '{module}'; {did_you_mean(module, ends)}")
        return (parts - {"llm"}) | {f"llm.{name}" for name in chosen}
