"""A page is a template of ours with one document in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def page(template: str, document: Mapping[str, Any]) -> str:
    """The HTML of ``template``, which holds all it needs."""
    # A name may hold anything: nothing in it may end the script.
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return files(__package__).joinpath(template).read_text("utf-8").replace("/*DATA*/", text)
