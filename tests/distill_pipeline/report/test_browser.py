"""The pages in a real browser: nothing is asked for, nothing is refused, nothing sticks out of a phone's screen."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.report.build import build_comparison
from distill_pipeline.report.html import write_comparison, write_student_report

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_pages_need_nothing_and_fit_the_screen(
    browser: Any, make_report: Callable[..., dict[str, Any]], tmp_path: Path, width: int
) -> None:
    report = make_report(student="a_student_with_a_rather_long_name_indeed")
    write_student_report(report, tmp_path / "report.html")
    write_comparison(build_comparison([report, make_report(method="sft")]), tmp_path / "comparison.html")
    for name in ("report", "comparison"):
        page = browser.new_page(viewport={"width": width, "height": 800})
        complaints: list[str] = []
        page.on("console", lambda message, found=complaints: found.append(message.text))
        page.on("request", lambda request, found=complaints: request.url.startswith("file:") or found.append(request.url))
        page.goto(f"file://{tmp_path}/{name}.html")
        assert complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("getComputedStyle(document.querySelector('.tile, .card')).borderRadius") == "12px"
        page.close()
