"""The notebook: stored without outputs, and every cell runs on a CPU with the shipped model."""

import base64
import io
import itertools
import re

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests import tiny_transdiff
from tests.architecture_test import ROOT

PATH = ROOT / "launch/colab_sampling.ipynb"
CELL = 64 + 2  # pixels of an image in a figure, and its border
ROWS = {"## A column per class": 6, "## Layout control": 3, "## Variations": 1, "## TransDiff": 4}
COLUMNS = {"## A column per class": 10, "## TransDiff": 3}
TIMEOUT_S = 3600


def read():
    return nbformat.read(PATH, as_version=nbformat.NO_CONVERT)


def test_notebook_is_valid_and_stored_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert cell.metadata == {}


def test_badge_opens_the_notebook_that_installs_the_same_repository():
    """So that one command fills the owner in; see the README's table of what runs where."""
    readme = (ROOT / "README.md").read_text()
    ((repository, path),) = re.findall(
        r"https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)]+)\)", readme
    )
    assert ROOT / path == PATH
    assert f'REPOSITORY = "{repository}"' in read().cells[1].source
    assert f"perl -pi -e s,{repository},YOU/dar_jax, README.md {path}" in readme
    assert f"git clone https://github.com/{repository} " in readme


def outputs_by_heading(notebook):
    """The outputs of all code cells below each heading."""
    outputs, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = cell.source.splitlines()[0]
        else:
            outputs.setdefault(heading, []).extend(cell.outputs)
    return outputs


def add_transdiff(notebook, directory):
    """Repeat the cell of TransDiff with the address of a model that exists."""
    tiny_transdiff.save_vae(directory)
    model = tiny_transdiff.save(directory, "one_step", tiny_transdiff.ONE_STEP)
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("TRANSDIFF"))
    named = cell.source.replace("hf://owner/name", str(model))
    notebook.cells.insert(notebook.cells.index(cell) + 1, nbformat.v4.new_code_cell(named))


def pictures(outputs, kind):
    found = [output.data.get(kind) for output in outputs if "data" in output]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found if data]


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    for name, value in (("PYTHONPATH", str(ROOT)), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    resources = {"metadata": {"path": str(tmp_path)}}
    notebook = read()
    add_transdiff(notebook, tmp_path)
    client = nbclient.NotebookClient(notebook, timeout=TIMEOUT_S, resources=resources)
    client.execute()
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    outputs = outputs_by_heading(notebook)

    text = "".join(output.get("text", "") for output in itertools.chain(*outputs.values()))
    assert "cannot get hf://owner/name" in text
    assert "Using package://emoji: 128 tokens, classes face-smiling, " in text
    assert "Nothing is drawn: name a model in TRANSDIFF" in text
    for heading, rows in ROWS.items():
        (picture,) = pictures(outputs[heading], "image/png")
        columns = COLUMNS.get(heading, 11)
        assert picture.size == (columns * CELL, rows * CELL)
        assert np.asarray(picture).std() > 0
    (animation,) = pictures(outputs["## Previews while the tokens are written"], "image/gif")
    assert animation.n_frames == 4
    (state,) = (
        widget["state"]
        for widget in notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"][
            "state"
        ].values()
        if widget["model_name"] == "OutputModel"
    )
    (drawn,) = pictures([nbformat.from_dict(output) for output in state["outputs"]], "image/png")
    assert drawn.size == (10 * CELL, CELL)
