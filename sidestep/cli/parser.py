"""From words typed to named values. Every flag is made from the config dataclasses; only what was typed is kept.

`--vram-profile`: which of the presets for cards a call starts from.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sidestep.cli.start import version
from sidestep.errors import UserError
from sidestep.events import Decision, Event, Notice
from sidestep.settings.config import (
    COMMANDS,
    RANK_MAP,
    SET_BY_RANK_MAP,
    SPELLINGS,
    PlanConfig,
    PreprocessConfig,
    TrainConfig,
)
from sidestep.settings.option import Option, matters, options_of, resolve, splits_at_commas
from sidestep.settings.path_checks import find_models
from sidestep.settings.presets import COMMANDS_WITH_PRESETS, PROFILES, profile_for
from sidestep.terminal.terminal import as_typed
from sidestep.variants import OFFICIAL_FOLDERS
from sidestep.words import PROGRAM, as_word, did_you_mean

METAVARS = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class Call:
    """A command line, read: the command (empty: none was given) and what was typed for it, by setting name.

    preprocess: `fixed --preprocess` was typed, which preprocesses and, with an output folder, trains afterwards.
    """

    command: str = ""
    typed: dict[str, Any] = field(default_factory=dict)
    preprocess: bool = False
    preset: str = ""
    config: Path | None = None
    vram_profile: str = ""
    plain: bool = False
    yes: bool = False
    dry_run: str = ""  # for a person or, as json, for a program


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors like all others."""

    def __init__(self, prog: str, **arguments: Any):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(prog, allow_abbrev=False, formatter_class=layout, **arguments)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        nearest = did_you_mean(found[1], re.findall(r"[\w-]+", found[2])) if found else ""
        raise UserError(message[:1].upper() + message[1:] + ".", nearest or f"See: {self.prog} --help")


