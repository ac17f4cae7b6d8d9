"""The report: one page that asks nobody for anything, in a browser too."""

import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foredraft.bench import plots
from foredraft.bench.page import page
from foredraft.bench.result import Bench

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_names_nothing_outside_itself(found: Bench) -> None:
    text = page(found)
    assert "tiny &amp; &lt;small&gt;" in text and "<small>, drafted" not in text
    assert text.count("<svg") == 4 and "prefers-color-scheme: dark" in text
    for stand_in in plots.COLOURS.values():
        assert stand_in not in text
    assert "#000000" not in text and "default-src 'none'" in text.replace("&#x27;", "'")
    assert "<script" not in text and "@import" not in text and "@font-face" not in text
    links = [part.split('"')[0] for part in text.replace("src=", "href=").split('href="')[1:]]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


class Proxy(socketserver.ThreadingTCPServer):
    """Notes the first line of whatever is sent to it, and answers nothing."""

    daemon_threads = allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Note)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Note(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline().decode("latin-1").strip())  # type: ignore[attr-defined]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        yield server
        server.shutdown()


def browse(path: Path, proxy: Proxy, picture: Path, *, dark: bool) -> Any:
    """A picture of the page, and in `proxy.asked` what the browser asked the network for."""
    from matplotlib.image import imread

    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
        "--disable-component-update --disable-quic --disable-extensions --disable-default-apps --hide-scrollbars "
        f"--window-size=1280,2400 --blink-settings=preferredColorScheme={0 if dark else 1} "
        f"--proxy-server=127.0.0.1:{proxy.server_address[1]} --proxy-bypass-list=<-loopback>"
    )
    assert CHROMIUM is not None
    profile = f"--user-data-dir={picture.parent / 'chromium'}"
    command = [CHROMIUM, *flags.split(), profile, f"--screenshot={picture}", path.as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    return imread(picture)


def has(picture: Any, colour: tuple[int, int, int]) -> int:
    """How many pixels are of this colour."""
    return int((np.abs(picture[..., :3] * 255 - colour).max(-1) < 3).sum())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at the report")
def test_the_page_in_a_browser(found: Bench, proxy: Proxy, tmp_path: Path) -> None:
    """Light and dark, drawn in the page's own colours, without a word to the network. Pictures are kept where
    FOREDRAFT_ARTEFACTS says."""
    report = tmp_path / "report.html"
    report.write_text(page(found), encoding="utf-8")
    kept = Path(os.environ.get("FOREDRAFT_ARTEFACTS", tmp_path))
    light, dark = (browse(report, proxy, kept / f"bench-{name}.png", dark=name == "dark") for name in ("light", "dark"))
    assert has(light, (0xF4, 0xF5, 0xF8)) > 100_000 > has(light, (0x0F, 0x11, 0x16))
    assert has(dark, (0x0F, 0x11, 0x16)) > 100_000 > has(dark, (0xF4, 0xF5, 0xF8))
    assert has(light, (0x2F, 0x62, 0xD9)) > 2000 and has(dark, (0x7A, 0xA2, 0xFF)) > 2000  # bars and lines
    own = [line for line in proxy.asked if "google" not in line and "gvt" not in line]  # the browser's own affairs
    assert own == []
    report.write_text(page(found).replace("</main>", '<img src="http://foredraft.invalid/x.png"></main>'), "utf-8")
    browse(report, proxy, tmp_path / "control.png", dark=False)
    assert not any("foredraft.invalid" in line for line in proxy.asked)  # the page itself forbids it
    report.write_text('<img src="http://foredraft.invalid/x.png">')
    browse(report, proxy, tmp_path / "control.png", dark=False)
    assert any("foredraft.invalid" in line for line in proxy.asked)  # and we would have heard it
