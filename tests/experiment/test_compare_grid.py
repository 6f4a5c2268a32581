"""What a comparison is made of: words to methods and orders, a folder that grows, candidates for tuning."""

from pathlib import Path

import pytest

from graftlm.core.errors import ConfigError, RunError
from graftlm.experiment.grid import Grid, make_grid, parse_methods, parse_order, remember
from graftlm.experiment.spec import ExperimentSpec, load
from graftlm.experiment.store import RunStore
from graftlm.experiment.tuning import Tuning, candidates, parse_grid


@pytest.fixture(scope="module")
def spec() -> ExperimentSpec:
    return load("mera-miniworld", ["data.size=tiny"])


def grid(spec: ExperimentSpec, *methods: str, orders: tuple[str, ...] = (), seeds: tuple[int, ...] = (0,)) -> Grid:
    return make_grid(spec, methods, orders, seeds)


@pytest.mark.parametrize(
    ("word", "name", "entries"),
    [
        ("mera", "mera", [{"mera": {"fraction": 0.10}}]),  # the file's method of that name, not the ingredient
        ("replay", "replay", ["replay"]),
        ("ewc+realign", "ewc+realign", ["ewc", "realign"]),
        (
            "ewc:strength=1e+3,fraction=.1+realign",
            "ewc-strength-1e+3-fraction-.1+realign",
            [{"ewc": {"strength": 1000.0, "fraction": 0.1}}, "realign"],
        ),
        (
            "select:modules=[q_proj, v_proj]",
            "select-modules-q_proj-v_proj",
            [{"select": {"modules": ["q_proj", "v_proj"]}}],
        ),
        (
            "[replay, {realign: {fraction: 0.2}}]",
            "replay+realign-fraction-0.2",
            ["replay", {"realign": {"fraction": 0.2}}],
        ),
        ("both: [replay, merge]", "both", ["replay", "merge"]),
        ("{replay: {repeat: 2}}", "replay-repeat-2", [{"replay": {"repeat": 2}}]),
    ],
)
def test_a_method_is_a_name_a_mix_or_yaml(spec: ExperimentSpec, word: str, name: str, entries: list[object]) -> None:
    assert parse_methods([word], spec) == {name: entries}
    grid(spec, word)  # and an experiment takes it


