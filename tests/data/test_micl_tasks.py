"""Flickr30k, MSR-VTT and MSRVTT-QA as they lie on disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import DataError
from graftlm.data.tasks import TASKS, flickr30k, msrvtt, msrvtt_qa


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def karpathy(root: Path) -> None:
    images: list[dict[str, Any]] = []
    for number, split in enumerate(("train", "train", "val", "test", "restval")):
        sentences = [{"raw": f"picture {number} said {k}.", "tokens": []} for k in range(5)]
        images.append({"filename": f"10{number}.jpg", "split": split, "sentences": sentences, "imgid": number})
        touch(root / f"flickr30k-images/10{number}.jpg")
    write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def token_lines(files: int) -> str:
    return "".join(f"{number}.jpg#{k}\tpicture {number} said {k} .\n" for number in range(files) for k in range(5))


def test_flickr30k_has_the_splits_of_karpathy(tmp_path: Path) -> None:
    karpathy(tmp_path)
    task = flickr30k.load(tmp_path)
    assert (task.kind, task.metric, task.modalities) == ("caption", "cider", ("image",))
    assert [(s.id, s.answers) for s in task.train] == [(f"10{i}.0", (f"picture {i} said 0.",)) for i in (0, 1)]
    assert [s.id for s in task.val] == ["102"] and len(task.val[0].answers) == 5
    assert [s.media[0].source.name for s in task.test] == ["103.jpg"]
    assert len(flickr30k.load(tmp_path, all_captions=True).train) == 10
    assert flickr30k.load(tmp_path, prompt="describe the image.").test[0].prompt == "describe the image."


def test_flickr30k_draws_splits_where_there_are_only_tokens(tmp_path: Path) -> None:
    write(tmp_path / "results_20130124.token", token_lines(30))
    for number in range(30):
        touch(tmp_path / f"flickr30k-images/{number}.jpg")
    task = flickr30k.load(tmp_path)
    assert (len(task.train), len(task.val), len(task.test)) == (24, 3, 3)
    files = [{s.media[0].source for s in split} for split in (task.train, task.val, task.test)]
    assert len(set.union(*files)) == 30 and task == flickr30k.load(tmp_path)
    assert all(len(s.answers) == 5 for s in task.test) and all(len(s.answers) == 1 for s in task.train)
    assert task.test[0].answers[1] == f"picture {task.test[0].id} said 1 ."


@pytest.mark.parametrize("line", ["a.jpg#0 no tab", "a.jpg\tno number", "a.jpg#x\tno number"])
def test_flickr30k_names_a_damaged_line(line: str, tmp_path: Path) -> None:
    write(tmp_path / "results_20130124.token", f"0.jpg#0\tfine .\n{line}\n")
    with pytest.raises(DataError, match=r"results_20130124.token: the line 'a.jpg.*file#number, a tab and a caption"):
        flickr30k.load(tmp_path)


def test_flickr30k_names_a_damaged_entry(tmp_path: Path) -> None:
    karpathy(tmp_path)
    path = tmp_path / "dataset_flickr30k.json"
    write(path, path.read_text().replace('"raw": "picture 2 said 3."', '"raw": 3'))
    with pytest.raises(DataError, match=r"images\[2\].sentences\[3\].raw is 3, text is expected"):
        flickr30k.load(tmp_path)


def videos(root: Path, folder: str = "videos/all") -> None:
    def info(number: int, split: str) -> dict[str, Any]:
        return {
            "video_id": f"video{number}",
            "split": split,
            "category": 1,
            "url": "",
            "start time": 0.0,
            "end time": 1.0,
        }

    for name, splits in (("train_val", ("train", "train", "validate")), ("test", ("test",))):
        first = 0 if name == "train_val" else 3
        said = [
            {"caption": f"clip {first + i} said {k}", "video_id": f"video{first + i}", "sen_id": 20 * i + k}
            for i in range(len(splits))
            for k in range(20)
        ]
        entries = [info(first + i, split) for i, split in enumerate(splits)]
        write(root / f"{name}_videodatainfo.json", {"videos": entries, "sentences": said})
    for number in range(4):
        touch(root / folder / f"video{number}.mp4")


@pytest.mark.parametrize("folder", ["videos/all", "videos", "TrainValVideo"])
def test_msrvtt_trains_on_the_first_of_twenty_captions(folder: str, tmp_path: Path) -> None:
    videos(tmp_path, folder)
    task = msrvtt.load(tmp_path)
    assert [(s.id, s.answers) for s in task.train] == [(f"video{i}.0", (f"clip {i} said 0",)) for i in (0, 1)]
    assert [s.id for s in task.val] == ["video2"] and [s.id for s in task.test] == ["video3"]
    assert len(task.test[0].answers) == 20 and task.test[0].media[0].source.parent == tmp_path / folder
    assert len(msrvtt.load(tmp_path, all_captions=True).train) == 40


def test_msrvtt_names_missing_clips_and_damaged_entries(tmp_path: Path) -> None:
    videos(tmp_path)
    (tmp_path / "videos/all/video3.mp4").unlink()
    with pytest.raises(DataError, match=r"msrvtt: 1 media files .* first .*videos/all/video3.mp4"):
        msrvtt.load(tmp_path)
    path = tmp_path / "test_videodatainfo.json"
    write(path, path.read_text().replace('"split": "test"', '"split": "later"'))
    with pytest.raises(DataError, match="an annotation is not of the form"):
        msrvtt.load(tmp_path)


def test_msrvtt_qa_asks_about_the_clips_beside_it(tmp_path: Path) -> None:
    videos(tmp_path / "msrvtt")
    for split, video in (("train", 0), ("val", 2), ("test", "video3")):
        entry = {"answer": "dog", "category_id": 1, "id": 7, "question": "what barks?", "video_id": video}
        write(tmp_path / f"msrvtt_qa/{split}_qa.json", [entry, entry | {"id": 8, "answer": 2}])
    task = msrvtt_qa.load(tmp_path / "msrvtt_qa")
    assert (task.kind, task.metric, task.max_new_tokens) == ("qa", "exact", 10)
    assert [s.media[0].source.name for s in (task.train[0], task.test[0])] == ["video0.mp4", "video3.mp4"]
    assert [(s.id, s.prompt, s.answers) for s in task.test] == [
        ("7", "what barks?", ("dog",)),
        ("8", "what barks?", ("2",)),
    ]
    assert msrvtt_qa.load(tmp_path / "msrvtt_qa", videos=tmp_path / "msrvtt") == task


def test_the_table_knows_them() -> None:
    assert {name: TASKS.get(name) for name in ("flickr30k", "msrvtt", "msrvtt_qa")} == {
        "flickr30k": flickr30k.load,
        "msrvtt": msrvtt.load,
        "msrvtt_qa": msrvtt_qa.load,
    }
