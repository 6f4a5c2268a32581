"""Sweeps: what is measured is what would be written; what is measured is kept; what is picked, and why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment.finetunes import (
    NEW,
    OLD,
    adapted,
    learned_adapter,
    learned_base,
    learned_whole,
    moved,
    questions,
    weights,
)
from safetensors.torch import load_file, save_file

from graftlm.core.errors import ConfigError, DataError, GraftError, RunError
from graftlm.core.files import read_json, read_jsonl, write_json
from graftlm.data.types import Sample, Task
from graftlm.experiment import sweep as sweeps
from graftlm.experiment.consolidate import consolidate, open_change
from graftlm.experiment.sweep import Criteria, Grid, InPlace, Measure, Written, judge, parse_grid, sweep
from graftlm.experiment.validation import check_metric, read_sets
from graftlm.merging import RULES
from graftlm.model import checkpoint
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec
from graftlm.report.sweep import write_sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = learned_base(folder / "base")
    return {
        "base": base,
        "adapter": learned_adapter(base, folder / "adapter"),
        "whole": learned_whole(base, folder / "whole"),
        "moved": moved(base, folder / "moved"),
        "new": questions(folder / "new.jsonl", NEW),
        "old": questions(folder / "old.jsonl", OLD),
    }


def measure(models: dict[str, Path], metric: str = "exact", **settings: Any) -> Measure:
    new = read_sets([models["new"]], metric, max_new_tokens=3)
    return Measure(new, read_sets([models["old"]], metric, max_new_tokens=3, taken=["new"]), **settings)


def in_place(tuned: Path, base: Path | None, rule: str, folder: Path) -> InPlace:
    change = open_change(tuned, base)
    subject = sweeps._subject(change, rule, base, "cpu", folder)
    assert isinstance(subject, InPlace)
    return subject


# --- what is measured is what would be written ------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", ["adapter", "moved"])
@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("sac", {"alpha": 0.2}),
        ("sac", {"alpha": 0.6, "window": "eq6"}),
        ("sac", {"alpha": 1}),
        ("model_mix", {"alpha": 0.4}),
    ],
)
def test_weights_in_place_are_those_of_the_folder(
    models: dict[str, Path], tmp_path: Path, tuned: str, rule: str, settings: dict[str, Any]
) -> None:
    subject = in_place(models[tuned], models["base"], rule, tmp_path / "scratch")
    subject.at({"alpha": 0.9})  # an earlier value leaves nothing behind
    model, reports = subject.at(settings)
    wanted = weights(consolidate(models[tuned], rule, settings, tmp_path / "out", base=models["base"], form="model"))
    for name, parameter in model.llm.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=0, atol=2e-6)
    assert bool(reports) == (rule == "sac" and not (tuned == "moved" and settings["alpha"] == 1))


def test_end_points_in_place_are_exact(models: dict[str, Path], tmp_path: Path) -> None:
    subject = in_place(models["whole"], models["base"], "sac", tmp_path)
    for end, folder in ((subject.tuned, models["whole"]), (subject.base, models["base"])):
        wanted, model = weights(folder), end()
        assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.llm.named_parameters())


def test_every_matrix_of_a_dense_fine_tune_is_decomposed_once(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = in_place(models["whole"], models["base"], "sac", tmp_path)
    subject.at({"alpha": 0.2})
    assert len(list((tmp_path / "spectra").iterdir())) == sum(x.dim() > 1 for x in weights(models["base"]).values())
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("decomposed again"))
    subject.at({"alpha": 0.3})
    in_place(models["whole"], models["base"], "sac", tmp_path).at({"alpha": 0.3})


def test_a_rule_of_the_whole_model_is_written_and_loaded(models: dict[str, Path], tmp_path: Path) -> None:
    result = sweep(
        models["adapter"],
        "dare",
        {"seed": 1},
        parse_grid("drop=0,0.9"),
        measure(models),
        tmp_path / "s",
        base=models["base"],
    )
    assert [line["value"] for line in result["values"]] == [0.9, 0.0]  # from the base's end to the fine-tune's
    assert result["values"][1]["new"] == 100 and result["base"]["keep"] == 100
    assert not (tmp_path / "s" / "written").exists()


def test_names_that_a_program_does_not_know_are_written_and_loaded(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("base", "moved"):
        folder = tmp_path / name
        folder.mkdir()
        stored = {f"model.{key}" if key.startswith("model.") else key: x for key, x in weights(models[name]).items()}
        for file in models[name].glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change = open_change(tmp_path / "moved", tmp_path / "base")
    known = MultimodalLM.build(ModelSpec(str(models["base"])))
    subject: Any = None
    read = sweeps._read_model
    try:
        sweeps._read_model = lambda *_: known  # what a program that renames weights would give
        subject = sweeps._subject(change, "sac", tmp_path / "base", "cpu", tmp_path / "scratch")
    finally:
        sweeps._read_model = read
    assert isinstance(subject, Written)


# --- a whole sweep ----------------------------------------------------------------------------------------------------


def test_a_sweep_measures_draws_and_picks(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    criteria = Criteria(least_new=50, least_keep=50)
    arguments: Any = (models["adapter"], "model_mix", {}, parse_grid("alpha=0:1:0.1"), measure(models), folder)
    result = sweep(*arguments, base=models["base"], criteria=criteria)
    assert result["values"][0]["keep"] == 100 and result["values"][-1]["new"] == 100
    assert result["tuned"]["keep"] < 20 and result["base"]["new"] < 20
    low, high = result["ideal_region"]
    assert 0 < low <= result["picked"]["value"] <= high < 1
    assert min(result["picked"]["new"], result["picked"]["keep"]) >= 50
    assert read_json(folder / "sweep.json") == result
    assert (folder / "values" / "alpha=0.3" / "predictions" / "new.jsonl").is_file()
    svg, page = (path.read_text() for path in write_sweep(folder))
    assert svg.startswith("<svg xmlns") and "ideal region" in svg and "picked" in svg
    assert "alpha" in page and "<script" not in page


def test_a_sweep_by_sac_says_what_became_of_the_spectra(models: dict[str, Path], tmp_path: Path) -> None:
    grid = parse_grid("alpha=0.0,0.5,1")
    result = sweep(models["adapter"], "sac", {}, grid, measure(models), tmp_path / "s", base=models["base"])
    small, middle, full = (line["spectrum"] for line in result["values"])
    assert small["tensors"] == small["out_of_reach"] == 14
    assert small["window_share"] == [1, 1, 1] and full["window_share"][2] < 1
    assert middle["reached"][0] <= middle["reached"][1] <= middle["reached"][2]
    assert full["reached"] == pytest.approx([1, 1, 1])
    spectra = read_json(tmp_path / "s" / "spectra.json")["0.5"]
    k, r, reached = spectra["model.layers.0.mlp.up_proj.weight"]
    assert 1 < k < r == 8 and 0.4 < reached < 0.6


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from experiment.test_sweep import measure, parse_grid, sweep\n"
        "models = dict(zip(['base', 'adapter', 'new', 'old'], map(Path, sys.argv[1:5])))\n"
        "sweep(models['adapter'], 'sac', {}, parse_grid('alpha=0.2,0.5,0.8'), measure(models), Path(sys.argv[5]), "
        "base=models['base'])"
    )
    command = [sys.executable, "-c", code, *(str(models[name]) for name in ("base", "adapter", "new", "old"))]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    for kill in ("sweep.measured:3", "batch.predicted:1", None):
        environment = os.environ | {"PYTHONPATH": path} | ({"GRAFTLM_KILL_AT": kill} if kill else {})
        done = subprocess.run(
            [*command, str(tmp_path / "killed")], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == (-9 if kill else 0), done.stderr[-2000:]
        lines = read_jsonl(tmp_path / "killed" / "journal.jsonl")
        assert len(lines) == (6 if kill is None else 4)
    grid = parse_grid("alpha=0.2,0.5,0.8")
    whole = sweep(models["adapter"], "sac", {}, grid, measure(models), tmp_path / "whole", base=models["base"])
    assert read_json(tmp_path / "killed" / "sweep.json") == whole


def test_a_finer_grid_measures_only_what_is_new(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: Any = {"base": models["base"]}
    sweep(models["adapter"], "sac", {}, parse_grid("alpha=0.2,0.8"), measure(models), tmp_path, **arguments)
    asked: list[Any] = []
    scores = sweeps._scores

    def watched(model: Any, what: Measure, folder: Path, tell: Any) -> Any:
        asked.append(folder.name)
        return scores(model, what, folder, tell)

    monkeypatch.setattr(sweeps, "_scores", watched)
    sweep(models["adapter"], "sac", {}, parse_grid("alpha=0.2,0.5,0.8"), measure(models), tmp_path, **arguments)
    assert asked == ["alpha=0.5"]
    monkeypatch.setattr(sweeps, "_subject", lambda *_: pytest.fail("models were read"))
    sweep(models["adapter"], "sac", {}, parse_grid("alpha=0.2,0.5"), measure(models), tmp_path, **arguments)


def test_likelihood_measures_what_answers_cannot(models: dict[str, Path], tmp_path: Path) -> None:
    grid = parse_grid("alpha=0.5")
    result = sweep(models["adapter"], "sac", {}, grid, measure(models, "likelihood"), tmp_path, base=models["base"])
    base, tuned = result["base"]["scores"], result["tuned"]["scores"]
    assert base["old"]["value"] > 0.9 and base["new"]["value"] < 0.1
    assert tuned["new"]["value"] > 0.6 and tuned["old"]["value"] < 0.3
    assert result["base"]["keep"] == result["tuned"]["new"] == 100


def test_a_vision_language_model_is_asked_for_text(tmp_path: Path, models: dict[str, Path]) -> None:
    from experiment.finetunes import config, tokenizer
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=config(), image_token_index=3))
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 1e-2)
    asked = measure(models, "likelihood")
    result = sweep(
        tmp_path / "tuned", "sac", {}, parse_grid("alpha=0.3"), asked, tmp_path / "s", base=tmp_path / "base"
    )
    assert result["values"][0]["new"] > 0


def test_stages_of_a_checkpoint(tmp_path: Path) -> None:
    """A new modality against the one before it; what the stages share is weighed together."""
    specs = [
        ModalitySpec(name, EncoderSpec(f"mini-{name}", "miniworld"), ConnectorSpec("mlp"))
        for name in ("image", "audio")
    ]
    model = MultimodalLM.build(ModelSpec("miniworld", tuple(specs), LoraSpec(4, 8.0)))
    for number, spec in enumerate(specs):
        model.add_modality(spec, seed=number)
        generator = torch.Generator().manual_seed(number)
        model.adapter.open(seed=number)
        with torch.no_grad():
            for parameter in [*model.adapter.parameters().values(), *model.connectors.parameters()]:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        model.adapter.fold()
        checkpoint.save(model, tmp_path / spec.name, history=[])
    tasks = [
        Task(name, "instruction", (), "likelihood", (), (Sample("1", name, (), question, ("yes",)),), ())
        for name, question in (("new", "is it red ?"), ("old", "what is this ?"))
    ]
    arguments: Any = (
        tmp_path / "audio",
        "sac",
        {},
        parse_grid("alpha=0.3,1"),
        Measure(tasks[:1], tasks[1:]),
        tmp_path / "s",
    )
    result = sweep(*arguments, base=tmp_path / "image")
    assert result["values"][1]["new"] == pytest.approx(100, abs=1e-3)
    subject = in_place(tmp_path / "audio", tmp_path / "image", "sac", tmp_path)
    got, _ = subject.at({"alpha": 0.3})
    out = consolidate(tmp_path / "audio", "sac", {"alpha": 0.3}, tmp_path / "out", base=tmp_path / "image")
    wanted = checkpoint.load(out)
    for name, parameter in wanted.llm.named_parameters():
        torch.testing.assert_close(got.llm.get_parameter(name), parameter, rtol=0, atol=2e-6)
    for name, tensor in load_file(out / "connectors.image.safetensors").items():
        torch.testing.assert_close(got.connectors["image"].state_dict()[name], tensor, rtol=0, atol=0)


# --- judging ----------------------------------------------------------------------------------------------------------


def judged(new: list[float], keep: list[float], **criteria: Any) -> dict[str, Any]:
    tasks = [Task(name, "instruction", (), "exact", (), (), ()) for name in ("new", "keep")]

    def entry(place: Any, n: float, k: float) -> dict[str, Any]:
        return {"place": place, "scores": {"new": {"value": n}, "keep": {"value": k}}, "spectrum": None}

    values = [entry(i / 10, n, k) for i, (n, k) in enumerate(zip(new, keep, strict=True))]
    return judge(
        Measure(tasks[:1], tasks[1:]), entry("base", 0.1, 0.5), entry("tuned", 0.8, 0.1), values, Criteria(**criteria)
    )


def test_the_ideal_region_lies_between_the_stable_ones() -> None:
    result = judged([0.2, 0.77, 0.78, 0.80, 0.80], [0.5, 0.5, 0.5, 0.48, 0.1])
    assert (result["task_stable_from"], result["general_stable_to"]) == (0.1, 0.3)
    assert result["ideal_region"] == [0.1, 0.3]
    assert result["picked"]["value"] == 0.2
    assert result["picked"]["new"] == pytest.approx(97.5) and result["picked"]["keep"] == pytest.approx(100)


def test_regions_reach_from_an_end_without_a_gap() -> None:
    result = judged([0.2, 0.79, 0.2, 0.79], [0.49, 0.2, 0.49, 0.2])
    assert (result["task_stable_from"], result["general_stable_to"]) == (0.3, 0.0)
    assert result["ideal_region"] is None


def test_without_an_ideal_region_the_best_of_all_is_picked() -> None:
    result = judged([0.1, 0.4, 0.8], [0.5, 0.4, 0.1])
    assert result["ideal_region"] is None and result["picked"]["value"] == 0.1
    assert judged([0.1, 0.4, 0.8], [0.1, 0.1, 0.1])["general_stable_to"] is None
    assert judged([0.1, 0.4, 0.5], [0.5, 0.4, 0.1])["task_stable_from"] is None


def test_of_equal_values_the_one_nearest_the_base_is_picked() -> None:
    assert judged([0.8, 0.8, 0.8], [0.5, 0.5, 0.5])["picked"]["value"] == 0.0


def test_scores() -> None:
    assert Criteria().of(100, 50) == pytest.approx(200 / 3)
    assert Criteria(score="sum").of(100, 50) == 150
    assert Criteria().of(0, 0) == 0


# --- grids and sets ---------------------------------------------------------------------------------------------------


def test_grids() -> None:
    assert parse_grid("alpha=0:1:0.05").values == tuple(round(i * 0.05, 2) for i in range(21))
    assert parse_grid("scale=0.5,0.1,0.5") == Grid("scale", (0.1, 0.5))
    assert parse_grid("drop=0.1,0.9").values == (0.9, 0.1)
    assert parse_grid("alpha=1:0:-0.5").values == (0, 0.5, 1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("alpha", "a setting with its values is expected"),
        ("=1", "a setting with its values is expected"),
        ("alpha=", "a setting with its values is expected"),
        ("alpha=a,b", "'a,b' are no numbers"),
        ("alpha=0:1", "'0:1' are no numbers"),
        ("alpha=0:1:0", "steps of 0 never lead from 0 to 1"),
        ("alpha=0:1:-0.1", "steps of -0.1 never lead from 0 to 1"),
        ("alpha=0:1:0.00001", "100001 values; at most 1000"),
        ("alpha=nan", "are not all finite"),
        ("alpha=0:inf:1", "no numbers|not all finite"),
    ],
)
def test_bad_grids_are_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_grid(text)


def test_sets_in_three_formats(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    entries = [
        {"id": "a", "conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]},
        {"messages": [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]},
        {"prompt": "q3", "answers": ["a3", "b3"]},
    ]
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    (task,) = read_sets([path], "exact")
    asked = [(s.id, s.prompt, s.answers) for s in task.val]
    assert asked == [("a", "q1", ("a1",)), ("2", "q2", ("a2",)), ("3", "q3", ("a3", "b3"))]
    write_json(tmp_path / "val.json", entries[:1])
    (folder,) = read_sets([tmp_path], "vqa", taken=["set"])
    assert len(folder.val) == 1 and folder.metric == "vqa"
    names = [each.name for each in read_sets([path, path], "exact", taken=["set"])]
    assert len({*names, "set"}) == 3


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no entries"),
        ("{", "line 1: not JSON"),
        ("[1]", "entry 1: 1; an object is expected"),
        ('{"prompt": "q"}', "fields prompt; 'conversations', 'messages', or 'prompt'"),
        ('{"prompt": "q", "answer": " "}', "an empty question or answer"),
        ('{"prompt": "q", "answer": "a", "image": "x.png"}', "has 'image', but sets from files are of text alone"),
        ('{"messages": [{"role": "system", "content": "s"}]}', "begins with"),
        ('{"conversations": "x"}', "no list of turns"),
    ],
)
def test_bad_sets_are_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(text)
    with pytest.raises(DataError, match=what):
        read_sets([tmp_path / "set.jsonl"], "exact")
    with pytest.raises(DataError, match="no such file"):
        read_sets([tmp_path / "missing.jsonl"], "exact")


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'likelihood'"):
        check_metric("likelyhood")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_sweeps_that_cannot_be_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    asked = measure(models)

    def refused(
        what: str, grid: str = "alpha=0.5", rule: str = "sac", settings: Any = None, sets: Measure = asked
    ) -> None:
        with pytest.raises(GraftError, match=what):
            sweep(models["adapter"], rule, settings or {}, parse_grid(grid), sets, tmp_path / "s", base=models["base"])
        assert not (tmp_path / "s" / "values").exists()

    refused("alpha: both swept and set to 0.2", settings={"alpha": 0.2})
    refused("alpha 1.5 is not a share", grid="alpha=0.5,1.5")
    refused("settings of sac: .*'beta'", grid="beta=0.5")
    refused("no rule 'sca'; did you mean 'sac'", rule="sca")
    refused("mmer: keeps several models apart", grid="density=0.5", rule="mmer")
    refused("--keep: no validation set", sets=Measure(asked.new, []))
    refused("--new: no samples in the test split", sets=Measure(asked.new, asked.keep, split="test"))
    refused("--keep: new is in --new too", sets=Measure(asked.new, asked.new))


def test_another_sweep_in_a_folder_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    sweep(models["adapter"], "sac", {}, parse_grid("alpha=0.5"), measure(models), tmp_path, base=models["base"])
    with pytest.raises(RunError, match=r"another sweep is in this folder \(rule differ\)"):
        sweep(
            models["adapter"], "model_mix", {}, parse_grid("alpha=0.5"), measure(models), tmp_path, base=models["base"]
        )
    with pytest.raises(RunError, match=r"\(questions differ\)"):
        other = measure(models, limit=3)
        sweep(models["adapter"], "sac", {}, parse_grid("alpha=0.5"), other, tmp_path, base=models["base"])


def test_end_points_of_0_are_refused_before_any_value(models: dict[str, Path], tmp_path: Path) -> None:
    asked = measure(models)
    with pytest.raises(RunError, match=r"--new: the fine-tune scores 0 on old \(exact\)"):
        sweep(
            models["adapter"],
            "sac",
            {},
            parse_grid("alpha=0.5"),
            Measure(asked.keep, asked.new),
            tmp_path / "s",
            base=models["base"],
        )
    assert len(read_jsonl(tmp_path / "s" / "journal.jsonl")) == 3


def test_scores_that_are_not_finite_are_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "likelihood", lambda model, part: [float("nan")] * len(part))
    with pytest.raises(RunError, match="base: the score of new is nan"):
        asked = measure(models, "likelihood")
        sweep(models["adapter"], "sac", {}, parse_grid("alpha=0.5"), asked, tmp_path, base=models["base"])


def test_a_fine_tune_that_is_its_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="the same weights as"):
        sweep(models["base"], "sac", {}, parse_grid("alpha=0.5"), measure(models), tmp_path, base=models["base"])


def test_every_rule_of_one_model_has_a_way(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapted(models["base"], tmp_path / "adapter")
    change = open_change(adapter, models["base"])
    ways = {rule: type(sweeps._subject(change, rule, models["base"], "cpu", tmp_path)) for rule in RULES.table()}
    assert {rule for rule, way in ways.items() if way is Written} == {"ties", "dare", "consensus"}
