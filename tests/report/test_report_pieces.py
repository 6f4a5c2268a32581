"""Figures, tables, samples and reading, each by itself."""

import base64
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from graftlm.report import figures, media, tables
from graftlm.report.figures import Series
from graftlm.report.reading import flatten, gains, read_run
from graftlm.report.samples import choose


def test_curves_mark_every_known_point_and_escape_names() -> None:
    lines = [Series("<b>", 0, [100.0, None, 50.0]), Series("none", 1, [None, math.nan, None]), Series("m", 9, [90.0])]
    svg = figures.curves("t", "d", ["a", "<i>", "c"], lines, blind=20.0)
    assert svg.count('class="point"') == 3
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "--dash:7 4" in svg
    assert 'class="blind"' in svg


def test_curves_show_the_spread_over_runs() -> None:
    svg = figures.curves("t", "d", ["a", "b"], [Series("m", 0, [90.0, 80.0], [85.0, 80.0], [95.0, 80.0])])
    assert svg.count('class="spread"') == 1


def test_curves_without_anything() -> None:
    assert figures.curves("t", "d", [], []).startswith("<svg")


def test_names_at_line_ends_do_not_overlap() -> None:
    lines = [Series(f"m{i}", i, [100.0, 50.0 + i / 10]) for i in range(9)]
    svg = figures.curves("t", "d", ["a", "b"], lines)
    heights = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', svg))
    assert min(b - a for a, b in pairwise(heights)) >= 14.9


def test_numbers_times_and_sizes() -> None:
    assert [tables.number(v) for v in (1.005, None, math.nan, "x")] == ["1.00", "–", "–", "–"]
    assert [tables.duration(v) for v in (12.34, 754, 7260, None)] == ["12.3 s", "12 min 34 s", "2 h 01 min", "–"]
    assert [tables.memory(v) for v in (310e6, 37.43e9, 0, None)] == ["310 MB", "37.43 GB", "–", "–"]
    assert tables.mean_std([100, 51.08, 47.99, 39.97]) == pytest.approx((59.76, 27.23), abs=0.005)
    assert tables.mean_std([1.0]) == (1.0, None)


def test_shade_is_the_distance_from_the_expert(finished: Path) -> None:
    run = read_run(finished)
    matrix = tables.matrix(run, run.methods[0])
    label, _, cells = matrix.rows[2]
    assert label == "2 video"
    assert cells[0].shade == pytest.approx(-0.49)
    assert cells[2].shade == pytest.approx(0)
    assert cells[-2].shade is None


def test_unfinished_run_is_put_together_like_its_summary(finished: Path, make_run: object, tmp_path: Path) -> None:
    assert callable(make_run)
    rebuilt = read_run(make_run(tmp_path / "run", summary=False))
    written = read_run(finished)
    assert rebuilt.finished
    assert rebuilt.order == written.order
    assert rebuilt.experts == written.experts
    for ours, theirs in zip(rebuilt.methods, written.methods, strict=True):
        assert ours.ingredients == theirs.ingredients
        assert ours.forward == pytest.approx(theirs.forward)
        assert ours.probes == theirs.probes
        assert [set(stage) for stage in ours.scores] == [set(stage) for stage in theirs.scores]
        assert [entry["seconds"] for entry in ours.cost] == [entry["seconds"] for entry in theirs.cost]


def test_gains_without_experts() -> None:
    assert gains([{"image": {"coco": 1.0}}], {}) == ((), ())


def test_flatten() -> None:
    assert flatten({"a": {"b": [1, 2]}, "c": [{"d": None}]}) == {"a.b": "1, 2", "c.0.d": "None"}


def test_items_that_differ_most_come_first(finished: Path) -> None:
    run = read_run(finished)
    task = next(samples for samples in choose(run, 3) if samples.task == "okvqa")
    assert task.columns == ("image", "video", "audio", "point")
    assert len(task.items) == 3
    marks = {answer.mark for _, answers in task.items[0].rows for answer in answers if answer}
    assert marks == {"right", "wrong"}
    assert task.items[0].expert is not None
    assert task == next(samples for samples in choose(run, 3) if samples.task == "okvqa")


def test_without_item_scores_equal_text_is_right(finished: Path, tmp_path: Path, make_run: object) -> None:
    assert callable(make_run)
    folder = make_run(tmp_path / "run", order=("image",), methods=("finetune",), stages_done=1)
    for path in folder.rglob("items.json"):
        path.unlink()
    by_task = {samples.task: samples for samples in choose(read_run(folder), 6)}
    caption = {
        answer.mark for item in by_task["coco"].items for _, answers in item.rows for answer in answers if answer
    }
    short = {
        answer.mark
        for item in by_task["instructions"].items
        for _, answers in item.rows
        for answer in answers
        if answer
    }
    assert caption == {"unknown"}
    assert short <= {"right", "wrong"}


@pytest.mark.parametrize("unit", [1, 100])
def test_captions_are_judged_beside_the_expert(tmp_path: Path, make_run: object, unit: int) -> None:
    assert callable(make_run)
    folder = make_run(tmp_path / "run", order=("image",), methods=("finetune",), stages_done=1)
    cells = {
        folder / "methods" / "finetune" / "1-image": [2.5, 1.0, 0.5, 0.1, 0, 0.9],
        folder / "experts" / "image": [1.0] * 6,
    }
    for cell, scores in cells.items():
        items = json.loads((cell / "items.json").read_text())
        (cell / "items.json").write_text(json.dumps(items | {"coco": [unit * score for score in scores]}))
    samples = next(samples for samples in choose(read_run(folder), 6) if samples.task == "coco")
    said = {item.sample_id: item.rows[0][1][0] for item in samples.items}
    marks = [(answer.mark, answer.note) for i in range(6) if (answer := said[f"coco-{i}"])]
    assert marks == [
        ("right", "252"),
        ("right", "101"),
        ("partial", "50"),
        ("partial", "10"),
        ("wrong", "0"),
        ("partial", "91"),
    ]


def test_large_pictures_and_long_sounds_become_small(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "big.png")
    shown = media.show("image", tmp_path / "big.png")
    assert (shown.kind, shown.text, shown.pixelated) == ("image", "2000 × 1000", False)
    assert shown.size < 20_000
    soundfile.write(tmp_path / "long.wav", np.zeros((48_000 * 12, 2)), 48_000)
    sound = media.show("audio", tmp_path / "long.wav")
    assert sound.text == "12.0 s, the first 10 s"
    assert sound.size < 450_000


def test_cloud_without_colours_is_grey(tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32))
    shown = media.show("point", tmp_path / "grey.npy")
    points = np.frombuffer(base64.b64decode(shown.points), dtype=np.uint8).reshape(-1, 6)
    assert len(points) == media.POINTS
    assert (points[:, 3:] == 204).all()
    assert np.linalg.norm(points[:, :3] / 127.5 - 1, axis=1).max() <= 1.01


def test_unknown_and_damaged_files_become_notes(tmp_path: Path) -> None:
    for name in ("a.xyz", "b.mp4", "c.wav", "d.ply"):
        (tmp_path / name).write_bytes(b"nonsense")
    texts = [media.show("x", tmp_path / name).text for name in ("a.xyz", "b.mp4", "c.wav", "d.ply", "e.png")]
    assert texts == [
        "no picture for this kind of file: a.xyz",
        "media unreadable: b.mp4",
        "media unreadable: c.wav",
        "media unreadable: d.ply",
        "media missing: e.png",
    ]
