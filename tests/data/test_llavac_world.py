"""The world of LLaVA-c: real files, disjoint splits, true answers, known words, the same bytes again."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.seeds import rng
from graftlm.data import llavac as streams
from graftlm.data.miniworld.llavac import DOMAINS, SIZES, TASKS, build
from graftlm.data.miniworld.llavac_questions import ASK
from graftlm.data.miniworld.pages import (
    Board,
    Chart,
    Page,
    Picture,
    Scatter,
    Sign,
    draw_picture,
    render_picture,
    split_of_picture,
)
from graftlm.data.miniworld.scenes import SPLITS, Thing
from graftlm.data.miniworld.text import vocabulary
from graftlm.data.miniworld.words import COLORS, LETTERS, NUMBERS, SHAPES
from graftlm.data.types import Sample, Stream


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(size="tiny", root=tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def shown(world: Path) -> dict[str, dict[str, Any]]:
    return {path: entry["scene"] for path, entry in json.loads((world / "world.json").read_text())["media"].items()}


def samples(stream: Stream) -> list[Sample]:
    start = stream.start.tasks if stream.start else ()
    tasks = [*(task for stage in stream.stages for task in stage.tasks), *stream.probes, *start]
    return [sample for task in tasks for sample in (*task.train, *task.val, *task.test)]


def about(world: Path, shown: dict[str, dict[str, Any]], name: str) -> list[tuple[Sample, dict[str, Any]]]:
    """The samples of a task, each with what its picture shows."""
    stream = streams.finetune(world) if name in TASKS else streams.pretrain(world)
    task = next(task for stage in stream.stages for task in stage.tasks if task.name == name)
    every = (*task.train, *task.val, *task.test)
    return [(sample, shown[sample.media[0].source.relative_to(world).as_posix()]) for sample in every]


# files


def test_the_same_bytes_again_and_others_with_another_seed(world: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    again, other = build(size="tiny", root=tmp_path), build(size="tiny", seed=1, root=tmp_path)
    assert again.name == world.name != other.name and world.name.startswith("llavac-tiny-")
    assert digests(again) == digests(world)
    assert digests(other)["llava/llava_v1_5_mix665k.json"] != digests(world)["llava/llava_v1_5_mix665k.json"]
    told: list[tuple[str, int, int]] = []
    assert build(size="tiny", root=tmp_path, progress=lambda *step: told.append(step)) == again and not told


def test_progress_counts_every_task(tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    build(size="tiny", seed=2, root=tmp_path, progress=lambda what, done, total: told.update({what: (done, total)}))
    assert told.keys() == {*TASKS, *DOMAINS}  # the general pictures are told as "coco", too
    assert all(done == total > 0 for done, total in told.values())


def test_pictures_are_png(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    files = {path.relative_to(world).as_posix() for path in world.rglob("*.png")}
    assert files == set(shown)
    for path in sorted(files)[::20]:
        with Image.open(world / path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))


def test_what_is_shown_in_one_split_is_shown_in_no_other(world: Path) -> None:
    content = json.loads((world / "world.json").read_text())
    splits: dict[str, set[str]] = defaultdict(set)
    for entry in (*content["media"].values(), *content["texts"].values()):
        splits[json.dumps(entry["scene"], sort_keys=True)].add(entry["split"])
    assert {frozenset(found) for found in splits.values()} == {frozenset({split}) for split in SPLITS}


def test_the_domains_are_one_file_told_apart_by_paths(world: Path) -> None:
    entries = json.loads((world / "llava/llava_v1_5_mix665k.json").read_text())
    domains = [entry["id"].partition("-")[0] for entry in entries]
    assert set(domains) == set(DOMAINS) and domains != sorted(domains, key=list(DOMAINS).index)
    for entry, domain in zip(entries, domains, strict=True):
        assert entry.get("image", "").startswith(DOMAINS[domain]) and ("image" in entry) == (domain != "tqa")
        assert [turn["from"] for turn in entry["conversations"]] == ["human", "gpt"]


@pytest.mark.parametrize(("settings", "message"), [({"size": "huge"}, "huge"), ({"conflict": 0.5}, "one modality")])
def test_worlds_that_are_not(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build(root=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


# words and answers


@pytest.mark.parametrize("stream", [streams.finetune, streams.pretrain])
def test_every_word_is_known_to_the_base(stream: Any, world: Path) -> None:
    texts = [text for s in samples(stream(world)) for text in (s.prompt.replace("<image>", " "), *s.answers)]
    assert {word for text in texts for word in text.split()} <= set(vocabulary())


@pytest.mark.parametrize("name", ASK)
def test_words_and_splits_of_many_questions(name: str) -> None:
    known = set(vocabulary())
    for number in range(60):
        split = SPLITS[number % 3]
        asked = ASK[name](rng(7, name, number), split)
        assert set(" ".join((asked.text, *asked.answers, *asked.options)).split()) <= known
        assert not asked.options or asked.answers[0] in asked.options
        assert (asked.picture is None) == (name == "tqa") == (asked.scene is not None)
        if isinstance(asked.picture, Picture):
            assert split_of_picture(asked.picture) == split


def test_icons_are_counted(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    counts = 0
    for sample, scene in about(world, shown, "iconqa"):
        if sample.prompt.startswith("how many"):
            counts += 1
            assert sample.prompt.endswith("A one B two C three D four . answer with a letter .")
            assert LETTERS.index(sample.answers[0]) + 1 == len(scene["things"])
    assert counts


def test_sums_are_right(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    for sample, scene in about(world, shown, "clevr_math"):
        step = {"one object goes": -1, "one object joins": 1}.get(sample.prompt.partition(" .")[0], 0)
        assert NUMBERS.index(sample.answers[0]) == len(scene["things"]) + step


def test_bars_and_trends_are_read_right(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    said = set()
    for sample, scene in about(world, shown, "figureqa"):
        heights = scene["heights"]
        larger = heights[0] > heights[1] if len(heights) == 2 else heights == sorted(heights) != heights[::-1]
        assert sample.answers == (f"the answer is {'A' if larger else 'B'}",)
        said.add((len(heights), larger))
        assert "? A yes B no . answer with a sentence ending with the letter ." in sample.prompt
    assert len(said) == 4
    for sample, scene in about(world, shown, "arxivqa"):
        heights = scene["heights"]
        if "level ?" in sample.prompt:
            height = heights[0 if " first " in sample.prompt else -1]
            assert sample.answers == (" ABBC"[height],) and "A low B medium C high" in sample.prompt
        else:
            rises, falls = heights == sorted(heights), heights == sorted(heights)[::-1]
            assert sample.answers == ("C" if rises and falls else "A" if rises else "B" if falls else "D",)


def test_writing_is_read_right(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    for sample, scene in about(world, shown, "ocr_vqa"):
        right = {"letter": LETTERS[scene["letter"]], "number": str(scene["digit"] + 1), "color": COLORS[scene["color"]]}
        assert sample.answers == (right[sample.prompt.split()[2]],)
    for sample, scene in about(world, shown, "textvqa"):
        glyph = scene["glyph"]
        text = f"the letter {LETTERS[glyph]}" if glyph < 4 else f"the number {glyph - 3}"
        assert all(text in answer and COLORS[scene["thing"]["color"]] in answer for answer in sample.answers)


def test_boxes_hold_what_they_are_about(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    for sample, scene in about(world, shown, "vg"):
        left, top, right, bottom = (NUMBERS.index(word) for word in sample.answers[0].split())
        assert [left, top] in scene["corners"] and (right - left, bottom - top) == (2, 2)
    thing = Thing(0, 1, 1, 0)
    for corner in ((0, 0), (1, 2), (2, 1)):
        scatter = Scatter((thing,), (corner,), 2)
        image = render_picture(scatter, rng(0, "box"))
        rows, columns = np.nonzero(np.abs(image - np.median(image, (0, 1))).max(2) > 0.45)
        left, top, right, bottom = (12 * edge for edge in scatter.box(0))
        assert left <= columns.min() and columns.max() < right and top <= rows.min() and rows.max() < bottom
        assert len(rows) > 100


def test_what_is_not_there_is_not_there(world: Path, shown: dict[str, dict[str, Any]]) -> None:
    for probe in streams.finetune(world).probes:
        if probe.name.startswith("pope"):
            for sample in probe.test:
                scene = shown[sample.media[0].source.relative_to(world).as_posix()]
                name = sample.prompt.split(" in the picture")[0].split()[-2:]
                there = [[COLORS[each["color"]], SHAPES[each["shape"]]] for each in scene["things"]]
                assert sample.answers == ("yes" if name in there else "no",)
            assert sum(sample.answers == ("yes",) for sample in probe.test) * 2 == len(probe.test)


# pictures


@pytest.mark.parametrize(
    "picture",
    [
        Board((Thing(0, 0, 1, 0),), (0,), 2),
        Chart(1, (1, 2, 3, 4), bars=True),
        Chart(1, (1, 2, 3, 4), bars=False),
        Page(0, 1, 2, 0),
        Scatter((Thing(0, 0, 0, 0),), ((3, 3),), 1),
        Sign(Thing(0, 0, 1, 0), 4, 0, below=True),
    ],
)
def test_every_kind_is_rendered_with_noise(picture: Picture) -> None:
    one, same, other = (render_picture(picture, rng(seed, "render")) for seed in (0, 0, 1))
    assert one.shape == (48, 48, 3) and one.dtype == np.float32 and 0 <= one.min() < one.max() <= 1
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_bars_stand_as_high_as_they_should() -> None:
    image = render_picture(Chart(2, (1, 4, 2, 3), bars=True), rng(0, "bars"))
    blue = image[..., 2] - image[..., 0] > 0.4
    heights = [int(blue[:, 12 * column + 6].sum()) for column in range(4)]
    assert [round((height + 3) / 12) for height in heights] == [1, 4, 2, 3]


def test_a_single_picture_is_in_one_split_only() -> None:
    picture = Page(0, 0, 0, 0)
    other = next(split for split in SPLITS if split != split_of_picture(picture))
    with pytest.raises(DataError, match="more than a handful"):
        draw_picture(lambda _: picture, rng(0, "one"), other)


# streams


def test_fine_tuning_has_five_tasks_after_a_general_start(world: Path) -> None:
    stream = streams.finetune(world)
    assert [stage.name for stage in stream.stages] == list(streams.FINETUNE) and not stream.aligned
    assert all(stage.modalities == ("image",) for stage in stream.stages)
    sizes = SIZES["tiny"]
    for stage in stream.stages:
        (task,) = stage.tasks
        assert (len(task.train), len(task.val), len(task.test)) == (sizes.train, sizes.val, sizes.test)
    assert stream.start is not None and stream.start.name == "general"
    assert [task.kind for task in stream.start.tasks] == ["caption", "qa", "instruction", "choice", "qa"]
    names = [probe.name for probe in stream.probes]
    assert len(set(names) | set(streams.FINETUNE)) == len(names) + 5 and "instructions" in names
    assert all(probe.val and probe.test for probe in stream.probes)
    endings = {stage.tasks[0].test[0].prompt.split("answer with ")[1] for stage in stream.stages}
    assert endings == {"a letter .", "one word .", "a sentence ending with the letter ."}


def test_pretraining_has_six_domains_after_alignment(world: Path) -> None:
    stream = streams.pretrain(world)
    assert [stage.name for stage in stream.stages] == ["tqa", "coco", "ocr_vqa", "textvqa", "gqa", "vg"]
    assert stream.aligned and stream.start is not None and [task.kind for task in stream.start.tasks] == ["caption"]
    assert stream.stages[0].modalities == () and stream.stages[1].modalities == ("image",)
    assert not stream.stages[1].samples(frozenset({"caption"}))
    captions = next(task for stage in stream.stages for task in stage.tasks if task.name == "textvqa")
    assert all(len(s.answers) == 1 for s in captions.train) and all(len(s.answers) == 5 for s in captions.test)
    own = {task.name for stage in stream.stages for task in stage.tasks}
    assert own.isdisjoint(probe.name for probe in stream.probes)
    aligned = {item.source for task in stream.start.tasks for s in task.train for item in s.media}
    assert aligned.isdisjoint(item.source for s in stream.stages[1].samples() for item in s.media)


def test_inquiries_are_the_questions_of_tqa(world: Path) -> None:
    one, other = streams.finetune(world), streams.pretrain(world)
    assert one.inquiries == other.inquiries == tuple(other.stages[0].samples())
    assert all(not sample.media and sample.answers[0] for sample in one.inquiries)
    probe = next(probe for probe in one.probes if probe.name == "instructions")
    taught = ("answer with one word .", "answer with a letter .", "in one sentence .")
    assert all(sample.prompt.endswith(taught) for sample in one.inquiries)
    assert not any(sample.prompt.endswith(taught) for sample in probe.test) and not probe.train


def test_bad_pictures_are_left_out_when_told(tmp_path: Path) -> None:
    own = build(size="tiny", root=tmp_path)
    (own / "figureqa/train1/png/3.png").write_bytes(b"no picture")
    (own / "iconqa/iconqa_data/iconqa/train/choose_txt/1/image.png").unlink()
    with pytest.raises(DataError, match="iconqa: 1 media files"):
        streams.finetune(own)
    stages = {stage.name: stage for stage in streams.finetune(own, skip_bad=True).stages}
    assert len(stages["figureqa"].samples()) == len(stages["iconqa"].samples()) == SIZES["tiny"].train - 1
    assert len(stages["arxivqa"].samples()) == SIZES["tiny"].train


def test_a_task_without_training_samples_is_refused(tmp_path: Path) -> None:
    own = build(size="tiny", root=tmp_path)
    (own / "clevr_math/clevr-math-train.json").write_text('{"questions": []}')
    with pytest.raises(DataError, match="clevr_math: no training sample"):
        streams.finetune(own)


def test_public_streams_read_the_same_files(tmp_path: Path) -> None:
    own = build(size="tiny", root=tmp_path)
    entries = json.loads((own / "llava/llava_v1_5_mix665k.json").read_text())
    pictured = [entry for entry in entries if "image" in entry][:30]
    (own / "llava/blip_laion_cc_sbu_558k.json").write_text(json.dumps(pictured))
    for split in SPLITS:
        place = own / f"iconqa/iconqa_data/iconqa/{split}/fill_in_blank/900"
        place.mkdir(parents=True)
        (place / "data.json").write_text(json.dumps({"question": "How many?", "answer": "7"}))
        Image.new("RGB", (8, 8)).save(place / "image.png")
    stream = streams.public_finetune(own)
    assert stream.name == "llava-c-finetune" and [stage.name for stage in stream.stages] == list(streams.FINETUNE)
    icons = stream.stages[0].tasks[0]
    assert icons.metric == "exact" and icons.train[-1].answers == ("7",)
    assert icons.train[0].prompt.endswith("\nAnswer with the option's letter from the given choices directly.")
    assert icons.train[-1].prompt == "How many?\nAnswer the question using a single word or phrase."
    assert stream.start is not None and [task.name for task in stream.start.tasks] == ["alignment", *DOMAINS]
    assert [s.media for s in stream.start.samples(frozenset({"caption"}))]
    assert [probe.name for probe in stream.probes] == ["pope_random", "pope_popular", "pope_adversarial"]
    pretrained = streams.public_pretrain(own)
    assert pretrained.aligned and [stage.name for stage in pretrained.stages] == list(DOMAINS)
