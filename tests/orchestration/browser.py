"""Open pages of a web UI in headless Chromium: the text that a user sees, and a screenshot.

Chromium's own command line does it (`--dump-dom`, `--screenshot`), so no driver and no package is needed.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
DEADLINE_S = 90.0
VIRTUAL_MS = 15_000
"""Time that the page believes to have; Chromium's clock stands still while requests are under way."""


def require_chromium() -> str:
    """The browser's path; the test is skipped where none is installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return browser


def look_at(url: str, name: str, expected: list[str], profile: Path) -> str:
    """The text of a page once it shows all that is expected; the screenshot is kept as SCREENSHOTS/NAME.png."""
    browser, deadline = require_chromium(), time.monotonic() + DEADLINE_S
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,1300",
        f"--user-data-dir={profile}", f"--virtual-time-budget={VIRTUAL_MS}",
        f"--screenshot={SCREENSHOTS / name}.png", "--dump-dom", url,
    ]  # fmt: skip
    while True:
        page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S).stdout
        page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
        missing = [part for part in expected if part not in text]
        if not missing:
            return text
        assert time.monotonic() < deadline, f"{name} at {url} lacks {missing}; it shows: {text[:3000]}"
