"""Planning: the same walk as a run, counted by hand on a tiny model."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.data.types import Media, Sample, Stage, Stream, Task
from graftlm.experiment.base import build_tokenizer
from graftlm.experiment.plan import Plan, plan_stream
from graftlm.experiment.sizes import count
from graftlm.experiment.spec import ExperimentSpec, load
from graftlm.learning.method import Context, Method

WIDTH, LAYERS, INNER, RANK, ALPHA = 16, 2, 24, 4, 4.0
SAMPLES = 40


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and tokenizer of a tiny LLM, and no weights at all."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def stream(*modalities: str) -> Stream:
    """One stage per modality, half captions and half questions."""

    def task(modality: str, name: str, kind: str) -> Task:
        samples = [
            Sample(f"{name}{i}", name, (Media(modality, Path(f"{modality}{i}")),), "describe this .", ("red",))
            for i in range(SAMPLES // 2)
        ]
        return Task(name, kind, (modality,), "exact", samples, [], [])  # type: ignore[arg-type]

    stages = tuple(Stage(m, (task(m, f"{m}-cap", "caption"), task(m, f"{m}-qa", "qa"))) for m in modalities)
    return Stream("tiny", stages)


def spec(llm: Path, *overrides: str) -> ExperimentSpec:
    return load("mera-miniworld", [f"model.llm={llm}", f"model.lora.rank={RANK}", *overrides])


def planned(llm: Path, *overrides: str, modalities: tuple[str, ...] = ("image", "video")) -> Plan:
    return plan_stream(spec(llm, *overrides), stream(*modalities))


def test_parameters_are_counted_by_hand(llm: Path) -> None:
    sizes = count(spec(llm).model_spec())
    attention, mlp = 4 * WIDTH * WIDTH, 3 * WIDTH * INNER
    assert sizes.llm == sizes.vocabulary * WIDTH + LAYERS * (attention + mlp + 2 * WIDTH) + WIDTH
    assert sizes.plastic == LAYERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    full = count(spec(llm, "model.lora=null").model_spec())
    assert full.plastic == full.llm and not full.lora
    for targets in ("[q_proj]", ".*q_proj"):
        some = count(spec(llm, f"model.lora.targets={targets}").model_spec())
        assert some.plastic == LAYERS * RANK * 2 * WIDTH
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: 'x_proj' is no layer of this LLM"):
        count(spec(llm, "model.lora.targets=x_proj").model_spec())


def test_phases_samples_and_steps_follow_the_schedule(llm: Path) -> None:
    made = planned(llm, "methods=[mera]")
    schedule = spec(llm).schedule()
    expert = made.stages[0]
    assert [phase.phase for phase in expert.phases] == [phase.name for phase in schedule.phases]
    for phase, rule in zip(expert.phases, schedule.phases, strict=True):
        samples = SAMPLES // 2 if rule.kinds else SAMPLES
        assert phase.samples == samples * rule.epochs
        assert phase.steps == -(-samples // rule.batch_size) * rule.epochs
        text = 8  # <bos> <usr> describe this . <ast> red <eos>
        assert phase.tokens == phase.samples * (text + made.sizes.tokens["image"])
    assert set(expert.phases[0].trained) == {"connectors.image"}
    assert set(expert.phases[1].trained) == {"connectors.image", "llm"}


def test_mera_realigns_all_connectors_from_the_second_stage(llm: Path) -> None:
    first, second = (stage for stage in planned(llm, "methods=[mera]").stages if stage.cell == "mera")
    assert [phase.phase for phase in first.phases] == ["pretrain", "finetune"]
    realign = second.phases[-1]
    assert realign.phase == "realign"
    assert set(realign.trained) == {"connectors.image", "connectors.video"}
    assert realign.samples == 2 * round(0.1 * SAMPLES) * spec(llm).schedule().realign.epochs
    assert second.moments == ("Merge", "Realign") and second.notes == ()


def test_what_is_learned_alike_is_counted_once(llm: Path) -> None:
    made = planned(llm, "methods={finetune: [finetune], mera: [mera], again: [finetune]}")
    shared = {(stage.cell, stage.stage): stage.shared for stage in made.stages}
    assert shared == {
        ("expert", "image"): None,
        ("expert", "video"): None,
        ("finetune", "image"): "expert image",
        ("finetune", "video"): None,
        ("mera", "image"): "expert image",
        ("mera", "video"): None,
        ("again", "image"): "expert image",
        ("again", "video"): "finetune video",
    }
    alone = planned(llm, "methods=[finetune]")
    assert alone.steps == sum(p.steps for s in alone.stages if s.shared is None for p in s.phases)


def test_replay_and_eproj_change_data_and_parts(llm: Path) -> None:
    made = planned(llm, "methods={replay: [replay], eproj: [eproj]}")
    second = {stage.cell: stage for stage in made.stages if stage.number == 2}
    assert set(second["replay"].phases[1].trained) == {"connectors.image", "connectors.video", "llm"}
    epochs = spec(llm).schedule().phases[1].epochs
    assert second["replay"].phases[1].samples == (SAMPLES + round(0.1 * SAMPLES)) * epochs
    assert set(second["eproj"].phases[1].trained) == {"connectors.video"}
    assert second["eproj"].checkpoint_bytes == 4 * (made.sizes.connectors["image"] + made.sizes.connectors["video"])
    assert second["replay"].checkpoint_bytes == second["eproj"].checkpoint_bytes + 4 * made.sizes.plastic


def test_memory_and_disk_are_the_stated_sums(llm: Path) -> None:
    made = planned(llm, "methods=[finetune]", modalities=("image",))
    sizes, finetune = made.sizes, made.stages[0].phases[1]
    side = sizes.encoders["image"] + sizes.connectors["image"]
    positions, answers, batch = 8 + sizes.tokens["image"], 2, 16
    expected = (
        4 * (sizes.llm + side + sizes.plastic)
        + 12 * (sizes.plastic + sizes.connectors["image"])
        + batch * positions * LAYERS * WIDTH * 17 * 4
        + batch * answers * sizes.vocabulary * 8
    )
    assert finetune.memory_bytes == made.memory_bytes == expected
    assert made.features_bytes == 4 * (SAMPLES // 2) * sizes.features["image"]
    assert made.disk_bytes == made.features_bytes + made.stages[0].checkpoint_bytes
    halved = planned(llm, "methods=[finetune]", "phases.finetune.accumulate=2", modalities=("image",))
    assert halved.memory_bytes < made.memory_bytes


def test_ingredient_that_looks_at_the_model_is_noted(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Curious(Method):
        def prepare(self, ctx: Context) -> None:
            ctx.model.generate([])

    monkeypatch.setattr("graftlm.methods.build", lambda entries, path: [Curious()])
    notes = planned(llm, "methods=[finetune]").stages[-1].notes
    assert notes == ("Curious looks at the model (generate); what follows from it is not counted.",)


def test_modality_without_encoder_is_refused(llm: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.modalities\.smell: missing; stage 'smell' of stream tiny"):
        planned(llm, modalities=("image", "smell"))


def test_folder_without_an_llm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no language model at"):
        count(spec(tmp_path).model_spec())
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(ConfigError, match="is of no LLM"):
        count(spec(tmp_path).model_spec())


def test_plan_as_json(llm: Path) -> None:
    tree = json.loads(json.dumps(planned(llm).to_dict()))
    assert tree["totals"]["steps"] == planned(llm).steps
    assert tree["stages"][0]["phases"][0]["trained"]


def test_eight_billion_parameters_are_counted_without_memory(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)
    sizes = count(load("mera-miniworld", [f"model.llm={tmp_path}", "model.lora.rank=128"]).model_spec())
    assert sizes.llm == 8_030_261_248
    assert sizes.plastic == 335_544_320
