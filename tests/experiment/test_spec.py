"""The experiment file: what is read, what is refused, and how the refusal reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError, MethodConflict
from graftlm.experiment import reading
from graftlm.experiment.spec import ExperimentSpec, library, load

NAME = "mera-miniworld"


@pytest.mark.parametrize("name", sorted(library()))
def test_packaged_experiments_load_and_check(name: str) -> None:
    spec = load(name)
    spec.check()
    assert spec.name == name
    header = library()[name].read_text()
    assert all(word in header for word in ("Paper:", "Expected:", "Needs:"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["methods=[replay,realign]", "seed=3", "model.lora=null", "data.conflict=0.5"],
        ["phases.finetune.epochs=1", "model.modalities.image.connector.pool=2"],
        ["phases=[{name: one, trainable: [llm], lr: {llm: 1e-3}, kinds: null}]", "methods.x=mera", "jobs=1"],
    ],
)
def test_yaml_round_trip(overrides: list[str]) -> None:
    spec = load(NAME, overrides)
    again = ExperimentSpec.from_yaml(spec.to_yaml())
    assert again == spec
    assert again.to_yaml() == spec.to_yaml()
    assert yaml.safe_load(spec.to_yaml()) == spec.to_dict()  # any other reader sees the same


def test_overrides_reach_their_place() -> None:
    spec = load(
        NAME,
        [
            "data.size=smoke",
            "model.lora.rank=8",
            "seed=1",
            "methods.mera[0].mera.fraction=0.25",
            "model.modalities.audio.connector.queries=4",
            "model.modalities.image.encoder.weights=null",
        ],
    )
    assert (spec.data.size, spec.seed) == ("smoke", 1)
    assert spec.model.lora is not None and spec.model.lora.rank == 8
    assert spec.mixes()["mera"] == [{"mera": {"fraction": 0.25}}]
    assert spec.model.modalities["audio"].connector.settings == {"queries": 4}
    assert spec.model.modalities["image"].encoder.weights is None


def test_list_of_ingredients_is_one_method_named_after_them() -> None:
    assert list(load(NAME, ["methods=[replay,{realign: {fraction: 0.01}}]"]).mixes()) == ["replay+realign"]
    assert load(NAME, ["methods=[mera]"]).mixes() == {"mera": ["mera"]}


def test_named_schedule_with_a_change() -> None:
    plain, changed = (
        load(NAME).schedule(),
        load(NAME, ["phases.finetune.epochs=7", "phases.realign.lr.connectors=1e-4"]).schedule(),
    )
    assert [phase.epochs for phase in changed.phases] == [plain.phases[0].epochs, 7]
    assert changed.phases[1].lr == plain.phases[1].lr
    assert changed.realign.lr == {"connectors": 1e-4}


def test_phases_written_out() -> None:
    spec = load(
        NAME,
        ["phases=[{name: one, trainable: [connectors.current, llm], lr: {connectors: 1e-3, llm: 2e-4}, epochs: 2}]"],
    )
    (phase,) = spec.schedule().phases
    assert phase.trainable == {"connectors.current", "llm"}
    assert phase.lr == {"connectors": 1e-3, "llm": 2e-4}
    assert phase.kinds is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "sed: no such setting; did you mean 'seed'?"),
        ("model.lora.rnak=8", "model.lora.rnak: no such setting; did you mean 'rank'?"),
        ("model.modalities.image.encodr=x", "model.modalities.image.encodr: no such setting; did you mean 'encoder'?"),
        ("phases.finetune.epohcs=1", "phases.finetune.epohcs: no such setting; did you mean 'epochs'?"),
        (
            "phases=[{name: a, trainable: [llm], lr: {llm: 1}, epohcs: 2}]",
            "phases[0].epohcs: no such setting; did you mean 'epochs'?",
        ),
        ("phases=[{name: a, trainable: [llm]}]", "phases[0].lr: missing; a phase that is written out needs it."),
        (
            "phases=[{name: a, trainable: [lmm], lr: {llm: 1}}]",
            "phases[0].trainable[0]: no part 'lmm' that can be trained; did you mean 'llm'?",
        ),
        ("data.size=smok", "data.size: 'smok' does not fit; did you mean 'smoke'?"),
        ("data.conflict=2", "data.conflict: 2 does not fit; input should be less than or equal to 1."),
        ("seed=-1", "seed: -1 does not fit; input should be greater than or equal to 0."),
        ("seed=x", "seed: 'x' does not fit; input should be a valid integer."),
        ("seed=true", "seed: True does not fit; input should be a valid integer."),
        ("jobs=0", "jobs: 0 does not fit; auto, or a number of processes from 1, is expected."),
        ("device=gpu", "device: 'gpu' does not fit;"),
        (
            "stream=miniworld-sequentail",
            "stream: no stream 'miniworld-sequentail'; did you mean 'miniworld-sequential'?",
        ),
        ("methods=[meera]", "methods[0]: no method 'meera'; did you mean 'mera'?"),
        ("methods={a: [replay, {realing: {}}]}", "methods.a[1]: no method 'realing'; did you mean 'realign'?"),
        ("methods=[]", "methods: [] does not fit; a list of ingredients is expected, for example [merge, realign]."),
        ("methods={}", "methods: no method is named; at least one is expected."),
        ("methods=[{mera: {}, replay: {}}]", "name, or {name: {setting: value}}, is expected."),
        (
            "methods=3",
            "methods: 3 does not fit; a list of ingredients, or a mapping of names to such lists, is expected.",
        ),
        ("methods={a/b: [mera]}", "'a/b' cannot be the name of a folder"),
        ("methods={..: [mera]}", "'..' cannot be the name of a folder"),
        ("name=../up", "name: '../up' cannot be the name of a folder"),
        ("model.modalities.image.encoder=mini-imgae", "encoder: no encoder 'mini-imgae'; did you mean 'mini-image'?"),
        (
            "model.modalities.image.connector.kind=mpl",
            "model.modalities.image.connector.kind: no connector 'mpl'; did you mean 'mlp'?",
        ),
        ("model.modalities={}", "model.modalities: {} does not fit;"),
        (
            "model.modalities.image={encoder: mini-image}",
            "model.modalities.image.connector: missing; this setting is required.",
        ),
        ("evaluate.limit=0", "evaluate.limit: 0 does not fit;"),
    ],
)
def test_wrong_setting_is_named_with_its_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(NAME, [override])
    assert message in str(caught.value)


def test_every_wrong_setting_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load(NAME, ["seed=x", "data.size=smok", "model.dtype=float23"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[{mera: {fractoin: 0.1}}]", "methods[0].mera.fractoin: no such setting; did you mean 'fraction'?"),
        ("methods.mera[0].mera.fraction=2", "methods.mera[0].mera.fraction: 2"),
        ("methods={a: [finetune, {realign: {noise: -1}}]}", "methods.a[1].realign.noise: -1"),
        ("phases=miniwrold", "phases: no schedule 'miniwrold'; did you mean 'miniworld'?"),
        ("phases.finetun.epochs=1", "phases.finetun: no phase of schedule 'miniworld'; did you mean 'finetune'?"),
        ("phases=[{name: a, trainable: [llm], lr: {connectors: 1}}]", "phases.a.lr: no learning rate for 'llm'"),
        ("model.llm=no/such/folder", "model.llm: no folder 'no/such/folder'."),
        (
            "model.modalities.audio.connector.querys=4",
            "model.modalities.audio.connector.querys: no such setting; did you mean 'queries'?",
        ),
        ("model.modalities.audio.connector.queries=x", "model.modalities.audio.connector.queries: 'x' does not fit;"),
        (
            "model.modalities.image.encoder={kind: mini-image, settings: {a: 1}}",
            "image.encoder.settings.a: no such setting",
        ),
        ("model.modalities.image.encoder.weights=no.safetensors", "image.encoder.weights: no file 'no.safetensors'"),
        ("data.root=/tmp", "data.root: '/tmp', but stream miniworld-sequential is generated. Leave it out."),
        ("stream=mera-sequential", "data.root: no folder 'None'. Stream mera-sequential needs the folder"),
    ],
)
def test_check_refuses_what_only_the_rooms_know(override: str, message: str) -> None:
    spec = load(NAME, [override])
    with pytest.raises(ConfigError) as caught:
        spec.check()
    assert message in str(caught.value)


def test_check_refuses_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: 'cuda', but torch finds no GPU"):
        load(NAME, ["device=cuda"]).check()
    assert load(NAME).device_name() == "cpu"


def test_check_refuses_ingredients_that_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.methods.replay.Replay.adapter", "run")
    with pytest.raises(MethodConflict, match="cannot share the LLM"):
        load(NAME, ["methods=[replay, merge]"]).check()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed' is not a setting; key=value is expected"),
        ("=1", "is not a setting"),
        ("a..b=1", "is not a setting"),
        ("seed.x=1", "seed.x"),
        ("methods.mera[4].mera.fraction=1", "methods.mera[4]: no such entry; 1 are there"),
        ("seed=[1", "line 1, column"),
    ],
)
def test_malformed_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(NAME, ["seed=1", override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\nseed: 1", "line 2, column 5: not YAML"),
        ("seed: 1\nseed: 2", "line 2, column 1: not YAML: 'seed' is given twice"),
        ("1: 2", "line 1, column 1: not YAML: a key must be text; quote it"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("- 1", "A mapping of settings is expected"),
        ("", "A mapping of settings is expected"),
    ],
)
def test_file_that_is_no_experiment(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


def test_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no file and no experiment 'mera-minworld'; did you mean 'mera-miniworld'\?"
    ):
        load("mera-minworld")


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    tree = load(NAME).to_dict()
    del tree["name"]
    path = tmp_path / "mine.yaml"
    path.write_text(reading.write(tree))
    assert load(path).name == "mine"


def test_scalars_are_those_of_yaml_1_2() -> None:
    read = reading.parse("{a: 1e-3, b: yes, c: 2024-01-01, d: -2, e: .5, f: null, g: true, h: 1:30}", "x")
    assert read == {"a": 1e-3, "b": "yes", "c": "2024-01-01", "d": -2, "e": 0.5, "f": None, "g": True, "h": "1:30"}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aeyno1.-:_ é", max_size=6)
)


@given(st.dictionaries(st.text("abn1_", min_size=1, max_size=4), SCALARS | st.lists(SCALARS, max_size=3), max_size=4))
def test_written_trees_are_read_back(tree: dict[str, object]) -> None:
    assert reading.parse(reading.write(tree), "x") == tree
    assert yaml.safe_load(reading.write(tree)) == tree


def test_speed_settings_do_not_change_the_identity() -> None:
    assert load(NAME, ["jobs=1"]).digest == load(NAME).digest
    assert load(NAME, ["seed=1"]).digest != load(NAME).digest


def test_loading_imports_no_torch() -> None:
    code = f"import sys; from graftlm.experiment.spec import load; load({NAME!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
