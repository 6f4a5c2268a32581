"""Answers that survive a crash, and scores that need no model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from graftlm.core.errors import DataError, RunError
from graftlm.data.types import Media, Sample, Task
from graftlm.evaluation.blind import blind
from graftlm.evaluation.bootstrap import paired_difference
from graftlm.evaluation.predict import predict
from graftlm.evaluation.suite import evaluate, rescore


class Parrot:
    """Answers with the last word of the question, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def generate(self, samples: Sequence[Sample], *, max_new_tokens: int) -> list[str]:
        self.asked += len(samples)
        return [sample.prompt.split()[-1] for sample in samples]


def make_task(count: int = 10) -> Task:
    samples = tuple(
        Sample(str(i), "colors", (Media("image", Path(f"{i}.png")),), f"{'x ' * (i % 4)}say red{i % 3}", ("red1",))
        for i in range(count)
    )
    return Task("colors", "qa", ("image",), "exact", (), (), samples)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_suite import Parrot, make_task
from graftlm.evaluation.suite import evaluate
evaluate(Parrot(), [make_task()], Path(sys.argv[1]), batch_size=3)
"""


def start(folder: Path, **environment: str) -> int:
    code = [sys.executable, "-c", SCRIPT, str(folder), str(Path(__file__).parent)]
    return subprocess.run(code, env=os.environ | environment, timeout=120).returncode


def test_a_killed_evaluation_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    assert start(tmp_path / "whole") == 0
    assert start(tmp_path / "killed", GRAFTLM_KILL_AT="batch.predicted:2") == -signal.SIGKILL
    lines = tmp_path / "killed/predictions/colors.jsonl"
    assert len(lines.read_text().splitlines()) == 6
    with lines.open("a") as file:
        file.write('{"sample_id": "torn')
    assert start(tmp_path / "killed") == 0
    for name in ("predictions/colors.jsonl", "scores.json", "items.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_part_of_a_batch_is_asked_again(tmp_path: Path) -> None:
    task, path = make_task(), tmp_path / "p.jsonl"
    predict(Parrot(), task, task.test, path, batch_size=3)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:5]))
    parrot = Parrot()
    predict(parrot, task, task.test, path, batch_size=3)
    assert path.read_text() == whole and parrot.asked == 7


def test_finished_answers_are_not_asked_again(tmp_path: Path) -> None:
    task, parrot = make_task(), Parrot()
    evaluate(Parrot(), [task], tmp_path)
    scores = evaluate(parrot, [task], tmp_path)
    assert parrot.asked == 0
    assert scores["colors"].value == pytest.approx(0.3) and scores["colors"].n == 10 and scores["colors"].stderr > 0


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    task, path = make_task(), tmp_path / "p.jsonl"
    predict(Parrot(), task, task.test, path)
    with pytest.raises(RunError, match="line 1: an answer to another question"):
        predict(Parrot(), task, task.test[1:], path)
    reworded = tuple(dataclasses.replace(s, prompt="say red9") if s.id == "8" else s for s in task.test)
    with pytest.raises(RunError, match="line 3: an answer to another question"):  # after those of 0 and 4
        predict(Parrot(), task, reworded, path)
    path.write_text('{"output": 1}\n')
    with pytest.raises(RunError, match="no prediction"):
        predict(Parrot(), task, task.test, path)


def test_blind_answers_do_not_pass_for_sighted_ones(tmp_path: Path) -> None:
    task = make_task()
    evaluate(Parrot(), [task], tmp_path)
    with pytest.raises(RunError, match="an answer to another question"):
        evaluate(Parrot(), [blind(task, seed=0)], tmp_path)
    moved = [dataclasses.replace(s, media=(Media("image", Path("/moved") / s.media[0].source),)) for s in task.test]
    assert evaluate(Parrot(), [dataclasses.replace(task, test=moved)], tmp_path)["colors"].n == 10


def test_an_id_that_two_samples_share_is_refused(tmp_path: Path) -> None:
    task = make_task()
    with pytest.raises(DataError, match="1 sample ids are used more than once"):
        predict(Parrot(), task, (*task.test, task.test[0]), tmp_path / "p.jsonl")


def test_predictions_that_were_cut_are_not_scored_as_if_whole(tmp_path: Path) -> None:
    evaluate(Parrot(), [make_task()], tmp_path)
    path, scores = tmp_path / "predictions/colors.jsonl", (tmp_path / "scores.json").read_bytes()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(RunError, match="4 predictions of 'colors', where 10 were scored"):
        rescore(tmp_path)
    assert (tmp_path / "scores.json").read_bytes() == scores
    evaluate(Parrot(), [make_task()], tmp_path)
    assert (tmp_path / "scores.json").read_bytes() == scores


def test_new_numbers_need_no_model(tmp_path: Path) -> None:
    evaluate(Parrot(), [make_task()], tmp_path)
    before = (tmp_path / "scores.json").read_bytes()
    rescore(tmp_path)
    assert (tmp_path / "scores.json").read_bytes() == before
    assert rescore(tmp_path, {"colors": "letter"})["colors"].value == 1.0
    with pytest.raises(RunError, match="missing; a folder that was evaluated"):
        rescore(tmp_path / "nothing")


def test_the_limit_takes_the_first_items(tmp_path: Path) -> None:
    evaluate(Parrot(), [make_task()], tmp_path, limit=4)
    assert set(json.loads((tmp_path / "items.json").read_text())["colors"]) == {"0", "1", "2", "3"}


def test_the_blind_see_only_foreign_media() -> None:
    task = make_task()
    turned = blind(task, seed=0)
    assert all(a.media != b.media and a.prompt == b.prompt for a, b in zip(task.test, turned.test, strict=True))
    assert sorted(str(s.media) for s in turned.test) == sorted(str(s.media) for s in task.test)


def test_paired_differences() -> None:
    better = {"t": {str(i): 1.0 for i in range(100)}}
    mixed = {"t": {str(i): float(i % 2) for i in range(100)}}
    difference = paired_difference(better, mixed, {"t": 0.5})
    assert difference.value == pytest.approx(100) and 70 < difference.low < 100 < difference.high < 130
    same = paired_difference(mixed, mixed, {"t": 0.5})
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(DataError, match="the same items"):
        paired_difference(better, {"t": {"0": 1.0}}, {"t": 0.5})
    with pytest.raises(DataError, match="0 experts' scores"):
        paired_difference(better, mixed, {})


def test_the_interval_holds_the_truth_in_95_of_100_worlds() -> None:
    """Both methods share the difficulty of an item; the true difference is 0.1."""
    rng, held = np.random.default_rng(0), 0
    for world in range(200):
        shared, noise = rng.normal(size=80), rng.normal(0, 0.3, size=(2, 80))
        first, second = (
            {"t": {str(i): float(x) for i, x in enumerate(v)}} for v in (shared + noise[0] + 0.1, shared + noise[1])
        )
        difference = paired_difference(first, second, {"t": 1.0}, seed=world, draws=400)
        held += difference.low <= 10 <= difference.high
    assert 176 <= held <= 199
