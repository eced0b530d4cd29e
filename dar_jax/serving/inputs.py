"""What clients ask for: fields of OpenAI's image API, read and checked."""

import dataclasses
import difflib
import json
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from dar_jax.common.checks import MAX_SEED
from dar_jax.generation.batches import takes_texts
from dar_jax.pipelines.base import Pipeline, class_index
from dar_jax.serving.drawing import Request
from dar_jax.serving.errors import ApiError
from dar_jax.serving.pictures import BEST, FORMATS, Kept, Output

MAX_GUIDANCE, MAX_TEMPERATURE = 20.0, 2.0
MAX_PROMPT = 1000
"""Letters of a text."""
RESPONSE_FORMAT = "b64_json"
AUTO = "auto"
ONLY_AUTO = ("quality", "background", "moderation")
"""Fields of the API that there is no choice of."""
WITHOUT_MEANING = ("user", "safety_identifier")
NUMBERS = ("n", "seed", "guidance", "temperature", "stream", "partial_images", "output_compression")
"""Fields that are text in a form and something else in JSON."""
FIELDS = (
    *("prompt", "model", "size", "response_format", "output_format"),
    *NUMBERS,
    *ONLY_AUTO,
    *WITHOUT_MEANING,
)


@dataclasses.dataclass(frozen=True)
class Offer:
    """What the server has.

    Attributes:
        model: its name.
        class_names: of the classes that have a name.
        num_classes: they are numbered from 0; without any, prompts are texts.
        size: side of the images that are given out, in pixels.
        image_size: side of the images that the model works on.
        num_tokens: of an image; 0 if the model has none.
        previews: numbers of groups after which there is a preview that is not the image.
        sampling: how images are drawn where a request does not say it.
        max_images: of a request.
        architecture: of the model, which options have to suit.
        edits: whether parts of images can be kept.
    """

    model: str
    class_names: tuple[str, ...]
    num_classes: int
    size: int
    image_size: int
    num_tokens: int
    previews: tuple[int, ...]
    sampling: Any
    max_images: int
    architecture: Any = None
    edits: bool = True

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        sampling: Any,
        model: str,
        previews: tuple[int, ...],
        max_images: int,
    ) -> "Offer":
        """Offer what a pipeline draws."""
        return cls(
            model=model,
            class_names=pipeline.class_names,
            num_classes=0 if takes_texts(pipeline.prior.config) else pipeline.num_classes,
            size=pipeline.output_size,
            image_size=pipeline.image_size,
            num_tokens=pipeline.num_tokens,
            previews=previews,
            sampling=sampling,
            max_images=max_images,
            architecture=pipeline.prior.config,
            edits=pipeline.keeps_tokens,
        )


class Wanted(NamedTuple):
    """A request, whether it is streamed, and the files that it gives."""

    request: Request
    stream: bool
    output: Output


