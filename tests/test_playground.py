"""The playground in a real Chromium: a chat, coloured tokens, drafting off with the same text, a race, the keyboard.

A screenshot is kept where FOREDRAFT_ARTEFACTS says, or in pytest's folder.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from playwright.sync_api import sync_playwright
from servers import PATIENCE, ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1360, "height": 860}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.troubles = []
    page.asked = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda line: page.troubles.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    yield page
    assert page.troubles == []
    assert all(url.startswith((server.url, "data:")) for url in page.asked)  # nothing leaves the server
    context.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("FOREDRAFT_ARTEFACTS") or tmp_path_factory.mktemp("playground"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".turn:last-child .run:not(.busy)")


def texts(page: Any) -> list[str]:
    return [run.inner_text() for run in page.query_selector_all(".turn:last-child .run .text")]


def test_chat_then_drafting_off(page: Any, artefacts: Path) -> None:
    ask(page, "I would like to book a table for two tonight.")
    assert page.query_selector_all(".run[data-drafting=true] .token.accepted")
    page.wait_for_function("document.querySelector('#n-accepted').textContent !== '0'")  # drawn with the next frame
    assert page.inner_text("#rate") != "–"
    assert "percent" in page.get_attribute("#positions", "aria-label")
    page.click("#switch")
    page.wait_for_selector(".verdict")
    assert "Identical" in page.inner_text(".verdict")
    with_drafts, without = texts(page)
    assert with_drafts == without
    assert not page.query_selector_all(".run[data-drafting=false] .token.accepted")
    page.screenshot(path=artefacts / "playground-light.png")


def test_race(page: Any, artefacts: Path) -> None:
    page.fill("#prompt", "I need a hotel in the centre, with parking.")
    page.keyboard.press("Alt+r")
    page.wait_for_selector(".race .verdict")
    assert "Identical" in page.inner_text(".verdict")
    assert len(set(texts(page))) == 1 and len(texts(page)) == 2
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=artefacts / "playground-dark.png")


def test_conversation_goes_on(page: Any) -> None:
    ask(page, "Hello.")
    ask(page, "I need a taxi.")
    body = page.evaluate("performance.getEntriesByType('resource').length")
    assert body and len(page.query_selector_all(".turn")) == 2
    page.click("#clear")
    assert page.query_selector_all(".turn") == [] and page.is_visible("#welcome")


def test_completion_and_stop(page: Any, server: ServerProcess) -> None:
    page.click("#tab-completion")
    page.click("summary")
    page.fill("#max-tokens", "900")
    page.fill("#temperature", "1.5")
    page.fill("#prompt", "User: Tell me all about")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".run.busy .token")
    page.keyboard.press("Escape")
    page.wait_for_selector(".run:not(.busy)")
    assert page.is_visible("#send") and not page.is_visible("#stop")


def test_errors_are_told(page: Any) -> None:
    ask(page, "word " * 3000)
    assert "1024" in page.inner_text(".trouble")
    page.troubles = [text for text in page.troubles if "400" not in text]  # the console tells of the status


def test_keyboard_and_names(page: Any) -> None:
    """Everything that can be used has a name and can be reached."""
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, select, input, textarea')].filter(e => !e.closest('dialog'))
        .filter(e => !(e.innerText || e.getAttribute('aria-label') || e.labels?.length || e.title)).map(e => e.id)"""
    )
    assert unnamed == []
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-completion", "aria-selected") == "true"
    before = page.get_attribute("#switch", "aria-checked")
    page.keyboard.press("Alt+d")
    assert page.get_attribute("#switch", "aria-checked") != before


def test_narrow_screen(browser: Any, server: ServerProcess) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 780})
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
