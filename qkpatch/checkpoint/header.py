"""The safetensors header, parsed strictly and without the library.

``safetensors`` says what a tensor is but not where its bytes lie, and of two tensors with one name it
takes the last where another reader may take the first. qkpatch copies byte ranges: it has to know
each of them, and to agree with every loader about which bytes are which tensor.

What safetensors 0.8 refuses is refused here. The single exception, the one place this parser is laxer,
is a dtype it does not know: qkpatch copies those bytes unread. Their place is checked, their number is not.

Refused here although safetensors 0.8 lets it pass:

* a key that appears twice in one JSON object, be it a tensor, in ``__metadata__`` or further down;
* a header that does not begin with ``{``, which the format demands; the library skips white space;
* an entry written as an array, ``["U8", [2], [0, 2]]``, or a dtype written as ``{"U8": null}``;
* a number beyond ±1e308, which only a field the format does not define could hold. Such undefined
  fields of an entry are otherwise allowed and ignored, as in the library;
* more values than :data:`~qkpatch.common.json_text.MAX_VALUES`, which would take gigabytes to read.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard, cast

from qkpatch.checkpoint.files import OpenFile
from qkpatch.common.dtypes import DTYPE_BITS
from qkpatch.common.json_text import check_size, half_surrogate
from qkpatch.common.text import cut
from qkpatch.errors import HeaderError, plain

MAX_HEADER_SIZE = 100_000_000

_PREFIX = 8  # bytes: the length of the JSON, u64 little endian
_U64_MAX = 2**64 - 1
_MAX_DEPTH = 127  # of nested JSON arrays and objects: the library's limit
_METADATA = "__metadata__"
_AGAIN = "download the file again"
_RESAVE = "download the file again; if that changes nothing, re-save it with the safetensors library"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a file: what it is, and the half-open byte range of the file that holds it."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor's range in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header. Its tensors, in the order it lists them, share out all bytes from ``data_start``."""

    shard: str
    data_start: int
    file_size: int
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] | None


def read_header(file: OpenFile, shard: str) -> Header:
    """Read the header of an open file; FileSystemError only where reading fails."""
    file_size = file.size
    start = _read(file, 32, 0)
    if start.startswith(b"version https://git-lfs"):
        fix = "run `git lfs pull`, or download the file from the Hub"
        raise _fault("this is a Git LFS pointer, not the file it points to", shard, fix=fix)
    if len(start) < _PREFIX:
        raise _fault(f"the file is truncated: it ends after {len(start)} bytes", shard, fix=_AGAIN)
    length = int.from_bytes(start[:_PREFIX], "little")
    _check_length(length, shard, file_size)
    raw = _read(file, length, _PREFIX)
    if len(raw) < length:
        raise _fault("the file became shorter while it was read", shard, fix=_AGAIN)
    return parse_header(raw, shard=shard, file_size=file_size)


def parse_header(raw: bytes, *, shard: str, file_size: int) -> Header:
    """Read the JSON of a header, and hold it against the size of the file it comes from."""
    _check_length(len(raw), shard, file_size)
    data_start = _PREFIX + len(raw)
    entries = _object(_load(raw, shard), shard, None)
    metadata = _metadata(entries.pop(_METADATA, None), shard)
    # An index has the same names, and a model of 10^5 tensors few dtypes and shapes; most begin where another ends.
    same: dict[Any, Any] = {}
    tensors = {
        name: _tensor(name, entries[name], shard, data_start, same) for name in map(sys.intern, entries)
    }
    _check_coverage(tensors.values(), shard, data_start, file_size)
    return Header(shard, data_start, file_size, MappingProxyType(tensors), metadata)


def _fault(what: str, shard: str, name: str | None = None, *, fix: str = _RESAVE) -> HeaderError:
    return HeaderError(what, where=shard if name is None else f"{shard}: {_shown(name)}", fix=fix)


def _shown(text: object) -> str:
    """Something the file says, made fit for one line of a terminal."""
    return cut(plain(str(text)), 200)


def _read(file: OpenFile, size: int, offset: int) -> bytes:
    """The ``size`` bytes from ``offset`` on; fewer only where the file ends."""
    return bytes(file.read(max(min(size, file.size - offset), 0), offset))


def _check_length(length: int, shard: str, file_size: int) -> None:
    if length > MAX_HEADER_SIZE:
        what = f"this is no safetensors file: its header would take {length} bytes, above {MAX_HEADER_SIZE}"
        raise _fault(what, shard, fix=_AGAIN)
    if _PREFIX + length > file_size:
        what = f"the file is truncated: its header takes {_PREFIX + length} bytes, the file has {file_size}"
        raise _fault(what, shard, fix=_AGAIN)


