"""The page of one run: what it says, and what it must never do."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graftlm.core.errors import RunError
from graftlm.core.files import append_jsonl
from graftlm.report import page

Build = Callable[..., Path]


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and its text by line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._silent = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items())]


@pytest.fixture(scope="module")
def read(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(page.write(finished, tmp_path_factory.mktemp("page") / "report.html"))


def test_default_place_is_the_run_folder(make_run: Build, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", order=("image",), methods=("finetune",), stages_done=1)
    assert page.write(run) == run / "report.html"
    assert (run / "report.html").stat().st_size < page.LARGEST
    assert not list(run.glob(".*.tmp"))


def test_header_and_numbers(read: Page) -> None:
    assert "mera10 keeps 98.6 % of what experts reach, on average over 4 stages; finetune keeps 59.5 %." in read.text
    for fact in ("mera-miniworld", "2025-05-01 10:00 UTC, 7 min 30 s", "0.1.0", "2.9.0", "x86_64, 2 CPUs"):
        assert fact in read.text
    assert "finetune 100.0 51.0 45.5 41.3 59.46 ± 27.32 100.0 100.0 100.0 100.0 0.699" in read.text
    assert "eproj frozen LLM 87.0 87.0 87.0 87.0 87.00 ± 0.00" in read.text
    assert "blind experts shown the media of other samples 30.0 30.0 30.0 30.0 30.00" in read.text
    assert "base the LLM before any stage – – – –" in read.text
    assert "Unfinished" not in read.text


def test_matrix_has_dashes_before_a_task_is_learned(read: Page) -> None:
    assert "1 image 100.0 100.76 100.0 0.358 – – – – – – 0.900" in read.text
    assert "4 point 33.0 33.25 33.0 0.118" in read.text
    titles = [a["title"] for a in read.all("td") if a.get("title")]
    assert "coco after video: 51.39 ± 1.03 (metric cider, n 6); expert 100.76" in titles


def test_figures_explain_themselves(read: Page) -> None:
    figures = [a for a in read.all("svg") if a.get("class") in ("curves", "ranking")]
    assert len(figures) == 3
    assert all(a["role"] == "img" for a in figures)
    assert len(read.all("g", class_="point")) == 2 * 3 * 4
    assert "Percent of the experts, stage by stage. finetune: 100.0, 51.0, 45.5, 41.3;" in read.text
    assert "mera10, stage 4 (point): 97.33 %" in read.text


def test_cost(read: Page) -> None:
    assert "finetune pretrain 16.0 s 240 000 15 000 310 MB" in read.text
    assert "total 70.0 s 480 000" in read.text


def test_every_modality_is_shown(read: Page) -> None:
    sources = [a["src"] or "" for a in [*read.all("img"), *read.all("audio")]]
    assert sum(source.startswith("data:image/webp;base64,") for source in sources) >= 4
    assert sum(source.startswith("data:audio/wav;base64,") for source in sources) == 8
    assert all(source.startswith("data:") for source in sources)
    assert sum("data-points" in a for a in read.all("canvas")) == 8
    assert len(read.all("svg", class_="waveform")) == 8


def test_answers_are_marked(read: Page) -> None:
    marks = [a["class"] for a in read.all("td") if a.get("class") in ("right", "wrong", "partial")]
    assert {"right", "wrong"} <= set(marks)
    assert "✓" in read.text
    assert "✗" in read.text


def test_nothing_is_asked_for(read: Page) -> None:
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:|//)""", read.source)
    assert not read.all("link", rel="stylesheet")
    policy = read.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(read: Page) -> None:
    assert len(read.all("script")) == 1
    assert not read.all("img", src="x")
    assert "<script>document.title='owned'</script><img src=x onerror=alert(1)>" in read.text


def test_hostile_names_stay_text(make_run: Build, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", order=("image",), methods=("finetune",), stages_done=1)
    bad = '"><script>alert(1)</script>'
    text = (run / "summary.json").read_text().replace('"finetune"', json.dumps(bad)).replace('"coco"', json.dumps(bad))
    (run / "summary.json").write_text(text.replace('"name": "mera-miniworld"', f'"name": {json.dumps(bad)}'))
    (run / "experiment.yaml").write_text(f"seed: {json.dumps(bad)}\n")
    read = Page(page.write(run))
    assert len(read.all("script")) == 1
    assert bad in read.text


def test_unfinished_run(make_run: Build, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", summary=False, stages_done=2)
    read = Page(page.write(run))
    assert "Unfinished: finetune 2 of 4 stages; eproj 2 of 4 stages; mera10 2 of 4 stages." in read.text
    assert "finetune unfinished: audio, point to come 100.0 51.0 – –" in read.text
    assert "instructions" in read.text


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("name: young\nseed: 3\n")
    read = Page(page.write(tmp_path))
    assert "No stage of a method is finished yet." in read.text
    assert "Unfinished: no method has begun." in read.text


def test_missing_damaged_and_absent_media(make_run: Build, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", order=("image",), methods=("finetune",), stages_done=1)
    for index in range(3):  # four of the six items are shown
        (run / "media" / "image" / f"{index}.png").unlink()
        (run / "media" / "image" / f"{index + 3}.png").write_bytes(b"no picture")
    file = run / "methods" / "finetune" / "1-image" / "predictions" / "instructions.jsonl"
    append_jsonl(
        file, {"sample_id": "new", "task": "instructions", "prompt": "say", "output": "b", "references": ["a"]}
    )
    read = Page(page.write(run))
    assert re.search(r"media missing: [0-2]\.png", read.text)
    assert re.search(r"media unreadable: [3-5]\.png", read.text)
    assert str(tmp_path) not in read.source


def test_page_stays_small(make_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", order=("image",), methods=("finetune",), stages_done=1)
    full = page.write(run).stat().st_size
    monkeypatch.setattr(page, "LARGEST", full - 1)
    assert page.write(run).stat().st_size < full
    monkeypatch.setattr(page, "SIZES", ((4, 100),))
    assert "image left out: the page is full" in Page(page.write(run)).text


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run here .* Give the folder that 'graftlm run' printed"):
        page.write(tmp_path)
    (tmp_path / "experiment.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"experiment.yaml: not YAML"):
        page.write(tmp_path)


def test_comparison(make_run: Build, tmp_path: Path, finished: Path) -> None:
    other = make_run(tmp_path / "other", seed=1, shift=-0.04)
    reverse = make_run(tmp_path / "reverse", order=("point", "audio", "video", "image"))
    path = page.compare([finished, other, reverse], tmp_path / "compare.html")
    read = Page(path)
    assert "3 runs, 2 orders" in read.text
    assert "image → video → audio → point" in read.text
    assert "finetune 57.96 ± 2.12 ± 28.31" in read.text
    assert "seed 0 1 0" in read.text
    assert "platform Linux-0 Linux-1 Linux-0" in read.text
    assert "5 properties of the machines and versions are the same" in read.text
    assert len([a for a in read.all("svg") if a.get("class") == "curves"]) == 6


def test_comparison_needs_two_runs(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"1 run to compare - two or more were expected"):
        page.compare([finished], tmp_path / "compare.html")
