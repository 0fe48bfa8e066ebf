"""From words typed to named values. Every flag is made from the config dataclasses; only what was typed is kept.

`--vram-profile`: which of the presets for cards a call starts from.
"""

import argparse
import difflib
from dataclasses import MISSING, dataclass, field
from typing import Any, NoReturn

from sidestep import __version__
from sidestep.errors import UserError
from sidestep.settings.config import COMMANDS, PreprocessConfig, TrainConfig
from sidestep.settings.option import Option, options_of, resolve, splits_at_commas
from sidestep.settings.path_checks import find_models
from sidestep.settings.presets import COMMANDS_WITH_PRESETS, PROFILES, profile_for
from sidestep.variants import OFFICIAL_FOLDERS

METAVARS = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Call:
    """A command line, read: the command (None: none was given) and what was typed for it, by setting name."""

    command: str | None = None
    typed: dict[str, Any] = field(default_factory=dict)
    preprocess: bool = False
    preset: str = ""
    vram_profile: str = ""
    plain: bool = False
    yes: bool = False


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors like all others."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UserError(message[:1].upper() + message[1:] + ".", f"See: {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)


def parse(argv: list[str]) -> Call:
    """Read a command line. `--help` and `--version` print and raise SystemExit(0).

    Raises UserError for an unknown command or flag, naming the nearest one there is.
    """
    namespace = _global_parser().parse_args(argv)
    if namespace.command is None:
        return Call(plain=namespace.plain, yes=namespace.yes)
    command = namespace.command
    if command not in COMMANDS:
        raise UserError(
            f"Unknown command: {command}.", _near(command, list(COMMANDS)) or f"Commands: {', '.join(COMMANDS)}."
        )
    parser = command_parser(command)
    found, extra = parser.parse_known_args(namespace.rest)
    if extra:
        raise _unknown(command, parser, extra)
    typed = vars(found)
    flags = {"plain": False, "yes": False, "preset": "", "vram_profile": "", "preprocess": False}
    flags |= {name: typed.pop(name) for name in flags if name in typed}
    options = options_for(command)
    absent = [
        name
        for name, value in typed.items()
        if value is None or (value == [] and not options[name].flag.startswith("-"))
    ]  # optional positional words
    typed = {name: _parts(options[name], value) for name, value in typed.items() if name not in absent}
    flags |= {"plain": namespace.plain or flags["plain"], "yes": namespace.yes or flags["yes"]}
    return Call(command, typed, **flags)


def configs_of(call: Call, preset: dict[str, Any]) -> list[Any]:
    """The configs that a call asks for, in the order in which they run; typed wins over preset.

    Raises UserError where something is missing, out of range, or typed for a mode that was not asked for.
    """
    options = options_for(call.command)
    preset = {name: value for name, value in preset.items() if name in options}
    if call.command != "fixed":
        return [resolve(COMMANDS[call.command][0], preset, call.typed)]
    if not call.preprocess:
        astray = [options[name].flag for name in call.typed if name not in options_of(TrainConfig)]
        if astray:
            raise UserError(
                f"{', '.join(astray)}: only for preprocessing, which was not asked for.",
                "Add --preprocess to turn audio into training tensors.",
            )
        return [resolve(TrainConfig, _only(TrainConfig, preset), call.typed)]
    configs = [resolve(PreprocessConfig, _only(PreprocessConfig, preset), _only(PreprocessConfig, call.typed))]
    if "output_dir" in call.typed:
        data = {"dataset_dir": configs[0].tensor_output}
        configs.append(resolve(TrainConfig, data, _only(TrainConfig, preset), _only(TrainConfig, call.typed)))
    return configs


def notes_of(call: Call) -> list[str]:
    """What a user should know of how a call was read: defaults taken between modes, flags without use."""
    if call.command != "fixed" or not call.preprocess:
        return []
    if "output_dir" not in call.typed:
        options = options_for("fixed")
        idle = [options[name].flag for name in call.typed if name not in options_of(PreprocessConfig)]
        return (
            [f"{', '.join(idle)}: for training only, so not used here. Add --output-dir to train after preprocessing."]
            if idle
            else []
        )
    notes = ["Preprocessing first, then training."]
    if "dataset_dir" not in call.typed:
        notes.append(f"Training reads --dataset-dir {call.typed['tensor_output']}, where the tensors go.")
    elif call.typed["dataset_dir"] != call.typed["tensor_output"]:
        notes.append(
            f"Tensors go to --tensor-output {call.typed['tensor_output']}, but training reads --dataset-dir {call.typed['dataset_dir']}."
        )
    return notes


def options_for(command: str) -> dict[str, Option]:
    """Every setting of a command by name; `fixed` has those of training and of preprocessing."""
    options = options_of(COMMANDS[command][0])
    return (
        options | {name: o for name, o in options_of(PreprocessConfig).items() if name not in options}
        if command == "fixed"
        else options
    )


