"""The public data sets of LLaVA-c as they lie on disk: read, divided, and refused with a name when something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from graftlm.core.errors import DataError
from graftlm.data.tasks import TASKS
from graftlm.data.tasks.choices import Wording
from graftlm.data.types import Task

LETTER = "Answer with the option's letter from the given choices directly."
ONE_WORD = "Answer the question using a single word or phrase."


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def load(name: str, root: Path, **settings: Any) -> Task:
    task: Task = TASKS.get(name)(root, **settings)
    return task


def sizes(task: Task) -> list[int]:
    return [len(task.train), len(task.val), len(task.test)]


# wording


def test_a_wording_is_question_options_instruction() -> None:
    assert Wording().ask("Which?", ["red", "blue"]) == f"Which?\nA. red\nB. blue\n{LETTER}"
    assert (
        Wording("answer .", "{letter} {text}", " ").ask("which ?", ["red", "blue"]) == "which ? A red B blue answer ."
    )
    assert Wording("").ask("Which?") == "Which?"


# LLaVA-665k


def conversation(key: object, image: str | None, *turns: str) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": key, **({"image": image} if image else {}), "conversations": said}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """Ten entries per domain; ids repeat, and one has two turns."""
    paths = {
        "coco": "coco/train2017/{}.jpg",
        "ocr_vqa": "ocr_vqa/images/{}.jpg",
        "textvqa": "textvqa/train_images/{}.jpg",
        "gqa": "gqa/images/{}.jpg",
    }
    entries = [conversation("text", None, "Hello?", f"Hi {i}.") for i in range(10)]
    for domain, path in paths.items():
        entries += [
            conversation("same", path.format(i), "<image>\nWhat?", f"{domain} {i}", "And?", "more") for i in range(10)
        ]
    for i in range(10):
        folder = "VG_100K" if i % 2 else "VG_100K_2"
        entries.append(conversation(i, f"vg/{folder}/{i}.jpg", "Where?\n<image>", "[0, 0, 1, 1]"))
    for entry in entries:
        if "image" in entry:
            picture(tmp_path / entry["image"])
    write(tmp_path / "llava_v1_5_mix665k.json", entries)
    return tmp_path


@pytest.mark.parametrize("domain", ["tqa", "coco", "ocr_vqa", "textvqa", "gqa", "vg"])
def test_a_domain_is_what_lies_under_its_path(domain: str, llava: Path) -> None:
    task = load("llava_json", llava, domain=domain)
    assert task.name == domain and sizes(task) == [8, 1, 1]
    answers = {sample.answers[0] for split in (task.train, task.val, task.test) for sample in split}
    expected = {
        "tqa": {f"Hi {i}." for i in range(10)},
        "vg": {"[0, 0, 1, 1]"},
    }.get(domain, {f"{domain} {i}" for i in range(10)})
    assert answers == expected
    assert task.modalities == (() if domain == "tqa" else ("image",))
    assert all(len(sample.media) == len(task.modalities) for sample in task.train)
    assert task.kind != "caption"


def test_turns_are_samples_when_told(llava: Path) -> None:
    first, every = (load("llava_json", llava, domain="gqa", all_turns=turns) for turns in (False, True))
    assert sizes(every) == [16, 2, 2] and sizes(first) == [8, 1, 1]
    assert {s.prompt for s in first.train} == {"<image>\nWhat?"}
    assert {(s.prompt, s.answers[0] == "more") for s in every.train} == {("<image>\nWhat?", False), ("And?", True)}
    assert len({s.media for s in every.test}) == 1 and {s.media for s in every.test}.isdisjoint(
        s.media for s in every.train
    )


def test_held_out_files_come_first_and_gather_references(llava: Path) -> None:
    for split in ("val", "test"):
        said = [conversation("x", "coco/train2017/3.jpg", "<image>\nWhat?", answer) for answer in ("one", "two")]
        texts = [conversation("t", None, "Same?", "yes"), conversation("t", None, "Same?", "no")]
        write(llava / f"llava_v1_5_mix665k_{split}.json", [*said, *texts])
    task = load("llava_json", llava, domain="coco")
    assert sizes(task) == [10, 1, 1] and task.test[0].answers == ("one", "two")
    assert sizes(load("llava_json", llava, domain="tqa")) == [10, 2, 2]


def test_alignment_is_a_file_of_captions(llava: Path) -> None:
    entries = [conversation(f"{i}", f"{i:05d}/{i}.jpg", "Describe.\n<image>", f"a cat {i}") for i in range(10)]
    for entry in entries:
        picture(llava / entry["image"])
    write(llava / "blip_laion_cc_sbu_558k.json", entries)
    task = load("llava_json", llava, domain="alignment")
    assert (task.name, task.kind, task.metric, task.modalities) == ("alignment", "caption", "cider", ("image",))
    assert sizes(task) == [8, 1, 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (conversation(1, "sam/1.jpg", "?", "!"), "entry 1 has the picture 'sam/1.jpg'"),
        (conversation(1, "coco/../../etc/1.jpg", "?", "!"), "outside of the data set"),
        ({"id": 1, "conversations": []}, "conversations"),
    ],
)
def test_entries_that_belong_nowhere(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "llava_v1_5_mix665k.json", [entry])
    with pytest.raises(DataError, match=message):
        load("llava_json", tmp_path, domain="coco")


def test_a_domain_that_is_not(llava: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'textvqa'"):
        load("llava_json", llava, domain="textqa")


# IconQA


def icons(root: Path, content: dict[str, Any], kind: str = "choose_txt", pids: tuple[int, ...] = (10, 9)) -> None:
    for split in ("train", "val", "test"):
        for pid in pids:
            place = root / "iconqa_data/iconqa" / split / kind / str(pid)
            write(place / "data.json", content)
            picture(place / "image.png")


def test_iconqa_reads_options_and_blanks(tmp_path: Path) -> None:
    icons(tmp_path, {"question": "How many?", "choices": ["3", "5"], "answer": 1})
    icons(tmp_path, {"question": "Count.", "answer": "4"}, "fill_in_blank", (11,))
    task = load("iconqa", tmp_path)
    assert sizes(task) == [2, 2, 2] and task.metric == "letter" and [s.id for s in task.train] == ["9", "10"]
    assert task.train[0].prompt == f"How many?\nA. 3\nB. 5\n{LETTER}" and task.train[0].answers == ("B",)
    both = load("iconqa", tmp_path, types=("choose_txt", "fill_in_blank"), test_size=2)
    assert sizes(both) == [3, 3, 2] and both.metric == "exact"
    assert both.train[2].prompt == f"Count.\n{ONE_WORD}" and both.train[2].answers == ("4",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "option 2 of 2"),
        ({"answer": -1}, "option -1 of 2"),
        ({"choices": "35"}, "a list of texts is expected"),
        ({"answer": "B"}, "not of the form"),
    ],
)
def test_iconqa_refuses_answers_that_are_no_option(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    icons(tmp_path, {"question": "How many?", "choices": ["3", "5"], "answer": 1} | change)
    with pytest.raises(DataError, match=message):
        load("iconqa", tmp_path)


def test_iconqa_has_types_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose_img"):
        load("iconqa", tmp_path, types=("choose_img",))
    with pytest.raises(DataError, match="this folder is missing"):
        load("iconqa", tmp_path)


# Super-CLEVR and CLEVR-Math


def test_super_clevr_is_divided_by_image(tmp_path: Path) -> None:
    numbers = [0, 19_999, 20_000, 24_999, 25_000, 29_999]
    answers = ["car", 3, True, False, "red", "2"]
    questions = [
        {
            "split": "new",
            "image_index": i,
            "image_filename": f"superCLEVR_new_{i:06d}.png",
            "question": "?",
            "answer": a,
        }
        for i, a in zip(numbers, answers, strict=True)
    ]
    for each in questions:
        picture(tmp_path / "images" / each["image_filename"])
    write(tmp_path / "superCLEVR_questions_30k.json", {"info": {}, "questions": questions})
    task = load("super_clevr", tmp_path)
    found = [[sample.answers[0] for sample in split] for split in (task.train, task.val, task.test)]
    assert found == [["car", "3"], ["yes", "no"], ["red", "2"]] and task.metric == "exact"
    assert task.train[0].prompt == f"?\n{ONE_WORD}"
    assert sizes(load("super_clevr", tmp_path, train_size=1, test_size=1)) == [1, 2, 1]
    write(tmp_path / "superCLEVR_questions_30k.json", {"questions": [each | {"split": "test"} for each in questions]})
    assert sizes(load("super_clevr", tmp_path)) == [0, 0, 6]


def test_clevr_math_counts_in_digits_or_words(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        picture(tmp_path / f"CLEVR_v1.0/images/{split}/CLEVR_{split}_000001.png")
        asked = [{"image_filename": f"CLEVR_{split}_000001.png", "question": "Left?", "answer": 2}]
        write(tmp_path / f"clevr-math-{split}.json", {"questions": asked})
    assert load("clevr_math", tmp_path).test[0].answers == ("2",)
    assert load("clevr_math", tmp_path, numbers=("zero", "one", "two")).test[0].answers == ("two",)
    with pytest.raises(DataError, match="an answer is 2, and words are given for 0 to 1"):
        load("clevr_math", tmp_path, numbers=("zero", "one"))


# FigureQA


def plots(root: Path, split: str, answers: list[int | None]) -> None:
    pairs = []
    for i, answer in enumerate(answers):
        picture(root / split / f"png/{i}.png")
        known = {} if answer is None else {"answer": answer}
        pairs.append({"question_string": "Is Red the maximum?", "image_index": i, **known})
    write(root / split / "qa_pairs.json", {"qa_pairs": pairs})


def test_figureqa_ends_with_the_letter(tmp_path: Path) -> None:
    plots(tmp_path, "train1", [1, 0])
    plots(tmp_path, "validation1", [1, 0, 1, 0])
    task = load("figureqa", tmp_path)
    assert sizes(task) == [2, 2, 2] and task.metric == "exact"
    assert [s.answers for s in task.train] == [("The answer is A",), ("The answer is B",)]
    assert task.train[0].prompt == (
        "Is Red the maximum?\nA. yes\nB. no\nPlease answer the question and provide the correct option letter at the end."
    )
    assert {s.media for s in task.val}.isdisjoint(s.media for s in task.test)
    plots(tmp_path, "test1", [None, None, None])
    assert sizes(load("figureqa", tmp_path)) == [2, 2, 2]
    plots(tmp_path, "test1", [0, 1, 1])
    assert sizes(load("figureqa", tmp_path)) == [2, 4, 3]


def test_figureqa_refuses_other_answers(tmp_path: Path) -> None:
    plots(tmp_path, "train1", [2])
    with pytest.raises(DataError, match="answer 0 is 2; 0 or 1"):
        load("figureqa", tmp_path)


# ArxivQA


def figures(path: Path, entries: list[tuple[list[str], str]]) -> None:
    records = []
    for i, (options, label) in enumerate(entries):
        picture(path.parent / f"images/{path.stem}-{i}.jpg")
        key = f"{path.stem}-{i}"
        records.append(
            {"id": key, "image": f"images/{key}.jpg", "options": options, "question": "Trend?", "label": label}
        )
    lines(path, records)


@pytest.mark.parametrize(
    ("options", "label", "letter"),
    [
        (["A) up", "B) down"], "B", "B"),
        (["(A) up", "(B) down"], "(B)", "B"),
        (["A. up", "B. down"], "B. down", "B"),
        (["up", "down"], "down", "B"),
        (["up", "down"], "A", "A"),
    ],
)
def test_arxivqa_reads_labels_in_any_form(options: list[str], label: str, letter: str, tmp_path: Path) -> None:
    figures(tmp_path / "arxivqa.jsonl", [(options, label)])
    figures(tmp_path / "arxivqa_test.jsonl", [(options, label)])
    task = load("arxivqa", tmp_path)
    assert sizes(task) == [1, 0, 1] and task.test[0].answers == (letter,) and task.metric == "letter"
    assert task.test[0].prompt == f"Trend?\nA. up\nB. down\n{LETTER}"


def test_arxivqa_keeps_options_that_only_look_lettered(tmp_path: Path) -> None:
    figures(tmp_path / "arxivqa_test.jsonl", [(["B. subtilis", "E. coli"], "A")])
    lines(tmp_path / "arxivqa.jsonl", [])
    assert "A. B. subtilis\nB. E. coli" in load("arxivqa", tmp_path).test[0].prompt


@pytest.mark.parametrize("label", ["C", "sideways", ""])
def test_arxivqa_refuses_labels_that_are_no_option(label: str, tmp_path: Path) -> None:
    figures(tmp_path / "arxivqa.jsonl", [(["up", "down"], "A"), (["up", "down"], label)])
    figures(tmp_path / "arxivqa_test.jsonl", [(["up", "down"], "A")])
    with pytest.raises(DataError, match=r"line 2: label .* is none of the options"):
        load("arxivqa", tmp_path)
    assert sizes(load("arxivqa", tmp_path, skip_bad=True)) == [1, 0, 1]


def test_arxivqa_options_are_a_list(tmp_path: Path) -> None:
    figures(tmp_path / "arxivqa.jsonl", [("AB", "A")])  # type: ignore[list-item]
    with pytest.raises(DataError, match="line 1: options are 'AB'"):
        load("arxivqa", tmp_path)


def test_arxivqa_divides_by_picture(tmp_path: Path) -> None:
    records = []
    for i in range(40):
        picture(tmp_path / f"images/{i // 2}.jpg")
        records.append(
            {"id": i, "image": f"images/{i // 2}.jpg", "options": ["up", "down"], "question": "?", "label": "A"}
        )
    lines(tmp_path / "arxivqa.jsonl", records)
    task = load("arxivqa", tmp_path)
    assert sizes(task) == [32, 4, 4]
    seen = [{s.media for s in split} for split in (task.train, task.val, task.test)]
    assert seen[0].isdisjoint(seen[1] | seen[2]) and seen[1].isdisjoint(seen[2])
    assert sizes(load("arxivqa", tmp_path, train_size=5, test_size=1)) == [5, 2, 1]


# POPE


def test_pope_has_three_subsets(tmp_path: Path) -> None:
    image = "COCO_val2014_000000000001.jpg"
    picture(tmp_path / "coco/val2014" / image)
    for subset in ("random", "popular", "adversarial"):
        asked = {"question_id": 1, "image": image, "text": f"Is there a {subset}?", "label": "no"}
        lines(tmp_path / f"pope/coco_pope_{subset}.json", [asked, asked | {"question_id": 2, "label": "yes"}])
    for subset in ("random", "popular", "adversarial"):
        task = load("pope", tmp_path / "pope", subset=subset)
        assert sizes(task) == [0, 0, 2] and task.metric == "exact"
        assert task.test[0].prompt == f"Is there a {subset}?\n{ONE_WORD}"
        assert [s.answers[0] for s in task.test] == ["no", "yes"]
    for part in ("train", "val"):
        lines(tmp_path / f"pope/coco_pope_{part}.json", [asked])
    assert sizes(load("pope", tmp_path / "pope")) == [1, 1, 2]


@pytest.mark.parametrize("change", [{"label": "maybe"}, {"image": "1.jpg"}])
def test_pope_refuses_what_it_cannot_place(change: dict[str, str], tmp_path: Path) -> None:
    asked = {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "?", "label": "no"} | change
    lines(tmp_path / "pope/coco_pope_random.json", [asked])
    with pytest.raises(DataError, match=r"line 1: image .* are expected"):
        load("pope", tmp_path / "pope")
