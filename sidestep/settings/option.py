"""How a setting is declared, checked, written as a flag and read back. The settings themselves are in `config`."""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Container, Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sidestep.errors import UserError
from sidestep.words import as_word, did_you_mean

C = TypeVar("C")
Answers = Mapping[str, Any]  # values by setting name: what was answered so far


LARGEST = 10**9  # of a number whose setting has no bound of its own: enough for all, and no product of two overflows
LARGEST_SEED = 2**63 - 1  # in files and in random generators


@dataclass(frozen=True)
class Choice:
    """One of the values that are offered. `note`: a few words on what it means."""

    value: Any
    title: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting: everything that the parser, the wizard, the presets, the review and docs/reference.md derive from.

    The first fields are declared with `option(...)`; name and type come from its dataclass field.
    """

    default: Any  # MISSING when required
    help: str  # for the flag; `plain` says the same to a musician
    flags: tuple[str, ...]
    group: str
    label: str = ""  # the question's words, where the flag's own would puzzle
    plain: str = ""
    more: str = ""  # two or three sentences for who wants to know: what it does to the sound, what is usual
    choices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # a few words on each of the choices
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    advanced: bool = False
    when: tuple[Any, ...] = ()  # when it matters: the name of another setting, then the values of it
    depends_on: tuple[str, ...] = ()  # settings whose change voids an earlier answer to this one
    suggest: Callable[[Answers], Any] | None = None  # a default that follows other answers; None: the usual one
    offers: Callable[[Answers], tuple[Choice, ...]] | None = None  # values found on disk; none found: it is typed
    holds: str = ""  # what a path must hold: a key of path_checks.CONTENTS
    kept: bool = False  # the value last used is suggested the next time
    bare: str = ""  # the choice that the flag means without a value, and true in a file; false means the first choice

    name: str = ""
    type: type = str  # str, int, float, bool or Path: of one value
    many: bool = False  # a tuple of values
    optional: bool = False  # None is allowed

    @property
    def title(self) -> str:
        """The setting's name as a person reads it."""
        return self.label or self.name.replace("_", " ").capitalize()

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def flag(self) -> str:
        return self.flags[0]

    @property
    def follows(self) -> tuple[str, ...]:
        """The settings whose value, when it is given and this one's is not, decides this one's: alpha follows rank."""
        return self.depends_on if self.suggest and not self.required else ()

    def default_under(self, given: Answers) -> Any:
        """The default beside values that are given."""
        suggested = self.suggest(given) if self.suggest and self.follows else None
        return self.default if suggested is None else suggested

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
        if self.bare and isinstance(value, bool):  # as files of before it had choices
            return self.bare if value else self.choices[0]
        if not isinstance(value, str | int | float | Path) or isinstance(value, bool) != (self.type is bool):
            raise self._wrong(value, f"must be {self._kind()}")
        if self.type is int and isinstance(value, float) and value % 1 != 0:
            raise self._wrong(value, "must be a whole number")
        if self.type is Path and not str(value).strip():  # Path("") is the working folder, which nobody has named
            raise self._wrong('""', "is empty; name a path (. is the folder you are in)")
        if self.type is str and any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise self._wrong(ascii(value), "holds bytes that are no text in UTF-8")
        try:
            checked: Any = Path(str(value)).expanduser() if self.type is Path else self.type(value)
        except (ValueError, OverflowError):
            raise self._wrong(value, f"must be {self._kind()}") from None
        except RuntimeError:  # no HOME, and a user that the system does not know
            raise self._wrong(value, "~ has no meaning here, there is no home folder; write the whole path") from None
        if self.choices and checked not in self.choices:
            nearest = did_you_mean(str(checked), self.choices)
            raise self._wrong(checked, f"must be one of {', '.join(self.choices)}", nearest)
        if self.type in (int, float):
            if checked != checked or checked in (float("inf"), float("-inf")):
                raise self._wrong(checked, "must be a finite number")
            if self.minimum is not None and checked < self.minimum:
                raise self._wrong(checked, f"must be at least {self.minimum:g}")
            largest = LARGEST if self.maximum is None else self.maximum
            if checked > largest:
                raise self._wrong(value, f"must be at most {largest}")
            if checked < -LARGEST:
                raise self._wrong(value, f"must be at least {-LARGEST}")
            if self.above is not None and checked <= self.above:
                raise self._wrong(checked, f"must be above {self.above:g}")
        return checked

    def _wrong(self, value: Any, why: str, fix: str = "") -> UserError:
        return UserError(f"{self.flag} {value}: {why}.", fix or f"Help: {self.help}")


