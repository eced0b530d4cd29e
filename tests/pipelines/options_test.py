"""What `help` and completion show of the options of pipelines."""

import dataclasses
import inspect

import pytest

import dar_jax


@pytest.mark.parametrize("name", ["stream", "generate"])
@pytest.mark.parametrize(
    ("pipeline", "options"),
    [
        (dar_jax.DarPipeline, dar_jax.DarSampling),
        (dar_jax.TransDiffPipeline, dar_jax.TransDiffSampling),
    ],
)
def test_every_option_is_in_the_signature_and_explained(pipeline, options, name):
    function = getattr(pipeline, name)
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:3] == ["self", "labels", "rng"]
    assert "microbatch" in parameters and "options" not in parameters
    for field in dataclasses.fields(options):
        assert repr(parameters[field.name].default) == "..."
        assert f"\n    {field.name}: " in inspect.getdoc(function)
    assert "rng: key or seed" in inspect.getdoc(function)
    # There is nothing to choose of previews where there are none.
    assert ("previews" in parameters) == ("\n    previews: " in inspect.getdoc(function))
    assert ("previews" in parameters) == (name == "stream")