def _load(raw: bytes, shard: str) -> object:
    if not raw.startswith(b"{"):
        raise _fault("the header does not begin with '{'", shard)
    try:
        check_size(raw)
        text = raw.decode()
        value: object = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_real
        )
        if (half := half_surrogate(text)) is not None:
            raise ValueError(f"half a surrogate pair (char {half})")
    except (ValueError, RecursionError) as error:
        raise _fault(f"the header is not valid JSON in UTF-8: {error}", shard) from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object] | tuple[str]:
    """The pairs as a dict; where a key is there twice, that key in a tuple, since no JSON value is one."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    return (Counter(key for key, _ in pairs).most_common(1)[0][0],)


def _integer(digits: str) -> int | float:
    """An int where 64 bits hold it; beyond them, and for ``-0``, a float, as in the library."""
    if len(digits) <= 20 and digits != "-0" and -(2**63) <= (value := int(digits)) <= _U64_MAX:
        return value
    return _real(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not abs(value) <= 1e308:  # or NaN; the library stops a little short of the largest double
        raise ValueError(f"{_shown(digits)} is no finite number")
    return value


def _object(value: object, shard: str, name: str | None) -> dict[str, object]:
    if isinstance(value, tuple):
        key = value[0]
        raise _fault(f"the key {_shown(key)} appears twice", shard, key if name is None else name)
    if not isinstance(value, dict):
        raise _fault("this is not a JSON object", shard, name)
    return value


def _metadata(value: object, shard: str) -> Mapping[str, str] | None:
    if value is None:
        return None
    fields = _object(value, shard, _METADATA)
    if strange := [key for key, text in fields.items() if not isinstance(text, str)]:
        raise _fault(f"the value of {_shown(strange[0])} is not a string", shard, _METADATA)
    return MappingProxyType(cast("dict[str, str]", fields))


def _tensor(name: str, entry: object, shard: str, data_start: int, same: dict[Any, Any]) -> TensorRef:
    fields = _object(entry, shard, name)
    dtype, shape, offsets = (fields.pop(key, None) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise _fault("dtype is missing or not a string", shard, name)
    if not _are_naturals(shape):
        raise _fault("shape is missing or not a list of whole numbers below 2^64", shard, name)
    if not _are_naturals(offsets) or len(offsets) != 2:
        raise _fault("data_offsets is missing or not two whole numbers below 2^64", shard, name)
    if fields:
        _check_undefined(fields, shard, name, depth=1)
    found = (tuple(shape), *(data_start + offset for offset in offsets))
    tensor = TensorRef(name, shard, sys.intern(dtype), *(same.setdefault(value, value) for value in found))
    if tensor.nbytes < 0:
        raise _fault("data_offsets end before they begin", shard, name)
    if dtype in DTYPE_BITS:
        _check_size(tensor)
    return tensor


def _are_naturals(value: object) -> TypeGuard[list[int]]:
    """Only such numbers does the format know; ``_integer`` has seen to their upper bound."""
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def _check_size(ref: TensorRef) -> None:
    """Multiply in the library's order: no step may pass 64 bits, and a zero saves only what follows it."""
    bits = 1
    for factor in (*ref.shape, DTYPE_BITS[ref.dtype]):
        bits *= factor
        if bits > _U64_MAX:
            raise _fault("its size in bits passes 2^64", ref.shard, ref.name)
    if bits != 8 * ref.nbytes:
        takes = f"{ref.dtype} {_shown(list(ref.shape))} takes {bits / 8:.17g} bytes"
        raise _fault(f"{takes}, its data_offsets hold {ref.nbytes}", ref.shard, ref.name)


def _check_undefined(value: object, shard: str, name: str, depth: int) -> None:
    """An undefined field may hold anything but a key twice, or more levels than the library reads."""
    if isinstance(value, (list, dict, tuple)):
        if depth == _MAX_DEPTH:
            raise _fault("the entry nests too deeply", shard, name)
        for inner in value if isinstance(value, list) else _object(value, shard, name).values():
            _check_undefined(inner, shard, name, depth + 1)


def _check_coverage(tensors: Iterable[TensorRef], shard: str, data_start: int, file_size: int) -> None:
    """In the order of their offsets, each tensor begins where the last ended, from data to end of file."""
    reached = data_start
    for tensor in sorted(tensors, key=lambda ref: (ref.begin, ref.end)):
        if tensor.begin != reached:
            what = f"it begins at byte {tensor.begin} of the file, the tensors before it end at {reached}"
            raise _fault(what, shard, tensor.name)
        reached = tensor.end
    if file_size < reached:
        what = f"the file is truncated: its header declares {reached} bytes, the file has {file_size}"
        raise _fault(what, shard, fix=_AGAIN)
    if file_size > reached:
        raise _fault(f"no tensor owns the last {file_size - reached} bytes of the file", shard)