class _Version(argparse.Action):
    """`--version`: found out only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_rest: Any) -> NoReturn:
        print(version())
        parser.exit()


def parse(argv: list[str]) -> Call:
    """Read a command line. `--help` and `--version` print and raise SystemExit(0).

    Raises UserError for an unknown command or flag, naming the nearest one there is.
    """
    namespace = global_parser().parse_args(argv)
    typed_command = namespace.command
    if typed_command is None:
        return Call(plain=namespace.plain, yes=namespace.yes)
    if typed_command not in SPELLINGS:
        nearest = did_you_mean(typed_command, SPELLINGS)
        raise UserError(f"Unknown command: {typed_command}.", nearest or f"Commands: {', '.join(COMMANDS)}.")
    command, parser = SPELLINGS[typed_command], command_parser(typed_command)
    found, extra = parser.parse_known_args(namespace.rest)
    if extra:
        flags = [word.split("=")[0] for word in extra if word.startswith("-")]
        see = f"See: {parser.prog} --help"
        if not flags:
            raise UserError(f"{typed_command} does not know what to do with: {' '.join(extra)}.", see)
        known = [flag for action in parser._actions for flag in action.option_strings]
        fixes = []
        for flag in flags:
            others = (name for name in COMMANDS if name != command)
            elsewhere = [name for name in others if any(flag in o.flags for o in options_for(name).values())]
            hint = f"{flag} is a flag of {', '.join(elsewhere)}." if elsewhere else did_you_mean(flag, known)
            fixes.append(hint or see)
        raise UserError(f"{typed_command} has no flag {', '.join(flags)}.", "\n".join(dict.fromkeys(fixes)))
    typed = vars(found)
    preprocess, preset = typed.pop("preprocess", False), typed.pop("preset", "")
    vram_profile, config = typed.pop("vram_profile", ""), typed.pop("config", None)
    plain, yes = typed.pop("plain", namespace.plain), typed.pop("yes", namespace.yes)
    dry_run = typed.pop("dry_run", "")
    options = options_for(command)
    values = {}
    for name, value in typed.items():
        o = options[name]
        if value is None or (value == [] and not o.flag.startswith("-")):
            continue  # a word that may be left out, and was
        if isinstance(value, list) and splits_at_commas(o):
            value = [part for word in value for part in word.split(",") if part]
        values[name] = value
    return Call(command, values, preprocess, preset, config, vram_profile, plain, yes, dry_run)


def configs_of(call: Call, preset: Mapping[str, Any]) -> list[Any]:
    """The configs that a call asks for, in the order in which they run. What was typed wins, over rank maps too.

    Raises UserError where something is missing, out of range, or typed for a mode that was not asked for.
    """
    first = PreprocessConfig if call.preprocess else COMMANDS[call.command].config
    if not call.preprocess and (astray := _flags_without(call, first)):
        raise UserError(
            f"{', '.join(astray)}: only for preprocessing, which was not asked for.",
            "Add --preprocess to turn audio into training tensors.",
        )
    configs: list[Any] = [resolve(first, _settings_of(first, preset), _settings_of(first, call.typed))]
    if call.preprocess and "output_dir" in call.typed:
        layers = ({"dataset_dir": configs[0].tensor_output}, preset, call.typed)
        configs.append(resolve(TrainConfig, *(_settings_of(TrainConfig, layer) for layer in layers)))
    if isinstance(then := configs[-1], TrainConfig) and _typed_beside_map(call, then):
        configs[-1] = replace(then, ignore_rank_map=True)
    return configs


def notes_of(call: Call, configs: list[Any], preset: Mapping[str, Any]) -> list[Event]:
    """What a user should know of how a call was read: what follows from what was typed, flags without use."""
    notes: list[Event] = []
    if call.preprocess and len(configs) == 1:
        if unused := ", ".join(_flags_without(call, PreprocessConfig)):
            advice = "for training only, so not used here. Add --output-dir to train after preprocessing."
            notes.append(Notice(message=f"{unused}: {advice}"))
    elif call.preprocess:
        notes.append(Notice(message="Preprocessing first, then training."))
        tensors, dataset = configs[0].tensor_output, configs[1].dataset_dir
        words = f"Training reads --dataset-dir {tensors}, where the tensors go."
        if dataset != tensors:
            words = f"Tensors go to --tensor-output {tensors}, but training reads --dataset-dir {dataset}."
        notes.append(Notice(message=words))
    config = configs[-1]
    options, answers = options_of(type(config)), vars(config)
    for name, o in options.items():
        value = getattr(config, name)
        if name in call.typed and not matters(o, answers, options):
            wanted, *values = o.when
            what = " or ".join(as_word(v) for v in values if v is not True)
            where = f"{options[wanted].flag} {what}".rstrip()
            notes.append(Notice(message=f"{o.flag} is not used: it is for {where}.", level="warning"))
        if o.follows and name not in call.typed and value != preset.get(name, o.default):
            flags = " ".join(options[other].flag for other in o.follows if other in call.typed)
            reason = f"follows {flags or 'the preset'}; {o.flag} sets it"
            notes.append(Decision(what=o.flag.removeprefix("--"), value=as_typed(value), reason=reason))
    if isinstance(config, TrainConfig) and (flags := _typed_beside_map(call, config)):
        path = config.dataset_dir / RANK_MAP
        notes.append(Notice(message=f"{flags} goes before {path}, which is not used; --no-ignore-rank-map uses it."))
    return notes


def _settings_of(config_class: type, layer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if name in options_of(config_class)}


def _flags_without(call: Call, config_class: type) -> list[str]:
    """The flags typed that are no settings of a config class."""
    options, known = options_for(call.command), options_of(config_class)
    return [options[name].flag for name in call.typed if name not in known]


def _typed_beside_map(call: Call, config: TrainConfig) -> str:
    """The typed flags that a rank map beside the data would overrule, unless it was said what to do with it."""
    if "ignore_rank_map" in call.typed or not (config.dataset_dir / RANK_MAP).is_file():
        return ""
    return ", ".join(options_of(TrainConfig)[name].flag for name in SET_BY_RANK_MAP if name in call.typed)


def options_for(command: str) -> dict[str, Option]:
    """Every setting that a command takes, by name; `fixed` takes those of preprocessing too, for `--preprocess`."""
    command = SPELLINGS[command]
    options = options_of(COMMANDS[command].config)
    return options if command != "fixed" else options | options_of(PreprocessConfig) | options


def command_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command, by any of its spellings; its namespace holds only what is typed."""
    options, name = options_for(command), SPELLINGS[command]

    def needed(config_class: type) -> str:
        required = [o for o in options_of(config_class).values() if o.required]
        words = [
            f"{o.flag} {METAVARS.get(o.type, 'PATH')}" if o.flag.startswith("-") else o.flag.upper() for o in required
        ]
        return " ".join([*words, "[FLAGS]"])

    prog = f"{PROGRAM[-1]} {command}"
    usage = f"{prog} {needed(COMMANDS[name].config)}"
    if name == "fixed":
        usage += f"\n       {prog} --preprocess --audio-dir PATH {needed(PreprocessConfig)}"
    others = [other for other in (name, *COMMANDS[name].spellings) if other != command]
    also = f" Also spelled: {', '.join(others)}." if others else ""
    parser = _Parser(prog, usage=usage, description=f"{COMMANDS[name].help}.{also}")
    parser.add_argument("--plain", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--yes", "-y", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    help = "say what would be read and written, how long it takes and how much memory; write nothing"
    parser.add_argument(
        "--dry-run", action="store_const", const="table", dest="dry_run", default=argparse.SUPPRESS, help=help
    )
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--dry-run-as-json", action="store_const", const="json", dest="dry_run", **hidden)
    if name == "fixed":
        help = "turn audio into training tensors; with --output-dir too, train on them afterwards"
        parser.add_argument("--preprocess", action="store_true", default=argparse.SUPPRESS, help=help)
    if name in COMMANDS_WITH_PRESETS:
        help = f"start from a preset (see: {PROGRAM[-1]} presets list); typed flags win"
        parser.add_argument("--preset", metavar="NAME", default=argparse.SUPPRESS, help=help)
        help = "start from the settings of a run: its config.json; folders for results are not taken; typed flags win"
        parser.add_argument("--config", metavar="FILE", type=Path, default=argparse.SUPPRESS, help=help)
        help = "start from the preset for this GPU (auto), or for a card of that kind; typed flags win"
        parser.add_argument("--vram-profile", choices=("auto", *PROFILES), default=argparse.SUPPRESS, help=help)
    groups: dict[str, Any] = {}
    for setting, o in options.items():
        if o.group not in groups:
            groups[o.group] = parser.add_argument_group(o.group)
        _add(groups[o.group], setting, o)
    return parser


def _add(group: Any, name: str, o: Option) -> None:
    positional = not o.flag.startswith("-")
    default = as_typed(o.default)
    note = " (required)" if o.required else f" (default: {default})" if default not in ("-", "none") else ""
    text = o.help + ("" if positional and not o.required and note == " (default: .)" else note)
    text += f"; {o.plain}" if o.plain else ""
    if o.type is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(*o.flags, dest=name, action=action, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
        return
    few = o.choices and not o.many and len(" ".join(o.choices)) < 40
    if o.choices and not few and not positional:
        text += f" ({'any' if o.many else 'one'} of {', '.join(o.choices)})"
    metavar = "{" + ",".join(o.choices) + "}" if few else METAVARS.get(o.type, "PATH")
    text = text.replace("%", "%%")
    if positional:
        nargs = "*" if o.many else None if o.required else "?"
        group.add_argument(name, metavar=o.flag.upper(), nargs=nargs, help=text)
    else:
        many: dict[str, Any] = {"nargs": "*", "action": "extend"} if o.many else {}  # typed twice: both
        many |= {"nargs": "?", "const": o.bare} if o.bare else {}
        group.add_argument(*o.flags, dest=name, metavar=metavar, default=argparse.SUPPRESS, help=text, **many)
        if o.bare:
            off: dict[str, Any] = {"action": "store_const", "const": o.choices[0], "help": argparse.SUPPRESS}
            group.add_argument("--no-" + o.flag.removeprefix("--"), dest=name, default=argparse.SUPPRESS, **off)


def global_parser(with_command: bool = True) -> argparse.ArgumentParser:
    """The parser of the words before and including the command; its help is that of the program itself."""
    names = {name: ", ".join([name, *command.spellings]) for name, command in COMMANDS.items()}
    width = max(map(len, names.values()))
    commands = "\n".join(f"  {names[name]:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = _Parser(
        PROGRAM[-1],
        usage=f"{PROGRAM[-1]} [--plain] [--yes] [--version] [COMMAND ...]",
        description="Side-Step: train adapters for ACE-Step 1.5.\nWithout a command, in a terminal, the wizard starts.",
        epilog=f"commands:\n{commands}\n\n{PROGRAM[-1]} COMMAND --help lists the flags of a command.",
    )
    plain = "plain text only: no colours, no live view, numbered questions"
    parser.add_argument("--plain", action="store_true", help=plain)
    parser.add_argument("--yes", "-y", action="store_true", help="ask for no confirmation")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of Side-Step and PyTorch")
    if with_command:
        parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
        parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def profile_of(call: Call) -> tuple[str, str]:
    """(preset, why) for a call with `--vram-profile`. Raises UserError where there is nothing to choose by."""
    if call.preset:
        raise UserError(
            f"--preset {call.preset} and --vram-profile {call.vram_profile} are both given.", "Leave one of them away."
        )
    variant = call.typed.get("model_variant", "turbo")
    is_xl = variant.startswith("xl-")
    if variant not in OFFICIAL_FOLDERS and "checkpoint_dir" in call.typed:
        models = find_models(call.typed["checkpoint_dir"])
        is_xl = any(model.name == variant and model.variant.startswith("xl-") for model in models)
    if call.vram_profile != "auto":
        return profile_for(PROFILES[call.vram_profile], is_xl), "asked for"
    gib, card = options_of(PlanConfig)["vram"].check(call.typed.get("vram")), "--vram"
    if not gib:
        from sidestep.acestep.device import GIB, choose_device, gpu_memory

        device = gpu_memory(choose_device(call.typed.get("device", "auto")).value)
        if device is None:
            raise UserError(
                "--vram-profile auto: no GPU was found here.", f"Name a profile: --vram-profile {'|'.join(PROFILES)}"
            )
        gib, card = device.bytes / GIB, device.source
    return profile_for(gib, is_xl), f"{card} has {gib:.0f} GiB"
