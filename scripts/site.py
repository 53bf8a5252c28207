"""Lay out what the site is built from: the repository's Markdown, and whatever it links to, at the same places.

python -m scripts.site [FOLDER]

So that links that hold on a forge hold on the site, and no page is written twice; `make site` goes on from there.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "configs/*.md", "demo/*.md")
CONFIG = "zensical.toml"
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


def pages() -> list[Path]:
    """Every page of the documentation."""
    return sorted({page for pattern in PAGES for page in REPO.glob(pattern)})


def linked(page: Path) -> Iterator[Path]:
    """The files that a page links to, or shows.

    Raises:
        FileNotFoundError: one is not there, or is what a site does not show: a directory, or hidden.
    """
    for link in _LINK.findall(_FENCED.sub("", page.read_text("utf-8"))):
        if "://" in link:
            continue
        target = (page.parent / link).resolve()
        if not target.is_file() or not target.is_relative_to(REPO) or "/." in f"/{target.relative_to(REPO)}":
            raise FileNotFoundError(f"{page.relative_to(REPO)}: {link} is no file that the site can show")
        yield target


def lay_out(folder: Path) -> None:
    """Write the configuration and the pages below ``folder``, in place of former ones."""
    shutil.rmtree(folder / "pages", ignore_errors=True)
    files = {file for page in pages() for file in (page, *linked(page))}
    for file in files:
        place = folder / "pages" / file.relative_to(REPO)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    shutil.copyfile(REPO / CONFIG, folder / CONFIG)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "build")
