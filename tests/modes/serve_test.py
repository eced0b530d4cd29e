"""The mode of the API: its config, what keeps it from starting, and a server that has to stop."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from configs import mnist
from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.modes import serve
from dar_jax.serving.config import ServeConfig

NEEDED = "the API needs what pip install 'dar-jax[serve]' brings"
START_TIMEOUT_S = 300


def test_the_api_binds_to_loopback_and_asks_for_no_key():
    assert ServeConfig().host == "127.0.0.1" and not ServeConfig().api_key_file


@pytest.mark.parametrize(
    "name",
    ["port", "batch_size", "max_waiting", "max_images", "max_body_megabytes", "ttl", "drain"],
)
def test_config_out_of_range_is_refused(name):
    kind = type(getattr(ServeConfig(), name))
    with pytest.raises(ValueError, match=rf"{name}=0(\.0)? must be"):
        ServeConfig(**{name: kind(0)})


def test_a_request_has_to_fit_into_a_clients_share_of_the_queue():
    with pytest.raises(ValueError, match="max_images=10 must be at most half of max_waiting=19"):
        ServeConfig(max_waiting=19)


def test_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    with pytest.raises(ValueError, match=r"needs python_multipart, .* 'dar-jax\[serve\]'$"):
        serve.serve(read_config(mnist.get_config("dar")), str(tmp_path))


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"\.port={port} cannot be bound to: Address already"):
            serve._bound(ServeConfig(port=port))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("package://mnist", "mnist"),
        ("runs/digits/model", "digits"),
        ("model", "model"),
        ("hf://owner/name", "name"),
        ("/models/l", "l"),
    ],
)
def test_a_model_is_called_what_its_directory_is(path, name):
    assert serve._name(path) == name


@pytest.fixture
def model(tmp_path):
    """Return a model directory of its own."""
    return pathlib.Path(shutil.copytree(model_dir.locate("package://mnist"), tmp_path / "served"))


@pytest.fixture
def process(tmp_path, model):
    """Give a server of the shipped digits and its address."""
    pytest.importorskip("uvicorn", reason=NEEDED)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dar_jax.main", "--config=configs/mnist.py:dar"]
    command += [f"--workdir={tmp_path}", "--mode=serve", f"--config.serve.port={port}"]
    command += ["--config.serve.batch_size=2", f"--config.sample.model={model}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready(address):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        yield process, address
        process.kill()


def is_ready(address):
    try:
        return urllib.request.urlopen(f"{address}/health").status == 200
    except urllib.error.URLError:
        return False


def ask(address, **fields):
    headers = {"Content-Type": "application/json"}
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"{address}/v1/images/generations", body, headers)
    return urllib.request.urlopen(request)


@pytest.mark.slow
def test_sigterm_lets_requests_finish(process):
    process, address = process
    with ask(address, prompt=3, n=8, stream=True, partial_images=3) as response:
        first = response.readline()
        threading.Timer(0.0, process.send_signal, (signal.SIGTERM,)).start()
        names = [first, *(line for line in response if line.startswith(b"event: "))]
    assert names.count(b"event: image_generation.completed\n") == 8
    assert names.count(b"event: image_generation.partial_image\n") == 3 * 8
    assert process.wait(START_TIMEOUT_S) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_model_that_is_replaced_while_it_is_served_goes_on_as_it_was(process, model):
    def drawn():
        return json.load(ask(process[1], prompt=3, seed=5))["data"]

    before = drawn()
    for file in model.rglob("model.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert drawn() == before
    shutil.rmtree(model)
    assert drawn() == before
