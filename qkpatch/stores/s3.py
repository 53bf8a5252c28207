"""``S3Store``: what S3 can besides: reads of one version, objects in parts that are sent or copied on its side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any

from qkpatch.common.interrupts import signals_held
from qkpatch.errors import StoreError
from qkpatch.stores.parts import Part, upload_parts
from qkpatch.stores.store import Entry, Read, Store

_AT_ONCE = 6  # parts on their way; as many are in memory


class S3Store(Store):
    """A folder of a bucket."""

    is_pinned = copies_parts = True
    tries = 3  # its client tries again itself

    def _get(self, entry: Entry, begin: int, end: int) -> bytes:
        from fsspec.asyn import sync

        async def get() -> bytes:
            asked = {"Range": f"bytes={begin}-{end - 1}", "IfMatch": _etag(entry), **self.fs.req_kw}
            answer = await self.fs._call_s3("get_object", **self._at(entry.path), **asked)
            async with answer["Body"] as body:
                return bytes(await body.read())

        return sync(self.fs.loop, get)  # type: ignore[no-any-return]

    def assemble(
        self, name: str, spans: Sequence[Part], read: Read, progress: Callable[[int], None]
    ) -> Entry:
        """As :meth:`Store.assemble`; parts are sent and copied side by side, and what is given up is aborted."""
        parts = upload_parts(spans)
        is_whole = len(spans) == 1 and spans[0].source is not None and spans[0].source.size == spans[0].end
        if len(parts) <= 1 and (is_whole or not any(part.source for part in parts)):
            return super().assemble(name, spans, read, progress)
        where, at = self.where(name), self._at(self.path(name))
        upload = {**at, "UploadId": self._call(where, "create_multipart_upload", **at)["UploadId"]}
        done: list[dict[str, Any]] = []
        under_way: deque[Future[dict[str, Any]]] = deque()
        try:
            with ThreadPoolExecutor(_AT_ONCE, "qkpatch-part") as pool:
                try:
                    for number, part in enumerate(parts, 1):
                        if len(under_way) == _AT_ONCE:
                            done.append(under_way.popleft().result())
                        data = None if part.source else read(part.begin, part.end)
                        under_way.append(pool.submit(partial(self._part, where, upload, number, part, data)))
                        progress(part.size)
                    done += [one.result() for one in under_way]
                finally:
                    for one in under_way:
                        one.cancel()
                    wait(under_way)
            self._call(where, "complete_multipart_upload", **upload, MultipartUpload={"Parts": done})
        except BaseException:
            with signals_held(), suppress(StoreError):
                self._call(where, "abort_multipart_upload", **upload)
            raise
        return self.stat(name)

    def _copy(self, where: str, source: Entry, path: str) -> None:
        pinned = {"CopySource": self._at(source.path), "CopySourceIfMatch": _etag(source)}
        self._call(where, "copy_object", **self._at(path), **pinned)

    def _part(
        self, where: str, upload: dict[str, Any], number: int, part: Part, data: bytearray | None
    ) -> dict[str, Any]:
        if part.source is None:
            made = self._call(where, "upload_part", **upload, PartNumber=number, Body=bytes(data or b""))
        else:
            made = self._call(
                where,
                "upload_part_copy",
                **upload,
                PartNumber=number,
                CopySource=self._at(part.source.path),
                CopySourceIfMatch=_etag(part.source),
                CopySourceRange=f"bytes={part.offset}-{part.offset + part.size - 1}",
            )["CopyPartResult"]
        return {"PartNumber": number, "ETag": made["ETag"]}

    def abort_left(self) -> None:
        """Abort the uploads that dead runs left below the folder: they are not seen, and paid for."""
        bucket, prefix, _ = self.fs.split_path(f"{self.root}/")
        asked = {"Bucket": bucket, "Prefix": prefix}
        for upload in self._call(self.url.text, "list_multipart_uploads", **asked).get("Uploads", []):
            # Somebody else may have been faster.
            with suppress(StoreError):
                named = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._call(self.url.text, "abort_multipart_upload", **named)

    def _at(self, path: str) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(path)
        return {"Bucket": bucket, "Key": key}

    def _call(self, where: str, method: str, **asked: Any) -> Any:
        return self.attempt(where, lambda: self.fs.call_s3(method, **asked, **self.fs.req_kw))


def _etag(entry: Entry) -> str:
    return entry.identity.rpartition("ETag=")[2]
