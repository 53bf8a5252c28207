"""``PresentInStore``: what is in an OUT in a store."""

from __future__ import annotations

from contextlib import AbstractContextManager

from qkpatch.checkpoint.files import OpenFile
from qkpatch.checkpoint.present_files import Present
from qkpatch.stores.remote import StoreFolder
from qkpatch.stores.url import StoreUrl


class PresentInStore(Present):
    """The objects of a folder."""

    def __init__(self, url: StoreUrl) -> None:
        """Raises :class:`StoreError` where they cannot be listed, or there are none."""
        super().__init__(url.text, url.name)
        self._folder = StoreFolder.at(url)
        self.files |= self._folder.files
        self.directories = list(self._folder.directories)

    def open(self, name: str) -> AbstractContextManager[OpenFile]:
        """As :meth:`Present.open`."""
        return self._folder.files[name].open()

    def check_still(self) -> None:
        """As :meth:`Present.check_still`."""
        self._folder.check_still(self._folder.files)
