"""How a setting is declared, checked, written as a flag and read back. The settings themselves stand in `config`."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sidestep.errors import UserError

C = TypeVar("C")


@dataclass(frozen=True)
class Option:
    """One setting: everything that the parser, the wizard, the presets, the review and the README derive from."""

    name: str
    type: type  # str, int, float, bool or Path: of one value
    many: bool  # a tuple of values
    optional: bool  # None is allowed
    default: Any  # MISSING when required
    help: str
    flags: tuple[str, ...]
    group: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    above: float | None
    advanced: bool

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def flag(self) -> str:
        return self.flags[0]

    def check(self, value: Any) -> Any:
        """The value in its declared type. Raises UserError naming the flag, the value and what is allowed."""
        if value is None:
            if self.optional:
                return None
            raise self._wrong(value, f"a value is needed ({self._kind()})")
        if self.many:
            values = value.split() if isinstance(value, str) else value
            if not isinstance(values, list | tuple):
                raise self._wrong(value, "must be a list of values")
            return tuple(self._check_one(v) for v in values)
        return self._check_one(value)

    def _kind(self) -> str:
        return ", ".join(self.choices) or {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            Path: "a path",
        }.get(self.type, "text")

    def _check_one(self, value: Any) -> Any:
        if self.type is bool:
            if not isinstance(value, bool):
                raise self._wrong(value, "must be true or false")
            return value
        if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
            raise self._wrong(value, f"must be {self._kind()}")
        if self.type is int and isinstance(value, float) and not value.is_integer():
            raise self._wrong(value, "must be a whole number")
        try:
            value = self.type(value).expanduser() if self.type is Path else self.type(value)
        except (ValueError, OverflowError):
            raise self._wrong(value, f"must be {self._kind()}") from None
        if self.choices and value not in self.choices:
            raise self._wrong(value, f"must be one of {', '.join(self.choices)}")
        if self.type in (int, float):
            if value != value or value in (float("inf"), float("-inf")):
                raise self._wrong(value, "must be a finite number")
            if self.minimum is not None and value < self.minimum:
                raise self._wrong(value, f"must be at least {self.minimum:g}")
            if self.maximum is not None and value > self.maximum:
                raise self._wrong(value, f"must be at most {self.maximum:g}")
            if self.above is not None and value <= self.above:
                raise self._wrong(value, f"must be above {self.above:g}")
        return value

    def _wrong(self, value: Any, why: str) -> UserError:
        return UserError(f"{self.flag} {value}: {why}.", f"Help: {self.help}")


def option(
    default: Any,
    help: str,
    *flags: str,
    group: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    advanced: bool = False,
) -> Any:
    """Declare a setting as a dataclass field. `default=MISSING` makes it required; no flags: `--` and the field's name."""
    metadata = {
        "help": help,
        "flags": flags,
        "group": group,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "advanced": advanced,
    }
    return dataclasses.field(default=default, metadata={"option": metadata})


def same_as(config_class: type, name: str) -> Any:
    """A setting that another config class declares: the same default, flag and help."""
    declared = next(f for f in dataclasses.fields(config_class) if f.name == name)
    return dataclasses.field(default=declared.default, metadata=declared.metadata)


def options_of(config_class: type) -> dict[str, Option]:
    """Every setting of a config class by name, in order of declaration."""
    return dict(_options_of(config_class))


@functools.cache  # resolving the type hints of sixty fields takes a millisecond, and a wizard asks often
def _options_of(config_class: type) -> dict[str, Option]:
    hints = typing.get_type_hints(config_class)
    found = {}
    for f in dataclasses.fields(config_class):
        kind, optional, many = hints[f.name], False, False
        if isinstance(kind, types.UnionType):
            optional = True
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        if typing.get_origin(kind) is tuple:
            many, kind = True, typing.get_args(kind)[0]
        facts = dict(f.metadata["option"])
        facts["flags"] = facts["flags"] or ("--" + f.name.replace("_", "-"),)
        found[f.name] = Option(name=f.name, type=kind, many=many, optional=optional, default=f.default, **facts)
    return found


def splits_at_commas(o: Option) -> bool:
    """True where `a,b` means two values: lists of numbers and of choices, but not of names and files, which may hold commas."""
    return o.many and (o.type in (int, float) or bool(o.choices))


def resolve(config_class: type[C], *layers: Mapping[str, Any]) -> C:
    """A config from layers of named values; the later layer wins (carried over, preset, typed).

    Raises UserError for an unknown name, a value out of range or a missing required setting.
    """
    options = options_of(config_class)
    merged: dict[str, Any] = {}
    for layer in layers:
        unknown = sorted(set(layer) - set(options))
        if unknown:
            raise UserError(f"Unknown setting: {', '.join(unknown)}.", f"Known settings: {', '.join(options)}.")
        merged.update(layer)
    missing = [o.flag for o in options.values() if o.required and o.name not in merged]
    if missing:
        raise UserError(
            f"Missing: {', '.join(missing)}.",
            "\n".join(f"{o.flag}: {o.help}" for o in options.values() if o.flag in missing),
        )
    return config_class(**{name: options[name].check(value) for name, value in merged.items()})


def changed_from_defaults(config: Any) -> dict[str, Any]:
    """The settings whose value is not the default, in order of declaration."""
    return {
        name: getattr(config, name)
        for name, o in options_of(type(config)).items()
        if o.required or getattr(config, name) != o.default
    }


def as_arguments(config: Any) -> list[str]:
    """The words that give this config when parsed: positional ones first, then flags; defaults are left out."""
    arguments: list[str] = []
    options = options_of(type(config))
    for name, value in changed_from_defaults(config).items():
        o = options[name]
        if not o.flag.startswith("-"):
            continue
        if o.type is bool:
            arguments.append(o.flag if value else "--no-" + o.flag.removeprefix("--"))
        elif value is None:
            continue
        elif o.many and splits_at_commas(o) and any(str(part).startswith("-") for part in value):
            arguments.append(f"{o.flag}={','.join(map(str, value))}")  # -1e-3 alone would be read as a flag
        elif o.many:
            arguments += [o.flag, *map(str, value)]
        elif str(value).startswith("-"):
            arguments.append(f"{o.flag}={value}")
        else:
            arguments += [o.flag, str(value)]
    return _positional(config) + arguments


def _positional(config: Any) -> list[str]:
    """The values without a flag, up to the last one that is not the default."""
    words: list[str] = []
    kept = 0
    changed = changed_from_defaults(config)
    for name, o in options_of(type(config)).items():
        if not o.flag.startswith("-"):
            value = getattr(config, name)
            words += map(str, value) if o.many else [str(value)]
            kept = len(words) if name in changed else kept
    return words[:kept]


def as_json_values(config: Any) -> dict[str, Any]:
    """Every setting as plain JSON values: what `config.json` of a run holds and `resolve` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return value.as_posix() if isinstance(value, Path) else value

    return {name: plain(getattr(config, name)) for name in options_of(type(config))}
