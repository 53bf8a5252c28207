"""The README's pictures of the report page, in headless Chromium: SmolLM2 (`make fixtures`), before and after an edit.

python -m scripts.docs.pictures
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from qkpatch.cli import app

REPO = Path(__file__).resolve().parent.parent.parent
SOURCE = REPO / ".cache" / "fixtures" / "smollm2-135m"
EDIT = ("--layers", "10-19", "--modes", "4", "--alpha", "0.5")
# Name, what is looked at besides, and the window in pixels.
PICTURES = {"spectra": ((), (1180, 1115)), "against": (("--against", "edited"), (1180, 870))}
MOST = 150_000  # bytes of a picture


def main() -> int:
    """Draw both; 1 where there is no browser, or a picture is large."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None or not SOURCE.is_dir():
        print("it takes Chromium, and the checkpoint of `make fixtures`", file=sys.stderr)
        return 1
    to = REPO / "docs" / "pictures"
    to.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _call("apply", SOURCE, "-o", folder / "edited", *EDIT, "--quiet")
        for picture, (besides, size) in PICTURES.items():
            page, more = folder / f"{picture}.html", [folder / b if b == "edited" else b for b in besides]
            _call("inspect", SOURCE, "--quiet", "--report", page, *more)
            _draw(browser, page, to / f"{picture}.png", size)
            if (to / f"{picture}.png").stat().st_size > MOST:
                print(f"{picture}.png is larger than {MOST:,} bytes", file=sys.stderr)
                return 1
    return 0


def _call(*arguments: str | Path) -> None:
    CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def _draw(browser: str, page: Path, picture: Path, size: tuple[int, int]) -> None:
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
    ]
    own = [f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture}"]
    window = f"--window-size={','.join(map(str, size))}"
    command = [browser, *flags, *own, window, page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
