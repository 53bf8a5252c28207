"""Files that ``inspect`` draws: where each is to be, found out before heads are computed; and what is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.common.number_ranges import format_ranges
from qkpatch.errors import UsageError
from qkpatch.output.destination import check_apart
from qkpatch.reports import plot, spectra_page

if TYPE_CHECKING:
    from qkpatch.patching.inspection import Inspection
    from qkpatch.reports.spectra_page import Side

_HEAD = re.compile(r"\s*(\d{1,6})\.(\d{1,6})\s*", re.ASCII)
_MOST_READ = 64 << 20  # bytes of what may be a figure of ours


@dataclass(frozen=True)
class DrawnFile:
    """A file neither in what is looked at nor over one that is no picture of ours."""

    path: Path
    folder: Rooted

    @classmethod
    def found(
        cls, flag: str, path: Path, looked_at: Sequence[Inspection], is_ours: Callable[[bytes], bool]
    ) -> DrawnFile:
        """Look at what is there.

        Raises:
            UsageError: it lies in what is looked at, or somebody's file is there.
            FileSystemError: there is no such directory.
        """
        for one in looked_at:
            check_apart(path, one.model.checkpoint)
        folder = Rooted(path.parent)
        if folder.status(path.name) is not None:
            with folder.reading(path.name) as opened:
                if not is_ours(bytes(opened.read(min(opened.size, _MOST_READ), 0))):
                    what = "exists, and is none that inspect drew"
                    raise UsageError(what, where=f"{flag} {path}", fix="choose another name")
        return cls(path, folder)

    def write(self, content: bytes) -> None:
        """Put it there, whole or not at all."""
        with self.folder as folder:
            folder.replace(self.path.name, content)


def page_file(path: Path, looked_at: Sequence[Inspection]) -> DrawnFile:
    """Where ``--report`` is to be; raises as :meth:`DrawnFile.found`."""
    if path.suffix != ".html":
        raise UsageError("a report is an .html file", where=f"--report {path}", fix="name it page.html")
    return DrawnFile.found("--report", path, looked_at, spectra_page.is_ours)


@dataclass(frozen=True)
class FigureFile:
    """Where ``--plot`` is to be, and whose curves it has; None for those that are remarkable."""

    file: DrawnFile
    heads: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, path: Path, curves: str | None, looked_at: Sequence[Inspection]) -> FigureFile:
        """Before a weight is read.

        Raises:
            UsageError: as :func:`plot.check_can_plot` and :meth:`DrawnFile.found`; heads that are not looked at.
        """
        plot.check_can_plot(path)
        heads = None if curves is None else _heads(curves, looked_at[0])
        return cls(DrawnFile.found("--plot", path, looked_at, plot.is_ours), heads)

    def write(self, looked_at: Sequence[Inspection], sides: Sequence[Side], device: str) -> None:
        """Compute all channels of the heads whose curves are drawn, and draw."""
        from qkpatch.cli.drawing import channel_told
        from qkpatch.patching.device import choose_device
        from qkpatch.patching.spectra import head_channels

        settings = looked_at[0].settings
        heads = plot.remarkable(sides[0].layers) if self.heads is None else self.heads
        curves = [head_channels(one, heads, choose_device(device)) for one in looked_at]
        by_modes = any(rule.energy is not None for _, rule in settings.edits)
        r = "r" if settings.modes is None else settings.modes
        label = "modes that are taken" if by_modes else f"energy in the top {r} modes"
        label += channel_told(settings)
        self.file.write(plot.figure(self.file.path.suffix, sides, curves, label, by_modes=by_modes))


def _heads(text: str, looked_at: Inspection) -> tuple[tuple[int, int], ...]:
    """``12.3,20.0`` as layers and heads, which are looked at."""
    settings, found = looked_at.settings, list[tuple[int, int]]()
    for part in text.split(","):
        match = _HEAD.fullmatch(part)
        if match is None:
            raise UsageError(f"{part!r:.80} is no LAYER.HEAD", where="--curves", fix="write 12.3,20.0")
        layer, head = int(match[1]), int(match[2])
        if layer not in settings.layers or head not in settings.heads:
            there = f"layers {format_ranges(settings.layers)}, heads {format_ranges(settings.heads)}"
            raise UsageError(f"{layer}.{head} is not looked at: {there} are", where="--curves")
        found.append((layer, head))
    if len(found) > plot.MOST_CURVES:
        raise UsageError(f"{len(found)} heads, more than {plot.MOST_CURVES}", where="--curves")
    return tuple(dict.fromkeys(found))
