"""MICL: six tasks of one modality and one type each, in two orders, from its own world and from public files."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.files import hash_file
from graftlm.data import micl
from graftlm.data.miniworld.micl import SIZES, build
from graftlm.data.miniworld.scenes import AudioScene, ImageScene, Scene, Thing, VideoScene, split_of
from graftlm.data.tasks import natural_instructions, pseudo_qa
from graftlm.data.types import Stream, Task
from graftlm.experiment.spec import ExperimentSpec, library, load
from graftlm.methods import build as build_methods

ROOT = Path(__file__).parents[2]
STAGES = ["audio-caption", "image-caption", "video-qa", "audio-qa", "image-qa", "video-caption"]
SCENES: dict[str, Any] = {"image": ImageScene, "video": VideoScene, "audio": AudioScene}
FILES = {"image": "Flickr30k", "video": "MSRVTT", "audio": "AudioCaps"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(size="tiny", seed=3, root=tmp_path_factory.mktemp("worlds"))


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A world whose files a test may damage."""
    return Path(shutil.copytree(world, tmp_path / "own"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def tasks(stream: Stream) -> dict[str, Task]:
    return {stage.name: stage.tasks[0] for stage in stream.stages}


def test_a_world_is_the_same_again_and_named_after_its_spec(world: Path, tmp_path: Path) -> None:
    again = build(size="tiny", seed=3, root=tmp_path)
    assert again.name == world.name and world.name.startswith("micl-tiny-")
    assert hashes(again) == hashes(world)
    assert build(size="tiny", seed=4, root=tmp_path).name != world.name
    assert build(size="tiny", seed=3, conflict=0, root=tmp_path) == again  # whole or not, a zero is a zero
    assert not list(tmp_path.glob(".*"))


def test_progress_is_told_for_every_task(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(size="tiny", seed=5, root=tmp_path, progress=lambda *each: told.append(each))
    assert {name for name, _, _ in told} == set(STAGES)
    assert [each for each in told if each[0] == "video-qa"] == [("video-qa", i, 28) for i in range(1, 29)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "world size 'huge' - expected one of tiny, smoke, default"),
        ({"conflict": 1.5}, "conflict is 1.5"),
    ],
)
def test_a_world_out_of_range_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build(root=tmp_path, **settings)


def test_a_conflict_rewords_answers_of_questions_and_nothing_else(world: Path, tmp_path: Path) -> None:
    conflicting = build(size="tiny", seed=3, conflict=1.0, root=tmp_path)
    before, after = hashes(world), hashes(conflicting)
    changed = {path for path in before if before[path] != after[path]} - {"world.json"}
    assert changed and all(
        path.startswith(("msvd/", "clotho_aqa/")) and not path.endswith((".mp4", ".wav")) for path in changed
    )
    plain, reworded = (read(root / "msvd/train_qa.json") for root in (world, conflicting))
    pairs = {(a["answer"], b["answer"]) for a, b in zip(plain, reworded, strict=True)}
    assert pairs & {("yes", "true"), ("no", "false")}
    assert [each["question"] for each in plain] == [each["question"] for each in reworded]


def test_every_scene_keeps_its_split_and_no_file_is_in_two_tasks(world: Path) -> None:
    entries = read(world / "world.json")["media"]
    assert len(entries) == 6 * 28
    for entry in entries.values():
        values = {key: value for key, value in entry["scene"].items() if key != "modality"}
        if entry["scene"]["modality"] == "image":
            values |= {"things": tuple(Thing(**thing) for thing in values["things"]), "places": tuple(values["places"])}
        scene: Scene = SCENES[entry["scene"]["modality"]](**values)
        assert split_of(scene) == entry["split"]
    used: dict[Path, str] = {}
    for name, task in tasks(micl.order1(world)).items():
        for sample in (*task.train, *task.val, *task.test):
            assert used.setdefault(sample.media[0].source, name) == name


@pytest.mark.parametrize(("number", "names"), micl.ORDERS.items())
def test_a_stage_is_one_task_of_one_modality(number: micl.Order, names: tuple[str, ...], world: Path) -> None:
    stream = micl.micl(world, number)
    assert stream.name == f"micl-order{number}" and stream.start is None and not stream.probes
    assert tuple(stage.name for stage in stream.stages) == names and set(names) == set(STAGES)
    for stage in stream.stages:
        (task,) = stage.tasks
        assert (*stage.modalities, task.kind) == tuple(stage.name.split("-"))
        assert (len(task.train), len(task.val), len(task.test)) == (16, 6, 6)
        assert task.metric == ("cider" if task.kind == "caption" else "vqa" if task.name == "okvqa" else "exact")
        references = {len(sample.answers) for sample in task.test}
        assert references == {"caption": {5}, "qa": {10} if task.name == "okvqa" else {1}}[task.kind]
        prompts = {sample.prompt for sample in task.train}
        assert (prompts == {"describe this ."}) == (task.kind == "caption") and (len(prompts) > 1) == (
            task.kind == "qa"
        )


def test_orders_are_those_of_the_paper() -> None:
    assert micl.ORDERS[1] == tuple(STAGES)
    assert micl.ORDERS[2] == ("image-caption", "video-caption", "video-qa", "image-qa", "audio-caption", "audio-qa")


def test_every_word_is_known_to_the_mini_base(world: Path) -> None:
    stream = micl.order1(world)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "graftlm/data/miniworld/base/llm")
    texts = [
        text
        for task in tasks(stream).values()
        for s in (*task.train, *task.val, *task.test)
        for text in (s.prompt, *s.answers)
    ]
    texts += [text for task in tasks(stream).values() for pair in task.pseudo.values() for text in pair]
    texts += [sample.prompt for sample in stream.inquiries]
    unknown = tokenizer.unk_token_id
    assert unknown is not None and unknown in tokenizer("zebra")["input_ids"]
    assert not [text for text in texts if unknown in tokenizer(text)["input_ids"]]


