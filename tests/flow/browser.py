"""A page in a real browser: what it asks the network for, what it complains of, what it draws. Debian's `chromium`, headless."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

WATCH = """<script>addEventListener("load", () => setTimeout(() => {
  const drawn = [...document.querySelectorAll(".js-plotly-plot .svg-container > .main-svg:first-child")];
  const charts = drawn.map((chart) => chart.getBoundingClientRect().width);
  document.title = JSON.stringify({charts, width: document.body.getBoundingClientRect().width, needed: document.body.scrollWidth});
}, 500))</script>"""


@dataclass(frozen=True)
class Seen:
    """What came of a page."""

    complaints: list[str]
    """Lines of the console."""
    asked: list[str]
    """Addresses that the page asked for."""
    charts: list[float]
    """Widths in pixels of those that were drawn."""
    width: float
    """Of the page, in pixels."""
    needed: float
    """What its widest part takes; more than that is cut off or must be scrolled to."""
    dom: str


def look(page: Path, folder: Path, width: int) -> Seen:
    """Open a page as wide as that. Skips where there is no chromium."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    # a window is never narrower than 500 pixels; the page takes the width that it has
    html = page.read_text().replace("<body>", f'<body style="width: {width}px">', 1).replace("</body>", f"{WATCH}</body>", 1)
    copy = folder / f"{width}.html"
    copy.write_text(html)
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    words += ["--no-first-run", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    words += ["--virtual-time-budget=10000", f"--window-size={max(width, 500)},2000", "--dump-dom", f"file://{copy}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False, env={**os.environ, "HOME": str(folder)})
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(complaints, _asked(folder / "net.json", copy), dom=done.stdout, **json.loads(found[1]))


def _asked(log: Path, page: Path) -> list[str]:
    """What the page asked for, by the browser's record of its network. What the browser itself asks (the time, updates, accounts, more
    with each version) is begun by no page, which the record calls no origin."""
    text = log.read_text()
    assert str(page) in text, "the record is of this page"
    begun = re.findall(r'"initiator":"([^"]*)".*?"url":"((?:https?|wss?)://[^"]*)"', text)  # an event is a line
    return sorted({url for initiator, url in begun if initiator != "not an origin"})
