"""Write the generated pages of the documentation; ``--check`` only says which are stale.

python -m scripts.docs [--check]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Read by typer when it is imported: help as plain text, which no version of rich changes.
os.environ["TYPER_USE_RICH"] = "0"
os.environ["COLUMNS"] = "100"

from scripts.docs import api, commands, documented, models, picture, report
from scripts.docs.errors import page as errors

REPO = Path(__file__).resolve().parent.parent.parent
PAGES: dict[str, Callable[[Path], str]] = {
    "docs/api.md": api.page,
    "docs/cli.md": commands.page,
    "docs/errors.md": errors.page,
    "docs/models.md": models.page,
    "docs/spectrum.svg": picture.page,
    "docs/evidence/report.md": report.page,
}


def main() -> int:
    """Write or check the pages; 1 when one is stale, or what a user may say is told nowhere."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.docs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a page is stale")
    is_check = parser.parse_args().check
    if missing := documented.undocumented(REPO):
        print("not documented:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    stale = []
    for name, page in PAGES.items():
        path, fresh = REPO / name, page(REPO)
        if not path.exists() or path.read_text("utf-8") != fresh:
            stale.append(name)
            if not is_check:
                path.write_text(fresh, "utf-8")
    if is_check and stale:
        print(f"stale: {', '.join(stale)}; `make docs` writes them", file=sys.stderr)
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
