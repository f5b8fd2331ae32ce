"""The family's figures agree with the published ones."""

from __future__ import annotations

import pytest

from tinyemo.errors import ConfigError
from tinyemo.families import FAMILY, find_size


@pytest.mark.parametrize(
    ("name", "width", "billions"),
    [
        ("tinyemo-700m", 1280, 0.70),
        ("tinyemo-880m", 1536, 0.88),
        ("tinyemo-1.5b", 2048, 1.53),
        ("tinyemo-3.2b", 2560, 3.21),
    ],
)
def test_totals_round_to_the_published_ones(name: str, width: int, billions: float):
    size = find_size(name)
    assert size.hidden_size == width
    assert round(size.total_parameters / 1e9, 2) == billions
    assert size.published_average is not None


def test_names_are_their_own_keys_and_grow():
    assert all(size.name == name for name, size in FAMILY.items())
    widths = [size.hidden_size for size in FAMILY.values()]
    assert widths == sorted(widths)


def test_an_unknown_size_lists_the_known():
    with pytest.raises(ConfigError, match=r"unknown model size 'tinyemo-7b'.*tinyemo-700m"):
        find_size("tinyemo-7b")
