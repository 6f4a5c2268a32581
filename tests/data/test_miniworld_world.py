"""The world on disk: real files, public formats, disjoint splits, the same bytes again."""

import csv
import hashlib
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.seeds import rng
from graftlm.data.miniworld.combinations import COMBINATIONS
from graftlm.data.miniworld.render import render
from graftlm.data.miniworld.scenes import SPLITS, draw
from graftlm.data.miniworld.text import vocabulary
from graftlm.data.miniworld.world import SIZES, Sizes, WorldSpec, build, folder_of
from graftlm.data.miniworld.write import write_media

SECOND = pytest.mark.parametrize("base", ["", "second"])
SMOKE = SIZES["smoke"]
ITEMS = 2 * SMOKE.train + SMOKE.val + SMOKE.test


@pytest.fixture
def tiny(monkeypatch):
    """Smoke worlds of a handful of items."""
    monkeypatch.setitem(SIZES, "smoke", Sizes(6, 4, 8, 4, {"train": 5, "val": 5, "test": 5}))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return build(WorldSpec("smoke", conflict=1.0, stages=8), tmp_path_factory.mktemp("long"))


def read(path: Path):
    return json.loads(path.read_text())


def rows(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# formats


@SECOND
def test_images_are_png_files_of_coco(long, base):
    for split, captioned in (("train", SMOKE.train), ("val", SMOKE.val), ("test", SMOKE.test)):
        content = read(long / base / f"coco/annotations/captions_{split}2014.json")
        assert content.keys() >= {"images", "annotations"}
        assert len(content["images"]) == captioned
        assert len(content["annotations"]) == captioned * (1 if split == "train" else 5)
        assert content["annotations"][0].keys() == {"id", "image_id", "caption"}
        first = content["images"][0]
        path = long / base / f"coco/{split}2014/{first['file_name']}"
        assert first["file_name"] == f"COCO_{split}2014_{first['id']:012d}.png"
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))


@SECOND
def test_okvqa_has_ten_answers_that_mostly_agree(long, base):
    for split, asked in (("train", SMOKE.train), ("val", SMOKE.val), ("test", SMOKE.test)):
        questions = read(long / base / f"okvqa/OpenEnded_mscoco_{split}2014_questions.json")["questions"]
        answers = read(long / base / f"okvqa/mscoco_{split}2014_annotations.json")["annotations"]
        assert len(questions) == len(answers) == asked
        for question, answer in zip(questions, answers, strict=True):
            assert question.keys() == {"image_id", "question", "question_id"}
            assert answer["question_id"] == question["question_id"]
            said = [each["answer"] for each in answer["answers"]]
            assert len(said) == 10
            assert max(map(said.count, said)) >= 8
            assert (long / base / f"coco/{split}2014/COCO_{split}2014_{question['image_id']:012d}.png").is_file()


