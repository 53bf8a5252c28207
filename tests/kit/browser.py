"""A page in headless Chromium: a script that drives it, and what it then found."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

_FIND = """<script>
addEventListener("error", event => found.errors.push(event.message));
const found = {errors: []};
</script>"""
_TELL = """<script>
{ const told = document.createElement("pre"); told.id = "found";
try { %s } catch (error) { found.errors.push(String(error)); }
told.textContent = JSON.stringify(found); document.body.append(told); }
</script></body>"""


def _chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    fixed = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command = [CHROMIUM, *fixed, f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def drive(page: Path, script: str, width: int = 1200) -> dict[str, Any]:
    """What ``script`` puts into ``found``; with it ``errors`` of the page and of its console."""
    text = page.read_text("utf-8").replace("<head>", f"<head>{_FIND}", 1)
    driven = page.with_name(f"driven-{page.name}")
    driven.write_text(text.replace("</body>", _TELL % script, 1), "utf-8")
    done = _chromium(driven, f"--window-size={width},900", "--dump-dom")
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert told, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    found["errors"] += re.findall(r"CONSOLE.*", done.stderr)
    return found


def picture(page: Path, target: Path, *flags: str) -> None:
    """The page as it looks."""
    _chromium(page, f"--screenshot={target}", *flags)
