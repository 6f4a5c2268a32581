"""The training loop: what it plans, what it refuses, and that a batch is the sum of its micro-batches."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import ConfigError, DataError, RunError
from graftlm.data.types import Batch, Output, Phase, Sample, Stage, Stream
from graftlm.learning.fit import fit, plan_batches, steps_of
from graftlm.learning.phase import SCHEDULES, schedule
from graftlm.learning.stage import learn
from graftlm.methods.mera import Merge
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

PHASE = Phase("finetune", frozenset({"connectors"}), {"connectors": 1e-3}, batch_size=8)


@pytest.fixture
def model(spec: ModelSpec, features: FeatureCache) -> MultimodalLM:
    built = MultimodalLM.build(spec, features=features)
    built.add_modality(spec.modalities[0], seed=0)
    return built


def samples(count: int) -> list[Sample]:
    return [Sample(str(i), "t", (), "x " * (i % 5) + "?", ("y",)) for i in range(count)]


def test_every_epoch_sees_every_sample_once_in_another_order() -> None:
    all_samples = samples(50)
    epochs = [plan_batches(all_samples, 8, seed=0, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(s.id for b in batches for s in b) == sorted(s.id for s in all_samples)
        assert max(map(len, batches)) == 8
    assert epochs[0] != epochs[1]
    assert epochs[0] == plan_batches(all_samples, 8, seed=0, epoch=0)
    assert steps_of(50, dataclasses.replace(PHASE, epochs=3)) == 3 * len(epochs[0])


def test_micro_batches_add_up_to_the_batch(stream: Stream, spec: ModelSpec, features: FeatureCache) -> None:
    results = []
    for accumulate in (1, 4):
        model = MultimodalLM.build(spec, features=features)
        model.add_modality(spec.modalities[0], seed=0)
        phase = dataclasses.replace(PHASE, accumulate=accumulate)
        fit(model, stream.stages[0].tasks[0].train[:16], phase, phase.trainable, seed=0)
        results.append({name: p.detach().clone() for name, p in model.connectors.named_parameters()})
    for name, whole in results[0].items():
        torch.testing.assert_close(results[1][name], whole, rtol=1e-3, atol=2e-5)


def test_nothing_to_learn_from_is_an_error(model: MultimodalLM) -> None:
    with pytest.raises(DataError, match="phase finetune: no samples"):
        fit(model, [], PHASE, PHASE.trainable, seed=0)


def test_a_part_without_parameters_or_rate_is_named(model: MultimodalLM, stream: Stream) -> None:
    train = stream.stages[0].tasks[0].train[:8]
    with pytest.raises(RunError, match=r"no parameter belongs to \['llm'\]"):
        fit(model, train, PHASE, frozenset({"llm"}), seed=0)
    with pytest.raises(RunError, match="is trained but has no learning rate"):
        fit(model, train, dataclasses.replace(PHASE, lr={"llm": 1.0}), PHASE.trainable, seed=0)


def test_a_loss_that_is_not_finite_stops_and_says_where(model: MultimodalLM, stream: Stream) -> None:
    train = stream.stages[0].tasks[0].train[:16]

    def poison(batch: Batch, out: Output) -> dict[str, Tensor]:
        return {"poison": out.loss * float("nan")}

    with pytest.raises(RunError, match=r"phase finetune, epoch 1, step 1 of 2: the loss is nan"):
        fit(model, train, PHASE, PHASE.trainable, seed=0, terms=[poison])


def test_two_terms_of_one_name_are_an_error(model: MultimodalLM, stream: Stream) -> None:
    def term(batch: Batch, out: Output) -> dict[str, Tensor]:
        return {"twice": out.loss}

    with pytest.raises(RunError, match=r"two loss terms are named \['twice'\]"):
        fit(model, stream.stages[0].tasks[0].train[:8], PHASE, PHASE.trainable, seed=0, terms=[term, term])


def test_a_modality_without_encoder_is_named(stream: Stream, spec: ModelSpec, features: FeatureCache) -> None:
    model = MultimodalLM.build(spec, features=features)
    with pytest.raises(ConfigError, match=r"stage image: modality 'image' has no encoder; the model names \['audio'\]"):
        learn(
            model,
            stream.stages[0],
            [],
            [],
            SCHEDULES["miniworld"],
            modalities={"audio": spec.modalities[2]},
        )


def test_log_says_what_was_done(model: MultimodalLM, stream: Stream) -> None:
    told: list[tuple[str, int, int]] = []
    log = fit(
        model,
        stream.stages[0].tasks[0].train[:16],
        dataclasses.replace(PHASE, epochs=2),
        PHASE.trainable,
        seed=0,
        progress=lambda *event: told.append(event),
    )
    assert (log.steps, log.samples, log.phase) == (4, 32, "finetune")
    assert log.parameters == sum(p.numel() for p in model.connectors.parameters())
    assert log.last_loss < log.first_loss and log.tokens > 32 * 16
    assert told[-1] == ("finetune", 32, 32)


def test_stage_without_samples_of_a_kind(model: MultimodalLM, stream: Stream) -> None:
    only_questions = Stage("image", (stream.stages[0].tasks[1],))
    with pytest.raises(DataError, match="phase pretrain: no samples"):
        learn(model, only_questions, [], [Merge()], SCHEDULES["miniworld"], modalities={})


def test_schedules_by_name_and_by_phases() -> None:
    assert schedule("llava-two-step").phases[0].batch_size == 128
    with pytest.raises(ConfigError, match=r"no schedule 'miniwold'; did you mean 'miniworld'\?"):
        schedule("miniwold")
    with pytest.raises(ConfigError, match="not unique"):
        schedule([PHASE, PHASE])
    with pytest.raises(ConfigError, match="leaves nothing to train in"):
        schedule([dataclasses.replace(PHASE, name="realign")])


def grown(grow: Callable[..., MultimodalLM]) -> MultimodalLM:
    return grow([], stages=1)


def test_nothing_stays_open_or_trainable(grow: Callable[..., MultimodalLM]) -> None:
    model = grown(grow)
    assert not model.adapter.is_open and not any(p.requires_grad for p in model.parameters())
    assert all("lora" not in name for name, _ in model.named_parameters())
