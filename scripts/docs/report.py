"""The evidence's report, from its stored numbers: its wording changes without measuring anew."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.evidence.report import markdown


def page(repo: Path) -> str:
    """What `make evidence` writes beside its numbers."""
    return markdown(json.loads((repo / "docs" / "evidence" / "report.json").read_text("utf-8")))