def option(default: Any, help: str, *flags: str, group: str, **more: Any) -> Any:
    """Declare a setting as a dataclass field; `more` are fields of Option.

    `default=MISSING` makes it required; without flags its flag is `--` and the field's name.
    """
    declared = Option(default=default, help=help, flags=flags, group=group, **more)
    return dataclasses.field(default=default, metadata={"option": declared})


def same_as(config_class: type, name: str, **changes: Any) -> Any:
    """A setting that another config class declares: the same default, flag, help and all else, but for the changes."""
    declared = next(f.metadata["option"] for f in dataclasses.fields(config_class) if f.name == name)
    changed = replace(declared, **changes)
    return dataclasses.field(default=changed.default, metadata={"option": changed})


def fixed(value: Any) -> Any:
    """A field of another config class that a command has no setting for: it has always this value."""
    return dataclasses.field(default=value, init=False)


@functools.cache  # resolving the type hints of sixty fields takes a millisecond, and a wizard asks often
def options_of(config_class: type) -> dict[str, Option]:
    """Every setting of a config class by name, in order of declaration."""
    hints = typing.get_type_hints(config_class)
    found = {}
    for f in dataclasses.fields(config_class):
        if not f.init:
            continue
        o, kind = f.metadata["option"], hints[f.name]
        if optional := isinstance(kind, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        if many := typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        flags = o.flags or ("--" + f.name.replace("_", "-"),)
        found[f.name] = replace(o, name=f.name, type=kind, many=many, optional=optional, flags=flags)
    return found


def matters(o: Option, answers: Answers, options: Mapping[str, Option]) -> bool:
    """Whether a setting has a meaning under these answers; what was not answered has its default."""
    if not o.when:
        return True
    name, *values = o.when
    return answers.get(name, options[name].default) in values


def splits_at_commas(o: Option) -> bool:
    """True where `a,b` means two values: in lists of numbers and of choices; names and files may hold commas."""
    return o.many and (o.type in (int, float) or bool(o.choices))


def resolve(config_class: type[C], *layers: Mapping[str, Any]) -> C:
    """A config from layers of named values; the later layer wins (last used, preset, typed).

    A setting that follows others gives way where a later layer changes one of those and not itself.
    Raises UserError for an unknown name, a value out of range or a missing required setting.
    """
    options = options_of(config_class)
    values: dict[str, Any] = {}
    for layer in layers:
        if unknown := sorted(set(layer) - set(options)):
            raise UserError(f"Unknown setting: {', '.join(unknown)}.", f"Known settings: {', '.join(options)}.")
        checked = {name: options[name].check(value) for name, value in layer.items()}
        changed = {name for name, value in checked.items() if value != values.get(name, options[name].default)}
        values = {name: v for name, v in values.items() if not changed & set(options[name].follows)} | checked
    if missing := [o for o in options.values() if o.required and o.name not in values]:
        flags = ", ".join(o.flag for o in missing)
        raise UserError(f"Missing: {flags}.", "\n".join(f"{o.flag}: {o.help}" for o in missing))
    return config_class(**{name: o.default_under(values) for name, o in options.items()} | values)


def changed_from_defaults(config: Any) -> dict[str, Any]:
    """The settings that are neither the default nor what follows from the others, in order of declaration."""
    options, given = options_of(type(config)), {}
    for name, o in sorted(options.items(), key=lambda item: bool(item[1].follows)):
        if o.required or getattr(config, name) != o.default_under(given):
            given[name] = getattr(config, name)
    return {name: given[name] for name in options if name in given}


def as_arguments(config: Any, but: Container[str] = ()) -> list[str]:
    """The words that give this config when parsed: positional ones first, then flags; defaults are left out.

    but: names of settings that are left out too.
    """
    changed = changed_from_defaults(config)
    positional: list[str] = []
    flags: list[str] = []
    needed = 0  # positional words up to the last one that is not the default
    for name, o in options_of(type(config)).items():
        value = getattr(config, name)
        words = [] if value is None else [as_word(part) for part in (value if o.many else [value])]
        if not o.flag.startswith("-"):
            positional += words
            needed = len(positional) if name in changed else needed
        elif name not in changed or name in but or value is None:
            continue
        elif o.type is bool:
            flags.append(o.flag if value else "--no-" + o.flag.removeprefix("--"))
        elif any(word.startswith("-") for word in words):
            flags += [f"{o.flag}={word}" for word in ([",".join(words)] if splits_at_commas(o) else words)]
        else:
            flags += [o.flag, *words]
    return positional[:needed] + flags


def as_json_values(config: Any) -> dict[str, Any]:
    """Every setting as plain JSON values: what `config.json` of a run holds and `resolve` reads back."""
    values = {name: getattr(config, name) for name in options_of(type(config))}
    return {
        n: v.as_posix() if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for n, v in values.items()
    }
