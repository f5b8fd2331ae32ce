"""Sections of configuration from TOML and `--set key=value`; all that is wrong with one is said at once."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from tinyemo.config import Section
from tinyemo.errors import ConfigError

S = TypeVar("S", bound=Section)
Tables = dict[str, Any]
Loc = tuple[int | str, ...]


def read_toml(path: Path) -> Tables:
    """The tables of a file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no TOML file that can be read ({error})") from error


def lay_over(content: Tables, overrides: Iterable[str], model: type[Section]) -> list[str]:
    """Lay each `key=value` or `table.key=value` over the tables of a model; what is wrong with them, a line each.

    What a table has by default stays, but for the key.
    """
    return [problem for text in overrides if (problem := _override(content, text, model))]


def _override(content: Tables, text: str, model: type[Section] | None) -> str | None:
    key, separator, value = text.partition("=")
    if not separator or not key:
        return f"--set {text}: needs the form key=value"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    *names, last = key.split(".")
    table = content
    for name in names:
        table = table.setdefault(name, _default_table(model, name))
        if not isinstance(table, dict):
            return f"--set {text}: {name} is a value, not a table"
        model = _section_class(model, name)
    table[last] = parsed
    return None


def _default_table(model: type[Section] | None, name: str) -> Any:
    """What stands under a name where a file says nothing; a section only with what its default has of its own."""
    field = model.model_fields.get(name) if model else None
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, Section):
        return default.model_dump(exclude_unset=True)
    return {} if default is None else copy.deepcopy(default)


def _section_class(model: type[Section] | None, name: int | str) -> type[Section] | None:
    """The class of the section under a name; None where there is a value, a plain table or nothing."""
    field = model.model_fields.get(str(name)) if model else None
    kind = field.annotation if field else None
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def parse_section(
    model: type[S], content: Tables, *, source: str, problems: Sequence[str] = (), required: Tables | None = None
) -> S:
    """The validated section of nested tables.

    Args:
        model: its class.
        content: its tables.
        source: where they come from, for the error.
        problems: found before, for instance by `lay_over`; they come with the others.
        required: values for the fields without a default, to check the other fields against each other where one of
            those is wrong.

    Raises:
        ConfigError: all that is wrong, one line a field, also what does not go together.
    """
    found = list(problems)
    section = None
    try:
        section = model.model_validate(content)
    except ValidationError as error:
        found += _describe(error, model)
        # Field errors hide the checks over several fields: look at those with the broken fields at their defaults.
        try:
            model.model_validate((required or {}) | _without(content, [e["loc"] for e in error.errors() if e["loc"]]))
        except ValidationError as rest:
            found += [line for line in _describe(rest, model) if line not in found]
    if section is None or found:
        lines = found if len(found) == 1 else [f"{len(found)} errors", *(f"  {line}" for line in found)]
        raise ConfigError(f"{source}: " + "\n".join(lines))
    return section


def _describe(error: ValidationError, model: type[Section]) -> list[str]:
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        got = f", got {item['input']!r}"
        if item["type"] == "value_error":
            problems = str(item["ctx"]["error"]).splitlines()
            # What a check over several fields says has their values in it.
            got = "" if isinstance(item["input"], dict) else got
            lines += [f"{field}: {problem}{got}" for problem in problems] if field else problems
        elif item["type"] == "extra_forbidden":
            lines.append(f"{field}: no such key{_neighbours(item['loc'], model)}")
        elif item["type"] == "missing":
            lines.append(f"{field}: is missing")
        else:
            lines.append(f"{field}: {item['msg'].lower()}{got}")
    return lines


def _neighbours(loc: Loc, model: type[Section]) -> str:
    """The keys that the unknown key's section has."""
    section: type[Section] | None = model
    for part in loc[:-1]:
        section = _section_class(section, part)
    return f"; there are {', '.join(section.model_fields)}" if section else ""


def _without(content: Tables, locs: list[Loc]) -> Tables:
    """A copy of nested tables without the values at `locs`."""
    rest = copy.deepcopy(content)
    for loc in locs:
        table: Any = rest
        for part in loc[:-1]:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table.pop(loc[-1], None)
    return rest
