"""The page and the Markdown of a comparison, and what stages note for the page of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import RunError
from graftlm.report import figures, grid, page
from graftlm.report.figures import Series

HOSTILE = "<img src=x onerror=alert(1)>|x"


def spread(mean: float, std: float | None = 1.0) -> dict[str, Any]:
    return {"mean": mean, "std": std, "n": 2, "low": mean - 1, "high": mean + 1}


def facts(**changes: Any) -> dict[str, Any]:
    table = {
        name: {"acc": spread(acc), "fm": spread(fm), "runs": 2, "of": 2}
        for name, acc, fm in (("finetune", 60.0, 30.0), ("mera", 90.0, 5.0), ("ewc", 62.0, 25.0))
    }
    table["broken"] = {"acc": None, "fm": None, "runs": 0, "of": 2}
    gap = {"runs": 2, "seeds": 2}
    cost = {"seconds": 10.0, "cpu_seconds": 5.0, "relative": 1.5, "peak_memory_bytes": 1e9, "parameters": 7e5, "tokens": 1.0,
            "checkpoint_bytes": 4e6}  # fmt: skip
    return {
        "name": "study",
        "split": "test",
        "limit": None,
        "against": "finetune",
        "methods": {"finetune": ["finetune"], "mera": [{"mera": {"fraction": 0.1}}], "ewc": ["ewc"], "broken": ["damc"]},
        "orders": {"given": {"stream": "s", "stages": ["image", "audio"]}},
        "seeds": [0, 1],
        "metrics": {
            "acc": {"title": "ACC", "about": "mean", "large": True},
            "fm": {"title": "FM", "about": "fall", "large": False},
        },
        "fm": "best since its own learning",
        "table": {"given": table},
        "differences": {
            "given": {
                "mera": {"value": 30.0, "low": 20.0, "high": 40.0, "told_apart": True, **gap},
                "ewc": {"value": 2.0, "low": -1.0, "high": 5.0, "told_apart": False, **gap},
            }
        },
        "ranks": {"finetune": {"mean": 3.0, "blocks": 2}, "mera": {"mean": 1.0, "blocks": 2}},
        "cost": {"mera": cost},
        "curves": {"given": {"backward": {"mera": [spread(100.0), spread(90.0)]}, "shift": {"mera": [spread(0.01), None]}}},
        "raw": {
            "given": {
                "tasks": {"image": ["coco"], "audio": ["clotho"]},
                "probes": ["instructions"],
                "units": {"coco": "cider"},
                "bounds": {"start": {"coco": spread(5.0)}, "expert": {"coco": spread(100.0), "clotho": spread(0.5)}},
                "methods": {"mera": {"coco": spread(90.0), "clotho": spread(0.45, None)}},
                "matrix": {"mera": [[100.0, None], [90.0, 95.0]]},
            }
        },
        "runs": [
            {"name": "given-seed0", "order": "given", "seed": 0, "methods": {"mera": {"finished": True}}},
        ],
        "failed": [{"run": "given-seed0", "kind": "method", "name": "broken", "message": HOSTILE}],
        "tuning": None,
        "code": ["abc"],
        **changes,
    }  # fmt: skip


def written(folder: Path, **changes: Any) -> tuple[str, str]:
    (folder / "comparison.json").write_text(json.dumps(facts(**changes)))
    html, markdown = grid.write(folder)
    return html.read_text(), markdown.read_text()


def test_what_is_not_told_apart_is_said_so() -> None:
    said = grid.lead(facts())
    assert "against finetune: better: mera by 30.0 points; not told apart: ewc." in said
    assert "One seed" not in said
    assert "One seed: intervals speak of the test items" in grid.lead(facts(seeds=[0]))


def test_both_pages_say_the_same(tmp_path: Path) -> None:
    html, markdown = written(tmp_path)
    for text in (html, markdown):
        assert "+30.0" in text and "+20.0 to +40.0, better" in text
        assert "−1.0 to +5.0, not told apart" in text
        assert "0 of 2 runs, the rest failed" in text
        assert "1.50 ×" in text and "coco (cider)" in text
    assert "| mera | **90.0** ± 1.0 | **5.0** ± 1.0 | 1.00 |" in markdown  # a small FM is the best
    assert "| clotho" not in markdown.split("## Raw")[0]


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    html, markdown = written(tmp_path)
    assert HOSTILE not in html and "&lt;img src=x onerror" in html
    assert "onerror=alert(1)>\\|x" in markdown  # would end a table's cell
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )


def test_equal_means_have_no_best(tmp_path: Path) -> None:
    table = {name: {"acc": spread(50.0), "fm": None, "runs": 2, "of": 2} for name in facts()["methods"]}
    _, markdown = written(tmp_path, table={"given": table})
    assert "| ewc | 50.0 ± 1.0 |" in markdown


def test_several_versions_of_the_code_are_a_warning(tmp_path: Path) -> None:
    html, markdown = written(tmp_path, code=["abc", "def"])
    assert "2 versions of the code" in html and "2 versions of the code" in markdown


def test_trials_are_shown(tmp_path: Path) -> None:
    trial = {"settings": {"ewc.strength": 100.0}, "score": 80.0, "backward": 70.0, "forward": 90.0, "failed": None}
    bad = {
        **trial,
        "settings": {"ewc.strength": 1e5},
        "score": None,
        "backward": None,
        "forward": None,
        "failed": "nan",
    }
    tuning = {"objective": "the mean", "budget": 2, "seed": 100, "order": "given", "split": "val",
              "methods": {"ewc": {"given": ["ewc"], "chosen": 0, "trials": [trial, bad]}}}  # fmt: skip
    html, markdown = written(tmp_path, tuning=tuning)
    assert "At most 2 candidates per method" in html
    assert "| ewc | ewc.strength=100.0 | 80.0 | 70.0 | 90.0 | **chosen** |" in markdown
    assert "ewc.strength=100000.0 | – | – | – | failed" in markdown


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"comparison.json: missing"):
        grid.write(tmp_path)


def test_small_numbers_have_small_ticks() -> None:
    svg = figures.curves("shift", "about", ["a", "b"], [Series("m", 0, [0.01, 0.034])], unit="")
    assert ">0.03<" in svg and ">100" not in svg and "expert" not in svg
    percent = figures.curves("gain", "about", ["a", "b"], [Series("m", 0, [99.0, 98.0])])
    assert ">100<" in percent and ">expert<" in percent


def test_a_spectrum_is_logarithmic_and_bounded() -> None:
    svg = figures.spectrum("w", [1.0, 0.1, 1e-30], [0.3, 0.1, 0.0], k=2)
    assert ">1e0<" in svg and ">1e-6<" in svg and ">1e-7<" not in svg
    assert svg.count('class="curve"') == 2 and svg.count('class="blind"') == 1
    assert "nan" not in svg
    assert figures.spectrum("w", [0.0], []) == ""


def noted(folder: Path) -> None:
    """A run of two stages that measured its language shift and noted spectra at the second."""
    for index, stage in enumerate(("image", "audio")):
        for place in (folder / "experts" / stage, folder / "methods" / "llava-c" / f"{index + 1}-{stage}"):
            place.mkdir(parents=True)
            tasks = ["image", "audio"][: index + 1] if "methods" in place.parts else [stage]
            (place / "scores.json").write_text(
                json.dumps({f"task_{t}": {"metric": "exact", "value": 0.5} for t in tasks})
            )
            (place / "fit.json").write_text("[]")
    second = folder / "methods" / "llava-c" / "2-audio"
    (folder / "methods/llava-c/1-image/shift.json").write_text('{"inquiries": 4, "l2": 1.25, "relative": 0.1}')
    (second / "shift.json").write_text('{"inquiries": 4, "l2": 2.5, "relative": 0.2}')
    spectra = [
        {"name": f"layer.{i}", "before": [3.0, 0.1], "after": [1.0, 0.1], "k": 1, "reached": 0.33} for i in range(9)
    ]
    (second / "notes.json").write_text(json.dumps({"spectra": spectra, "other": 1}))
    (folder / "experiment.yaml").write_text("name: noted\n")


def test_a_run_shows_shift_and_spectra(tmp_path: Path) -> None:
    noted(tmp_path)
    html = page.write(tmp_path).read_text()
    assert "Language shift" in html and "stage 2 (audio): 2.50<" in html
    assert html.count('class="spectrum"') == page.SPECTRA  # a selection of the nine
    assert "k = 1, reached 0.33" in html and "llava-c, audio" in html


def test_a_run_without_notes_has_neither(tmp_path: Path) -> None:
    noted(tmp_path)
    for path in [*tmp_path.rglob("shift.json"), *tmp_path.rglob("notes.json")]:
        path.unlink()
    html = page.write(tmp_path).read_text()
    assert "Language shift" not in html and "Spectra" not in html
