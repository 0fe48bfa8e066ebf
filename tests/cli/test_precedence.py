"""Typed goes before preset and rank map, preset before default; what follows another setting says so."""

import itertools
import shlex

import pytest

from sidestep.cli.main import main
from sidestep.cli.parser import configs_of, notes_of, parse
from sidestep.errors import ExitStatus, UserError
from sidestep.settings.config import COMMANDS, RANK_MAP, SET_BY_RANK_MAP, TrainConfig, command_of, command_words
from sidestep.settings.option import as_arguments, options_of, resolve
from sidestep.settings.presets import preset_options
from sidestep.terminal.terminal import as_lines

TRAIN = "fixed --checkpoint-dir c --dataset-dir d --output-dir o"
OPTIONS = options_of(TrainConfig)
IN_PRESETS = [name for name in OPTIONS if name in preset_options()]
FOLDERS = {"checkpoint_dir": "c", "dataset_dir": "d", "output_dir": "o"}


def read(line: str, **preset) -> TrainConfig:
    return configs_of(parse(shlex.split(line)), preset)[0]


def said(line: str, **preset) -> str:
    call = parse(shlex.split(line))
    return "\n".join("\n".join(as_lines(event)) for event in notes_of(call, configs_of(call, preset), preset))


def two_values(name: str) -> tuple:
    """Two values of a setting, the first one not its default, that no other setting forbids."""
    o = OPTIONS[name]
    if o.type is bool:
        return not o.default, o.default
    if o.choices:
        values = [(choice,) if o.many else choice for choice in o.choices]
    elif o.type is str:
        values = [(word,) if o.many else word for word in ("one", "two")]
    else:
        low = max(o.minimum or 0, o.above or 0) + (o.maximum or 8) / 8
        values = [o.type(low), o.type(low + (o.maximum or 8) / 4)]
    return tuple(sorted(values, key=lambda value: value == o.default))[:2]


@pytest.mark.parametrize("name", IN_PRESETS)
def test_of_last_used_preset_and_typed_the_later_one_wins_for_every_setting(name):
    first, second = two_values(name)
    values = (first, second, first)
    for given in itertools.product((True, False), repeat=3):
        layers = [{name: value} if there else {} for value, there in zip(values, given, strict=True)]
        last = [value for value, there in zip(values, given, strict=True) if there][-1:]
        assert getattr(resolve(TrainConfig, FOLDERS, *layers), name) == (last or [OPTIONS[name].default])[0]


FOLLOWS = [  # (preset, typed, what comes of it)
    ({}, "--rank 8", {"rank": 8, "alpha": 16}),
    ({}, "--rank 8 --alpha 128", {"rank": 8, "alpha": 128}),
    ({}, "--alpha 32", {"rank": 64, "alpha": 32}),
    ({"rank": 32}, "", {"rank": 32, "alpha": 64}),
    ({"rank": 32, "alpha": 32}, "", {"rank": 32, "alpha": 32}),
    ({"rank": 32, "alpha": 32}, "--rank 32", {"rank": 32, "alpha": 32}),
    ({"rank": 32, "alpha": 32}, "--rank 16", {"rank": 16, "alpha": 32.0}),
    ({"rank": 32, "alpha": 32}, "--rank 64", {"rank": 64, "alpha": 128}),
    ({"rank": 32, "alpha": 32}, "--alpha 8", {"rank": 32, "alpha": 8}),
    ({"alpha": 32}, "--rank 8", {"rank": 8, "alpha": 16}),
    ({}, "--optimizer-type prodigy", {"lr": 1.0}),
    ({}, "--optimizer-type prodigy --lr 0.5", {"lr": 0.5}),
    ({}, "--optimizer-type adamw", {"lr": 1e-4}),
    ({"lr": 5e-5}, "--optimizer-type prodigy", {"lr": 1.0}),
    ({"lr": 5e-5}, "--optimizer-type adamw", {"lr": 5e-5}),
    ({"optimizer_type": "prodigy"}, "", {"lr": 1.0}),
    ({"optimizer_type": "prodigy"}, "--optimizer-type adamw", {"lr": 1e-4}),
    ({"optimizer_type": "prodigy", "lr": 2.0}, "--optimizer-type adamw8bit", {"lr": 1e-4}),
    ({"optimizer_type": "prodigy", "lr": 2.0}, "--lr 0.7", {"lr": 0.7}),
    ({"self_target_modules": ["q_proj"]}, "--target-modules v_proj", {"self_target_modules": None}),
    ({"cross_target_modules": ["q_proj"]}, "--target-modules v_proj", {"cross_target_modules": None}),
    ({"cross_target_modules": ["q_proj"]}, "--rank 8", {"cross_target_modules": ("q_proj",)}),
    ({"recompute_as_needed": True}, "--recompute-layers 3", {"recompute_as_needed": False, "recompute_layers": 3}),
    ({"recompute_as_needed": True}, "--swap-blocks 2", {"recompute_as_needed": False, "swap_blocks": 2}),
    ({"recompute_as_needed": True}, "--no-gradient-checkpointing", {"recompute_as_needed": False}),
    ({"recompute_as_needed": True}, "--rank 8", {"recompute_as_needed": True}),
]


@pytest.mark.parametrize(("preset", "typed", "expected"), FOLLOWS)
def test_a_setting_follows_another_until_it_is_given_beside_or_after_it(preset, typed, expected):
    config = read(f"{TRAIN} {typed}", **preset)
    assert {name: getattr(config, name) for name in expected} == expected
    assert configs_of(parse(command_words(config)), {}) == [config]  # and its own command says so again