def command_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command: a group per section, nothing in the namespace but what is typed."""
    options = options_for(command)
    needed = [
        f"{o.flag} {METAVARS.get(o.type, 'PATH')}" if o.flag.startswith("-") else o.flag.upper()
        for o in options.values()
        if o.required
    ]
    usage = " ".join(["train.py", command, *([] if command == "fixed" else needed), "[FLAGS]"])
    if command == "fixed":
        train, preprocess = (
            "--checkpoint-dir PATH --dataset-dir PATH --output-dir PATH",
            "--checkpoint-dir PATH --audio-dir PATH --tensor-output PATH",
        )
        usage = f"train.py fixed {train} [FLAGS]\n       train.py fixed --preprocess {preprocess} [FLAGS]"
    parser = _Parser(
        f"train.py {command}",
        usage=usage,
        description=COMMANDS[command][1] + ".",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--plain", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--yes", "-y", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if command == "fixed":
        help = "turn audio into training tensors; with --output-dir too, train on them afterwards"
        parser.add_argument("--preprocess", action="store_true", default=argparse.SUPPRESS, help=help)
    if command in COMMANDS_WITH_PRESETS:
        parser.add_argument(
            "--preset",
            metavar="NAME",
            default=argparse.SUPPRESS,
            help="start from a preset (see: train.py presets list); typed flags win",
        )
        help = "start from the preset for this GPU (auto), or for a card of that kind; typed flags win"
        parser.add_argument("--vram-profile", choices=("auto", *PROFILES), default=argparse.SUPPRESS, help=help)
    groups: dict[str, Any] = {}
    for name, o in options.items():
        group = groups.get(o.group) or groups.setdefault(o.group, parser.add_argument_group(o.group))
        _add(group, name, o)
    return parser


def _add(group: Any, name: str, o: Option) -> None:
    text = (o.help + _default_note(o)).replace("%", "%%")
    if not o.flag.startswith("-"):
        group.add_argument(
            name, metavar=o.flag.upper(), nargs="*" if o.many else (None if o.required else "?"), help=text
        )
    elif o.type is bool:
        group.add_argument(
            *o.flags, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    else:
        few = o.choices and not o.many and len(" ".join(o.choices)) < 40
        metavar = "{" + ",".join(o.choices) + "}" if few else METAVARS.get(o.type, "PATH")
        if o.many and o.choices:
            text += f" (any of {', '.join(o.choices)})"
        elif o.choices and not few:
            text += f" (one of {', '.join(o.choices)})"
        group.add_argument(
            *o.flags, dest=name, metavar=metavar, nargs="*" if o.many else None, default=argparse.SUPPRESS, help=text
        )


def _default_note(o: Option) -> str:
    if o.default is MISSING:
        return " (required)"
    if o.default is None or o.default == "" or o.default == ():
        return ""
    if isinstance(o.default, bool):
        return f" (default: {'on' if o.default else 'off'})"
    return f" (default: {' '.join(map(str, o.default)) if o.many else o.default})"


def _global_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {help}" for name, (_, help) in COMMANDS.items())
    parser = _Parser(
        "train.py",
        usage="train.py [--plain] [--yes] [--version] [COMMAND ...]",
        description="Side-Step: train adapters for ACE-Step 1.5.\nWithout a command, in a terminal, the wizard starts.",
        epilog=f"commands:\n{commands}\n\ntrain.py COMMAND --help lists the flags of a command.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--plain", action="store_true", help="plain text only: no colours, no live view, numbered questions"
    )
    parser.add_argument("--yes", "-y", action="store_true", help="ask for no confirmation")
    parser.add_argument("--version", action="version", version=f"Side-Step {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def command_list() -> str:
    """The help of `train.py` itself."""
    return _global_parser().format_help()


def _only(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in options_of(config_class)}


def _parts(o: Option, value: Any) -> Any:
    return (
        [part for word in value for part in word.split(",") if part]
        if isinstance(value, list) and splits_at_commas(o)
        else value
    )


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def _unknown(command: str, parser: argparse.ArgumentParser, extra: list[str]) -> UserError:
    flags = [word.split("=")[0] for word in extra if word.startswith("-")]
    if not flags:
        return UserError(f"{command} does not know what to do with: {' '.join(extra)}.", f"See: {parser.prog} --help")
    known = [flag for action in parser._actions for flag in action.option_strings]
    fixes = []
    for flag in flags:
        elsewhere = [
            name for name in COMMANDS if name != command and any(flag in o.flags for o in options_for(name).values())
        ]
        hint = f"{flag} is a flag of {', '.join(elsewhere)}." if elsewhere else _near(flag, known)
        fixes.append(hint or f"See: {parser.prog} --help")
    return UserError(f"{command} has no flag {', '.join(flags)}.", "\n".join(dict.fromkeys(fixes)))


def profile_of(call: Call) -> tuple[str, str]:
    """(preset, why) for a call with `--vram-profile`. Raises UserError where there is nothing to choose by."""
    if call.preset:
        raise UserError(
            f"--preset {call.preset} and --vram-profile {call.vram_profile} are both given.", "Leave one of them away."
        )
    is_xl = _is_xl(call)
    if call.vram_profile != "auto":
        return profile_for(PROFILES[call.vram_profile], is_xl), "asked for"
    gib, card = call.typed.get("vram"), "--vram"
    if not gib:
        from sidestep.tasks.plan.device import GIB, this_device

        device = this_device()
        if device is None:
            raise UserError(
                "--vram-profile auto: no GPU was found here.", f"Name a profile: --vram-profile {'|'.join(PROFILES)}"
            )
        gib, card = device.bytes / GIB, device.source
    return profile_for(gib, is_xl), f"{card} has {gib:.0f} GiB"


def _is_xl(call: Call) -> bool:
    variant = call.typed.get("model_variant", "turbo")
    if variant in OFFICIAL_FOLDERS or "checkpoint_dir" not in call.typed:
        return variant.startswith("xl-")
    return any(
        model.name == variant and model.variant.startswith("xl-") for model in find_models(call.typed["checkpoint_dir"])
    )
