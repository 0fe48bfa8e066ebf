"""A setting is declared once; what the wizard asks, when and with which suggestion derives from that."""

from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

from sidestep.errors import UserError
from sidestep.settings.config import COMMANDS, TrainConfig
from sidestep.settings.option import matters, option, options_of, same_as
from sidestep.settings.path_checks import CONTENTS
from sidestep.wizard.flows import FLOWS, Context, questions_of
from sidestep.wizard.questionnaire import from_option

ALL = {(name, o.name): o for name, command in COMMANDS.items() for o in options_of(command.config).values()}


@dataclass(frozen=True, kw_only=True)
class Garden:
    """Settings of no command."""

    water: bool = option(False, "water at night", group="Garden")
    hours: int = option(
        2,
        "hours of water",
        group="Garden",
        label="How long",
        plain="how long it rains",
        when=("water", True),
        minimum=1,
    )
    seeds: Path = option(MISSING, "folder of seeds", group="Garden", holds="songs")
    name: str = option("", "what it is called", group="Garden")


def test_the_question_says_what_the_declaration_says():
    question = from_option(options_of(Garden)["hours"], lambda answers: 3)
    prompt = question.asked({}, 3)
    assert (prompt.text, prompt.help, prompt.kind, prompt.section) == (
        "How long",
        "how long it rains",
        "text",
        "Garden",
    )
    assert prompt.read(" 4 ") == 4
    assert question.depends_on == ("water",)


@pytest.mark.parametrize(("answers", "asked"), [({}, False), ({"water": False}, False), ({"water": True}, True)])
def test_a_setting_is_asked_when_it_matters_and_what_was_not_answered_has_its_default(answers, asked):
    options = options_of(Garden)
    assert matters(options["hours"], answers, options) == asked
    assert matters(options["water"], answers, options)


def test_a_setting_of_another_config_may_be_taken_over_with_changes():
    @dataclass(frozen=True, kw_only=True)
    class Park:
        hours: int = same_as(Garden, "hours", default=5, when=())

    o = options_of(Park)["hours"]
    assert (Park().hours, o.default, o.help, o.flag, o.when) == (5, 5, "hours of water", "--hours", ())


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("seeds", "", "is empty"),
        ("seeds", "  ", "is empty"),
        ("hours", "1e23", "a whole number"),
        ("hours", 1e23, "at most 1000000000"),
        ("hours", 10**400, "at most 1000000000"),
        ("hours", "9" * 5000, "a whole number"),
        ("hours", float("nan"), "a whole number"),
        ("name", "caf\udce9", "no text"),
    ],
)
def test_what_no_program_can_mean_is_refused_with_the_flag(name, value, problem):
    with pytest.raises(UserError, match=problem) as refused:
        options_of(Garden)[name].check(value)
    assert refused.value.problem.startswith(f"--{name} ")
    refused.value.problem.encode("utf-8")


def test_a_tilde_without_a_home_is_refused(monkeypatch):
    def nobody(_path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(UserError, match="there is no home folder"):
        options_of(Garden)["seeds"].check("~/music")


NUMBERS = {key: o for key, o in ALL.items() if o.type in (int, float)}
ABSURD = ("nan", "inf", "-inf", "1e23", "-1e23", "1e400", str(10**30), "9" * 5000, 1e23, 10**400, float("nan"))


@pytest.mark.parametrize("o", NUMBERS.values(), ids=map("-".join, NUMBERS))
def test_no_number_takes_what_no_run_can_mean(o):
    for value in ABSURD:
        with pytest.raises(UserError) as refused:
            o.check([value] if o.many else value)
        assert refused.value.problem.startswith(o.flag)
        assert "\n" not in refused.value.problem
    for bound, beyond in ((o.minimum, -1), (o.maximum, 1)):
        if bound is not None:
            assert o.check([bound] if o.many else bound) == ((bound,) if o.many else bound)
            with pytest.raises(UserError):
                o.check([bound + beyond] if o.many else bound + beyond)


@pytest.mark.parametrize("o", ALL.values(), ids=map("-".join, ALL))
def test_a_declaration_names_only_what_there_is(o):
    names = {other.name for other in ALL.values()} | {"songs", "run", "preset"}  # which the wizard asks itself
    assert not o.holds or (o.holds in CONTENTS and o.type is Path)
    assert set(o.depends_on) | set(o.when[:1]) <= names
    if o.when:
        conditions = [options_of(c.config).get(o.when[0]) for c in COMMANDS.values()]
        assert any(all(c.check(value) == value for value in o.when[1:]) for c in conditions if c)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=lambda flow: flow.key)
def test_every_basic_question_has_plain_words(flow):
    options = options_of(flow.config_class)
    for question in questions_of(flow, Context()):
        plain = options[question.name].plain if question.name in options else question.help
        assert plain, question.name
        assert len(plain) <= 120
        assert "--" not in plain


@pytest.mark.parametrize(
    ("name", "answers", "suggested"),
    [
        ("alpha", {"rank": 16}, 32.0),
        ("alpha", {}, None),
        ("lr", {"optimizer_type": "prodigy"}, 1.0),
        ("lr", {"optimizer_type": "adamw"}, None),
        ("output_dir", {"dataset_dir": Path("tensors/waltz")}, Path("runs/waltz")),
        ("output_dir", {}, None),
    ],
)
def test_a_suggestion_follows_other_answers(name, answers, suggested, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options_of(TrainConfig)[name].suggest(answers) == suggested


def test_the_folder_of_a_new_run_is_one_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("waltz", "waltz-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert options_of(TrainConfig)["output_dir"].suggest({"dataset_dir": Path("waltz")}) == Path("runs/waltz-3")
