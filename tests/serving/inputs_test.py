"""What is made of the fields of a request, and what is said to bad ones."""

import pytest

from dar_jax.serving.errors import ApiError
from dar_jax.serving.inputs import read, read_form, spread
from dar_jax.serving.pictures import Output
from tests.serving.fake import OFFER


def test_defaults_are_one_image_of_any_seed_as_the_model_draws():
    first, second = (read({"prompt": "dog"}, OFFER) for _ in range(2))
    assert first.request.labels == (1,)
    assert first.request.seed != second.request.seed
    assert first.request.sampling == OFFER.sampling
    assert not first.request.preview_groups and not first.stream
    assert first.output == Output("png", 100)


def test_all_fields_are_read():
    wanted = read(
        {
            "prompt": " 4 ",
            "model": "squares",
            "n": 3,
            "size": "8x8",
            "seed": 2**32 - 1,
            "guidance": [1, 5.5],
            "temperature": 0,
            "stream": True,
            "partial_images": 3,
            "response_format": "b64_json",
            "output_format": "webp",
            "output_compression": 80,
            "quality": "auto",
            "user": None,
        },
        OFFER,
    )
    request = wanted.request
    assert request.labels == (4, 4, 4) and request.seed == 2**32 - 1 and wanted.stream
    assert request.preview_groups == {1, 2, 3}
    assert request.sampling.guidance_scale == (1.0, 5.5) and request.sampling.temperature == 0
    assert wanted.output == Output("webp", 80)


@pytest.mark.parametrize("prompt", [0, "0", "cat"])
def test_a_class_is_a_name_or_a_number(prompt):
    assert read({"prompt": prompt}, OFFER).request.labels == (0,)


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ([], 400, "expected a JSON object, got list"),
        ({}, 400, "prompt=null: expected the name or the number of a class"),
        ({"prompt": True}, 400, "prompt=true: expected"),
        ({"prompt": "cta"}, 400, "no class is called 'cta'; there is cat"),
        ({"prompt": "5"}, 400, "expected a class in 0..4"),
        ({"prompt": "9" * 5000}, 400, "no class is called"),
        ({"n": 0}, 400, "n=0: expected an integer in 1..10"),
        ({"n": 1000}, 400, "n=1000: expected an integer in 1..10"),
        ({"n": True}, 400, "n=true: expected an integer"),
        ({"n": 1.5}, 400, "n=1.5: expected an integer"),
        ({"seed": -1}, 400, "seed=-1: expected"),
        ({"seed": 2**32}, 400, "seed=4294967296: expected"),
        ({"size": "1024x1024"}, 400, 'size="1024x1024": expected auto or 8x8'),
        ({"guidance": 0.5}, 400, "guidance=0.5: expected one number"),
        ({"guidance": float("nan")}, 400, "guidance=NaN: expected"),
        ({"guidance": []}, 400, "guidance=[]: expected"),
        ({"guidance": [1, 2, 3]}, 400, "guidance=[1, 2, 3]: expected"),
        ({"temperature": 3}, 400, "temperature=3: expected a number in 0..2"),
        ({"stream": 1}, 400, "stream=1: expected true or false"),
        ({"partial_images": 1}, 400, "partial_images needs stream=true"),
        ({"partial_images": "0"}, 400, "partial_images needs stream=true"),
        ({"stream": True, "partial_images": 4}, 400, "partial_images=4: expected an integer in 0"),
        ({"response_format": "url"}, 400, 'response_format="url": expected b64_json'),
        ({"output_format": "svg"}, 400, 'output_format="svg": expected png or webp or jpeg'),
        ({"output_compression": 50}, 400, "png loses nothing"),
        ({"quality": "high"}, 400, 'quality="high": expected auto'),
        ({"model": "gpt-image-1"}, 404, "there is no model 'gpt-image-1', only 'squares'"),
        ({"guidence": 3}, 400, "unknown field 'guidence'; did you mean guidance?"),
    ],
)
def test_bad_fields_are_one_sentence(fields, status, says):
    fields = {"prompt": "cat", **fields} if fields else fields
    with pytest.raises(ApiError) as refused:
        read(fields, OFFER)
    assert refused.value.status == status and says in refused.value.message
    assert "\n" not in refused.value.message and len(refused.value.message) < 400


def test_forms_hold_numbers_as_text():
    fields = read_form({"prompt": "4", "n": "2", "stream": "true", "guidance": "[1, 5]"})
    assert fields == {"prompt": "4", "n": 2, "stream": True, "guidance": [1, 5]}
    with pytest.raises(ApiError, match='n="two": expected a number'):
        read_form({"n": "two"})


@pytest.mark.parametrize(
    ("groups", "count", "chosen"),
    [((1, 2, 3), 0, set()), ((1, 2, 3), 1, {2}), ((1, 2, 3), 3, {1, 2, 3}), ((2, 4, 6), 2, {2, 4})],
)
def test_previews_are_spread(groups, count, chosen):
    assert spread(groups, count) == chosen


@pytest.mark.parametrize("num_groups", [1, 2, 7, 8])
def test_as_many_previews_as_are_asked_for(num_groups):
    groups = tuple(range(1, num_groups))
    for count in range(num_groups):
        assert len(spread(groups, count)) == count
