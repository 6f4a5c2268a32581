"""Settings of a recipe are chosen on validation data, for each model its own, and what was measured is kept."""

from pathlib import Path

import pytest
import torch

from graftlm.core.errors import ConfigError, MergeError
from graftlm.core.files import read_json
from graftlm.data import streams
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.types import Task
from graftlm.experiment import calibrate as module
from graftlm.experiment.calibrate import calibrate
from graftlm.merging.recipe import Recipe
from graftlm.model import checkpoint
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, ModalitySpec, ModelSpec

MODALITIES = {
    "image": ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("mlp")),
    "audio": ModalitySpec("audio", EncoderSpec("mini-audio", "miniworld"), ConnectorSpec("qformer", {"queries": 8})),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(WorldSpec("tiny", 0, 0.0, 4), tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, spec in MODALITIES.items():
        model = MultimodalLM.build(ModelSpec("miniworld", tuple(MODALITIES.values()), None))
        model.add_modality(spec, seed=1)
        model.adapter.open(seed=0)
        generator = torch.Generator().manual_seed(ord(name[0]))
        with torch.no_grad():
            for parameter in model.adapter.parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.003)
        model.adapter.fold()
        checkpoint.save(model, root / name, history=[])
    return {name: str(root / name) for name in MODALITIES}


def questions(world: Path) -> list[Task]:
    stream = streams.miniworld(world)
    return [task for stage in stream.stages for task in stage.tasks if task.metric != "cider"]


def test_each_model_gets_its_own_best(
    world: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice follows the retention that was measured; here it is dictated, to differ between the models."""
    dictated = {0.3: {"image": 90.0, "audio": 99.0}, 1.5: {"image": 95.0, "audio": 80.0}}
    monkeypatch.setattr(module, "_try", lambda recipe, *_: dictated[recipe.settings["significance"]])
    recipe = Recipe("mmer", models, settings={"density": 0.8})
    chosen = calibrate(recipe, {"significance": [0.3, 1.5]}, questions(world), tmp_path / "scores", limit=2)
    assert chosen.per_model == {"image": {"significance": 1.5}, "audio": {"significance": 0.3}}
    assert chosen.settings == {"density": 0.8}


def test_a_shared_setting_is_the_best_of_the_mean(
    world: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated = {0.2: {"image": 90.0, "audio": 99.0}, 0.5: {"image": 95.0, "audio": 95.0}}
    monkeypatch.setattr(module, "_try", lambda recipe, *_: dictated[recipe.settings["scale"]])
    chosen = calibrate(
        Recipe("arithmetic", models), {"scale": [0.2, 0.5]}, questions(world), tmp_path / "scores", limit=2
    )
    assert chosen.settings == {"scale": 0.5} and chosen.per_model == {}


def test_it_measures_for_real_and_remembers(world: Path, models: dict[str, str], tmp_path: Path) -> None:
    tasks, told = questions(world), []
    recipe = Recipe("mmer", models)
    grid = {"significance": [0.5, 4.0]}
    chosen = calibrate(recipe, grid, tasks, tmp_path / "scores", limit=4, progress=lambda *each: told.append(each))
    written = read_json(tmp_path / "scores" / "calibration.json")
    assert len(written["tried"]) == 2 and told
    assert not list((tmp_path / "scores").rglob("composed"))
    assert calibrate(recipe, grid, tasks, tmp_path / "scores", limit=4) == chosen


def test_what_cannot_be_calibrated(world: Path, models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audio .*none of the data sets"):
        tasks = [task for task in questions(world) if "audio" not in task.modalities]
        calibrate(Recipe("mmer", models), {"significance": [0.5]}, tasks, tmp_path / "a", limit=1)
    with pytest.raises(MergeError, match="no such setting"):
        calibrate(Recipe("mmer", models), {"signficance": [0.5]}, questions(world), tmp_path / "b", limit=1)
