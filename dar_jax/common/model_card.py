"""The model card: a `README.md` in a model directory that says what it is and how to use it."""

from collections.abc import Mapping, Sequence
from typing import Any

from dar_jax.common.version import version

CARD_NAME = "README.md"
MAX_CLASSES = 20


def model_card(
    name: str,
    kind: str,
    *,
    num_parameters: int,
    about: Mapping[str, Any],
    class_names: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
) -> str:
    """Write a card in Markdown.

    Args:
        name: of the model.
        kind: of the model.
        num_parameters: of the model itself.
        about: further facts, by what they are called; values are shown as they are.
        class_names: of the classes that have a name.
        sampling: options that it is best used with.
    """
    facts = {"kind": f"`{kind}`", "parameters": f"{num_parameters:,}", **about}
    if class_names:
        more = f" and {len(class_names) - MAX_CLASSES} more" * (len(class_names) > MAX_CLASSES)
        facts["classes"] = f"{len(class_names)}: {', '.join(class_names[:MAX_CLASSES])}{more}"
    if sampling:
        options = ", ".join(f"`{key}={value!r}`" for key, value in sampling.items())
        facts["recommended options"] = f"{options}; used unless others are given"
    facts["made with"] = f"dar_jax {version() or '(not installed)'}"
    facts["licence"] = "to be stated by whoever publishes it; that of the training data binds"
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""# {name}

| | |
|---|---|
{rows}

```python
import dar_jax

model = dar_jax.from_pretrained("{name}")  # the path of this directory
```

`dar-jax` takes it as `--config.sample.model=DIR`.
"""