def test_all_is_every_method_of_the_file(spec: ExperimentSpec) -> None:
    assert list(parse_methods(["all", "eproj"], spec)) == [*spec.mixes(), "eproj"]
    assert list(make_grid(spec).methods) == list(spec.mixes())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("finetun", "no method and no ingredient 'finetun'; did you mean 'finetune'"),
        ("ewc+realing", "no ingredient 'realing'; did you mean 'realign'"),
        ("ewc:1e3", "'1e3' is no setting; key=value is expected"),
        ("mine: [replai]", "no method 'replai'; did you mean 'replay'"),
        ("{a: 1, b: 2}", "does not fit; a name, ingredients joined by"),
    ],
)
def test_a_wrong_method_is_named(spec: ExperimentSpec, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(spec, word)


def test_two_methods_of_one_name_are_refused(spec: ExperimentSpec) -> None:
    with pytest.raises(ConfigError, match="'a' names two different methods"):
        grid(spec, "a: [replay]", "a: [merge]")


def test_orders(spec: ExperimentSpec) -> None:
    read = [parse_order(word, spec) for word in ("given", "reverse", "audio>image", "miniworld-reverse")]
    assert [order.label for order in read] == ["given", "reverse", "audio-image", "miniworld-reverse"]
    made = make_grid(spec, ["finetune"], ["reverse", "audio>image", "miniworld-reverse"], [3])
    assert [made.run(order, 3).order for order in made.orders] == ["reverse", ["audio", "image"], "given"]
    assert made.run(made.orders[2], 3).stream == "miniworld-reverse"
    with pytest.raises(ConfigError, match=r"'revers' is no order.*did you mean 'reverse'"):
        parse_order("revers", spec)


def test_without_orders_the_experiment_has_its_own() -> None:
    own = make_grid(load("mera-miniworld", ["order=[audio]"])).orders[0]
    assert (own.label, own.stages) == ("audio", ["audio"])
    assert make_grid(load("mera-miniworld", ["order=reverse"])).orders[0].label == "reverse"


def test_what_is_named_twice_or_missing_is_refused(spec: ExperimentSpec) -> None:
    with pytest.raises(ConfigError, match="--seeds: 1 is named twice"):
        make_grid(spec, ["finetune"], [], [1, 1])
    with pytest.raises(ConfigError, match="--orders: given is named twice"):
        make_grid(spec, ["finetune"], ["given", "given"], [])
    with pytest.raises(ConfigError, match=r"--against: no method 'mer'.*did you mean 'mera'"):
        make_grid(spec, ["mera"], against="mer")
    with pytest.raises(ConfigError, match="composes experts"):
        make_grid(load("mmer-miniworld"))


def test_a_folder_grows(spec: ExperimentSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    remember(grid(spec, "finetune", "replay"), out)
    whole = remember(grid(spec, "merge", orders=("reverse",), seeds=(2,)), out)
    assert list(whole.methods) == ["finetune", "replay", "merge"]
    assert [order.label for order in whole.orders] == ["given", "reverse"]
    assert whole.seeds == (0, 2)
    with pytest.raises(RunError, match=r"another comparison.*\n  methods.replay: \['replay'\] there"):
        remember(grid(spec, "replay: [merge]"), out)
    with pytest.raises(RunError, match=r"experiment.data: .*tiny.* there, .*smoke"):
        remember(grid(load("mera-miniworld", ["data.size=smoke"]), "finetune"), out)


def test_another_folder_is_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(RunError, match=r"not empty \(holiday.txt\) and no comparison"):
        remember(grid(spec, "finetune"), tmp_path)


def test_a_run_takes_more_methods_but_no_other_ones(spec: ExperimentSpec, tmp_path: Path) -> None:
    first, second = grid(spec, "finetune"), grid(spec, "merge")
    order = first.orders[0]
    store = RunStore.grow(tmp_path / "run", first.run(order, 0))
    store.summary_path.write_text("{}")
    assert RunStore.grow(tmp_path / "run", first.run(order, 0)).summary_path.is_file()
    grown = RunStore.grow(tmp_path / "run", second.run(order, 0))
    assert list(grown.spec.mixes()) == ["finetune", "merge"]
    assert not grown.summary_path.exists()  # there is a method that it does not sum up
    with pytest.raises(RunError, match=r"another experiment.*\n  methods.merge"):
        RunStore.grow(tmp_path / "run", grid(spec, "merge: [replay]").run(order, 0))
    with pytest.raises(RunError, match="seed: 0 there, 1 here"):
        RunStore.grow(tmp_path / "run", first.run(order, 1))


def values(method: str, entries: list[object], tuning: Tuning, rate: float | None = 1e-3) -> list[dict[str, object]]:
    return [dict(each.settings) for each in candidates(method, entries, tuning, rate)]


def test_every_method_gets_as_many_candidates() -> None:
    tuning = Tuning(budget=4)
    ewc = values("ewc", ["ewc"], tuning)
    assert [each["ewc.strength"] for each in ewc] == [1e2, 1e3, 1e4, 1e5]
    both = values("ewc+realign", ["ewc", "realign"], tuning)
    assert sorted(each["ewc.strength"] for each in both) == [1e2, 1e3, 1e4, 1e5]  # type: ignore[type-var]
    assert sorted(each["realign.lr"] for each in both) == [5e-4, 1e-3, 2e-3, 4e-3]  # type: ignore[type-var]
    assert values("ewc+realign", ["ewc", "realign"], tuning) == both
    assert values("finetune", ["finetune"], tuning) == [{}]
    assert values("ewc", ["ewc"], Tuning(budget=1)) == [{}]


def test_fewer_candidates_are_spread_over_the_values() -> None:
    assert [each["ewc.strength"] for each in values("ewc", ["ewc"], Tuning(budget=2))] == [1e2, 1e5]


def test_what_the_file_sets_is_not_tuned_unless_asked_for() -> None:
    given = [{"ewc": {"strength": 5.0}}]
    assert values("ewc", list(given), Tuning()) == [{}]
    made = candidates("ewc", list(given), Tuning(grid=parse_grid(["ewc.strength=1e2,3"])), None)
    assert [each.entries for each in made] == [[{"ewc": {"strength": 100.0}}], [{"ewc": {"strength": 3}}]]
    assert len({each.name for each in made}) == 2
    # a running average has no alpha, SAC has
    assert values("merge", ["merge"], Tuning()) == [{}]
    assert len(values("sac", [{"merge": {"rule": "sac"}}], Tuning())) == 4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ewc.strength", "'ewc.strength' does not fit"),
        ("replya.repeat=1", "no ingredient 'replya'; did you mean 'replay'"),
        ("ewc.strenght=1", "ewc has no setting 'strenght'; did you mean 'strength'"),
    ],
)
def test_a_wrong_grid_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_grid([word])


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tune-budget: 0"):
        Tuning(budget=0)
