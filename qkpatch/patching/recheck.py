"""What a run before this one left in staging, read again before it is taken over."""

from __future__ import annotations

import os

from qkpatch.checkpoint.files import READ_CHUNK, LocalOpenFile, write_exact
from qkpatch.checkpoint.pairs import Reader, Span
from qkpatch.output.layout import OutputFile
from qkpatch.output.staged_files import StagedFiles
from qkpatch.patching.checked_sources import Sources, is_listed
from qkpatch.patching.threads import Crew
from qkpatch.planning.plan import EditPlan


def is_as_noted(plan: EditPlan, sources: Sources, staged: StagedFiles, crew: Crew, file: OutputFile) -> bool:
    """Whether a file that is noted as done still holds what it should: it is read again."""
    ours = LocalOpenFile(staged.open(file.name), file.name)
    try:
        if file.name not in plan.edits_by_file:
            staged.is_done(file.name, os.fstat(ours.fd))
        if bytes(ours.read(len(file.own), 0)) != file.own:
            return False
        if not sources.is_download:
            return _equals_source(plan, crew, file, ours)
        # What an edit had begun to overwrite comes once more; then the whole is as the Hub lists it, or not.
        for extent in file.inside(plan.written_ranges(file.name)):
            with extent.file.open([(extent.begin, extent.end)]) as source:
                for begin in range(extent.begin, extent.end, READ_CHUNK):
                    data = source.read(min(READ_CHUNK, extent.end - begin), begin)
                    write_exact(ours.fd, data, begin - extent.begin + extent.at, file.name)
        whole = file.original
        if whole is None:  # a part of several files, which are checked when all have come
            return True
        if (
            whole.listed is None
        ):  # of a store, which says no digest: it came whole, of the very version that is planned
            return True
        if not is_listed(whole, ours):
            return False
        sources.proven.add(whole.name)
        return True
    finally:
        os.close(ours.fd)


def _equals_source(plan: EditPlan, crew: Crew, file: OutputFile, ours: LocalOpenFile) -> bool:
    """Whether all but the planned rows is what SOURCE has, byte for byte."""
    reader = Reader()
    for extent in file.around(plan.written_ranges(file.name)):
        with extent.file.open() as source:
            theirs, staged = Span(source, extent.begin, extent.end), Span(ours, extent.at, extent.upto)
            if reader.first_difference(theirs, staged, lambda _: crew.check()) is not None:
                return False
    return True
