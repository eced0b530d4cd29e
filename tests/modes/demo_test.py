"""The demo without a browser: its config, its pieces of HTML, and life without gradio."""

import base64
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dar_jax.demo
from configs import mnist
from dar_jax.config import build as read_config
from dar_jax.demo import html
from dar_jax.demo.config import DemoConfig
from dar_jax.modes import demo


def test_demo_binds_to_loopback():
    assert DemoConfig().host == "127.0.0.1"


@pytest.mark.parametrize("name", ["port", "batch_size", "max_requests", "max_upload_megabytes"])
def test_config_out_of_range_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be"):
        DemoConfig(**{name: 0})


def test_missing_gradio_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dar_jax.demo.page", raising=False)
    monkeypatch.delattr(dar_jax.demo, "page", raising=False)
    with pytest.raises(ValueError, match=r"needs gradio, .* pip install 'dar-jax\[demo\]'$"):
        demo.demo(read_config(mnist.get_config("dar")), str(tmp_path))


def test_other_modes_do_without_gradio():
    program = "import sys; sys.modules['gradio'] = None; from dar_jax import main; main.MODES"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tiles_hold_the_pictures_and_escape_names():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    text = html.tiles(["<b>cat</b>", "dog"], pixels)
    assert "<b>" not in text and "&lt;b&gt;cat" in text
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(data))), pixels[0])
    assert text.count("<figure>") == 2 and text.count('class="empty"') == 1


def test_status_and_problem_are_escaped_text():
    assert "width: 25.0%" in html.status(0.25, "8 of 32 tokens")
    assert "<script>" not in html.status(0.0, "<script>") + html.problem("<script>")