@pytest.mark.parametrize(("rank", "alpha"), itertools.product((None, 8, 64), (None, 16.0, 128.0, 7.0)))
def test_the_command_of_a_run_has_its_rank_and_alpha_whoever_set_them(rank, alpha):
    preset = {name: value for name, value in (("rank", rank), ("alpha", alpha)) if value is not None}
    config = read(TRAIN, **preset)
    assert (config.rank, config.alpha) == (rank or 64, alpha or 2.0 * (rank or 64))
    assert configs_of(parse(command_words(config)), {}) == [config]


@pytest.mark.parametrize(
    ("preset", "typed", "line"),
    [
        ({}, "--rank 8", "alpha: 16.0 (follows --rank; --alpha sets it)"),
        ({"rank": 32, "alpha": 64.0}, "--rank 64", "alpha: 128.0 (follows --rank; --alpha sets it)"),
        ({"optimizer_type": "prodigy"}, "", "lr: 1.0 (follows the preset; --lr sets it)"),
        ({}, "--optimizer-type prodigy", "lr: 1.0 (follows --optimizer-type; --lr sets it)"),
        ({}, "--rank 64", ""),
        ({}, "--rank 8 --alpha 8", ""),
        ({"rank": 32, "alpha": 32.0}, "", ""),
    ],
)
def test_what_follows_is_said(preset, typed, line):
    assert said(f"{TRAIN} {typed}", **preset) == line


@pytest.mark.parametrize(
    ("typed", "in_a_file", "expected"),
    [
        ("", {}, "off"),
        ("--compile", {}, "on"),
        ("--compile --rank 8", {}, "on"),
        ("--compile auto", {}, "auto"),
        ("--compile=off", {"compile": "on"}, "off"),
        ("--no-compile", {"compile": "auto"}, "off"),
        ("", {"compile": True}, "on"),  # as runs and presets of before it had choices say it
        ("", {"compile": False}, "off"),
    ],
)
def test_compile_is_a_choice_and_still_a_switch(typed, in_a_file, expected):
    config = read(f"{TRAIN} {typed}", **in_a_file)
    assert config.compile == expected
    assert read(shlex.join(["fixed", *as_arguments(config)])) == config


def test_estimate_follows_its_rank_too():
    [config] = configs_of(parse(shlex.split("estimate --checkpoint-dir c --dataset-dir d --rank 16")), {})
    assert config.alpha == 32


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """A folder of tensors with a rank map."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / RANK_MAP).write_text("{}", encoding="utf-8")


BESIDE_MAP = [
    ("", {}, False),
    ("--rank 8", {}, True),
    ("--rank 64", {}, True),
    ("--alpha 64", {}, False),
    ("--target-mlp", {}, True),
    ("--target-modules v_proj", {}, True),
    ("--rank 8 --no-ignore-rank-map", {}, False),
    ("--ignore-rank-map", {}, True),
    ("", {"rank": 32}, False),
    ("", {"rank": 32, "ignore_rank_map": True}, True),
    ("--rank 8", {"ignore_rank_map": False}, True),
    ("--no-ignore-rank-map", {"ignore_rank_map": True}, False),
]


@pytest.mark.parametrize(("typed", "preset", "ignored"), BESIDE_MAP)
def test_what_is_typed_goes_before_a_rank_map_and_a_preset_does_not(mapped, typed, preset, ignored):
    config = read(f"{TRAIN} {typed}", **preset)
    assert config.ignore_rank_map == ignored
    assert configs_of(parse(command_words(config)), {}) == [config]


@pytest.mark.parametrize("name", SET_BY_RANK_MAP)
def test_a_flag_that_goes_before_a_rank_map_is_said_with_the_name_of_the_map(mapped, name):
    value = two_values(name)[0]
    words = "" if value is True else " ".join(value) if isinstance(value, tuple) else value
    lines = said(f"{TRAIN} {OPTIONS[name].flag} {words}")
    assert f"{OPTIONS[name].flag} goes before d/{RANK_MAP}, which is not used" in lines


def test_without_a_map_nothing_is_said_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not read(f"{TRAIN} --rank 8").ignore_rank_map
    assert "map" not in said(f"{TRAIN} --rank 8")


def test_the_run_itself_gets_what_was_typed_and_the_lines_are_shown(mapped, monkeypatch, capsys):
    from sidestep.cli import commands

    seen = []
    monkeypatch.setattr("sidestep.cli.main.check_folders", lambda config: None)  # its folders are not there
    monkeypatch.setattr(commands, "train", lambda config, report: seen.append(config))
    assert COMMANDS[command_of(TrainConfig)].run == "cli.commands:train"
    assert main([*shlex.split(TRAIN), "--rank", "8", "--preset", "recommended"]) == ExitStatus.OK
    assert (seen[0].rank, seen[0].alpha, seen[0].ignore_rank_map) == (8, 16.0, True)
    shown = capsys.readouterr().out
    assert "alpha: 16.0 (follows --rank; --alpha sets it)" in shown
    assert f"--rank goes before d/{RANK_MAP}" in shown


def test_contradictions_that_were_both_typed_stay_errors():
    with pytest.raises(UserError, match="both given"):
        read(f"{TRAIN} --recompute-as-needed --swap-blocks 2")
