"""Measurements of `--mode=benchmark`: as JSON, and as lines of a table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

COLUMNS = ("phase", "batch", "guidance", "seconds", "images/s", "bound images/s", "of bound", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        phase: what is timed; see `performance.runs`.
        batch_size: images at a time.
        guidance_scale: None where there is none.
        seconds: median time of a batch.
        bound_seconds: least time of a batch.
        details: further figures by name.
    """

    phase: str
    batch_size: int
    guidance_scale: float | None
    seconds: float
    bound_seconds: float
    details: dict[str, float]

    @property
    def fraction_of_bound(self) -> float:
        return self.bound_seconds / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Flat names and values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        details = fields.pop("details")
        return {
            **fields,
            "images_per_second": self.batch_size / self.seconds,
            "bound_images_per_second": self.batch_size / self.bound_seconds,
            "fraction_of_bound": self.fraction_of_bound,
            **details,
        }

    def cells(self) -> tuple[str, ...]:
        """Values under `COLUMNS`."""
        return (
            self.phase,
            str(self.batch_size),
            "-" if self.guidance_scale is None else f"{self.guidance_scale:g}",
            f"{self.seconds:.4g}",
            f"{self.batch_size / self.seconds:.4g}",
            f"{self.batch_size / self.bound_seconds:.4g}",
            f"{100 * self.fraction_of_bound:.1f} %",
            ", ".join(f"{name} {value:.4g}" for name, value in self.details.items()),
        )


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out under their column names."""
    cells = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
