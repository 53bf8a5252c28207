"""Parts of an object: they follow each other, S3 takes them, and what the store has is sent as little as may be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qkpatch.stores.parts import LEAST, MOST_PARTS, Part, upload_parts
from qkpatch.stores.store import Entry

MIB = 1 << 20
SOURCE = Entry("a", "b/a", 1 << 45, "1")
# Sizes around those that S3 draws lines at, and whether the store has the bytes.
SPAN = st.tuples(
    st.one_of(
        st.integers(0, 12 * MIB), st.sampled_from([1, LEAST - 1, LEAST, LEAST + 1, 1 << 30, 3 << 30, 1 << 40])
    ),
    st.booleans(),
)


def spans_of(sizes: list[tuple[int, bool]]) -> list[Part]:
    spans, at = [], 0
    for size, is_there in sizes:
        # Offsets in the source are others than in the object, as where shards are made anew.
        spans.append(Part(at, at + size, SOURCE, at + 7) if is_there else Part(at, at + size))
        at += size
    return spans


@settings(deadline=None, max_examples=100)
@given(st.lists(SPAN, max_size=12))
def test_parts_are_what_s3_takes_and_hold_the_right_bytes(sizes: list[tuple[int, bool]]) -> None:
    spans = spans_of(sizes)
    parts = upload_parts(spans)
    size = spans[-1].end if spans else 0
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])][: len(parts)]
    assert (parts[-1].end if parts else 0) == size
    assert len(parts) <= MOST_PARTS
    assert all(LEAST <= part.size <= 5 << 30 for part in parts[:-1])
    for part in parts:
        if part.source is not None:
            assert part.offset == part.begin + 7
            assert any(s.source is not None and s.begin <= part.begin and part.end <= s.end for s in spans)
    sent = sum(part.size for part in parts if part.source is None)
    needed = sum(span.size for span in spans if span.source is None)
    # Each piece that is sent costs less than two least parts of what the store has, and so does each that is short.
    assert sent <= needed + 2 * LEAST * (len(spans) + 1)


def test_a_patched_shard_sends_its_rows_alone() -> None:
    rows = Part(1 << 30, (1 << 30) + 20 * MIB)
    spans = [Part(0, 1 << 30, SOURCE), rows, Part(rows.end, 5 << 30, SOURCE, rows.end)]
    assert [(part.begin, part.end) for part in upload_parts(spans) if part.source is None] == [
        (rows.begin, rows.begin + 10 * MIB),
        (rows.begin + 10 * MIB, rows.end),
    ]
