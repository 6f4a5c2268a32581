"""EWC: vectors of the penalty and of the Fisher, what it reduces to, and what several anchors are."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, DataError, MethodConflict
from graftlm.data.types import Stage, Stream
from graftlm.experiment.stages import StageStore
from graftlm.learning.method import Context, check_adapters
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.methods.ewc import EWC, fisher
from graftlm.methods.finetune import FineTune
from graftlm.methods.mera import Merge, Realign, mera
from graftlm.model.multimodal import MultimodalLM

QUICK = Schedule(
    tuple(dataclasses.replace(phase, epochs=1) for phase in SCHEDULES["miniworld"].phases),
    SCHEDULES["miniworld"].realign,
)

Grow = Callable[..., MultimodalLM]
Weights = Callable[[MultimodalLM], dict[str, Tensor]]


class Known:
    """A context whose samples are their own gradients: loss = sample · θ."""

    def __init__(self, theta: nn.Parameter) -> None:
        self.theta = theta
        self.model = SimpleNamespace(
            training=False, eval=lambda: None, train=lambda mode: None, batch=lambda samples: samples[0]
        )

    def forward(self, sample: Tensor) -> Any:
        return SimpleNamespace(loss=(sample * self.theta).sum())


def test_the_fisher_is_the_mean_of_squares() -> None:
    theta = nn.Parameter(torch.zeros(2))
    samples = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])]
    found = fisher(cast(Context, Known(theta)), {"p": theta}, cast(Any, samples))
    torch.testing.assert_close(found["p"], torch.tensor([5.0, 2.0]))  # of the batch: [4, 1]
    assert not theta.requires_grad


def moved(ewc: EWC, theta: Tensor) -> Any:
    adapter = SimpleNamespace(parameters=lambda: {"p": theta})
    return SimpleNamespace(number=2, trains_llm=True, model=SimpleNamespace(adapter=adapter))


def penalty(ewc: EWC, theta: Tensor) -> Tensor:
    return ewc.loss(moved(ewc, theta), cast(Any, None), cast(Any, None))["ewc"]


def test_the_penalty_and_its_gradient() -> None:
    ewc = EWC()
    ewc._anchor = {"p": torch.zeros(2)}
    ewc._remember("p", torch.zeros(2), torch.tensor([5.0, 2.0]))
    theta = torch.tensor([0.1, -0.2], requires_grad=True)
    loss = penalty(ewc, theta)
    assert loss.item() == pytest.approx(0.065)
    assert torch.autograd.grad(loss, theta)[0].tolist() == pytest.approx([0.5, -0.4])
    ewc._remember("p", torch.zeros(2), torch.tensor([1.0, 4.0]))
    assert penalty(ewc, theta).item() == pytest.approx(0.15)


def test_decay_forgets_the_older_fisher() -> None:
    ewc = EWC(decay=0.5)
    for new in ([4.0], [1.0]):
        ewc._remember("p", torch.zeros(1), torch.tensor(new))
    assert ewc.state["omega.p"].item() == pytest.approx(3.0)


def test_several_anchors_are_the_sum_of_their_penalties() -> None:
    torch.manual_seed(0)
    fishers, anchors = torch.rand(3, 5), torch.randn(3, 5)
    fishers[0, 0] = fishers[1, 0] = 0  # where nothing mattered there is no centre yet
    ewc = EWC(strength=3.0, anchors="all")
    for omega, anchor in zip(fishers, anchors, strict=True):
        ewc._remember("p", anchor, omega)
    ewc._anchor = {"p": ewc.state["centre.p"]}
    theta = torch.randn(5, requires_grad=True)
    expected = 0.5 * 3.0 * (fishers * (theta - anchors) ** 2).sum()
    loss = penalty(ewc, theta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], torch.autograd.grad(expected, theta)[0])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_without_strength_it_is_fine_tuning(grow: Grow, weights: Weights) -> None:
    assert same(weights(grow([EWC(0.0)], 3)), weights(grow([FineTune(continuing=True)], 3)))
    assert same(weights(grow([EWC(0.0, on="weights")])), weights(grow([FineTune()])))


@pytest.mark.parametrize("ewc", [EWC(1e5, 0.2), EWC(1e5, 0.2, anchors="all"), EWC(1e5, 0.2, on="weights")])
def test_the_llm_stays_nearer_to_the_first_stage(ewc: EWC, grow: Grow, weights: Weights) -> None:
    free = FineTune(continuing=ewc.on == "factors")
    first = weights(grow([free], 1))

    def far(model: MultimodalLM) -> float:
        return sum(float((w - first[n]).square().sum()) for n, w in weights(model).items() if n in first and "llm" in n)

    assert far(grow([ewc])) < 0.95 * far(grow([free]))


def test_one_lora_lives_through_the_run(grow: Grow) -> None:
    model = grow([EWC(1e3, 0.2)], 3)
    assert len(model.adapter.ledger) == 1
    assert model.spec.lora is not None
    ranks = {t.shape[0] for name, t in model.adapter.ledger[0].tensors.items() if name.endswith(".A")}
    assert ranks == {model.spec.lora.rank}


def test_mixes() -> None:
    assert check_adapters([EWC(), Realign()]) == "run"
    assert check_adapters([EWC(on="weights"), *mera()]) == "stage"
    with pytest.raises(MethodConflict, match=r"FineTune.*and EWC"):  # Ω of weights measures what a fresh LoRA adds
        check_adapters([FineTune(continuing=True), EWC(on="weights")])
    with pytest.raises(MethodConflict, match=r"EWC \(adapter = 'run'\) and Merge \(adapter = 'stage'\)"):
        check_adapters([EWC(), Merge()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "fraction: 0.0 leaves no sample to measure on"),
        ({"strength": -1.0}, "strength: -1.0; a number from 0"),
        ({"decay": 1.5}, "decay: 1.5 is not a share"),
        ({"anchors": "all", "on": "weights"}, "anchors: 'all' needs the centre of every weight"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EWC(**settings)


def test_a_stage_without_samples_cannot_be_measured() -> None:
    adapter = SimpleNamespace(parameters=dict, factors=dict)
    ctx: Any = SimpleNamespace(
        number=2, past=(Stage("image", ()),), open=lambda: adapter, replay=lambda stages, fraction: []
    )
    with pytest.raises(DataError, match="stage image has no sample to measure on"):
        EWC().prepare(ctx)


def test_a_run_that_was_cut_short_goes_on_the_same(stream: Stream, spec: Any, tmp_path: Path) -> None:
    """Ω, the anchor and the LoRA that goes on come from the store: other objects, other cells in between."""

    def walked(root: Path, *, cut: bool) -> dict[str, Tensor]:
        methods, parent, store = [EWC(1e4, 0.2)], None, StageStore(root, spec, QUICK, seed=0)
        for index in range(3):
            if cut:
                methods, store = [EWC(1e4, 0.2)], StageStore(root, spec, QUICK, seed=0)
                if parent is not None:
                    store.remember(parent, methods)
                store.load(None)
            parent = store.obtain(stream.stages[index], stream.stages[:index], methods, parent)
        assert parent is not None and len(methods[0].state) > 0
        return dict(store.load(parent).state_dict())

    assert same(walked(tmp_path / "whole", cut=False), walked(tmp_path / "cut", cut=True))


def test_the_teacher_is_free_and_there_is_no_second_llm(grow: Grow) -> None:
    model = grow([EWC(1e3, 0.2)], 2)
    before = sum(p.numel() for p in model.llm.parameters())
    model.adapter.open(0, resume=True)
    factors = sum(p.numel() for p in model.adapter.parameters().values())
    assert sum(p.numel() for p in model.llm.parameters()) == before + factors < 2 * before
    model.adapter.drop()