@SECOND
def test_videos_are_clips_of_msvd(long, base):
    folder = long / base / "msvd"
    lines = (folder / "AllVideoDescriptions.txt").read_text().splitlines()
    clips = [line.split(" ", 1)[0] for line in lines if line and not line.startswith("#")]
    listed = {split: (folder / f"{split}_list.txt").read_text().split() for split in SPLITS}
    assert {split: len(names) for split, names in listed.items()} == {"train": 120, "val": 20, "test": 40}
    assert set(clips) == {name for names in listed.values() for name in names}
    assert clips.count(listed["train"][0]) == 1
    assert clips.count(listed["test"][0]) == 5
    assert re.fullmatch(r"[\w-]{11}_\d+_\d+", clips[0])
    with av.open(str(folder / "clips" / f"{clips[0]}.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    assert frames[0].shape == (48, 48, 3)


@SECOND
def test_msvd_qa_names_videos_by_number(long, base):
    folder = long / base / "msvd"
    mapping = dict(reversed(line.split()) for line in (folder / "youtube_mapping.txt").read_text().splitlines())
    for split, asked in (("train", SMOKE.train), ("val", SMOKE.val), ("test", SMOKE.test)):
        questions = read(folder / f"{split}_qa.json")
        assert len(questions) == asked
        for question in questions:
            assert question.keys() == {"answer", "id", "question", "video_id"}
            clip = mapping[f"vid{question['video_id']}"]
            assert (folder / "clips" / f"{clip}.mp4").is_file()


@SECOND
def test_sounds_are_wav_files_of_audiocaps_and_clotho(long, base):
    for split, captioned in (("train", SMOKE.train), ("val", SMOKE.val), ("test", SMOKE.test)):
        captions = rows(long / base / f"audiocaps/dataset/{split}.csv")
        assert captions[0].keys() == {"audiocap_id", "youtube_id", "start_time", "caption"}
        assert len({row["audiocap_id"] for row in captions}) == len(captions)
        names = {f"{row['youtube_id']}_{row['start_time']}.wav" for row in captions}
        assert len(names) == captioned
        info = soundfile.info(long / base / "audiocaps/audio" / min(names))
        assert (info.samplerate, info.frames, info.channels, info.subtype) == (8000, 8000, 1, "PCM_16")
        questions = rows(long / base / f"clotho_aqa/clotho_aqa_{split}.csv")
        assert questions[0].keys() == {"file_name", "QuestionText", "answer", "confidence"}
        assert len(questions) == 3 * captioned
        for first, second, third in zip(questions[::3], questions[1::3], questions[2::3], strict=True):
            assert first["QuestionText"] == second["QuestionText"] == third["QuestionText"]
            assert (long / base / "clotho_aqa/audio_files" / first["file_name"]).is_file()


@SECOND
def test_points_are_ply_files_of_cap3d(long, base):
    with (long / base / "cap3d/Cap3D_automated_Objaverse_full.csv").open(newline="") as file:
        captions = list(csv.reader(file))
    assert all(len(row) == 2 and len(row[1]) <= 100 for row in captions)
    assert len(captions) == SMOKE.train + 5 * (SMOKE.val + SMOKE.test)
    listed = {split: (long / base / f"cap3d/{split}.txt").read_text().split() for split in SPLITS}
    assert {uid for uid, _ in captions} == {uid for uids in listed.values() for uid in uids}
    header, _, body = (long / base / f"cap3d/points/{captions[0][0]}.ply").read_bytes().partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 512\n")
    vertices = np.frombuffer(body, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    assert len(vertices) == 512
    assert np.abs(vertices["xyz"]).max() < 3
    questions = rows(long / base / "cap3d_qa/cap3d_qa_test.csv")
    keys = ["sample_id", "caption", "caption_no_color", "question", "answer", "extractive", "correct"]
    assert list(questions[0]) == keys
    assert len(questions) == SMOKE.test


def test_mcub_asks_over_four_inputs_with_balanced_letters(long):
    records = read(long / "mcub/MCUB-4.json")
    assert records == read(long / "mcub/MCUB-answer.json")
    assert len(records) == SMOKE.joint
    letters = [record["conversations"][-1]["value"] for record in records]
    assert {letter: letters.count(letter) for letter in "ABCD"} == dict.fromkeys("ABCD", SMOKE.joint // 4)
    for record in records:
        assert record["modal_inputs"].keys() == {"vision", "video", "audio", "point"}
        assert all((long / "mcub" / path).is_file() for paths in record["modal_inputs"].values() for path in paths)
        assert record["conversations"][0]["value"].startswith("<image> <video> <audio> <point> which ")
        assert record["conversations"][0]["value"].endswith("answer with a letter .")


def test_instructions_are_text_only_conversations_of_every_form(long):
    for split in SPLITS:
        records = read(long / f"instructions/{split}.json")
        assert len(records) == SMOKE.instructions[split]
        assert {record["format"] for record in records} == {"word", "letter", "list", "yes_no", "sentence"}
        for record in records:
            assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]


# laws


def test_splits_share_no_scene(long):
    world = read(long / "world.json")
    entries = [*world["media"].values(), *world["instructions"].values()]
    of_split = {
        split: {json.dumps(entry["scene"], sort_keys=True) for entry in entries if entry["split"] == split}
        for split in SPLITS
    }
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert of_split[first]
        assert not of_split[first] & of_split[second]
    on_disk = {
        path.relative_to(long).as_posix() for path in long.rglob("*") if path.suffix in (".png", ".mp4", ".wav", ".ply")
    }
    assert on_disk == set(world["media"])


def test_sizes_are_as_counted(long):
    counts = read(long / "world.json")["counts"]
    expected = {"train captioned": 120, "train asked": 120, "val captioned": 20, "val asked": 20}
    expected |= {"test captioned": 40, "test asked": 40}
    for modality in ("image", "video", "audio", "point"):
        assert counts[modality] == counts[f"second/{modality}"] == expected
    assert len(list((long / "msvd/clips").iterdir())) == ITEMS
    default = SIZES["default"]
    assert (default.train, default.val, default.test, default.joint) == (500, 150, 300, 200)
    assert default.instructions == {"train": 400, "val": 100, "test": 200}


@pytest.mark.usefixtures("tiny")
def test_the_same_spec_gives_the_same_bytes(tmp_path):
    spec = WorldSpec("smoke", conflict=0.5, stages=8)
    assert digests(build(spec, tmp_path / "a")) == digests(build(spec, tmp_path / "b"))


@pytest.mark.usefixtures("tiny")
def test_another_seed_gives_other_scenes(tmp_path):
    scenes = [read(build(WorldSpec("smoke", seed=seed), tmp_path) / "world.json")["media"] for seed in (1, 2)]
    assert scenes[0] != scenes[1]


@pytest.mark.usefixtures("tiny")
def test_a_world_of_four_stages_is_the_first_half_of_one_of_eight(tmp_path):
    four, eight = (digests(build(WorldSpec("smoke", stages=stages), tmp_path)) for stages in (4, 8))
    assert {path: digest for path, digest in eight.items() if not path.startswith("second/")} | {"world.json": ""} == (
        four | {"world.json": ""}
    )


@pytest.mark.usefixtures("tiny")
def test_expansion_adds_questions_and_changes_nothing_else(tmp_path):
    plain, more = WorldSpec("smoke", stages=8), WorldSpec("smoke", stages=8, expansion=True)
    before, after = digests(build(plain, tmp_path)), digests(build(more, tmp_path))
    assert folder_of(plain, tmp_path) != folder_of(more, tmp_path)
    kept = {path: digest for path, digest in after.items() if not path.startswith(("expansion/", "choice/"))}
    assert kept | {"world.json": ""} == before | {"world.json": ""}
    assert "expansion" not in read(folder_of(plain, tmp_path) / "world.json")["spec"]


def test_letters_of_combinations_are_balanced_and_splits_share_no_scene(tmp_path):
    folder = build(WorldSpec("smoke", stages=8, expansion=True), tmp_path)
    known = set(vocabulary()) | {"<image>", "<video>", "<audio>", "<point>"}
    for name, inputs in COMBINATIONS.items():
        for split, total in SMOKE.expansion.items():
            records = read(folder / f"expansion/{name}/{split}.json")
            letters = [record["conversations"][1]["value"] for record in records]
            assert {letter: letters.count(letter) for letter in "ABCD"} == dict.fromkeys("ABCD", total // 4)
            for record in records:
                assert list(record["modal_inputs"]) == ["vision" if each == "image" else each for each in inputs]
                assert set(record["conversations"][0]["value"].split()) <= known
    media = read(folder / "world.json")["media"].values()
    of_split = {s: {json.dumps(m["scene"], sort_keys=True) for m in media if m["split"] == s} for s in SPLITS}
    assert not of_split["val"] & of_split["test"] and not of_split["train"] & of_split["test"]
    for modality in ("image", "video", "audio", "point"):
        records = read(folder / f"choice/{modality}/train.json")
        assert len(records) == 2 * SMOKE.train
        assert all(
            (folder / path).is_file() for record in records for path in next(iter(record["modal_inputs"].values()))
        )


@pytest.mark.usefixtures("tiny")
def test_conflict_changes_answers_about_media_and_nothing_else(tmp_path):
    spec, torn_spec = WorldSpec("smoke", stages=8), WorldSpec("smoke", stages=8, conflict=1)
    first, second = build(spec, tmp_path), build(torn_spec, tmp_path)
    calm, torn = digests(first), digests(second)
    changed = {path for path in calm if calm[path] != torn[path]}
    answers = [f"msvd/{split}_qa.json" for split in SPLITS]
    answers += [f"{name}/{name}_{split}.csv" for split in SPLITS for name in ("cap3d_qa", "clotho_aqa")]
    assert calm.keys() == torn.keys()
    assert {"world.json", "msvd/test_qa.json", "cap3d_qa/cap3d_qa_test.csv"} <= changed
    assert changed - {"world.json"} <= {base + path for base in ("", "second/") for path in answers}
    pairs = zip(read(first / "msvd/test_qa.json"), read(second / "msvd/test_qa.json"), strict=True)
    assert all(one | {"answer": ""} == other | {"answer": ""} for one, other in pairs)


def test_every_word_of_every_annotation_is_known(long):
    known = set(vocabulary())
    texts = []
    for base in ("", "second"):
        folder = long / base
        for split in SPLITS:
            texts += [
                each["caption"] for each in read(folder / f"coco/annotations/captions_{split}2014.json")["annotations"]
            ]
            questions = read(folder / f"okvqa/OpenEnded_mscoco_{split}2014_questions.json")["questions"]
            texts += [question["question"] for question in questions]
            annotations = read(folder / f"okvqa/mscoco_{split}2014_annotations.json")["annotations"]
            texts += [answer["answer"] for each in annotations for answer in each["answers"]]
            texts += [each[key] for each in read(folder / f"msvd/{split}_qa.json") for key in ("question", "answer")]
            texts += [row["caption"] for row in rows(folder / f"audiocaps/dataset/{split}.csv")]
            texts += [
                f"{row['QuestionText']} {row['answer']}" for row in rows(folder / f"clotho_aqa/clotho_aqa_{split}.csv")
            ]
            texts += [f"{row['question']} {row['answer']}" for row in rows(folder / f"cap3d_qa/cap3d_qa_{split}.csv")]
        lines = (folder / "msvd/AllVideoDescriptions.txt").read_text().splitlines()
        texts += [line.split(" ", 1)[1] for line in lines if line and not line.startswith("#")]
        with (folder / "cap3d/Cap3D_automated_Objaverse_full.csv").open(newline="") as file:
            texts += [caption for _, caption in csv.reader(file)]
    records = read(long / "mcub/MCUB-4.json")
    for split in SPLITS:
        records += read(long / f"instructions/{split}.json")
    texts += [turn["value"] for record in records for turn in record["conversations"]]
    slots = {"<image>", "<video>", "<audio>", "<point>"}
    assert {word for text in texts for word in text.split()} - slots <= known
    assert {"true", "crimson", "3", "dim", "disc"} <= {word for text in texts for word in text.split()}


def test_files_keep_what_was_rendered(tmp_path):
    stream = rng(0, "files")
    frames, _ = render("video", draw("video", stream), stream)
    write_media(tmp_path / "a.mp4", "video", frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]) / 255
    assert np.abs(decoded - frames).mean() < 0.02
    image, _ = render("image", draw("image", stream), stream)
    write_media(tmp_path / "a.png", "image", image)
    with Image.open(tmp_path / "a.png") as stored:
        assert np.abs(np.asarray(stored) / 255 - image).max() < 0.003
    wave, _ = render("audio", draw("audio", stream), stream)
    write_media(tmp_path / "a.wav", "audio", wave)
    assert np.abs(soundfile.read(tmp_path / "a.wav")[0] - wave).max() < 1e-4
    with pytest.raises(DataError, match="no file format for modality 'smell'"):
        write_media(tmp_path / "a.smell", "smell", wave)


@pytest.mark.usefixtures("tiny")
def test_a_complete_world_is_reused_and_progress_is_told(tmp_path):
    told = []
    spec = WorldSpec("smoke")
    folder = build(spec, tmp_path, lambda *args: told.append(args))
    assert folder == folder_of(spec, tmp_path)
    assert told[0] == ("image", 1, 24)
    assert told[-1] == ("mcub", 4, 4)
    before = (folder / "world.json").stat().st_mtime_ns
    assert build(spec, tmp_path) == folder
    assert (folder / "world.json").stat().st_mtime_ns == before
    assert folder_of(WorldSpec("smoke", conflict=0), tmp_path) == folder
    assert folder_of(WorldSpec("smoke", conflict=0.5), tmp_path) != folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conflict": 1.5}, r"conflict is 1.5 - expected a number in \[0, 1\]"),
        ({"conflict": float("nan")}, "conflict is nan"),
        ({"size": "huge"}, "world size 'huge' - expected one of tiny, smoke, default"),
        ({"stages": 5}, "a mini world of 5 stages - expected 4, or 8"),
    ],
)
def test_a_spec_out_of_range_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        WorldSpec(**settings)
