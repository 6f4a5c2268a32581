"""Model Tailor on checkpoints of the packaged base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from graftlm.cli.tailor import tailor as command
from graftlm.core.errors import CheckpointError, ConfigError, DataError, GraftError, MergeError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Sample
from graftlm.experiment import tailoring
from graftlm.experiment.tailoring import tailor_model
from graftlm.merging.tailor import hessian, tailor
from graftlm.model import checkpoint
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

IMAGE = ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("mlp"))
AUDIO = ModalitySpec("audio", EncoderSpec("mini-audio", "miniworld"), ConnectorSpec("qformer", {"queries": 8}))
SPEC = ModelSpec("miniworld", (IMAGE, AUDIO), LoraSpec(rank=4, alpha=4.0))

Pair = tuple[Path, Path]


def move(model: MultimodalLM, seed: int) -> None:
    """A stage in which everything that may move did."""
    model.adapter.open(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*model.adapter.parameters().values(), *model.connectors.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.adapter.fold()


def grown(spec: ModelSpec, modality: ModalitySpec = IMAGE) -> MultimodalLM:
    model = MultimodalLM.build(spec)
    model.add_modality(modality, seed=1)
    move(model, 1)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def samples(world: Path) -> list[Sample]:
    stage = next(stage for stage in miniworld(world, "sequential").stages if stage.name == "image")
    return [*stage.tasks[0].train[:7], *stage.tasks[1].train[:6], Sample("text", "t", (), "what is this ?", ("red",))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model, and the same after another stage, whose norms moved too."""
    root = tmp_path_factory.mktemp("pair")
    model = grown(SPEC)
    checkpoint.save(model, root / "original", history=[{"stage": "image"}])
    move(model, 2)
    checkpoint.save(model, root / "tuned", history=[{"stage": "image"}, {"stage": "new"}])
    return root / "original", root / "tuned"


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(checkpoint.load(folder).named_parameters())


def in_blocks(name: str) -> bool:
    return name.startswith("llm.model.layers.") and name.endswith("_proj.weight")


def test_a_patch_of_everything_is_the_tuned_llm_in_the_original(
    pair: Pair, samples: list[Sample], tmp_path: Path
) -> None:
    before, after = (weights(folder) for folder in pair)
    sewn = weights(tailor_model(*pair, samples, tmp_path / "out", share=1.0))
    assert sewn.keys() == before.keys()
    for name, weight in sewn.items():
        assert torch.equal(weight, after[name] if in_blocks(name) else before[name]), name


def test_weights_are_tailored_with_the_inputs_of_their_layers(
    pair: Pair, samples: list[Sample], tmp_path: Path
) -> None:
    """The same by hand: one sample at a time, so without padding, and all matrices at once."""
    before, after = (weights(folder) for folder in pair)
    model = checkpoint.load(pair[1])
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.llm.named_modules():
        if isinstance(module, nn.Linear) and in_blocks(f"llm.{name}.weight"):
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.setdefault(f"llm.{name}.weight", []).append(x[0])
            )
    with torch.no_grad():
        for sample in samples:
            model(model.batch([sample]))
    assert len(inputs) == 28 and len(inputs["llm.model.layers.0.mlp.down_proj.weight"]) == len(samples)
    sewn = weights(tailor_model(*pair, samples, tmp_path / "out", share=0.25, features=FeatureCache()))
    for name, weight in sewn.items():
        if not in_blocks(name):
            assert torch.equal(weight, before[name]), name
            continue
        expected = tailor(before[name], after[name], hessian=hessian(inputs[name]), share=0.25)
        agree = torch.isclose(weight, expected, rtol=1e-3, atol=1e-5).float().mean()
        assert agree > 0.995, name  # a score at the threshold may fall to either side
        assert ((weight == before[name]).float().mean() - 0.75).abs() < 0.01
        plain = tailor(before[name], after[name], share=0.25)
        assert not torch.allclose(plain, expected, atol=1e-4)


