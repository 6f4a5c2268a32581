"""Public data sets as they lie on disk: read, filtered, and refused with a name when something is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from graftlm.core.errors import DataError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.tasks import TASKS
from graftlm.data.tasks.reading import data_set, inside, task, verify
from graftlm.data.types import Sample, Task

NAMES = [
    name
    for name in TASKS.table()
    if name
    in ("coco", "okvqa", "msvd", "msvd_qa", "audiocaps", "clotho_aqa", "cap3d", "cap3d_qa", "mcub", "instructions")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(WorldSpec("tiny", stages=8, expansion=True), tmp_path_factory.mktemp("worlds"))


def folder(world: Path, name: str) -> Path:
    return world / {"msvd_qa": "msvd", "letters": "expansion/avip"}.get(name, name)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_of_the_mini_world(name: str, world: Path) -> None:
    task: Task = TASKS.get(name)(folder(world, name))
    assert task.name == name and task.test
    assert len({s.id for s in task.test}) == len(task.test)
    for sample in (*task.train, *task.val, *task.test):
        assert sample.answers and all(m.source.is_file() for m in sample.media)
        assert {m.modality for m in sample.media} == set(task.modalities)
    if task.kind == "caption":
        assert len(task.train) == 24 and all(len(s.answers) == 1 for s in task.train)
        assert len(task.test) == 8 and all(len(s.answers) == 5 for s in task.test)
    verify(task)


def coco(root: Path, files: int = 3) -> None:
    for split in ("train", "val", "test"):
        images = [{"id": i, "file_name": f"COCO_{split}2014_{i:012d}.png"} for i in range(files)]
        notes = [
            {"id": 10 * i + k, "image_id": i, "caption": f"caption {i} {k}"} for i in range(files) for k in range(2)
        ]
        write(root / f"annotations/captions_{split}2014.json", {"images": images, "annotations": notes})
        for image in images:
            touch(root / f"{split}2014" / str(image["file_name"]))


def test_coco_trains_on_the_first_caption_and_tests_on_all(tmp_path: Path) -> None:
    coco(tmp_path)
    task = TASKS.get("coco")(tmp_path)
    assert [s.answers for s in task.train] == [(f"caption {i} 0",) for i in range(3)]
    assert task.test[1].answers == ("caption 1 0", "caption 1 1")
    assert len(TASKS.get("coco")(tmp_path, all_captions=True).train) == 6
    assert len(TASKS.get("coco")(tmp_path, limit=1).train) == 1


def test_okvqa_takes_the_most_frequent_answer(tmp_path: Path) -> None:
    coco(tmp_path / "coco", files=1)
    for split in ("train", "val", "test"):
        answers = [{"answer": word} for word in ["cat"] * 3 + ["dog"] * 7]
        write(
            tmp_path / f"okvqa/mscoco_{split}2014_annotations.json",
            {"annotations": [{"question_id": 5, "answers": answers}]},
        )
        question = {"image_id": 0, "question": "what ?", "question_id": 5}
        write(tmp_path / f"okvqa/OpenEnded_mscoco_{split}2014_questions.json", {"questions": [question]})
    task = TASKS.get("okvqa")(tmp_path / "okvqa")
    assert task.train[0].answers[0] == "dog" and sorted(task.train[0].answers) == ["cat"] * 3 + ["dog"] * 7
    distinct = TASKS.get("okvqa")(tmp_path / "okvqa", distinct_answers=True)
    assert [s.answers[0] for s in distinct.train] == ["dog", "cat"] and len(distinct.test) == 1


def test_clotho_aqa_keeps_confident_answers(tmp_path: Path) -> None:
    import numpy as np
    import soundfile

    (tmp_path / "audio_files").mkdir()
    soundfile.write(tmp_path / "audio_files/a.wav", np.zeros(800), 8000)
    lines = ["file_name,QuestionText,answer,confidence", *(f"a.wav,is it loud ?,{a},{a}" for a in ("yes", "no", "yes"))]
    rows = "\n".join(lines)
    for split in ("train", "val", "test"):
        write(tmp_path / f"clotho_aqa_{split}.csv", rows)
    assert [s.answers for s in TASKS.get("clotho_aqa")(tmp_path).train] == [("yes",)]
    assert TASKS.get("clotho_aqa")(tmp_path, confident_only=False).train[0].answers == ("yes", "no")


def okvqa(root: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        notes = [{"question_id": i, "answers": [{"answer": "cat"}] * 10} for i in range(6)]
        asked = [{"image_id": i // 2, "question": "what ?", "question_id": i} for i in range(6)]
        write(root / f"mscoco_{split}2014_annotations.json", {"annotations": notes})
        write(root / f"OpenEnded_mscoco_{split}2014_questions.json", {"questions": asked})


def test_without_public_test_answers_val_is_divided(tmp_path: Path) -> None:
    coco(tmp_path / "coco", files=4)
    (tmp_path / "coco/annotations/captions_test2014.json").unlink()
    task = TASKS.get("coco")(tmp_path / "coco")
    assert len(task.val) == len(task.test) == 2 and not {s.id for s in task.val} & {s.id for s in task.test}
    smaller = TASKS.get("coco")(tmp_path / "coco", test_size=1)
    assert len(smaller.test) == 1 and set(smaller.test) < set(task.test)
    okvqa(tmp_path / "okvqa", ("train", "val"))
    task = TASKS.get("okvqa")(tmp_path / "okvqa", test_size=1)
    assert len(task.test) == 1 and {s.media for s in task.test}.isdisjoint({s.media for s in task.val})


def test_large_tests_are_drawn_the_same_everywhere(tmp_path: Path) -> None:
    coco(tmp_path, files=9)
    small, large = (TASKS.get("coco")(tmp_path, test_size=n).test for n in (3, 5))
    assert len(small) == 3 and set(small) < set(large)
    assert [int(s.id) for s in large] == sorted(int(s.id) for s in large)
    gone = small[0].media[0].source
    gone.unlink()
    with pytest.raises(DataError, match="are missing"):
        TASKS.get("coco")(tmp_path, test_size=3)
    assert len(TASKS.get("coco")(tmp_path, test_size=3, skip_bad=True).test) == 3


def test_cap3d_as_distributed(tmp_path: Path) -> None:
    rows = "".join(f'u{i},"a red, large chair {i}"\n' for i in range(40)) + "long," + "x" * 101 + "\n"
    write(tmp_path / "cap3d/Cap3D_automated_Objaverse_full.csv", rows)
    head = "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    for i in range(40):
        write(tmp_path / f"cap3d/points/u{i}.ply", head + "0 0 0\n")
    task = TASKS.get("cap3d")(tmp_path / "cap3d", train_size=20)
    assert [len(task.train), len(task.val), len(task.test)] == [20, 4, 4]
    assert len({s.id for s in (*task.train, *task.val, *task.test)}) == 28
    assert task.test[0].answers[0].startswith("a red, large chair")
    questions = "sample_id,caption,question,answer\n" + "".join(f'u{i},c,"what\nis it ?",chair\n' for i in range(8))
    write(tmp_path / "cap3d_qa/CAP3DQA_final.csv", questions)
    write(tmp_path / "cap3d_qa/CAP3DQA_final_val.csv", questions)
    task = TASKS.get("cap3d_qa")(tmp_path / "cap3d_qa", train_size=5)
    assert [len(task.train), len(task.val), len(task.test)] == [5, 4, 4]
    assert task.train[0].prompt == "what\nis it ?"


def test_questions_about_clips_of_the_caption_test(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world / "msvd", tmp_path / "msvd")
    train = TASKS.get("msvd_qa")(tmp_path / "msvd").train
    assert not caplog.records
    (tmp_path / "msvd/test_list.txt").write_text(train[0].media[0].source.stem + "\n")
    assert len(TASKS.get("msvd_qa")(tmp_path / "msvd").train) == len(train)
    assert "1 training questions are about clips of MSVD's caption test" in caplog.text
    assert len(TASKS.get("msvd_qa")(tmp_path / "msvd", without_test_clips=True).train) == len(train) - 1


def test_mcub_answers_may_lie_apart(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "mcub", tmp_path / "mcub")
    expected = TASKS.get("mcub")(tmp_path / "mcub").test
    questions = json.loads((tmp_path / "mcub/MCUB-4.json").read_text())
    for each in questions:
        each["conversations"].pop()
    write(tmp_path / "mcub/MCUB-4.json", questions)
    assert TASKS.get("mcub")(tmp_path / "mcub").test == expected
    (tmp_path / "mcub/MCUB-answer.json").unlink()
    with pytest.raises(DataError, match=r"MCUB-answer\.json: this annotation file is missing"):
        TASKS.get("mcub")(tmp_path / "mcub")


def test_of_a_long_conversation_the_first_answer_counts(tmp_path: Path) -> None:
    turns = [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, "abcd", strict=True)]
    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}.json", [{"id": "1", "conversations": turns}])
    assert TASKS.get("instructions")(tmp_path).test[0].answers == ("b",)


def test_samples_without_text_or_with_one_id_are_named(tmp_path: Path) -> None:
    coco(tmp_path)
    path = tmp_path / "annotations/captions_val2014.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0])
    write(path, content)
    with pytest.raises(DataError, match="coco: two samples with the id '0'"):
        TASKS.get("coco")(tmp_path)
    content["images"].pop()
    silent = Sample("5", "t", (), "what ?", ())
    with pytest.raises(DataError, match=r"t: sample 5 has prompt .* Text and at least one answer"):
        task("t", "qa", (), "exact", [[], [], [silent]], root=tmp_path, skip_bad=False, limit=None)


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    coco(tmp_path)
    for path in (tmp_path / "test2014").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"coco: no test sample in .* \(3 skipped\)"):
        verify(TASKS.get("coco")(tmp_path), skip_bad=True)
    for path in (tmp_path / "test2014").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"coco: no test sample in .* \(3 skipped\)"):
        TASKS.get("coco")(tmp_path, skip_bad=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audiocap_id,youtube_id,start_time,caption\n1,2\n", "row 2: 2 fields, but 4 columns"),
        ("audiocap_id,youtube_id,start_time,caption\n1,a,0," + "x" * 200_000 + "\n", "not CSV"),
    ],
)
def test_broken_tables_are_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "dataset/train.csv", text)
    with pytest.raises(DataError, match=message):
        TASKS.get("audiocaps")(tmp_path)


def test_missing_media_are_counted_and_named(tmp_path: Path) -> None:
    coco(tmp_path)
    victim = tmp_path / "train2014/COCO_train2014_000000000001.png"
    victim.unlink()
    with pytest.raises(
        DataError, match=r"coco: 1 media files of 1 samples \(of 3\) are missing, first .*000000000001\.png"
    ):
        TASKS.get("coco")(tmp_path)
    task = TASKS.get("coco")(tmp_path, skip_bad=True)
    assert len(task.train) == 2 and "1 skipped" in task.source


def test_corrupt_media_are_found_by_verifying(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000002.png").write_bytes(b"no picture")
    task = TASKS.get("coco")(tmp_path)
    with pytest.raises(DataError, match=r"coco: 1 media files are corrupt, first: .*000000000002\.png"):
        verify(task)
    whole = verify(task, skip_bad=True)
    assert len(whole.val) == 2 and "1 corrupt skipped" in whole.source


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write(tmp_path / f"annotations/captions_{split}2014.json", {"images": [], "annotations": []})
    with pytest.raises(DataError, match="coco: no sample in"):
        TASKS.get("coco")(tmp_path)


def test_annotations_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2014\.json: this annotation file is missing"):
        TASKS.get("coco")(tmp_path)
    write(tmp_path / "annotations/captions_train2014.json", "{")
    with pytest.raises(DataError, match=r"captions_train2014\.json: not JSON"):
        TASKS.get("coco")(tmp_path)
    write(tmp_path / "dataset/train.csv", "audiocap_id,youtube_id\n1,2\n")
    with pytest.raises(DataError, match=r"train\.csv: columns \['start_time', 'caption'\] are missing"):
        TASKS.get("audiocaps")(tmp_path)


@pytest.mark.parametrize("file_name", ["../../secret.png", "/etc/passwd"])
def test_a_path_that_leads_out_is_refused(file_name: str, tmp_path: Path) -> None:
    coco(tmp_path)
    content = {"images": [{"id": 0, "file_name": file_name}], "annotations": [{"image_id": 0, "caption": "x"}]}
    write(tmp_path / "annotations/captions_train2014.json", content)
    with pytest.raises(DataError, match="outside of the data set"):
        TASKS.get("coco")(tmp_path)


COCO = "annotations/captions_train2014.json"
NOTES, ASKED = "mscoco_train2014_annotations.json", "OpenEnded_mscoco_train2014_questions.json"
GOOD_NOTES = {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}]}]}
HUMAN, MACHINE = {"from": "human", "value": "?"}, {"from": "gpt", "value": "A"}
INPUTS = {"vision": ["a.png"], "video": ["a.mp4"], "audio": ["a.wav"], "point": ["a.ply"]}


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("coco", {COCO: []}, r"captions_train2014\.json: no list 'annotations' of entries"),
        ("coco", {COCO: {"annotations": 3}}, r"no list 'annotations' of entries"),
        ("coco", {COCO: {"annotations": [7]}}, r"annotations\[0\] is 7, fields \['image_id', 'caption'\] are expected"),
        (
            "coco",
            {COCO: {"annotations": [{"image_id": 0, "caption": "x"}, {"image_id": 0}]}},
            r"captions_train2014\.json: annotations\[1\] has no 'caption'",
        ),
        (
            "coco",
            {COCO: {"annotations": [{"image_id": [], "caption": "x"}]}},
            r"annotations\[0\]\.image_id is \[\], a whole number or text is expected",
        ),
        (
            "coco",
            {COCO: {"annotations": [{"image_id": 0, "caption": None}]}},
            r"annotations\[0\]\.caption is None, text",
        ),
        ("coco", {COCO: {"annotations": [], "images": [{"name": 1}]}}, r"images\[0\] has no 'id'"),
        ("coco", {COCO: {"annotations": [], "images": [{"id": True, "file_name": ""}]}}, r"images\[0\]\.id is True"),
        (
            "okvqa",
            {NOTES: {"annotations": [{"question_id": 1, "answers": ["a"]}]}},
            rf"{NOTES}: annotations\[0\]\.answers\[0\] is 'a', fields",
        ),
        (
            "okvqa",
            {NOTES: {"annotations": [{"question_id": 1, "answers": []}]}},
            r"answers is \[\], a list of 1 or more",
        ),
        (
            "okvqa",
            {NOTES: GOOD_NOTES, ASKED: {"questions": [{"question_id": 1, "image_id": "x", "question": "?"}]}},
            rf"{ASKED}: questions\[0\]\.image_id is 'x', a whole number is expected",
        ),
        ("msvd_qa", {"youtube_mapping.txt": "clip\n"}, r"youtube_mapping\.txt: the line 'clip'; a clip name and vidN"),
        (
            "msvd_qa",
            {
                "youtube_mapping.txt": "clip vid1\n",
                "train_qa.json": [{"id": 0, "video_id": 1, "question": "?", "answer": None}],
            },
            r"train_qa\.json: entry\[0\]\.answer is None, a whole number or text is expected",
        ),
        (
            "msvd_qa",
            {
                "youtube_mapping.txt": "clip vid1\n",
                "train_qa.json": [{"id": 0, "video_id": 2, "question": "?", "answer": "a"}],
            },
            r"train_qa\.json: question 0 is about vid2, which youtube_mapping\.txt lacks",
        ),
        ("instructions", {"train.json": {}}, r"train\.json: no list of entries"),
        (
            "instructions",
            {"train.json": [{"id": 1, "conversations": [HUMAN]}]},
            r"train\.json: entry\[0\]\.conversations is .*, a list of 2 or more is expected",
        ),
        (
            "mcub",
            {
                "MCUB-4.json": [
                    {"id": 1, "modal_inputs": INPUTS | {"vision": "a.png"}, "conversations": [HUMAN, MACHINE]}
                ]
            },
            r"MCUB-4\.json: entry\[0\]\.modal_inputs\.vision is 'a\.png', a list of 1 or more",
        ),
        (
            "mcub",
            {"MCUB-4.json": [{"id": 1, "modal_inputs": INPUTS | {"smell": []}, "conversations": [HUMAN, MACHINE]}]},
            r"MCUB-4\.json: question 1 has inputs of unknown kinds \['smell'\]",
        ),
        (
            "letters",
            {"test.json": [{"id": 1, "modal_inputs": {"smell": ["a"]}, "conversations": [HUMAN, MACHINE]}]},
            r"test\.json: question 1 has inputs of unknown kinds \['smell'\]",
        ),
        (
            "letters",
            {"test.json": [{"id": 1, "modal_inputs": {"video": "a"}, "conversations": [HUMAN, MACHINE]}]},
            r"test\.json: question 1 has modal_inputs\.video = 'a'; a list of paths is expected",
        ),
        (
            "letters",
            {
                "test.json": [
                    {"id": i, "modal_inputs": {name: ["a"]}, "conversations": [HUMAN, MACHINE]}
                    for i, name in enumerate(("video", "audio"))
                ]
            },
            r"questions over \('video',\) and over \('audio',\)\. One task asks over the same inputs",
        ),
        (
            "mcub",
            {"MCUB-4.json": [{"id": 1, "modal_inputs": INPUTS, "conversations": [HUMAN]}], "MCUB-answer.json": []},
            r"MCUB-4\.json: question 1 has no answer in MCUB-answer\.json",
        ),
    ],
)
def test_a_wrong_annotation_is_named_with_its_file_and_place(
    name: str, files: dict[str, object], message: str, tmp_path: Path
) -> None:
    for path, content in files.items():
        write(tmp_path / path, content)
    with pytest.raises(DataError, match=message):
        TASKS.get(name)(tmp_path)


@pytest.mark.parametrize("text", ['["\\ud800"]', "[" * 100_000, "[" + "9" * 5000 + "]", "\0"])
def test_what_is_no_text_and_no_json_is_named(text: str, tmp_path: Path) -> None:
    write(tmp_path / "train.json", text)
    with pytest.raises(DataError, match=r"train\.json: not JSON"):
        TASKS.get("instructions")(tmp_path)


def test_pairs_of_surrogates_are_text(tmp_path: Path) -> None:
    turns = '[{"from": "human", "value": "\\ud83d\\ude00 ?"}, {"from": "gpt", "value": "yes"}]'
    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}.json", f'[{{"id": 1, "conversations": {turns}}}]')
    assert TASKS.get("instructions")(tmp_path).test[0].prompt == "\U0001f600 ?"


@pytest.mark.parametrize("name", ["a\0.png", "x" * 300, "ä" * 200])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which is no name of a file"):
        inside(tmp_path, "images", name)


def test_an_annotation_that_a_loader_did_not_expect_is_still_a_data_error(tmp_path: Path) -> None:
    @data_set
    def load(root: Path) -> Task:
        raise OSError("File name too long")

    with pytest.raises(DataError, match=r"an annotation is not of the form that .*test_tasks reads \(OSError"):
        load(tmp_path)


def test_a_file_is_decoded_once_for_all_who_share_what_is_known(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000002.png").write_bytes(b"no picture")
    found, known = TASKS.get("coco")(tmp_path), {}
    whole = verify(found, skip_bad=True, known=known)
    assert len(known) == 9 and [path.name for path, wrong in known.items() if wrong] == [
        "COCO_val2014_000000000002.png"
    ]
    for path in known:
        path.unlink()
    assert verify(found, skip_bad=True, known=known) == whole


def test_tables_need_no_torch() -> None:
    code = "import sys; from graftlm.data.tasks import TASKS; TASKS.table(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
