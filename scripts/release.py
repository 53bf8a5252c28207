"""Hold a tag against the version and the changelog, and say in the package's metadata where it is released from.

python -m scripts.release v1.2.3 https://forge/owner/name
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PLACEHOLDER = "https://github.com/OWNER/qkpatch"  # until it is known where the repository lies


def disagreements(tag: str, repo: Path = REPO) -> Iterator[str]:
    """What does not say what ``tag`` says."""
    version = tag.removeprefix("v")
    for name, pattern in (("pyproject.toml", r'^version = "(.*)"$'), ("CITATION.cff", r"^version: (.*)$")):
        said = re.findall(pattern, (repo / name).read_text("utf-8"), re.MULTILINE)
        if said != [version]:
            yield f"{name} says version {', '.join(said)}"
    day = re.findall(r"^date-released: (\d{4}-\d\d-\d\d)$", (repo / "CITATION.cff").read_text("utf-8"), re.M)
    head = f"## [{version}] - {''.join(day)}"
    if head not in (repo / "CHANGELOG.md").read_text("utf-8").splitlines():
        yield f"CHANGELOG.md has no section {head}, which is the day that CITATION.cff says"


def name_place(address: str, repo: Path = REPO) -> None:
    """Put the repository's address in place of the one that nobody has."""
    file = repo / "pyproject.toml"
    file.write_text(file.read_text("utf-8").replace(PLACEHOLDER, address.rstrip("/")), "utf-8")


def main(tag: str, address: str) -> int:
    """0 where all agrees; what does not is told."""
    wrong = list(disagreements(tag))
    for one in wrong:
        print(f"{tag}: {one}", file=sys.stderr)
    if not wrong:
        name_place(address)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