def test_sweeps_are_cheap_in_memory_and_change_nothing(
    pair: Pair, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    collect = tailoring._hessians

    def watched(*arguments: Any) -> dict[str, Tensor]:
        found = collect(*arguments)
        held.append(sum(matrix.nbytes for matrix in found.values()))
        return found

    monkeypatch.setattr(tailoring, "_hessians", watched)
    whole = weights(tailor_model(*pair, samples, tmp_path / "whole"))
    assert len(held) == 1 and held[0] == 4 * 4 * (3 * 128**2 + 352**2)  # q, k and v share theirs, gate and up too
    for ram, sweeps in ((1, 28), (10**6, 4)):
        held.clear()
        parts = weights(tailor_model(*pair, samples, tmp_path / str(ram), ram=ram))
        assert len(held) == sweeps and max(held) <= max(ram, 4 * 352**2)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_first_blocks_may_go_back(pair: Pair, samples: list[Sample], tmp_path: Path) -> None:
    before = weights(pair[0])
    sewn = weights(tailor_model(*pair, samples, tmp_path / "out", layers_from=0.625, share=0.5))
    moved = {name.split(".")[3] for name, weight in sewn.items() if not torch.equal(weight, before[name])}
    assert moved == {"3"}  # ceil(0.625 * 4)


def test_the_result_is_an_ordinary_checkpoint(pair: Pair, samples: list[Sample], tmp_path: Path) -> None:
    """It can be asked, learned on, and tailored again; its record says what it is made of."""
    told: list[tuple[str, int, int]] = []
    out = tailor_model(*pair, samples, tmp_path / "out", calibration=3, progress=lambda *what: told.append(what))
    manifest = checkpoint.read_manifest(out)
    assert manifest["llm"]["source"] == "llm" and manifest["ledger"] == []
    assert manifest["history"][0] == {"stage": "image"}
    step = manifest["history"][1]
    assert step["tailor"]["share"] == 0.1 and step["tailor"]["layers"] == 28
    assert step["inputs"]["tuned"]["path"] == str(pair[1]) and len(step["inputs"]["original"]["sha256"]) == 64
    assert told[0] == ("calibrating", 3, 3) and told[-1][1] == told[-1][2]
    assert [count for what, count, _ in told if what == "tailoring"] == sorted(
        count for what, count, _ in told if what == "tailoring"
    )
    model = checkpoint.load(out)
    assert len(model.generate(samples[:2])) == 2
    move(model, 3)
    checkpoint.save(model, tmp_path / "later", history=[])
    sewn = weights(tailor_model(out, tmp_path / "later", samples, tmp_path / "again", share=1.0))
    later = weights(tmp_path / "later")
    assert all(torch.equal(sewn[name], later[name]) for name in sewn if in_blocks(name))


def test_large_llms_are_sharded(
    pair: Pair, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(tailor_model(*pair, samples, tmp_path / "whole"))
    monkeypatch.setattr("graftlm.merging.output.SHARD_BYTES", 10**6)
    out = tailor_model(*pair, samples, tmp_path / "parts")
    assert len(list((out / "llm").glob("model-*-of-*.safetensors"))) > 2
    parts = weights(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_llm_in_bfloat16_stays_in_it(samples: list[Sample], tmp_path: Path) -> None:
    model = grown(ModelSpec("miniworld", (IMAGE,), None, "bfloat16"))
    checkpoint.save(model, tmp_path / "original", history=[])
    move(model, 2)
    checkpoint.save(model, tmp_path / "tuned", history=[])
    out = tailor_model(tmp_path / "original", tmp_path / "tuned", samples[:4], tmp_path / "out")
    before, sewn = weights(tmp_path / "original"), weights(out)
    name = "llm.model.layers.1.mlp.up_proj.weight"
    assert sewn[name].dtype == torch.bfloat16
    assert 0.08 < (sewn[name] != before[name]).float().mean() < 0.11


def test_a_failure_leaves_nothing(
    pair: Pair, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MergeError("no more")

    monkeypatch.setattr(tailoring, "_hessians", fails)
    with pytest.raises(MergeError, match="no more"):
        tailor_model(*pair, samples, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"share": 0}, MergeError, "share"),
        ({"weight": 2}, MergeError, "weight 2 is not a share"),
        ({"damping": -1}, MergeError, "damping -1 is negative"),
        ({"layers_from": 1.0}, ConfigError, r"layers_from: 1.0 leaves no block"),
        ({"calibration": 0}, ConfigError, "calibration: 0 samples"),
        ({"samples": []}, DataError, "no samples to calibrate with"),
    ],
)
def test_wrong_settings(
    change: dict[str, Any], error: type[GraftError], message: str, pair: Pair, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        tailor_model(*pair, **({"samples": samples, "out": tmp_path / "out"} | change))


def test_models_that_do_not_fit(pair: Pair, samples: list[Sample], tmp_path: Path) -> None:
    checkpoint.save(grown(SPEC, AUDIO), tmp_path / "audio", history=[])
    with pytest.raises(
        MergeError, match=r"knows audio, but .*original image; Model Tailor hosts tasks of the modalities"
    ):
        tailor_model(pair[0], tmp_path / "audio", samples, tmp_path / "out")
    other = tailor_model(*pair, samples, tmp_path / "other")
    with pytest.raises(MergeError, match="grown from an LLM of hash"):
        tailor_model(other, pair[1], samples, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds something"):
        tailor_model(*pair, samples, other)
    assert not (tmp_path / "out").exists()


def test_the_command(pair: Pair, world: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("tailor")(command)
    run: Callable[..., Any] = CliRunner().invoke
    arguments = [*map(str, pair), "--data", str(world), "--out", str(tmp_path / "out"), "--calibration", "4"]
    result = run(app, [*arguments, "--tasks", "coco", "--share", "0.2"], catch_exceptions=False)
    assert result.exit_code == 0 and "checkpoint:" in result.output
    assert checkpoint.read_manifest(tmp_path / "out")["history"][-1]["tailor"]["share"] == 0.2
    with pytest.raises(ConfigError, match="no data set 'cocoa'"):
        run(app, [*arguments, "--tasks", "cocoa"], catch_exceptions=False)
