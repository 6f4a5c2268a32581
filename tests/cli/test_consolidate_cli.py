"""``graftlm consolidate``: what it writes, what it says, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from experiment.finetunes import NEW, OLD, learned_adapter, learned_base, merged, questions, weights
from typer.testing import CliRunner

from graftlm.cli.consolidate import consolidate
from graftlm.core.errors import GraftError
from graftlm.core.files import read_json
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.model import checkpoint
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]

app = typer.Typer()
app.command()(consolidate)


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(each) for each in arguments])
    if isinstance(result.exception, GraftError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = learned_base(folder / "base")
    new, old = questions(folder / "new.jsonl", NEW), questions(folder / "old.jsonl", OLD)
    return {"base": base, "tuned": learned_adapter(base, folder / "adapter"), "new": new, "old": old}


def test_an_adapter_is_consolidated(models: dict[str, Path], tmp_path: Path) -> None:
    said = run(
        "--base", models["base"], "--tuned", models["tuned"], "--alpha", 0.3, "--out", tmp_path / "out", "window=alg1"
    )
    assert said.strip().endswith(f"consolidated: {tmp_path / 'out'}")
    record = read_json(tmp_path / "out" / "recipe.json")["compose"]
    assert (record["rule"], record["settings"]) == ("sac", {"alpha": 0.3, "window": "alg1"})
    assert merged(models["base"], tmp_path / "out")


def test_a_whole_model_in_another_dtype(models: dict[str, Path], tmp_path: Path) -> None:
    run(
        "--base",
        models["base"],
        "--tuned",
        models["tuned"],
        "--as",
        "model",
        "--dtype",
        "bfloat16",
        "--out",
        tmp_path / "out",
    )
    assert {str(tensor.dtype) for tensor in weights(tmp_path / "out").values()} == {"torch.bfloat16"}


def test_a_sweep_picks_and_writes(models: dict[str, Path], tmp_path: Path) -> None:
    command = ["--base", models["base"], "--tuned", models["tuned"], "--rule", "model_mix", "--sweep", "alpha=0:1:0.2"]
    command += ["--new", models["new"], "--keep", models["old"], "--max-new-tokens", 3, "--out", tmp_path / "out"]
    said = run(*command, "--least-new", 40, "--least-keep", 40)
    result = read_json(tmp_path / "out-sweep" / "sweep.json")
    low, high = result["ideal_region"]
    assert f"ideal region: {low:g} to {high:g}; picked alpha {result['picked']['value']:g}" in said
    assert f"sweep: {tmp_path / 'out-sweep' / 'sweep.html'}" in said
    assert {"sweep.svg", "sweep.html", "sweep.json", "journal.jsonl"} <= {
        x.name for x in (tmp_path / "out-sweep").iterdir()
    }
    assert read_json(tmp_path / "out" / "recipe.json")["compose"]["settings"] == {"alpha": result["picked"]["value"]}


def test_a_dry_run_writes_no_model(models: dict[str, Path], tmp_path: Path) -> None:
    command = ["--base", models["base"], "--tuned", models["tuned"], "--sweep", "alpha=0.5", "--new", models["new"]]
    said = run(*command, "--keep", models["old"], "--metric", "likelihood", "--sweep-out", tmp_path / "s", "--dry-run")
    assert "ideal region: none; picked alpha 0.5" in said
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_data_sets_of_a_mini_world(tmp_path: Path) -> None:
    specs = [
        ModalitySpec(name, EncoderSpec(f"mini-{name}", "miniworld"), ConnectorSpec("mlp"))
        for name in ("image", "audio")
    ]
    model = MultimodalLM.build(ModelSpec("miniworld", tuple(specs), LoraSpec(4, 8.0)))
    for number, spec in enumerate(specs):
        model.add_modality(spec, seed=number)
        model.adapter.open(seed=number)
        for parameter in model.adapter.parameters().values():
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02
        model.adapter.fold()
        checkpoint.save(model, tmp_path / spec.name, history=[])
    world = build(WorldSpec("tiny"), tmp_path)
    command = ["--tuned", tmp_path / "audio", "--base", tmp_path / "image", "--sweep", "alpha=0.5", "--data", world]
    command += ["--metric", "likelihood", "--limit", 4, "--out", tmp_path / "out"]
    said = run(*command, "--new", "clotho_aqa", "--keep", "coco,okvqa")
    assert "picked alpha 0.5" in said and "consolidated" in said
    assert {*read_json(tmp_path / "out-sweep" / "sweep.json")["sets"]["keep"]} == {"coco", "okvqa"}
    assert list(checkpoint.load(tmp_path / "out").specs) == ["image", "audio"]
    with pytest.raises(GraftError, match=r"--keep: no data set 'cococo'.*did you mean 'coco'"):
        run(*command, "--new", "clotho_aqa", "--keep", "cococo")


WRONG: list[tuple[list[str], str]] = [
    ([], "--tuned: missing"),
    (["--tuned", "{tuned}"], "--out: missing"),
    (["--tuned", "{tuned}", "--out", "x", "alpha"], "alpha: no setting; KEY=VALUE is expected"),
    (["--tuned", "{tuned}", "--out", "x", "--alpha", "0.1", "alpha=0.2"], "'alpha' is given twice"),
    (["--tuned", "{tuned}", "--out", "x", "--rule", "sca"], "no rule 'sca'; did you mean 'sac'"),
    (["--tuned", "{tuned}", "--out", "x", "--new", "n"], "belong to a sweep; --sweep GRID is expected"),
    (["--tuned", "{tuned}", "--out", "x", "--sweep", "alpha=x"], "no numbers"),
    (["--tuned", "{tuned}", "--out", "x", "--sweep", "alpha=0.1"], "--new: no validation set"),
    (["--tuned", "{tuned}", "--out", "x", "--sweep", "alpha=0.1", "--new", "{new}"], "--keep: no validation set"),
    (["--tuned", "{tuned}", "--sweep", "alpha=0.1", "--dry-run"], "--sweep-out: missing"),
    (["--sets", "--metric", "exakt"], "did you mean 'exact'"),
    (["--sets", "--least-new", "-1"], "--least-new -1: a percentage above 0"),
    (["--sets", "--data", "d"], "data sets are for checkpoints of graftlm"),
    (["--sets", "--split", "test"], "files have no splits"),
    (["--sets", "--alpha", "0.2"], "alpha: both swept and set"),
    (["--sets", "--rule", "dare", "--as", "adapter"], "what dare makes of a low-rank update is dense"),
    (["--sets", "--dtype", "float"], "dtype: 'float'; did you mean"),
]


@pytest.mark.parametrize(("arguments", "what"), WRONG, ids=[what for _, what in WRONG])
def test_mistakes_are_named(arguments: list[str], what: str, models: dict[str, Path], tmp_path: Path) -> None:
    sets = ["--tuned", "{tuned}", "--out", "x", "--sweep", "alpha=0.1", "--new", "{new}", "--keep", "{old}"]
    if arguments[:1] == ["--sets"]:
        arguments = [*sets, *arguments[1:]]
    given: list[Any] = [each.format(**models) if "{" in each else each for each in arguments]
    given = [tmp_path / each if each == "x" else each for each in given]
    with pytest.raises(GraftError, match=what):
        run(*given)
    assert not any(tmp_path.rglob("*.safetensors"))


def test_help_has_examples() -> None:
    said = run("--help")
    assert "graftlm consolidate --base llama --tuned llama-chat --alpha 0.2 --out repaired" in said
    assert "--sweep" in said and "ideal region" in said