def read_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a form as those of JSON.

    Raises:
        ApiError: a number is none.
    """
    values = dict(fields)
    for name in set(values) & {*NUMBERS}:
        try:
            values[name] = json.loads(values[name])
        except (ValueError, TypeError, RecursionError) as error:
            raise _wrong(name, values[name], "a number, true or false") from error
    return values


def read(fields: Any, offer: Offer, kept: Kept | None = None) -> Wanted:
    """Read the fields of a request.

    Raises:
        ApiError: a field is unknown, missing, of the wrong type or out of range.
    """
    if not isinstance(fields, dict):
        raise ApiError(400, f"expected a JSON object, got {type(fields).__name__}")
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_names(fields, offer)
    stream = fields.get("stream", False)
    if not isinstance(stream, bool):
        raise _wrong("stream", stream, "true or false")
    if fields.get("partial_images", 0) != 0 and not stream:
        raise ApiError(400, "partial_images needs stream=true", param="partial_images")
    num_partial = _integer(fields, "partial_images", 0, len(offer.previews), default=0)
    count = _integer(fields, "n", 1, offer.max_images, default=1)
    request = Request(
        labels=((_label if offer.num_classes else _text)(fields, offer),) * count,
        seed=_integer(fields, "seed", 0, MAX_SEED, default=secrets.randbelow(MAX_SEED + 1)),
        sampling=_sampling(fields, offer),
        preview_groups=spread(offer.previews, num_partial),
        **({} if kept is None else kept._asdict()),
    )
    return Wanted(request, stream, _output(fields))


def spread(groups: tuple[int, ...], count: int) -> frozenset[int]:
    """Choose so many of the groups, evenly spread."""
    return frozenset(groups[(i + 1) * (len(groups) + 1) // (count + 1) - 1] for i in range(count))


def _check_names(fields: Mapping[str, Any], offer: Offer) -> None:
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(FIELDS)}"
            raise ApiError(400, f"unknown field {name[:60]!r}; {hint}", param=name[:60])
    if fields.get("model", offer.model) != offer.model:
        raise ApiError(
            404,
            f"there is no model {str(fields['model'])[:60]!r}, only {offer.model!r}",
            param="model",
            code="model_not_found",
        )
    side = f"{offer.size}x{offer.size}"
    for name, known in (
        *((name, (AUTO,)) for name in ONLY_AUTO),
        ("size", (AUTO, side)),
        ("response_format", (RESPONSE_FORMAT,)),
        ("output_format", FORMATS),
    ):
        if fields.get(name, known[0]) not in known:
            raise _wrong(name, fields[name], " or ".join(known))


def _text(fields: Mapping[str, Any], offer: Offer) -> str:
    """Return the text that the prompt is."""
    prompt = fields.get("prompt")
    text = " ".join(prompt.split()) if isinstance(prompt, str) else ""
    if not 1 <= len(text) <= MAX_PROMPT:
        raise _wrong("prompt", prompt, f"a text of at most {MAX_PROMPT} letters")
    return text


def _label(fields: Mapping[str, Any], offer: Offer) -> int:
    """Return the class that the prompt names, or that has its number."""
    prompt = fields.get("prompt")
    if isinstance(prompt, bool) or not isinstance(prompt, str | int):
        raise _wrong("prompt", prompt, "the name or the number of a class")
    name = str(prompt).strip()
    if name not in offer.class_names and name.isdecimal() and len(name) <= len(str(MAX_SEED)):
        if int(name) < offer.num_classes:
            return int(name)
        raise _wrong("prompt", name, f"a class in 0..{offer.num_classes - 1}")
    try:
        return class_index(name[:200], offer.class_names)
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt", code="unknown_class") from error


def _sampling(fields: Mapping[str, Any], offer: Offer) -> Any:
    changes: dict[str, Any] = {}
    if "temperature" in fields and not hasattr(offer.sampling, "temperature"):
        raise _wrong("temperature", fields["temperature"], "none, which is for models of tokens")
    if "guidance" in fields:
        scales = fields["guidance"]
        scales = scales if isinstance(scales, list) else [scales]
        expected = f"one number, or the first and the last, in 1..{MAX_GUIDANCE:g}"
        if len(scales) not in (1, 2):
            raise _wrong("guidance", scales, expected)
        scales = [_number("guidance", s, 1, MAX_GUIDANCE, expected) for s in scales]
        changes["guidance_scale"] = tuple(scales)
    if "temperature" in fields:
        expected = f"a number in 0..{MAX_TEMPERATURE:g}"
        value = _number("temperature", fields["temperature"], 0, MAX_TEMPERATURE, expected)
        changes["temperature"] = value
    sampling = dataclasses.replace(offer.sampling, **changes)
    if offer.architecture is not None:
        try:
            sampling.check(offer.architecture)
        except ValueError as error:
            raise ApiError(400, str(error), param="guidance") from error
    return sampling


def _output(fields: Mapping[str, Any]) -> Output:
    output = Output(fields.get("output_format", FORMATS[0]))
    quality = _integer(fields, "output_compression", 0, BEST, default=BEST)
    if output.format == "png" and quality != BEST:
        raise ApiError(
            400,
            "output_compression is for webp and jpeg; png loses nothing",
            param="output_compression",
        )
    return output._replace(quality=quality)


def _integer(fields: Mapping[str, Any], name: str, least: int, most: int, *, default: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(name, value, f"an integer in {least}..{most}")
    return value


def _number(name: str, value: Any, least: int, most: float, expected: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # no NaN either
        raise _wrong(name, value, expected)
    return float(value)


def _wrong(name: str, value: Any, expected: str) -> ApiError:
    shown = json.dumps(value)[:60]
    return ApiError(400, f"{name}={shown}: expected {expected}", param=name)
