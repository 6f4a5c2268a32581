"""What a composition reads and writes: adapters, ledgers, checkpoints, records; and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from merging.conftest import Folders, flat, read
from torch import Tensor

from graftlm.core.errors import CheckpointError, MergeError, RunError
from graftlm.core.files import read_json
from graftlm.merging import rules
from graftlm.merging.compose import compose, open_inputs, read_recipe
from graftlm.merging.recipe import Recipe
from graftlm.model import checkpoint
from graftlm.model.base import base_folder
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

MODALITIES = {
    "image": ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("mlp")),
    "audio": ModalitySpec("audio", EncoderSpec("mini-audio", "miniworld"), ConnectorSpec("qformer", {"queries": 8})),
}


def grown(folder: Path, modality: str, lora: LoraSpec | None, stages: int = 1) -> Path:
    """A checkpoint of the packaged base with one modality, whose LLM moved at random."""
    model = MultimodalLM.build(ModelSpec("miniworld", tuple(MODALITIES.values()), lora))
    model.add_modality(MODALITIES[modality], seed=ord(modality[0]))
    for stage in range(stages):
        model.adapter.open(seed=stage)
        generator = torch.Generator().manual_seed(stage + 10 * ord(modality[0]))
        with torch.no_grad():
            for parameter in model.adapter.parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        model.adapter.fold()
    checkpoint.save(model, folder, history=[{"stage": modality}])
    return folder


def llm_weights(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.llm.named_parameters()}


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4, alpha=4.0)])
def test_checkpoints_become_one_checkpoint(lora: LoraSpec | None, tmp_path: Path) -> None:
    folders = {name: grown(tmp_path / name, name, lora, stages=2) for name in MODALITIES}
    out = compose(Recipe("average", {name: str(folder) for name, folder in folders.items()}), tmp_path / "both")
    parts = {name: checkpoint.load(folder) for name, folder in folders.items()}
    both = checkpoint.load(out)
    assert list(both.specs) == list(MODALITIES)
    image, audio = (llm_weights(part) for part in parts.values())
    for name, weight in llm_weights(both).items():
        torch.testing.assert_close(weight, (image[name] + audio[name]) / 2, rtol=1e-6, atol=1e-7)
    for name, part in parts.items():
        for key, tensor in part.connectors[name].state_dict().items():
            assert torch.equal(tensor, both.connectors[name].state_dict()[key])


def test_the_record_says_what_was_merged(tmp_path: Path) -> None:
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    recipe = Recipe("mmer", {name: str(folder) for name, folder in folders.items()}, settings={"density": 0.5})
    out = compose(recipe, tmp_path / "both")
    manifest = read_json(out / "manifest.json")
    (record,) = manifest["history"]
    assert record["compose"]["settings"] == {"density": 0.5}
    assert set(record["inputs"]) == {"base", "image", "audio"}
    assert all(len(each["sha256"]) == 64 for each in record["inputs"].values())
    assert 0 < record["mask_share"]["image"] < 0.5
    assert [route["name"] for route in manifest["routing"]["routes"]] == ["image", "audio"]
    assert read_recipe(out) == recipe
    assert "| image |" in (out / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_peft_adapter_is_merged_as_what_it_does_to_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = base_folder("miniworld")
    dense: list[dict[str, Tensor]] = []
    for i in range(2):
        torch.manual_seed(i)
        llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(llm, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(tmp_path / f"a{i}")
        dense.append({k: v.clone() for k, v in tuned.merge_and_unload().state_dict().items()})
    models = {f"a{i}": str(tmp_path / f"a{i}") for i in range(2)}
    recipe = Recipe("arithmetic", models, str(base), {"scale": 0.4}, dtype="float32")
    got = read(compose(recipe, tmp_path / "out"))
    before = read(base)
    for name, weight in got.items():
        wanted = rules.arithmetic(before[name].float(), [d[name].float() for d in dense], scale=0.4)
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(got[name], before[name].float()) for name in got)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_plain_mean_needs_no_base(folders: Folders, tmp_path: Path) -> None:
    _, models = folders()
    out = compose(Recipe("average", {model.name: str(model) for model in models}), tmp_path / "out")
    before, *after = (flat(read(model)) for model in models)
    assert torch.equal(flat(read(out)), rules.average(before, [before, *after]))


def test_another_storage_dtype(folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16)
    recipe = Recipe("average", {m.name: str(m) for m in models}, str(base), dtype="float32")
    out = compose(recipe, tmp_path / "out")
    wanted = rules.average(flat(read(base)).float(), [flat(read(model)).float() for model in models])
    assert torch.equal(flat(read(out)), wanted)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rule": "tise"}, "no rule 'tise'; did you mean 'ties'"),
    ({"rule": "ties", "settings": {"density": 0}}, "density: 0 is no share to keep"),
    ({"rule": "ties", "settings": {"density": 1.5}}, "density: 1.5 is no share to keep"),
    ({"rule": "ties", "settings": {"densty": 0.5}}, "did you mean 'density'"),
    ({"rule": "ties", "settings": {"merge": "median"}}, "merge: 'median'"),
    ({"rule": "dare", "settings": {"drop": 1.0}}, "drop: 1.0 is no share to drop"),
    ({"rule": "dare", "settings": {"then": "sac"}}, "then: 'sac'"),
    ({"rule": "dare", "settings": {"then": "ties", "drop": 0.5, "density": 0.2}}, "trims what dropping 0.5 leaves"),
    ({"rule": "average", "settings": {"weight": float("nan")}}, "a finite number is expected"),
    ({"rule": "average", "per_model": {"m1": {"weight": 0.5}, "m2": {"weight": 0.6}}}, "sum to 1.1"),
    ({"rule": "average", "per_model": {"m1": {"weight": 0.5}}}, "per_model.m2.weight: missing"),
    ({"rule": "mmer", "per_model": {"m3": {"significance": 0.5}}}, "no model 'm3'"),
    ({"rule": "mmer", "per_model": {"m1": {"significance": -1}}}, "a number from 0 is expected"),
    ({"rule": "mmer", "per_model": {"m1": {"density": 0.5}}}, "no such setting of one model"),
    ({"rule": "sac"}, "2 models; exactly 1 is expected"),
    ({"rule": "ties", "models": {}}, "models: none"),
    ({"rule": "ties", "models": {"a/b": "m1"}}, "cannot be a name"),
    ({"rule": "ties", "dtype": "float8"}, "dtype: 'float8'"),
    ({"rule": "ties", "densities": 1}, "no such setting of a recipe"),
]


@pytest.mark.parametrize(("tree", "message"), WRONG)
def test_a_wrong_recipe_says_what_is_wrong(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        Recipe.from_dict({"models": {"m1": "a", "m2": "b"}, **tree})


def test_fewer_than_two_models(folders: Folders, tmp_path: Path) -> None:
    base, models = folders(models=1)
    with pytest.raises(MergeError, match="1 given, at least 2 expected"):
        compose(Recipe("mmer", {"m1": str(models[0])}, str(base)), tmp_path / "out")
    done = command("ties", "--base", str(base), "--model", f"m1={models[0]}", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "at least 2 expected" in done.stderr.replace("\n", " ")


def test_wrong_settings_of_a_rule_of_tensors(folders: Folders, tmp_path: Path) -> None:
    base, models = folders(models=1)
    with pytest.raises(MergeError, match="alpha 2"):
        compose(Recipe("sac", {"m1": str(models[0])}, str(base), {"alpha": 2.0}), tmp_path / "out")
    with pytest.raises(MergeError, match="alpa"):
        compose(Recipe("sac", {"m1": str(models[0])}, str(base), {"alpa": 0.2}), tmp_path / "out")


def test_a_base_must_be_known(folders: Folders, tmp_path: Path) -> None:
    _, models = folders()
    with pytest.raises(MergeError, match=r"base: not named.*--base FOLDER"):
        compose(Recipe("ties", {m.name: str(m) for m in models}), tmp_path / "out")


def test_an_output_is_never_overwritten(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    recipe = Recipe("ties", {m.name: str(m) for m in models}, str(base))
    for out in (models[0], base, models[0] / "inside", tmp_path):
        with pytest.raises(MergeError, match=r"output (is|contains|is inside)"):
            compose(recipe, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_checkpoints_of_another_base_are_refused(tmp_path: Path) -> None:
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    manifest = read_json(folders["audio"] / "manifest.json")
    manifest["llm"]["sha256"] = "0" * 64
    (folders["audio"] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MergeError, match=r"audio.*base"):
        open_inputs(Recipe("average", {name: str(folder) for name, folder in folders.items()}))


def test_one_modality_from_two_models_is_refused(tmp_path: Path) -> None:
    folders = [grown(tmp_path / "a", "image", None), grown(tmp_path / "b", "audio", None)]
    other = grown(tmp_path / "c", "image", LoraSpec(4, 4.0))
    connector = other / "connectors.image.safetensors"
    connector.unlink()
    connector.write_bytes((folders[0] / connector.name).read_bytes())
    with torch.no_grad():
        model = checkpoint.load(folders[0])
        next(model.connectors["image"].parameters()).add_(1.0)
        checkpoint.save(model, tmp_path / "d", history=[])
    with pytest.raises(MergeError, match="image"):
        open_inputs(Recipe("average", {"a": str(folders[0]), "d": str(tmp_path / "d")}))


def test_a_model_that_goes_on_from_a_composed_one(tmp_path: Path) -> None:
    """Its LLM is inside, and its ledger counts."""
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    both = compose(Recipe("average", {name: str(folder) for name, folder in folders.items()}), tmp_path / "both")
    model = checkpoint.load(both)
    model.adapter.open(seed=5)
    with torch.no_grad():
        for parameter in model.adapter.parameters().values():
            parameter.add_(0.01)
    model.adapter.fold()
    checkpoint.save(model, tmp_path / "later", history=[])
    recipe = Recipe("keep_new", {"later": str(tmp_path / "later")}, str(base_folder("miniworld")))
    again = checkpoint.load(compose(recipe, tmp_path / "again"))
    for name, weight in llm_weights(model).items():
        torch.testing.assert_close(llm_weights(again)[name], weight, rtol=1e-5, atol=1e-6)


def test_a_composed_model_must_be_restored_first(tmp_path: Path) -> None:
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    out = compose(Recipe("mmer", {name: str(folder) for name, folder in folders.items()}), tmp_path / "both")
    with pytest.raises(MergeError, match="graftlm restore"):
        open_inputs(Recipe("average", {"both": str(out), "image": str(folders["image"])}))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_inputs(Recipe("average", {"a": str(tmp_path / "gone"), "b": str(tmp_path / "gone")}))


def test_a_full_disk_says_so_and_keeps_nothing_half_written(folders: Folders, tmp_path: Path) -> None:
    """A file system of its own, of 300 kB, on which two copies of the model do not fit."""
    base, models = folders(torch.float32)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        with pytest.raises((MergeError, RunError), match=r"free|space"):
            compose(Recipe("average", {m.name: str(m) for m in models}, str(base)), disk / "out")
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


CLI = [sys.executable, "-m", "graftlm.cli.main", "compose"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_the_command(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    given = [each for model in models for each in ("--model", f"{model.name}={model}")]
    done = command("ties", "--base", str(base), *given, "--out", str(tmp_path / "out"), "density=0.5")
    assert done.returncode == 0, done.stderr
    assert "writes" in done.stderr and "composed" in done.stdout
    wanted = rules.ties(flat(read(base)), [flat(read(model)) for model in models], density=0.5)
    assert torch.equal(flat(read(tmp_path / "out")), wanted)
    (tmp_path / "recipe.yaml").write_text(json.dumps(read_recipe(tmp_path / "out").to_dict()))
    again = command(str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert torch.equal(flat(read(tmp_path / "again")), wanted)
    main = [*CLI[:-1], "plan", str(tmp_path / "recipe.yaml"), "density=0.3", "--json"]
    told = subprocess.run(main, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["passes"] == 2
    planned = command(str(tmp_path / "recipe.yaml"), "--plan")
    assert planned.returncode == 0 and "2 times" in planned.stderr


def test_the_command_says_what_is_wrong(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    for arguments, message in (
        (["ties", "--model", "a=x", "--model", "a=y"], "'a' is named twice"),
        (["ties", "--model", "a"], "NAME=FOLDER is expected"),
        (["ties", "--model", f"a={models[0]}", "--model", f"b={models[1]}", "--base", str(base)], "--out: missing"),
        (["ties", "--model", f"a={models[0]}", "half"], "KEY=VALUE is expected"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert message in done.stderr.replace("\n", " ")
    (tmp_path / "twice.yaml").write_text("rule: ties\nmodels: {image: a, image: b}\n")
    done = command(str(tmp_path / "twice.yaml"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "'image' is given twice" in done.stderr


def test_an_adapter_whose_scale_changes_starts_again(tmp_path: Path) -> None:
    """The config of an adapter decides what it adds, so it is one of the inputs."""
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    inputs = open_inputs(Recipe("average", {name: str(folder) for name, folder in folders.items()}))
    assert {path.name for path in inputs.files} >= {"manifest.json", "config.json", "000.safetensors"}


def test_a_damaged_checkpoint_is_not_composed(tmp_path: Path) -> None:
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    path = folders["audio"] / "connectors.audio.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"connectors\.audio\.safetensors.*damaged"):
        compose(Recipe("average", {name: str(folder) for name, folder in folders.items()}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_stay_apart_have_one_modality_each(tmp_path: Path) -> None:
    image = grown(tmp_path / "image", "image", LoraSpec(4, 4.0))
    model = checkpoint.load(image)
    model.add_modality(MODALITIES["audio"], seed=1)
    checkpoint.save(model, tmp_path / "two", history=[])
    with pytest.raises(MergeError, match="has the modalities image, audio; one per model"):
        open_inputs(Recipe("mmer", {"two": str(tmp_path / "two"), "image": str(image)}))


def test_models_with_their_llm_inside_are_composed_again(tmp_path: Path) -> None:
    """Restore, or merge, then compose: what comes out refers to the base, and can be read."""
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    base = str(base_folder("miniworld"))
    inside = {
        name: str(compose(Recipe("keep_new", {name: str(folder)}), tmp_path / f"{name}-inside"))
        for name, folder in folders.items()
    }
    model = checkpoint.load(compose(Recipe("mmer", inside, base), tmp_path / "both"))
    assert list(model.specs) == list(MODALITIES)


def test_a_density_is_a_share_of_the_whole_model(tmp_path: Path) -> None:
    """Tensors that no model changed count: trimming does not depend on how the models are stored."""
    folders = {name: grown(tmp_path / name, name, LoraSpec(4, 4.0)) for name in MODALITIES}
    inputs = open_inputs(Recipe("mmer", {name: str(folder) for name, folder in folders.items()}))
    assert inputs.numel < inputs.whole == sum(info.numel for info in inputs.base.tensors.values())
