"""The page of a run that composes: every study is there, and what is best and what is only a bound is told apart."""

import json
from pathlib import Path

import pytest
from composed import build, summary
from test_page import Page

from graftlm.report import composing, page
from graftlm.report.reading import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("composing") / "run")


@pytest.fixture(scope="module")
def read(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(page.write(run, tmp_path_factory.mktemp("page") / "report.html"))


def test_the_result_is_said_first(read: Page) -> None:
    assert "mmer keeps 98.0 % of what the experts reach; average keeps 88.0 %." in read.text
    assert "Over combinations of inputs mmer is right most often: 55.0 %." in read.text  # not the ceiling, 65
    assert "Unfinished" not in read.text


def test_every_section_can_be_reached(read: Page) -> None:
    places = {a.get("id") for a in read.all("section")}
    assert places == {"expansion", "retention", "forgetting", "studies", "samples", "settings"}
    assert {f"#{place}" for place in places} == {a["href"] for a in read.all("a") if "#task" not in (a["href"] or "")}


def test_tables(read: Page) -> None:
    assert (
        "IA VI mean average 55.0 45.0 50.0 mmer 60.0 50.0 55.0 damc 50.0 40.0 45.0 originals 70.0 60.0 65.0"
        in read.text
    )
    assert "blind mmer, shown other samples' media 24.0 26.0 25.0" in read.text
    assert "mmer density 0.8, significance 0.3 / 0.9 98.0 98.0 98.0 91.0 91.0 91.0 75.0" in read.text
    assert "damc, of its own percent of the experts that it composed 100.0 100.0 100.0 97.5 97.5 97.5 –" in read.text
    assert "no-congruence density 0.8, significance 0.3 / 0.9 25.0 70.0 60.0" in read.text
    assert "K = 80 % 52.4 98.0 kept 57.2 98.0 kept" in read.text
    assert "new-pictures: composed again coco_2 97.2 99.0 98.5 55.0 Model Tailor 90.0 80.0 – –" in read.text
    assert "mmer 8.00 MB 64.0" in read.text
    assert "mmer 60.0 2.0" in read.text  # shares of the masks


def test_only_composers_are_marked_as_best(run: Path) -> None:
    (_, _, (sheet,)), *_ = composing.sections(read_run(run))
    best = {row.name: [cell.best for cell in row.cells] for row in sheet.rows}
    assert best.pop("mmer") == [True] * 3
    assert list(best) == ["average", "damc", "originals", "blind"] and not any(map(any, best.values()))
    assert [row.kind for row in sheet.rows] == ["method", "method", "method", "floor", "floor"]


def test_figures_have_their_numbers_in_words(read: Page) -> None:
    assert [a["class"] for a in read.all("svg")] == ["ranking", "curves", "curves", "curves"]
    assert "mmer: 98.0 %; damc: 93.0 %; average: 88.0 %" in read.text
    assert "λ = 0.3: 92.0, 98.0; λ = 0.9: 92.0, 98.0." in read.text
    assert "average: 97.0, 88.0; mmer: 97.0, 98.0" in read.text
    assert "originals: 100, 100; plain: 40, 40; mmer: 64, 64" in read.text


def test_answers_of_composers_side_by_side(read: Page) -> None:
    assert "composer all modalities in one model average ✗ x mmer ✓ a" in read.text
    assert not read.all("b", class_="x") and "which is <b>0</b> ?" in read.text


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    read = Page(page.write(build(tmp_path / "run", finished=False)))
    assert "Nothing is composed yet." in read.text
    assert "Unfinished: 2 experts measured; compositions are shown when all are." in read.text


def test_studies_may_be_left_out(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    facts = summary()
    for study in ("ablation", "sweep", "counts", "forgetting"):
        del facts["composing"][study]
    del facts["composing"]["storage"]["by_count"]
    (run / "summary.json").write_text(json.dumps(facts))
    parts = composing.sections(read_run(run))
    assert [(key, len(sheets)) for key, _, sheets in parts] == [("expansion", 1), ("retention", 1), ("studies", 2)]
    assert "forgetting" not in {a.get("id") for a in Page(page.write(run)).all("section")}


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", shift=0.01)
    read = Page(page.compare([run, other], tmp_path / "compare.html"))
    assert "mmer 98.5 ± 0.7 91.0 ± 0.0 55.0 ± 0.0" in read.text
    assert {a.get("id") for a in read.all("section")} == {"result", "runs", "settings"}
    assert all((a["href"] or "")[1:] in ("result", "runs", "settings") for a in read.all("a"))
