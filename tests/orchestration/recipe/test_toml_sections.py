"""Sections from TOML and `--set`: overrides change one key, and everything that is wrong is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, field_validator, model_validator

from orchestration.recipe.toml_sections import lay_over, parse_section, read_toml
from tinyemo.config import Section
from tinyemo.errors import ConfigError


class Wheels(Section):
    count: PositiveInt = 4
    width: float = 1.0
    sizes: dict[str, float] = Field({"front": 1.0, "rear": 2.0})

    @field_validator("width")
    @classmethod
    def _is_narrow(cls, value: float) -> float:
        if value > 9:
            raise ValueError("must be at most 9")
        return value


class Car(Section):
    name: str
    wheels: Wheels = Wheels(count=3, sizes={"front": 5.0})
    trailer: Wheels | None = None
    seats: PositiveInt = 2

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.seats > 2 * self.wheels.count:
            raise ValueError(f"seats: {self.seats} are too many\nwheels.count: {self.wheels.count} are too few")
        return self


def load(*overrides: str, **content: Any) -> Car:
    tables = {"name": "car"} | content
    problems = lay_over(tables, overrides, Car)
    return parse_section(Car, tables, source="test", problems=problems, required={"name": "unnamed"})


def problems_of(*overrides: str, **content: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **content)
    first, *others = str(caught.value).splitlines()
    if not others:
        return [first.removeprefix("test: ")]
    assert first == f"test: {len(others)} errors"
    return [line.strip() for line in others]


@settings(deadline=None)
@given(
    key=st.sampled_from(["wheels.count", "wheels.width", "wheels.sizes.front", "wheels.sizes.new", "seats"]),
    value=st.integers(1, 6),
)
def test_an_override_changes_its_key_alone(key: str, value: int) -> None:
    """Also in a section whose default is not its class's, and in a table of any keys."""
    expected = load().model_dump()
    table = expected
    *names, last = key.split(".")
    for name in names:
        table = table[name]
    table[last] = value
    assert load(f"{key}={value}").model_dump() == expected


def test_a_table_of_the_file_stands_for_the_whole_default_one() -> None:
    sizes = {"sizes": {"rear": 3.0}}
    assert load(wheels=sizes).wheels == Wheels(sizes={"rear": 3.0})
    assert load("wheels.sizes.front=2", wheels=sizes).wheels == Wheels(sizes={"rear": 3.0, "front": 2.0})


def test_an_override_opens_a_section_that_is_not_there() -> None:
    assert load("trailer.count=2").trailer == Wheels(count=2)


def test_overrides_leave_the_defaults_alone() -> None:
    load("wheels.sizes.front=9", "trailer.sizes.rear=7")
    assert load().wheels.sizes == {"front": 5.0}
    assert Wheels().sizes == {"front": 1.0, "rear": 2.0}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seats", "--set seats: needs the form key=value"),
        ("=2", "--set =2: needs the form key=value"),
        ("seats.front=1", "--set seats.front=1: seats is a value, not a table"),
        ("seats=0", "seats: input should be greater than 0, got 0"),
        ("wheels.width=10", "wheels.width: must be at most 9, got 10"),
        ("wheels.colour=red", "wheels.colour: unknown key; known keys: count, width, sizes"),
        ("trailer.colour=red", "trailer.colour: unknown key; known keys: count, width, sizes"),
        ("colour=red", "colour: unknown key; known keys: name, wheels, trailer, seats"),
        ("wheels.sizes.front=big", "wheels.sizes.front: input should be a valid number"),
    ],
)
def test_one_problem_is_one_line(override: str, problem: str) -> None:
    [found] = problems_of(override)
    assert found.startswith(problem)


def test_all_problems_come_at_once() -> None:
    """What is no override, fields, and what does not go together with the broken fields at their defaults."""
    found = problems_of("x", "wheels.width=wide", "seats=9", "wheels.colour=1")
    assert [line.split(":")[0] for line in found] == [
        "--set x", "wheels.width", "wheels.colour", "seats", "wheels.count"
    ]  # fmt: skip


def test_a_required_field_that_is_missing_hides_no_other() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section(Car, {"seats": 9}, source="test", required={"name": "unnamed"})
    assert str(caught.value).splitlines() == [
        "test: 3 errors", "  name: is missing", "  seats: 9 are too many", "  wheels.count: 3 are too few"
    ]  # fmt: skip


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    for content in (b"a = ", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.toml: cannot be read as TOML"):
            read_toml(path)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path / "nowhere.toml")
