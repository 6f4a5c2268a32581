"""Experiments that are packaged, and those of full scale: read, their methods built, and refused for missing folders only.

A file of full scale may name encoders that a plug-in has to bring, if its header says so; here the mini world's come instead.
"""

from pathlib import Path

import pytest
import yaml

from graftlm import methods as shelf
from graftlm.core.errors import ConfigError
from graftlm.experiment.spec import library, load
from graftlm.experiment.tables import registry
from graftlm.learning.method import check_adapters
from graftlm.model.encoders import ENCODERS

FULL = {path.stem: path for path in sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))}
"""Experiments whose models and data are not in the package."""

FILES = [*library().values(), *FULL.values()]


def missing(path: Path) -> set[str]:
    """Kinds of encoders that the package does not have."""
    modalities = yaml.safe_load(path.read_text())["model"]["modalities"].values()
    encoders = [modality["encoder"] for modality in modalities]
    return {each if isinstance(each, str) else each["kind"] for each in encoders} - ENCODERS.table().keys()


@pytest.fixture
def plugged(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file, once every encoder that it names is there."""
    brought = dict.fromkeys(missing(path), "graftlm.model.encoders.mini:ImageEncoder")
    for table in (registry("encoders"), ENCODERS):
        monkeypatch.setattr(table, "_table", table._table | brought)
    return path


def test_every_table_has_its_file() -> None:
    tables = {"sequential", "reverse", "noise", "ablation", "realign-all", "overheads"}
    assert {f"mera-{name}" for name in tables} <= FULL.keys()
    assert {f"mera-miniworld-{name}" for name in ("noise", "ablation", "realign-all", "all")} <= library().keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_methods_build_and_do_not_clash(plugged: Path) -> None:
    spec = load(plugged)
    assert spec.name == plugged.stem
    for name, entries in spec.mixes().items():
        check_adapters(shelf.build(entries, f"methods.{name}"))
    plan = spec.schedule()
    assert all(phase.lr for phase in (*plan.phases, plan.realign))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_headers_say_what_to_expect(path: Path) -> None:
    header = path.read_text().partition("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Paper:", "Expected:", "Needs:"):
        assert header.count(f"\n# {word}") == 1
    if path not in FULL.values():
        assert not missing(path)
    for kind in missing(path):
        assert f"'{kind}'" in header, f"{path.name}: its header does not say that '{kind}' comes from a plug-in"


@pytest.mark.parametrize("path", FULL.values(), ids=lambda path: path.stem)
def test_full_scale_lacks_nothing_but_its_folders(plugged: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.llm: no folder 'models/"):
        load(plugged).check()
    with pytest.raises(ConfigError, match=r"data\.root: no folder"):
        load(plugged, ["model.llm=miniworld", f"data.root={tmp_path / 'none'}"]).check()
    load(plugged, ["model.llm=miniworld", f"data.root={tmp_path}"]).check()
