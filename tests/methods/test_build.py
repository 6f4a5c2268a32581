"""Ingredients from what an experiment file says."""

import pytest

from graftlm.core.errors import ConfigError
from graftlm.methods import METHODS, build, describe
from graftlm.methods.eproj import EProj
from graftlm.methods.mera import Merge, Realign
from graftlm.methods.replay import Replay


def test_names_and_settings() -> None:
    mix = build(["eproj", {"replay": {"fraction": 0.01}}, {"mera": {"fraction": 0.2, "noise": 0.5}}])
    assert mix == [EProj(), Replay(0.01), Merge(), Realign(0.2, 0.5)]
    assert describe(mix)[1]["fraction"] == 0.01


def test_every_method_declares_paper_and_differences() -> None:
    import importlib

    for target in METHODS.table().values():
        text = importlib.import_module(target.split(":")[0]).__doc__ or ""
        assert "Paper:" in text and "Differs:" in text, target


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["meera"], r"methods\[0\]: no method 'meera'; did you mean 'mera'\?"),
        (
            [{"replay": {"fractoin": 0.1}}],
            r"methods\[0\]\.replay\.fractoin: no such setting; did you mean 'fraction'\?",
        ),
        ([{"replay": {"fraction": 1.5}}], r"methods\[0\]\.replay\.fraction: 1\.5 is not a share"),
        ([{"replay": {"fraction": -0.1}}], r"methods\[0\]\.replay\.fraction: -0\.1 is not a share"),
        ([{"mera": {"fraction": 2}}], r"methods\[0\]\.mera\.fraction: 2\.0 is not a share"),
        ([{"realign": {"noise": -1}}], r"methods\[0\]\.realign\.noise: -1\.0 is not a share"),
        ([{"realign": {"epochs": "many"}}], r"methods\[0\]\.realign\.epochs: 'many' does not fit"),
        ([{"merge": {"weight": 7}}], r"methods\[0\]\.merge\.weight: 7\.0 is not a share"),
    ],
)
def test_wrong_settings_are_named_by_their_path(entries: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(entries)  # type: ignore[arg-type]
