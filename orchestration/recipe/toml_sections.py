"""Configuration sections from TOML and `--set key=value`, and back to TOML. An error lists every problem at once."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from tinyemo.config import Section
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import Taxonomy, describe_taxonomy

S = TypeVar("S", bound=Section)
Tables = dict[str, Any]
Loc = tuple[int | str, ...]


def read_toml(path: Path) -> Tables:
    """Read the tables of a TOML file.

    Raises:
        ConfigError: if it cannot be read or parsed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error


def lay_over(content: Tables, overrides: Iterable[str], model: type[Section]) -> list[str]:
    """Apply each `key=value` or `table.key=value` to `content` in place, and return one line per malformed override.

    An override changes its key alone: other keys of the table keep their defaults.
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
    """Return the default value of a field; of a section only the fields that its default sets."""
    field = model.model_fields.get(name) if model else None
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, Section):
        return default.model_dump(exclude_unset=True)
    return {} if default is None else copy.deepcopy(default)


def _section_class(model: type[Section] | None, name: int | str) -> type[Section] | None:
    """Return the class of the section under a name; None for a value, a plain table or an unknown name."""
    field = model.model_fields.get(str(name)) if model else None
    kind = field.annotation if field else None
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def parse_section(
    model: type[S], content: Tables, *, source: str, problems: Sequence[str] = (), required: Tables | None = None
) -> S:
    """Validate nested tables as a section.

    Args:
        model: class of the section.
        content: tables of the section.
        source: name of the source for the error message.
        problems: lines found before, for instance by `lay_over`, to report with the others.
        required: stand-in values for the fields without a default, so that checks between fields run even if one of
            these is wrong.

    Raises:
        ConfigError: lists all errors, one line per field, including those between fields.
    """
    found = list(problems)
    section = None
    try:
        section = model.model_validate(content)
    except ValidationError as error:
        found += _describe(error, model)
        # Field errors hide the checks over several fields, so run these with the broken fields at their defaults.
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
            # A check over several fields names their values itself.
            got = "" if isinstance(item["input"], dict) else got
            lines += [f"{field}: {problem}{got}" for problem in problems] if field else problems
        elif item["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown key{_neighbours(item['loc'], model)}")
        elif item["type"] == "missing":
            lines.append(f"{field}: is missing")
        else:
            lines.append(f"{field}: {item['msg'].lower()}{got}")
    return lines


def _neighbours(loc: Loc, model: type[Section]) -> str:
    section: type[Section] | None = model
    for part in loc[:-1]:
        section = _section_class(section, part)
    return f"; known keys: {', '.join(section.model_fields)}" if section else ""


def _without(content: Tables, locs: list[Loc]) -> Tables:
    rest = copy.deepcopy(content)
    for loc in locs:
        table: Any = rest
        for part in loc[:-1]:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict):
            table.pop(loc[-1], None)
    return rest


def toml_lines(section: Section, *, path: str = "", only: Collection[str] | None = None) -> list[str]:
    """Return a section as TOML with every field, in the order of its class; a field that is None becomes a comment.

    Args:
        path: dotted prefix of the tables, empty or ending with a dot.
        only: fields to write; None for all.
    """
    lines: list[str] = []
    tables: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if only is not None and name not in only:
            continue
        if isinstance(value, Taxonomy):
            value = describe_taxonomy(value)
        if isinstance(value, Section):
            tables += ["", f"[{path}{name}]", *toml_lines(value, path=f"{path}{name}.")]
        elif isinstance(value, dict) and value:
            parts = {_key(key): part for key, part in value.items()}
            if all(isinstance(part, Section) for part in parts.values()):
                for key, part in parts.items():
                    tables += ["", f"[{path}{name}.{key}]", *toml_lines(part, path=f"{path}{name}.{key}.")]
            else:
                tables += ["", f"[{path}{name}]"]
                tables += [line for key, part in parts.items() for line in _entries(key, part)]
        else:
            lines.append(f"# {name} = (not set)" if value is None else f"{name} = {_inline(value)}")
    return [*lines, *tables]


def _entries(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [line for inner, part in value.items() for line in _entries(f"{key}.{_key(inner)}", part)]
    return [f"{key} = {_inline(value)}"]


def _inline(value: Any) -> str:
    if isinstance(value, Section):
        fields = value.model_dump(mode="json", exclude_defaults=True)
        return "{ " + ", ".join(f"{_key(key)} = {_inline(part)}" for key, part in fields.items()) + " }"
    return "{}" if value == {} else json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
