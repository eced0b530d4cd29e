"""Batches of few sizes, and one under way while another is used."""

from dar_jax.common.batches import one_ahead


def test_one_ahead_loses_nothing():
    assert [list(one_ahead(iter(range(n)))) for n in (1, 2, 5)] == [[0], [0, 1], [0, 1, 2, 3, 4]]
