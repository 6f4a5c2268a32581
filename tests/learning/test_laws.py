"""The algebra of learning: what an ingredient must reduce to, and what it must not touch."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import MethodConflict
from graftlm.learning.method import Method, check_adapters
from graftlm.methods.eproj import EProj
from graftlm.methods.finetune import FineTune
from graftlm.methods.mera import Merge, Realign, mera
from graftlm.methods.replay import Replay
from graftlm.model.multimodal import MultimodalLM

Grow = Callable[..., MultimodalLM]
Weights = Callable[[MultimodalLM], dict[str, Tensor]]


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(grow: Grow, weights: Weights) -> dict[str, Tensor]:
    return weights(grow([FineTune()]))


@pytest.mark.parametrize(
    "mix",
    [[], [Replay(fraction=0)], [Merge(weight=1)], [Realign(fraction=0)], [Replay(0), Merge(weight=1)]],
    ids=["nothing", "replay 0", "merge 1", "realign 0", "replay 0 + merge 1"],
)
def test_inert_settings_are_fine_tuning(
    mix: list[Method], grow: Grow, weights: Weights, plain: dict[str, Tensor]
) -> None:
    assert same(weights(grow(mix)), plain)


def test_the_same_seed_twice_gives_the_same(grow: Grow, weights: Weights, plain: dict[str, Tensor]) -> None:
    assert same(weights(grow([FineTune()])), plain)
    assert not same(weights(grow([FineTune()], seed=1)), plain)


def test_the_first_stage_of_mera_is_fine_tuning(grow: Grow, weights: Weights) -> None:
    assert same(weights(grow(mera(), stages=1)), weights(grow([FineTune()], stages=1)))


def test_eproj_leaves_the_llm_alone(grow: Grow, weights: Weights, spec: object) -> None:
    base = part(weights(MultimodalLM.build(spec)), "llm")  # type: ignore[arg-type]
    assert same(part(weights(grow([EProj()])), "llm"), base)


def test_fine_tuning_moves_the_llm_and_only_the_current_connector(
    grow: Grow, weights: Weights, plain: dict[str, Tensor], spec: object
) -> None:
    first = weights(grow([FineTune()], stages=1))
    assert same(part(first, "connectors.image"), part(plain, "connectors.image"))
    assert same(part(first, "encoders.image"), part(plain, "encoders.image"))
    assert not same(part(first, "llm"), part(plain, "llm"))


def test_replay_moves_old_connectors(grow: Grow, weights: Weights, plain: dict[str, Tensor]) -> None:
    replayed = weights(grow([Replay(fraction=0.5)]))
    assert not same(part(replayed, "connectors.image"), part(plain, "connectors.image"))


def test_the_llm_of_mera_is_the_mean_of_the_vanilla_models(grow: Grow, weights: Weights) -> None:
    """θ_2 = (θ_1 + θ_{2,vanilla}) / 2, and realigning does not disturb it."""
    first = part(weights(grow([FineTune()], stages=1)), "llm")
    vanilla = part(weights(grow([FineTune()], stages=2)), "llm")
    merged = part(weights(grow(mera(0.5))), "llm")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (first[name] + vanilla[name]) / 2, rtol=1e-5, atol=1e-6)


def test_realigning_moves_every_connector_and_nothing_else(grow: Grow, weights: Weights) -> None:
    merged, realigned = weights(grow([Merge()])), weights(grow([Merge(), Realign(0.5)]))
    assert same(part(merged, "llm"), part(realigned, "llm"))
    assert same(part(merged, "encoders"), part(realigned, "encoders"))
    for connector in ("connectors.image", "connectors.video"):
        assert not same(part(merged, connector), part(realigned, connector))


def test_realigning_before_merging_is_refused(grow: Grow) -> None:
    """Realigning needs the stage folded: merging would find nothing, and do nothing, silently."""
    with pytest.raises(MethodConflict, match="Realign stands before Merge"):
        grow([Realign(0.5), Merge()])


def test_noise_changes_only_what_realigning_does(grow: Grow, weights: Weights) -> None:
    clean, noisy = weights(grow(mera(0.5))), weights(grow(mera(0.5, noise=0.5)))
    assert same(part(clean, "llm"), part(noisy, "llm"))
    assert not same(part(clean, "connectors"), part(noisy, "connectors"))


class Own(Method):
    adapter = "own"


class Run(Method):
    adapter = "run"


def test_clashing_adapters_are_named() -> None:
    with pytest.raises(MethodConflict, match=r"Merge \(adapter = 'stage'\) and Run \(adapter = 'run'\)"):
        check_adapters([Merge(), Run()])
    with pytest.raises(MethodConflict, match="cannot share the LLM"):
        check_adapters([Own(), Own()])
    assert check_adapters([FineTune(), Merge(), Realign()]) == "stage"
