"""The named schedules: which parts move, when, and how fast.

Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, Table 9 (``llava-two-step``).
Differs: ``llava-two-step`` runs in the model's dtype, not FP16, and its cosine starts with the warm-up. ``miniworld`` has
    its own epochs and rates, chosen on validation scenes, because its base is four orders of magnitude smaller.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.data.types import Phase

__all__ = ["SCHEDULES", "Schedule", "schedule"]


@dataclass(frozen=True)
class Schedule:
    """The phases of a stage, and the phase that the `realign` ingredient runs after it."""

    phases: tuple[Phase, ...]
    realign: Phase


SCHEDULES: Mapping[str, Schedule] = {
    "llava-two-step": Schedule(
        phases=(
            Phase(
                "pretrain",
                frozenset({"connectors.current"}),
                {"connectors": 1e-3},
                kinds=frozenset({"caption"}),
                batch_size=128,
            ),
            Phase("finetune", frozenset({"connectors.current", "llm"}), {"connectors": 2e-5, "llm": 2e-4}),
        ),
        realign=Phase("realign", frozenset({"connectors"}), {"connectors": 2e-5}),
    ),
    "miniworld": Schedule(
        phases=(
            Phase(
                "pretrain",
                frozenset({"connectors.current"}),
                {"connectors": 4e-3},
                kinds=frozenset({"caption"}),
                epochs=3,
            ),
            Phase("finetune", frozenset({"connectors.current", "llm"}), {"connectors": 1e-3, "llm": 5e-3}, epochs=3),
        ),
        realign=Phase("realign", frozenset({"connectors"}), {"connectors": 5e-4}, epochs=10),
    ),
}
"""Every named schedule."""


def schedule(choice: str | Sequence[Phase]) -> Schedule:
    """A schedule by name, or from a list of phases; the one named "realign" is for the ingredient of that name.

    Raises:
        ConfigError: no schedule of that name, two phases of one name, or no phase to train in.
    """
    if isinstance(choice, str):
        if choice not in SCHEDULES:
            raise ConfigError(f"phases: no schedule '{choice}'; {did_you_mean(choice, SCHEDULES)}")
        return SCHEDULES[choice]
    names = [phase.name for phase in choice]
    if len(set(names)) < len(names):
        raise ConfigError(f"phases: the names {names} are not unique. Logs are kept by phase name: rename one.")
    phases = tuple(phase for phase in choice if phase.name != "realign")
    if not phases:
        raise ConfigError(f"phases: {names} leaves nothing to train in. Name at least one phase beside 'realign'.")
    realign = next((phase for phase in choice if phase.name == "realign"), None)
    if realign is None:
        realign = dataclasses.replace(SCHEDULES["llava-two-step"].realign)
    return Schedule(phases, realign)
