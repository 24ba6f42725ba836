"""The page in a real browser (Playwright with Chromium): each tab driven to an image, wide and narrow, light and dark.

With APP_SCREENSHOTS=FOLDER it also writes what it sees there, to be looked at.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import served

pytest.importorskip("gradio", reason="the extra `app` is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SECONDS = 90_000  # that a slow machine may take, in milliseconds
DONE = {
    "Draw": ("#draw-button", "network calls a batch"),
    "Compare": ("#compare-button", "panels of the same seed"),
    "Between": ("#between-button", "network calls each"),
    "Edit": ("#edit-button", "network calls a batch"),
    "Points": ("#points-button", "of the exact answer"),
}
# What has no name that a screen reader could say, among what is shown.
NAMELESS = """() => [...document.querySelectorAll('input, textarea, select, button, a[href], img')]
  .filter(e => e.checkVisibility() && e.type !== 'file' && !e.ariaHidden && e.tabIndex >= 0)
  .filter(e => !(e.labels?.length || e.ariaLabel || e.title || e.alt || e.innerText?.trim() || e.getAttribute('aria-labelledby')
                 || e.closest('label')?.innerText.trim() || e.querySelector('[aria-label], [title], [alt]')))
  .map(e => e.outerHTML.slice(0, 160))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(workplace: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        with served() as page:
            yield page.local_url


def open_page(browser: Any, address: str, *, width: int = 1280, dark: bool = False) -> tuple[Any, list[str]]:
    """A page in a window of this width, and the list that its requests to other machines go to."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    context.set_default_timeout(SECONDS)
    page, others = context.new_page(), list[str]()
    page.on("request", lambda request: others.append(request.url) if not is_ours(request.url, address) else None)
    page.goto(address)
    page.locator("#gallery article").first.wait_for()
    return page, others


def is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def go_to(page: Any, name: str) -> None:
    """Open a tab; on a narrow page it may lie behind the button with dots."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.first.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    else:
        tab.first.click()


def take(page: Any, name: str) -> None:
    if folder := os.environ.get("APP_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def set_number(page: Any, tab: str, label: str, value: int) -> None:
    page.get_by_role("tabpanel").filter(visible=True).get_by_label(label, exact=True).first.fill(str(value))


def paint(page: Any, field: str) -> None:
    """Draw a line with the brush of an editor."""
    page.locator(field).get_by_label("Brush").first.click()
    box = page.locator(f"{field} canvas").first.bounding_box()
    x, y = box["x"] + 0.42 * box["width"], box["y"] + 0.5 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    for i in range(1, 6):
        page.mouse.move(x + 8 * i, y + 4 * i)
    page.mouse.up()


def draw(page: Any, tab: str) -> str:
    """Press the button of a tab, and wait for its image; gives the line that says what was drawn."""
    line, (button, words) = f"#{tab.lower()}-line", DONE[tab]
    page.locator(button).click()
    is_done = "document.querySelector(line)?.innerText.includes(words) || document.querySelector('.toast-body')"
    try:
        page.wait_for_function(f"([line, words]) => {is_done}", arg=[line, words])
    except sync_api.TimeoutError:
        take(page, "timeout")
        pytest.fail(f"{tab}: after {SECONDS / 1000:g} s the page says: {page.locator(line).inner_text()}")
    assert page.locator(".toast-body").count() == 0, page.locator(".toast-body").first.inner_text()
    image = page.get_by_role("tabpanel").filter(visible=True).locator("img").last
    image.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth >= 32", arg=image.element_handle())
    return page.locator(line).inner_text()


def test_each_tab_draws_an_image(browser: Any, address: str, tmp_path: Path) -> None:
    page, others = open_page(browser, address)
    take(page, "runs_wide_light")
    file = tmp_path / "image.png"
    Image.fromarray(np.full((96, 96, 3), 200, dtype=np.uint8)).save(file)
    for tab in DONE:
        go_to(page, tab)
        if tab == "Compare":
            page.get_by_label("Guidance").filter(visible=True).first.fill("1, 3")
        elif tab == "Edit":
            page.locator("#edit-image input[type=file]").first.set_input_files(file)
            page.locator("#edit-image").get_by_label("Brush").first.wait_for()
            paint(page, "#edit-image")
        elif tab == "Points":
            paint(page, "#points-drawing")
        for label, value in {"Steps": 4, "Images": 4, "Images of each": 2, "Frames": 4, "Points": 200}.items():
            number = page.get_by_label(label, exact=True).filter(visible=True)
            if number.count():
                number.first.fill(str(value))
        assert draw(page, tab)
        take(page, f"{tab.lower()}_wide_light")
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert others == [], "the page asks nothing of other machines"
    page.context.close()


def test_the_keyboard_reaches_the_button_and_a_stop_ends_a_job(browser: Any, address: str) -> None:
    page, _ = open_page(browser, address)
    go_to(page, "Draw")
    page.get_by_label("Steps", exact=True).filter(visible=True).first.fill("90")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "draw-button":
            break
    else:
        pytest.fail("the Tab key does not come to the button Draw")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#draw-line')?.innerText.includes('step')")
    page.get_by_role("button", name="Stop").filter(visible=True).first.click()
    page.wait_for_timeout(1500)
    before = page.locator("#draw-line").inner_text()
    page.wait_for_timeout(1500)
    assert page.locator("#draw-line").inner_text() == before and "network calls" not in before
    page.context.close()


def test_narrow_and_dark(browser: Any, address: str) -> None:
    page, others = open_page(browser, address, width=390, dark=True)
    assert page.evaluate("document.body.classList.contains('dark')")
    for tab in ("Runs", *DONE):
        go_to(page, tab)
        page.wait_for_timeout(300)
        if tab == "Draw":
            page.get_by_label("Steps", exact=True).filter(visible=True).first.fill("3")
            draw(page, tab)
        take(page, f"{tab.lower()}_narrow_dark")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    assert others == []
    page.context.close()


def test_a_run_appears_while_the_page_is_open_and_one_that_vanishes_is_named(
    browser: Any, address: str, workplace: Path
) -> None:
    page, _ = open_page(browser, address, width=1280, dark=True)
    shutil.copytree(workplace / "runs" / "shapes", workplace / "runs" / "new")
    try:
        page.locator("#gallery h3", has_text="runs/new").wait_for()
        take(page, "runs_wide_dark")
        go_to(page, "Draw")
        page.get_by_label("Run", exact=True).filter(visible=True).first.click()
        page.get_by_role("option", name="runs/new").first.click()
        take(page, "draw_wide_dark")
    finally:
        shutil.rmtree(workplace / "runs" / "new")
    page.locator("#draw-button").click()
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "the run runs/new is gone; choose another" in toast.inner_text()
    page.context.close()
