"""``Part``: which share of the work a machine does, said outright or by the scheduler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from qkpatch.errors import UsageError

MOST_PARTS = 9999

# Which task this is, the first one's number, and how many there are: what a scheduler says of an array of tasks.
_SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ("SKYPILOT_NODE_RANK", None, "SKYPILOT_NUM_NODES"),
    ("JOB_COMPLETION_INDEX", None, None),  # of a Kubernetes Job, whose pods are not told how many there are
)
_SAY = "say it outright: --part 3/8"


class Part(NamedTuple):
    """Part ``number`` of ``total``; numbers begin at 1."""

    number: int
    total: int

    @classmethod
    def of(cls, part: tuple[int, int]) -> Part:
        """The same, checked.

        Raises:
            UsageError: there is no such part.
        """
        if len(part) != 2 or any(type(n) is not int for n in part):
            raise UsageError(f"{part!r:.80} is no part", where="--part", fix=_SAY)
        if not 1 <= part[0] <= part[1] <= MOST_PARTS:
            what = f"there is no part {part[0]} of {part[1]}"
            raise UsageError(what, where="--part", fix=f"parts are 1/N to N/N, of at most {MOST_PARTS}")
        return cls(*part)

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


def parse_part(text: str, environment: Mapping[str, str]) -> Part:
    """``3/8``; or ``auto``, ``auto/8``: the one that the scheduler's ``environment`` says.

    Raises:
        UsageError: no part is meant, or none that there is.
    """
    if re.fullmatch(r"\d{1,9}/\d{1,9}", text, re.ASCII):
        number, count = map(int, text.split("/"))
        return Part.of((number, count))
    if (asked := re.fullmatch(r"auto(?:/(\d{1,9}))?", text, re.ASCII)) is None:
        what = f"{text!r:.80} is no part"
        raise UsageError(
            what, where="--part", fix="write 3/8, auto (of SLURM, SkyPilot) or auto/8 (of Kubernetes)"
        )
    found = [names for names in _SCHEDULERS if names[0] in environment]
    if len(found) != 1:
        which = " and ".join(names[0] for names in found) or "no variable of a scheduler that is known"
        raise UsageError(f"{which} says which part this is", where="--part auto", fix=_SAY)
    index, first, count_name = found[0]
    said = None if asked[1] is None else int(asked[1])
    told = said if count_name is None else _number(count_name, environment)
    if told is None:
        what = f"{index} says which part this is, and nothing says of how many"
        raise UsageError(what, where="--part auto", fix="say it: --part auto/8")
    if said not in (None, told):
        what = f"{count_name} is {told}: the array has other tasks than there are parts"
        raise UsageError(what, where=f"--part {text}", fix=_SAY)
    begin = 0 if first is None else _number(first, environment)
    return Part.of((_number(index, environment) - begin + 1, told))


def _number(name: str, environment: Mapping[str, str]) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UsageError(f"{name} is {text!r:.80}, and no number", where="--part auto", fix=_SAY)
    return int(text)
