"""The page in a real browser, opened from disk."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from graftlm.report import page

playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the playwright package")

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

Opened = tuple["Page", list[str]]

CHROMIUM = Path(os.environ.get("GRAFTLM_CHROMIUM", "/usr/bin/chromium"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}: install the package 'chromium' or set GRAFTLM_CHROMIUM"
)

INKED = """canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const first = pixels.slice(0, 3).join();
  let different = 0;
  for (let i = 0; i < pixels.length; i += 4) if (pixels.slice(i, i + 3).join() !== first) different++;
  return different;
}"""


@pytest.fixture(scope="module")
def opened(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The page in Chromium, and everything it complained about or asked for."""
    path = page.write(finished, tmp_path_factory.mktemp("browser") / "report.html")
    noticed: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.on("console", lambda message: noticed.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: noticed.append(f"error: {error}"))
        tab.on("request", lambda request: noticed.extend([request.url] * (not request.url.startswith("data:"))))
        tab.goto(path.as_uri())
        noticed.remove(path.as_uri())
        yield tab, noticed
        browser.close()


def test_text_and_curves_are_visible(opened: Opened) -> None:
    tab, _ = opened
    assert tab.title() == "mera-miniworld · graftlm"
    assert tab.get_by_text("mera10 keeps 98.6 % of what experts reach").is_visible()
    assert tab.locator("svg.curves").count() == 2
    for index in range(2):
        chart = tab.locator("svg.curves").nth(index)
        assert chart.locator(".curve").count() == 3
        assert chart.locator(".point").count() == 3 * 4
        box = chart.locator(".curve").first.bounding_box()
        assert box is not None
        assert box["width"] > 200


def test_line_is_singled_out_when_pointed_at(opened: Opened) -> None:
    tab, _ = opened
    chart = tab.locator("svg.curves").first
    chart.scroll_into_view_if_needed()
    chart.locator("text.name", has_text="eproj").hover()
    assert chart.locator(".series.chosen").get_attribute("data-series") == "eproj"
    tab.mouse.move(2, 500)
    assert chart.locator(".series.chosen").count() == 0


def test_point_cloud_is_drawn_and_turns(opened: Opened) -> None:
    tab, _ = opened
    canvas = tab.locator("canvas[data-points]").first
    canvas.scroll_into_view_if_needed()
    assert canvas.evaluate(INKED) > 1000
    canvas.hover()
    tab.mouse.down()
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    tab.mouse.move(*(value + 40 for value in _middle(canvas)))
    tab.mouse.up()
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    tab.wait_for_timeout(300)
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before


def _middle(element: "Locator") -> tuple[float, float]:
    box = element.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_media_load(opened: Opened) -> None:
    tab, _ = opened
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.duration > 0.9 && a.duration < 1.1)")
    assert tab.locator("audio").count() == 8
    widths = tab.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert min(widths) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_fits_the_window_in_light_and_dark(opened: Opened, scheme: Literal["light", "dark"], width: int) -> None:
    tab, _ = opened
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + Number(b), 0)"
    assert (tab.evaluate(luminance) < 200) == (scheme == "dark")


def test_nothing_went_wrong_and_nothing_was_asked_for(opened: Opened) -> None:
    tab, noticed = opened
    tab.wait_for_timeout(200)
    assert noticed == []
