"""Strict construction of dataclasses from nested mappings."""

import dataclasses

import pytest

from dar_jax.common.config_build import build


@dataclasses.dataclass(frozen=True)
class PartConfig:
    size: int
    scale: float = 1.0

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size={self.size} must be at least 0")


@dataclasses.dataclass(frozen=True)
class WholeConfig:
    name: str = "plain"
    enabled: bool = False
    rank: int | None = 8
    shape: tuple[int, ...] = (1, 2)
    part: PartConfig = PartConfig(size=3)
    optional_part: PartConfig | None = None


def test_absent_keys_keep_their_defaults():
    assert build(WholeConfig, {}, "model") == WholeConfig()


def test_nested_mappings_become_dataclasses():
    values = {"part": {"size": 5}, "optional_part": {"size": 6}, "shape": [3, 4], "rank": None}
    assert build(WholeConfig, values, "model") == WholeConfig(
        part=PartConfig(5), optional_part=PartConfig(6), shape=(3, 4), rank=None
    )


def test_json_round_trip():
    config = WholeConfig(shape=(7,), optional_part=PartConfig(1, 2.0))
    assert build(WholeConfig, dataclasses.asdict(config), "model") == config


def test_whole_numbers_serve_as_floats():
    part = build(PartConfig, {"size": 1, "scale": 2}, "part")
    assert part.scale == 2.0
    assert isinstance(part.scale, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "model: unknown key 'nam'; did you mean 'name'"),
        ({"zzz": 1}, "model: unknown key 'zzz'; valid keys: name, enabled"),
        (
            {"part": {"size": 1, "scal": 2}},
            r"model\.part: unknown key 'scal'; did you mean 'scale'",
        ),
        ({"part": {}}, r"model\.part: missing key 'size'"),
        ({"part": {"size": -1}}, r"model\.part: size=-1 must be at least 0"),
        ({"part": {"size": "3"}}, r"model\.part\.size: expected int, got '3'"),
        ({"part": {"size": True}}, r"model\.part\.size: expected int, got True"),
        ({"part": {"size": 1.5}}, r"model\.part\.size: expected int, got 1.5"),
        ({"part": {"size": 1, "scale": "big"}}, r"model\.part\.scale: expected float, got 'big'"),
        ({"enabled": 1}, r"model\.enabled: expected bool, got 1"),
        ({"rank": "8"}, r"model\.rank: expected int, got '8'"),
        ({"name": 3}, r"model\.name: expected str, got 3"),
        ({"name": None}, r"model\.name: expected str, got None"),
        ({"part": 3}, r"model\.part: expected a block of keys, got 3"),
        ({"part": None}, r"model\.part: expected a block of keys, got None"),
        ({"shape": 3}, r"model\.shape: expected a list, got 3"),
        ({"shape": (3, "x")}, r"model\.shape: expected int, got 'x'"),
        ({"name": ["x"]}, r"model\.name: expected str, got \['x'\]"),
    ],
)
def test_build_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        build(WholeConfig, values, "model")
