"""Words typed to configs."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.cli.parser import command_parser, configs_of, notes_of, options_for, parse
from sidestep.errors import UserError
from sidestep.settings.config import COMMANDS, PreprocessConfig, TrainConfig, command_line, command_words
from sidestep.settings.option import options_of, resolve
from sidestep.terminal.terminal import as_lines

TRAIN = "fixed --checkpoint-dir c --dataset-dir d --output-dir o"
SONGS = "--audio-dir a --tensor-output t --checkpoint-dir c"
PREPROCESS = "fixed --preprocess --audio-dir a --tensor-output t --checkpoint-dir c"


def configs(line: str, **preset) -> list:
    return configs_of(parse(shlex.split(line)), preset)


def notes(line: str, **preset) -> list[str]:
    call = parse(shlex.split(line))
    return [" ".join(as_lines(event)) for event in notes_of(call, configs_of(call, preset), preset)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{TRAIN} --lokr-factor 4", "--lokr-factor is not used: it is for --adapter-type lokr."),
        (f"{TRAIN} --lokr-factor 4 --adapter-type lokr", ""),
        (f"{TRAIN} --snr-gamma 1", "--snr-gamma is not used: it is for --loss-weighting min_snr."),
        (f"{TRAIN} --timestep-mu 0.1", ""),
        (
            f"{TRAIN} --timestep-mu 0.1 --timestep-mode discrete",
            "--timestep-mu is not used: it is for --timestep-mode auto or logit-normal.",
        ),
        ("sample --checkpoint-dir c --prompt x --lm-temperature 1", "--lm-temperature is not used: it is for --think."),
        ("sample --checkpoint-dir c --prompt x --lm-temperature 1 --think", ""),
        ("build-dataset --input a --device cpu", "--device is not used: it is for --caption lm."),
    ],
)
def test_a_flag_that_does_nothing_beside_the_others_is_named(line, said):
    assert [note for note in notes(line) if "not used" in note] == ([f"warning: {said}"] if said else [])


def test_what_a_preset_or_a_run_brings_along_is_not_named(tmp_path):
    assert not [note for note in notes(TRAIN, lokr_factor=4) if "not used" in note]


def test_the_namespace_holds_only_what_was_typed():
    assert parse(shlex.split("fixed --rank 8 --no-gradient-checkpointing")).typed == {
        "rank": "8",
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize("line", ["--plain -y fixed --rank 8", "fixed --rank 8 --plain --yes"])
def test_global_flags_stand_before_the_command_and_are_understood_after_it(line):
    call = parse(shlex.split(line))
    assert (call.plain, call.yes, call.typed) == (True, True, {"rank": "8"})


def test_typed_flag_wins_over_preset_and_preset_over_default():
    config = configs(f"{TRAIN} --rank 8", rank=32, alpha=32.0)[0]
    assert (config.rank, config.alpha, config.epochs) == (8, 16.0, 100)


def test_preprocess_asks_neither_for_a_dataset_nor_for_an_output_folder():
    assert [type(c) for c in configs(PREPROCESS)] == [PreprocessConfig]


@pytest.mark.parametrize("typed", [f"preprocess {SONGS}", f"fixed --preprocess {SONGS}", f"train --preprocess {SONGS}"])
def test_preprocessing_has_a_command_and_stays_a_mode_of_training(typed):
    [config] = configs(f"{typed} --normalize peak", normalize="lufs", max_duration=30.0)
    assert (type(config), config.normalize, config.max_duration) == (PreprocessConfig, "peak", 30.0)
    assert command_words(config)[0] == "preprocess"


def test_train_is_another_spelling_of_fixed():
    train = TRAIN.replace("fixed", "train")
    assert parse(shlex.split(train)) == parse(shlex.split(TRAIN))
    assert configs(train, rank=8) == configs(TRAIN, rank=8)
    assert command_words(configs(train)[0])[0] == "fixed"
    assert command_parser("train").format_usage().startswith("usage: train.py train --checkpoint-dir PATH")


def test_preprocess_with_an_output_folder_trains_afterwards_on_the_tensors_it_makes():
    call = parse(shlex.split(f"{PREPROCESS} --output-dir o --rank 8"))
    first, then = configs_of(call, {})
    assert (type(first), type(then), then.dataset_dir, then.rank) == (PreprocessConfig, TrainConfig, Path("t"), 8)
    assert "Training reads --dataset-dir t" in " ".join(notes(f"{PREPROCESS} --output-dir o --rank 8"))


def test_a_dataset_folder_typed_beside_another_tensor_output_is_kept_and_pointed_out():
    call = parse(shlex.split(f"{PREPROCESS} --output-dir o --dataset-dir d"))
    assert configs_of(call, {})[1].dataset_dir == Path("d")
    assert "but training reads --dataset-dir d" in " ".join(notes(f"{PREPROCESS} --output-dir o --dataset-dir d"))


def test_training_flags_typed_for_preprocessing_alone_are_named_as_unused():
    assert "--rank: for training only" in notes(f"{PREPROCESS} --rank 8")[0]


@pytest.mark.parametrize(
    ("line", "problem", "fix"),
    [
        ("fixd", "Unknown command: fixd.", "Did you mean fixed?"),
        ("zzz", "Unknown command: zzz.", "Commands: fixed,"),
        ("fixed --rnak 8", "no flag --rnak", "--rank"),
        ("trian --rank 8", "Unknown command: trian.", "Did you mean train or train-lm?"),
        ("train --rnak 8", "train has no flag --rnak", "--rank"),
        (
            f"preprocess {SONGS} --output-dir o",
            "preprocess has no flag --output-dir",
            "--output-dir is a flag of fixed",
        ),
        (
            "preprocess --tensor-output t --checkpoint-dir c",
            "neither --audio-dir nor --dataset-json",
            "Add --audio-dir",
        ),
        ("fixed --input x", "no flag --input", "--input is a flag of build-dataset."),
        ("fixed --zzzzzz", "no flag --zzzzzz", "train.py fixed --help"),
        ("fixed stray", "does not know what to do with: stray", "train.py fixed --help"),
        ("fixed --rank", "expected one argument", "train.py fixed --help"),
        (f"{TRAIN} --rank abc", "--rank abc: must be a whole number", ""),
        (f"{TRAIN} --rank 0", "--rank 0: must be at least 1", ""),
        (f"{TRAIN} --lr nan", "--lr nan: must be a finite number", ""),
        (f"{TRAIN} --optimizer-type sgd", "--optimizer-type sgd: must be one of adamw", ""),
        ("fixed --dataset-dir d", "Missing: --checkpoint-dir, --output-dir", "--checkpoint-dir: folder"),
        (f"{TRAIN} --audio-dir a", "--audio-dir: only for preprocessing", "Add --preprocess"),
        ("fixed --preprocess --audio-dir a --tensor-output t", "Missing: --checkpoint-dir.", ""),
        (
            "fixed --preprocess --tensor-output t --checkpoint-dir c",
            "neither --audio-dir nor --dataset-json",
            "Add --audio-dir",
        ),
    ],
)
def test_a_wrong_call_names_what_is_wrong_and_what_helps(line, problem, fix):
    with pytest.raises(UserError) as raised:
        configs(line)
    assert problem in raised.value.problem
    assert fix in raised.value.fix
    assert raised.value.status == 2


def test_flags_are_never_abbreviated():
    with pytest.raises(UserError):
        parse(["fixed", "--epoch", "3"])


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("--target-modules q_proj,v_proj", ("q_proj", "v_proj")),
        ("--target-modules q_proj v_proj", ("q_proj", "v_proj")),
    ],
)
def test_lists_of_choices_take_commas_and_spaces(typed, value):
    assert configs(f"{TRAIN} {typed}")[0].target_modules == value


def test_names_and_files_in_a_list_may_hold_commas():
    assert configs("export a --output o --add 'b, c:0.5'")[0].add == ("b, c:0.5",)


def test_a_list_of_strengths_takes_commas():
    assert configs("sample --checkpoint-dir c --prompt p --strength 0,0.5,1")[0].strength == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_a_command_is_a_flag_of_it_with_its_help(command):
    help = " ".join(command_parser(command).format_help().split())
    for o in options_for(command).values():
        assert o.flag in help or o.flag.upper() in help
        assert " ".join(o.help.split())[:40] in help.replace("- ", "-") or o.help.split()[0] in help


def _values(option):
    if option.choices:
        one = st.sampled_from(option.choices)
    else:
        low = (
            option.minimum if option.minimum is not None else option.above + 1e-3 if option.above is not None else -100
        )
        high = option.maximum if option.maximum is not None else max(low, 0) + 1000
        known = st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp"))
        never = (
            "~" if option.type is Path or option.flag.startswith("-") else "~-"
        )  # a word alone with a dash is a flag
        text = st.text(known, min_size=1, max_size=12).filter(lambda t: t.strip() and t[0] not in never)
        one = {
            int: st.integers(int(low), int(high)),
            float: st.floats(low, high),
            str: text,
            Path: text.map(Path),
            bool: st.booleans(),
        }[option.type]
    return st.lists(one, max_size=4).map(tuple) if option.many else st.none() | one if option.optional else one


@pytest.mark.parametrize(
    "config_class",
    [command.config for command in COMMANDS.values()],
)
def test_any_config_comes_back_from_its_command_line(config_class):
    options = options_of(config_class)
    some = st.fixed_dictionaries(
        {name: _values(o) for name, o in options.items() if o.required},
        optional={name: _values(o) for name, o in options.items() if not o.required},
    )

    @settings(max_examples=40, deadline=None)
    @given(some)
    def check(values):
        try:
            config = resolve(config_class, values)
        except UserError:
            return  # settings that contradict each other have no command line
        assert configs_of(parse(command_words(config)), {}) == [config]
        assert parse(shlex.split(command_line(config))[3:]) == parse(command_words(config))

    check()


@pytest.mark.parametrize(
    "line",
    ["fixed --checkpoint-dir c --dataset-dir d --output-dir o", "estimate --checkpoint-dir c --dataset-dir d", "plan"],
)
def test_a_rank_beyond_every_layer_is_refused_with_the_most_there_is(line):
    with pytest.raises(UserError, match="--rank 100000: must be at most 4096"):
        configs_of(parse([*line.split(), "--rank", "100000"]), {})
