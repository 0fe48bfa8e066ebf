"""`completion`: the script with which a shell completes the commands, flags, choices and files of `side-step`."""

import argparse
from pathlib import Path

import shtab

from sidestep.cli.parser import command_parser, global_parser, options_for
from sidestep.events import Report
from sidestep.settings.config import COMMANDS, SPELLINGS, CompletionConfig


def completion(config: CompletionConfig, report: Report) -> str:  # noqa: ARG001  as every command is called
    """The script for a shell."""
    parser = argparse.ArgumentParser("side-step", parents=[global_parser(with_command=False)], add_help=False)
    commands = parser.add_subparsers()
    for name, command in SPELLINGS.items():
        one = commands.add_parser(name, parents=[command_parser(name)], add_help=False, help=COMMANDS[command].help)
        options = options_for(name)
        for action in one._actions:
            option = options.get(action.dest)
            if option and option.choices:
                action.choices = option.choices
            elif option and option.type is Path:
                action.complete = shtab.FILE  # pyrefly: ignore[missing-attribute]  shtab looks for it
    return shtab.complete(parser, config.shell)