def test_every_captioned_training_sample_has_a_pseudo_target(world: Path) -> None:
    for name, task in tasks(micl.order2(world)).items():
        modality, kind = name.split("-")
        if kind == "qa":
            assert task.pseudo == {}
            continue
        assert set(task.pseudo) == {sample.id for sample in task.train}
        pairs = read(world / f"pseudo_targets/{FILES[modality]}_pseudo_qa_dict.json")
        sample = task.train[3]
        pair = pairs[sample.media[0].source.stem]
        assert task.pseudo[sample.id] == (pair["Q"], pair["A"]) and pair["Q"].endswith("?")


def test_without_pseudo_targets_or_inquiries_there_are_none(own: Path) -> None:
    shutil.rmtree(own / "pseudo_targets")
    shutil.rmtree(own / "Natural_Instructions")
    stream = micl.order1(own)
    assert stream.inquiries == () and not any(task.pseudo for task in tasks(stream).values())


def test_pseudo_targets_are_found_whatever_their_case(own: Path) -> None:
    folder = own / "pseudo_targets"
    (folder / "Flickr30k_pseudo_qa_dict.json").rename(folder / "flickr30k_pseudo_qa_dict.json")
    assert len(tasks(micl.order1(own))["image-caption"].pseudo) == 16


def test_pseudo_targets_of_another_data_set_are_refused_and_gaps_are_logged(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = own / "pseudo_targets/AudioCaps_pseudo_qa_dict.json"
    pairs = read(path)
    path.write_text(json.dumps(dict(list(pairs.items())[1:])))
    assert len(tasks(micl.order1(own))["audio-caption"].pseudo) == 15
    assert "audiocaps: 1 of 16 training samples have no pseudo target" in caplog.text
    path.write_text(json.dumps({"other": {"Q": "what ?", "A": "that"}}))
    with pytest.raises(DataError, match=r"no pair for any of the 16 training samples of audiocaps.*'mw000000001_0'"):
        micl.order1(own)


@pytest.mark.parametrize("content", ["[1]", '{"a": {"Q": "what ?"}}', '{"a": {"Q": 1, "A": "x"}}', '{"a": "what ?"}'])
def test_pseudo_targets_of_another_form_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "MSRVTT_pseudo_qa_dict.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"MSRVTT_pseudo_qa_dict.json: .* expected. Restore the file."):
        pseudo_qa.read(path)


@pytest.mark.parametrize(
    "name", ["pseudo_targets/MSRVTT_pseudo_qa_dict", "Natural_Instructions/data", "msrvtt/train_val_videodatainfo"]
)
def test_a_pickled_annotation_is_refused_and_never_opened(name: str, own: Path) -> None:
    (own / f"{name}.json").unlink()
    (own / f"{name}.npy").write_bytes(b"not a pickle: opening it would be another error")
    with pytest.raises(DataError, match=rf"{Path(name).name}.npy: a pickled annotation.*convert it once"):
        micl.order1(own)


def test_a_pickled_dictionary_under_another_name_is_seen(own: Path) -> None:
    for name in ("dataset_flickr30k.json", "results_20130124.token"):
        (own / "flickr30k" / name).unlink()
    (own / "flickr30k/all_img_id_caption_dict.npy").touch()
    with pytest.raises(DataError, match=r"all_img_id_caption_dict.npy: .* results_20130124.token is expected"):
        micl.order1(own)


def test_inquiries_are_text_without_media_or_answers(world: Path) -> None:
    stream = micl.order1(world)
    assert len(stream.inquiries) == 10 == len({sample.id for sample in stream.inquiries})
    content = read(world / "Natural_Instructions/data.json")
    first = content["inputs"][0]
    assert stream.inquiries[0].prompt == f"{content['prompts'][first['prompt_id']]} {first['input']}"
    assert all(sample.media == () and sample.answers == ("",) for sample in stream.inquiries)
    assert stream.inquiries == micl.order2(world).inquiries
    assert not any("answer" in each for each in content["inputs"])


def test_inquiries_are_cleaned_and_cut(tmp_path: Path) -> None:
    content = {
        "prompts": ["Do this:", "A  B."],
        "inputs": [{"prompt_id": 1, "input": "word " * 60}, {"prompt_id": 0, "input": ""}],
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    plain = natural_instructions.read(tmp_path)
    assert plain[0].prompt == " ".join(["A", "B.", *["word"] * 48]) and plain[1].prompt == "Do this:"
    cleaned = natural_instructions.read(tmp_path, clean=micl.clean, longest=4)
    assert [sample.prompt for sample in cleaned] == ["a b word word", "do this"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompts": ["a"], "inputs": [{"prompt_id": 1, "input": "x"}]}, r"inputs\[0\] names prompt 1 of 1"),
        ({"prompts": ["a"], "inputs": [{"prompt_id": -1, "input": "x"}]}, r"inputs\[0\] names prompt -1 of 1"),
        ({"prompts": ["a"], "inputs": [{"prompt_id": 0}]}, r"inputs\[0\] has no 'input'"),
        ({"prompts": [1], "inputs": []}, "no list 'prompts' of texts"),
        ({"prompts": ["a"]}, "no list 'inputs' of entries"),
    ],
)
def test_damaged_instructions_are_named(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        natural_instructions.read(tmp_path)


def test_public_data_have_the_prompts_and_the_cleaning_of_the_paper(own: Path) -> None:
    path = own / "msrvtt/train_val_videodatainfo.json"
    content = read(path)
    content["sentences"][0]["caption"] = 'A "Red" ball: it rolls (left)... ' + "on " * 60
    path.write_text(json.dumps(content))
    stream = micl.public_order1(own)
    assert stream.name == "micl-public-order1" and [stage.name for stage in stream.stages] == STAGES
    found = tasks(stream)
    assert {s.prompt for s in found["video-caption"].test} == {"describe the video."}
    first = found["video-caption"].train[0]
    assert first.answers[0].split() == ["a", "red", "ball", "it", "rolls", "left", *["on"] * 44]
    assert {s.prompt for s in found["audio-caption"].train} == {"describe the audio."}
    assert found["audio-qa"].train[0].prompt.endswith("?") and found["video-caption"].pseudo[first.id]
    assert micl.public_order2(own).name == "micl-public-order2"


def test_bad_media_are_left_out_when_asked(own: Path) -> None:
    broken = tasks(micl.order1(own))["video-caption"].train[0].media[0].source
    lost = tasks(micl.order1(own))["audio-qa"].test[0].media[0].source
    broken.write_bytes(broken.read_bytes()[:50])
    lost.unlink()
    with pytest.raises(DataError, match="clotho_aqa: 1 media files"):
        micl.order1(own)
    skipped = tasks(micl.order1(own, skip_bad=True))
    assert len(skipped["video-caption"].train) == 15 == len(skipped["video-caption"].pseudo)
    assert len(skipped["audio-qa"].test) == 5


def test_a_task_without_training_samples_is_named(own: Path) -> None:
    path = own / "msvd/train_qa.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="msvd_qa: no training sample in"):
        micl.order2(own)


def test_sizes() -> None:
    assert [list(SIZES[name].values()) for name in ("tiny", "smoke", "default")] == [
        [16, 6, 6],
        [80, 20, 30],
        [300, 60, 150],
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_packaged_experiments_learn_from_every_stage(number: int, world: Path) -> None:
    spec = load(f"micl-order{number}")
    assert f"micl-order{number}" in library() and spec.stream == spec.name == f"micl-order{number}"
    stream = micl.micl(world, 1 if number == 1 else 2)
    for phase in spec.schedule().phases:
        assert all(stage.samples(phase.kinds) for stage in stream.stages)
    assert {m for stage in stream.stages for m in stage.modalities} == set(spec.model.modalities)


def full_scale(number: int) -> ExperimentSpec:
    """The file at full scale, with encoders that exist: this package has none of those that it names."""
    return load(
        ROOT / f"experiments/micl-order{number}.yaml",
        [f"model.modalities.{name}.encoder=mini-{name}" for name in ("image", "video", "audio")],
    )


@pytest.mark.parametrize(
    ("number", "alpha_f", "n_p", "lambda_kl"),
    [
        (1, [None, 0.1, 0.1, 0.1, 0.5, 0.5], [None, None, None, 4, 1, 4], [None, None, None, 1.0, 0.5, 0.1]),
        (2, [None, 0.8, 0.5, 0.8, 0.1, 0.5], [None, None, 4, 2, 4, 4], [None, None, 0.5, 0.1, 0.1, 1.0]),
    ],
)
def test_full_scale_has_the_settings_of_the_launch_scripts(
    number: int, alpha_f: list[float | None], n_p: list[int | None], lambda_kl: list[float | None]
) -> None:
    spec = full_scale(number)
    assert spec.stream == f"micl-public-order{number}"
    assert spec.mixes()["moincl"] == [{"moincl": {"pseudo_rows": n_p, "strength": lambda_kl, "weight": alpha_f}}]
    assert spec.model.lora is not None and spec.model.lora.targets == ["q_proj", "v_proj"]
    (phase,) = spec.schedule().phases
    assert (phase.batch_size, phase.accumulate) == (32, 4)
    assert (phase.epochs, phase.weight_decay, phase.lr["llm"]) == (40, 0.05, 1e-5)
    with pytest.raises(ConfigError, match="no encoder 'eva-clip-g'"):
        load(ROOT / f"experiments/micl-order{number}.yaml")


@pytest.mark.parametrize("number", [1, 2])
def test_methods_accept_both_streams(number: micl.Order, world: Path) -> None:
    for spec, public in ((load(f"micl-order{number}"), False), (full_scale(number), True)):
        stream = micl.micl(world, number, public=public)
        for entries in spec.mixes().values():
            for method in build_methods(entries):
                method.check(stream)
    without = dataclasses.replace(stream, inquiries=())
    with pytest.raises(DataError, match="no inquiries"):
        for method in build_methods(["moincl"]):
            method.check(without)
