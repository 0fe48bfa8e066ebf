"""The wizard with scripted answers: the path through questions, its flows, its review, one step after another."""

import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.output.vt100 import Vt100_Output

from sidestep.data.records import index_records, save_record
from sidestep.errors import UserError
from sidestep.events import Table
from sidestep.settings import path_checks, presets
from sidestep.settings.advice import advise
from sidestep.settings.config import (
    COMMANDS,
    BuildDatasetConfig,
    CompareConfig,
    DemoConfig,
    PreprocessConfig,
    ScoreConfig,
    TrainConfig,
    TrainLmConfig,
    command_words,
)
from sidestep.settings.option import Choice, as_json_values, options_of
from sidestep.settings.path_checks import a_prompt_of
from sidestep.settings.presets import PROFILES
from sidestep.terminal.rich_terminal import RichTerminal
from sidestep.terminal.terminal import Terminal
from sidestep.wizard import flows
from sidestep.wizard.flows import COMPARED, FLOWS, Context, question_of, questions_of
from sidestep.wizard.numbered import NumberedAsk
from sidestep.wizard.prompts import QuestionaryAsk, asked
from sidestep.wizard.questionnaire import BACK, NEWS, Prompt, Question, Questionnaire
from sidestep.wizard.review import Knowledge, in_background
from sidestep.wizard.session import Outside, Wizard, results_of
from tests.training_world import record
from tests.wizard_world import CHECKPOINTS, Screen, Script, World, welcomed


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    welcomed(tmp_path / "home")
    return World(tmp_path / "world")


def session(world, **replies) -> tuple[Wizard, Script, Screen]:
    script, screen = Script(replies), Screen()
    return Wizard(script, screen, world.outside()), script, screen


def question(name, **more):
    return Question(name, name, **{"default": lambda answers: f"{name}?", **more})


# The path


def test_answers_come_in_order_and_questions_without_a_reason_are_left_out():
    path = Questionnaire([question("a"), question("b", when=lambda answers: answers.get("a") == "yes"), question("c")])
    assert path.forward(Script({"a": "no"})) == {"a": "no", "c": "c?"}


def test_a_step_back_offers_the_earlier_reply_again():
    script = Script({"a": ["one", lambda prompt: prompt.default], "b": [BACK, "two"]})
    assert Questionnaire([question("a"), question("b")]).forward(script) == {"a": "one", "b": "two"}
    assert [(p.name, p.default) for p in script.asked] == [("a", "a?"), ("b", "b?"), ("a", "one"), ("b", "b?")]


def test_a_step_back_over_the_first_question_leaves():
    assert Questionnaire([question("a")]).forward(Script({"a": BACK})) is None


def test_a_changed_choice_drops_the_replies_that_depended_on_it_and_those_that_depended_on_them():
    script = Script(
        {
            "a": ["x", "y"],
            "c": ["three", BACK, lambda p: p.default],
            "b": ["two", BACK, lambda p: p.default],
            "d": [BACK, "end"],
        }
    )
    path = Questionnaire(
        [question("a"), question("b", depends_on=("a",)), question("c", depends_on=("b",)), question("d")]
    )
    assert path.forward(script) == {"a": "y", "b": "b?", "c": "c?", "d": "end"}


def test_the_same_choice_again_drops_nothing():
    script = Script({"a": ["x", "x"], "b": ["two", BACK, lambda p: p.default], "c": [BACK, "end"]})
    assert Questionnaire([question("a"), question("b", depends_on=("a",)), question("c")]).forward(script) == {
        "a": "x",
        "b": "two",
        "c": "end",
    }


def test_a_reply_that_is_refused_is_asked_again_with_the_reason():
    def read(reply, answers):
        if reply == "bad":
            raise UserError("Not this one.", "Another.")
        return reply

    script = Script({"a": ["bad", "good"]})
    assert Questionnaire([question("a", read=read)]).forward(script) == {"a": "good"}
    assert script.asked[1].error == "Not this one. Another."


def test_the_step_counter_counts_what_will_be_asked():
    script = Script({"a": "yes"})
    Questionnaire(
        [question("a"), question("b", when=lambda answers: answers.get("a") == "yes"), question("c")], {"known": 1}
    ).forward(script)
    assert [(p.step, p.steps) for p in script.asked] == [(1, 2), (2, 3), (3, 3)]


def test_what_is_known_is_not_asked():
    assert Questionnaire([question("a"), question("b")], {"a": 1}).forward(Script({})) == {"a": 1, "b": "b?"}


# The flows

START = {
    "train": (TrainConfig, {"checkpoint_dir": str(CHECKPOINTS)}),
    "train-lm": (TrainLmConfig, {"checkpoint_dir": str(CHECKPOINTS)}),
    "plan": (COMMANDS["plan"].config, {}),
    "history": (COMMANDS["history"].config, {}),
    "doctor": (COMMANDS["doctor"].config, {}),
    "preprocess": (PreprocessConfig, {"checkpoint_dir": str(CHECKPOINTS)}),
    "build-dataset": (BuildDatasetConfig, {}),
    "resume": (TrainConfig, {}),
    "demo": (DemoConfig, {}),
    "estimate": (COMMANDS["estimate"].config, {"checkpoint_dir": str(CHECKPOINTS)}),
    "sample": (COMMANDS["sample"].config, {"checkpoint_dir": str(CHECKPOINTS), "prompt": "warm piano"}),
    "export": (COMMANDS["export"].config, {"output": "x"}),
    "score": (COMMANDS["score"].config, {}),
    "compare": (COMMANDS["compare"].config, {}),
}


def paths(world) -> dict[str, str]:
    return {
        name: world.path_for(name)
        for name in ("checkpoint_dir", "songs", "input", "dataset_dir", "adapter", "other_adapter", "run", "run_folder")
    }


@pytest.mark.parametrize("key", START)
def test_each_flow_ends_in_its_config(world, key):
    config_class, replies = START[key]
    wizard, _, _ = session(world, menu=key, **(paths(world) | replies))
    chosen = wizard.next()
    assert (chosen.flow, type(chosen.config), chosen.command) == (key, config_class, command_words(chosen.config)[0])


@pytest.mark.parametrize("key", START)
def test_back_from_every_question_of_every_flow_ends_in_the_menu_and_loses_nothing(world, key):
    _config_class, replies = START[key]
    wizard, script, _ = session(world, menu=key, **(paths(world) | replies))
    wizard.next()
    for stop in [name for name in script.names if name != "menu"]:
        table = paths(world) | replies | {"menu": [key, "exit"]}
        seen = []

        def ask(prompt, stop=stop, table=table, seen=seen):
            seen.append(prompt.name)
            if stop in seen[:-1] or prompt.name == stop:
                return BACK if prompt.name != "menu" else "exit"
            reply = table.get(prompt.name, prompt.default)
            return reply[0] if isinstance(reply, list) else reply

        assert Wizard(ask, Screen(), world.outside()).next() is None
        assert seen[-1] == "menu", f"stuck after going back from {stop}"


@pytest.mark.parametrize("key", START)
def test_ctrl_c_at_every_question_leaves(world, key):
    _config_class, replies = START[key]
    wizard, script, _ = session(world, menu=key, **(paths(world) | replies))
    wizard.next()

    def ctrl_c(prompt):
        raise KeyboardInterrupt

    for name in script.names:
        wizard, _, _ = session(world, **({"menu": key} | paths(world) | replies | {name: ctrl_c}))
        with pytest.raises(KeyboardInterrupt):
            wizard.next()


def test_every_flow_is_in_the_menu(world):
    wizard, script, _ = session(world, menu="exit")
    assert wizard.next() is None
    values = [choice.value for choice in script.asked[0].choices]
    assert values == [*FLOWS, "presets", "settings", "exit"]
    work = [values.index(key) for key in ("build-dataset", "preprocess", "estimate", "train", "sample", "export")]
    assert work == sorted(work)
    assert work[-1] < 9  # a digit takes it
    assert values.index("resume") > work[-1]


def test_what_only_looks_starts_without_a_review(world):
    for key in ("history", "doctor"):
        wizard, script, _ = session(world, menu=key)
        assert wizard.next().flow == key
        assert "review" not in script.names


def test_the_cursor_stands_at_the_next_step_that_the_disk_knows(world):
    def cursor(**used) -> str:
        welcomed(world.root.parent / "home", **{name: str(value) for name, value in used.items()})
        wizard, script, _ = session(world, menu="exit")
        wizard.next()
        return script.asked[0].default

    listed = {"dataset_json": world.songs / "dataset.json"}
    assert cursor() == "build-dataset"
    assert cursor(**listed) == "preprocess"
    assert cursor(**listed, dataset_dir=world.tensors) == "train"
    assert cursor(**listed, dataset_dir=world.tensors, adapter=world.adapter) == "sample"
    other = world.root / "tensors" / "newer"  # songs that the adapter was not trained on
    other.mkdir()
    (other / "one.pt").write_bytes(b"")
    assert cursor(**listed, dataset_dir=other, adapter=world.adapter) == "train"
    assert cursor(dataset_json=world.root / "gone.json", dataset_dir=world.root / "gone") == "build-dataset"


def test_the_cursor_returns_to_the_entry_that_was_left(world):
    wizard, script, _ = session(world, menu=["export", "demo", "exit"], adapter=BACK, review="cancel")
    assert wizard.next() is None
    assert [prompt.default for prompt in script.asked if prompt.name == "menu"] == ["build-dataset", "export", "demo"]


def test_in_the_advanced_depth_every_setting_can_be_reached():
    for flow in FLOWS.values():
        if flow.key in ("resume", "preprocess"):
            continue
        names = {question.name for question in questions_of(flow, Context(), advanced=True)}
        one_by_one = {"adapters"} if set(COMPARED) <= names else set()
        assert set(options_of(flow.config_class)) <= names | one_by_one


def test_songs_in_place_of_tensors_get_the_advice_to_preprocess(world):
    wizard, script, _ = session(
        world, menu="train", checkpoint_dir=str(CHECKPOINTS), dataset_dir=[str(world.songs), str(world.tensors)]
    )
    wizard.next()
    assert any("preprocess first?" in prompt.error for prompt in script.asked)


def test_models_are_offered_with_variant_and_size(world):
    wizard, script, _ = session(world, menu="train", **paths(world))
    wizard.next()
    model = next(prompt for prompt in script.asked if prompt.name == "model_variant")
    assert [(choice.value, choice.note) for choice in model.choices] == [
        ("turbo", "turbo, 0.1 M"),
        ("xl-turbo", "xl-turbo, 0.2 M"),
    ]


def test_the_kind_of_adapter_that_is_answered_stays_under_any_preset(world):
    for preset in presets.list_presets():
        wizard, _, _ = session(world, menu="train", preset=preset.name, adapter_type="lokr", **paths(world))
        assert wizard.next().config.adapter_type == "lokr"


def test_a_preset_fills_in_and_what_is_answered_wins(world):
    wizard, _, _ = session(world, menu="train", preset="minimal", epochs="7", **paths(world))
    config = wizard.next().config
    assert (config.optimizer_type, config.rank, config.epochs) == ("adamw8bit", 64, 7)


def test_a_training_is_started_with_the_settings_of_another(world):
    wizard, script, _ = session(world, menu="train", preset=str(world.run / "config.json"), **paths(world))
    config = wizard.next().config
    assert (config.rank, config.output_dir.name) == (8, "a")
    offered = next(prompt for prompt in script.asked if prompt.name == "preset").choices
    assert (str(world.run / "config.json"), "as old") in [(choice.value, choice.title) for choice in offered]


def test_a_run_of_the_language_model_is_offered_and_goes_on_as_one(world):
    composer = world.root / "runs" / "composer"
    shutil.copytree(world.run, composer)
    asked = TrainLmConfig(checkpoint_dir=CHECKPOINTS, dataset_dir=world.tensors, output_dir=composer, lm="0.6B")
    (composer / "config.json").write_text(json.dumps(as_json_values(asked)), encoding="utf-8")
    wizard, script, _ = session(world, menu="resume", run=[str(composer), str(world.run)], epochs="30")
    request = wizard.next()
    assert request.command == "train-lm"
    assert request.config == replace(asked, epochs=30, resume_from=Path("latest"))
    [offered] = [prompt.choices for prompt in script.asked if prompt.name == "run"]
    assert {str(composer), str(world.run)} <= {choice.value for choice in offered}
    request = wizard.next()
    assert (request.command, type(request.config)) == ("fixed", TrainConfig)


def test_the_composer_is_asked_for_where_there_is_one_and_its_adapter_is_at_hand(world, lm_home):
    composer = world.root / "runs" / "composer"
    shutil.copytree(world.run, composer)
    asked = TrainLmConfig(checkpoint_dir=lm_home, dataset_dir=world.tensors, output_dir=composer)
    (composer / "config.json").write_text(json.dumps(as_json_values(asked)), encoding="utf-8")
    home = {"checkpoint_dir": str(lm_home), "model_variant": "acestep-v15-512-codes"}
    replies = {"adapter": str(world.adapter), "prompt": "warm piano", **home}
    wizard, script, _ = session(world, menu="sample", think=True, lm_adapter=str(composer / "final"), **replies)
    config = wizard.next().config
    assert (config.think, config.lm_adapter) == (True, composer / "final")
    [offered] = [prompt.choices for prompt in script.asked if prompt.name == "lm_adapter"]
    assert str(composer / "final") in {choice.value for choice in offered}
    assert str(world.adapter) not in {choice.value for choice in offered}
    elsewhere = {"checkpoint_dir": str(CHECKPOINTS), "adapter": str(world.adapter), "prompt": "warm piano"}
    wizard, script, _ = session(world, menu="sample", **elsewhere)
    wizard.next()
    assert "think" not in script.names


def test_resuming_takes_the_settings_of_the_run(world):
    wizard, _, _ = session(world, menu="resume", run=str(world.run), epochs="200")
    config = wizard.next().config
    assert (config.rank, config.epochs, config.output_dir, config.resume_from) == (8, 200, world.run, Path("latest"))


def test_a_run_is_never_started_where_one_stands(world):
    wizard, script, _ = session(world, menu="train", output_dir=[str(world.run), "new"], **paths(world))
    assert wizard.next().config.output_dir == Path("new")
    assert any("A run stands there already" in prompt.error for prompt in script.asked)


# The review


def test_the_review_shows_what_was_asked_and_what_differs_and_the_rest_on_demand(world):
    wizard, script, screen = session(world, menu="train", preset="", epochs="7", **paths(world))
    wizard.next()
    text = screen.text()
    assert "*  Epochs" in text
    assert "   Rank" in text  # asked, and the default
    assert "Weight decay" not in text
    assert "uv run train.py fixed --checkpoint-dir" in text
    assert "--epochs 7" in text
    table = next(event for event in screen if isinstance(event, Table))
    rest = next(choice.note for choice in script.asked[-1].choices if choice.value == "all")
    assert rest == f"and {len(options_of(TrainConfig)) - len(table.rows)} more at their defaults"
    screen.clear()
    wizard, script, screen = session(world, menu="train", preset="", review=["all", "start"], **paths(world))
    wizard.next()
    titles = {row[1] for event in screen if isinstance(event, Table) for row in event.rows}
    assert {o.title for o in options_of(TrainConfig).values()} <= titles
    assert "all" not in [choice.value for choice in script.asked[-1].choices]


def test_a_setting_changed_in_the_review_is_in_the_config(world):
    wizard, script, _ = session(
        world, menu="train", review=["change", "start"], setting="lr", lr="0.002", **paths(world)
    )
    assert wizard.next().config.lr == 0.002
    listed = next(prompt for prompt in script.asked if prompt.name == "setting")
    assert [choice.value for choice in listed.choices] == list(options_of(TrainConfig))
    assert ("Learning rate", "0.0001") in [(choice.title, choice.note) for choice in listed.choices]


def test_a_change_in_the_review_survives_a_step_back_to_the_questions(world):
    wizard, _, _ = session(
        world, menu="train", review=["change", BACK, "start"], setting="lr", lr="0.002", **paths(world)
    )
    assert wizard.next().config.lr == 0.002


def test_settings_that_contradict_each_other_cannot_be_started(world):
    script = {
        "menu": "preprocess",
        "review": ["change", "change", "start"],
        "setting": "audio_dir",
        "audio_dir": ["", str(world.songs)],
        "dataset_json": "",
    }
    wizard, _, screen = session(world, **(paths(world) | script))
    assert wizard.next().config.audio_dir == world.songs
    assert "neither --audio-dir nor --dataset-json" in screen.text()


def test_answers_are_saved_as_a_preset_without_folders(world):
    wizard, _, screen = session(
        world,
        menu="train",
        preset="minimal",
        review=["save", "save", "start"],
        preset_name=["minimal", "mine"],
        **paths(world),
    )
    wizard.next()
    assert "built-in preset" in screen.text()
    assert presets.find("mine").values["optimizer_type"] == "adamw8bit"


def test_cancel_goes_back_to_the_menu(world):
    wizard, script, _ = session(world, menu=["demo", "exit"], review="cancel")
    assert wizard.next() is None
    assert script.names == ["menu", "output_dir", "review", "menu"]


def test_what_is_known_of_a_run_is_in_the_review_and_what_takes_long_comes_later(world):
    may_end, seen = Event(), []

    def slow(_config) -> list[str]:
        assert may_end.wait(240)
        return ["Memory: 3.4 GiB at most"]

    knowledge = Knowledge(quick=lambda config: ["Data: 3 songs"], slow=slow)
    screen = Screen()

    def ask(prompt):
        if prompt.name != "review":
            return "demo" if prompt.name == "menu" else prompt.default
        seen.append(screen.text())
        if prompt.news is None:
            return "start"
        may_end.set()
        assert prompt.news.wait(240)
        return NEWS

    Wizard(ask, screen, Outside(about=knowledge)).next()
    before, after = seen
    assert "Data: 3 songs" in before
    assert "Memory" not in before
    assert after.count("Data: 3 songs") == 1  # what was shown is not shown again
    assert "Memory: 3.4 GiB at most" in after


def test_a_plain_terminal_waits_for_what_takes_long_and_asks_then():
    lines, news = in_background(lambda: ["one"])
    out = io.StringIO()
    assert NumberedAsk(Terminal(out, out, io.StringIO("")))(replace(prompt("text"), news=news)) is NEWS
    assert (lines, out.getvalue()) == (["one"], "")


# One step after another


def test_each_step_fills_in_the_next_one(world):
    replies = {"menu": "build-dataset", "next": ["preprocess", "train", "sample", ""], "prompt": "piano"}
    wizard, script, _ = session(world, **(paths(world) | replies))
    built = wizard.next()
    wizard.finished(built, True)
    assert built.config.input == world.songs

    script.asked.clear()
    preprocessed = wizard.next()
    assert preprocessed.config.dataset_json == world.songs / "dataset.json"
    assert script.names == ["next", "checkpoint_dir", "model_variant", "review"]  # no checkpoint was known yet
    (preprocessed.config.tensor_output).mkdir(parents=True)
    (preprocessed.config.tensor_output / "a.pt").write_bytes(b"")
    wizard.finished(preprocessed, True)

    script.asked.clear()
    trained = wizard.next()
    assert script.names == ["next", "preset", "adapter_type", "review"]  # the preset says how long
    assert trained.config.dataset_dir == preprocessed.config.tensor_output
    (trained.config.output_dir / "final").mkdir(parents=True)
    (trained.config.output_dir / "final" / "adapter_config.json").write_text("{}", encoding="utf-8")
    wizard.finished(trained, True)

    script.asked.clear()
    sampled = wizard.next()
    assert sampled.config.adapter == trained.config.output_dir / "final"
    assert "checkpoint_dir" not in script.names
    assert "adapter" not in script.names


def test_after_a_failure_the_review_comes_back_with_all_answers_to_change_one(world):
    wizard, script, _ = session(
        world,
        menu="train",
        review=["start", "change", "start"],
        next="fix",
        setting="lr",
        lr="0.002",
        epochs="7",
        preset="",
        **paths(world),
    )
    first = wizard.next()
    wizard.finished(first, False)
    script.asked.clear()
    again = wizard.next()
    assert script.names == ["next", "review", "setting", "lr", "review"]
    assert script.asked[0].title == "Not done"
    assert again.config == replace(first.config, lr=0.002)


def test_after_a_stop_by_the_user_the_cursor_stands_at_resume(world):
    wizard, script, _ = session(world, menu="train", **paths(world))
    wizard.finished(wizard.next(), False, stopped=True)
    script.replies["menu"] = ["exit"]
    script.asked.clear()
    assert wizard.next() is None
    assert [(prompt.name, prompt.default) for prompt in script.asked] == [("menu", "resume")]


def test_files_that_were_left_out_are_not_called_done(world):
    wizard, script, _ = session(world, menu="build-dataset", next="exit", input=str(world.songs))
    wizard.finished(wizard.next(), True, left_out=True)
    assert wizard.next() is None
    assert script.asked[-1].title == "Done, but for the files named above: List songs"


def test_results_are_opened_from_what_comes_next(world):
    opened = []
    wizard, script, screen = session(
        world,
        menu="train",
        preset="",
        next=["open the report", "exit"],
        output_dir=str(world.root / "new"),
        **paths(world),
    )
    wizard.outside = replace(wizard.outside, open=lambda path: opened.append(path) or f"Opened {path}.")
    done = wizard.next()
    done.config.output_dir.mkdir(parents=True)
    (done.config.output_dir / "report.html").touch()
    wizard.finished(done, True)
    assert wizard.next() is None
    assert opened == [done.config.output_dir / "report.html"]
    assert script.names[-2:] == ["next", "next"]
    assert f"Opened {opened[0]}." in screen.text()


def test_the_page_of_a_judgement_is_opened_like_the_report_of_a_run(tmp_path):
    judged = results_of(ScoreConfig(run_folder=tmp_path / "run"))
    assert judged["the listening page"] == tmp_path / "run" / "score" / "listen.html"
    compared = results_of(CompareConfig(output=tmp_path / "compared"))
    assert compared["the listening page"] == tmp_path / "compared" / "listen.html"


def test_adapters_are_compared_by_their_run_and_without_one_it_is_asked_what_to_judge_by(world):
    wizard, script, _ = session(world, menu="compare", **paths(world))
    config = wizard.next().config
    assert config.adapters == (world.adapter, world.foreign)  # a name with a space is one name
    assert (config.checkpoint_dir, config.dataset_dir) == (None, None)
    assert script.names == ["menu", "adapter", "other_adapter", "third_adapter", "review"]
    asked = {prompt.name: prompt for prompt in script.asked}
    assert asked["adapter"].default == str(world.adapter)
    assert asked["other_adapter"].default == ""  # the only one that lies near was named

    voice, band = (world.root / f"{name}.safetensors" for name in ("voice", "band"))
    voice.touch()
    band.touch()
    named = {"adapter": str(voice), "other_adapter": [str(voice), str(band)], "third_adapter": str(world.foreign)}
    wizard, script, _ = session(world, menu="compare", **paths(world) | named)
    config = wizard.next().config
    assert config.adapters == (voice, band, world.foreign)
    assert (config.checkpoint_dir, config.model_variant) == (CHECKPOINTS, "turbo")
    assert config.dataset_dir == world.tensors
    refused = [prompt.error for prompt in script.asked if prompt.name == "other_adapter"]
    assert refused == ["", "That one was named before."]


def test_adapters_to_compare_are_no_line_to_type_in_the_review(world):
    wizard, script, _ = session(world, menu="compare", review=["change", "start"], setting=BACK, **paths(world))
    wizard.next()
    setting = next(prompt for prompt in script.asked if prompt.name == "setting")
    assert "adapters" not in [choice.value for choice in setting.choices]
    assert {"strength", "clips", "dataset_dir"} <= {choice.value for choice in setting.choices}


def offered(world, name: str, flow: str, suggested: object = None, **used) -> list[str]:
    """What a path question lists besides its suggestion, as paths below the world."""
    context = Context(used, world.outside().check, world.root)
    question = question_of(name, FLOWS[flow], context, {} if suggested is None else {name: suggested})
    choices = question.choices({})
    return [Path(choice.value).relative_to(world.root).as_posix() for choice in choices]


def test_every_path_question_offers_what_is_there_the_newest_first(world, monkeypatch):
    root = world.root
    monkeypatch.setattr(flows, "likely_checkpoint_dirs", lambda here: [here / "suggested", here / "models"])
    shutil.copytree(world.run, root / "runs" / "new")
    shutil.copytree(world.tensors, root / "tensors" / "b")
    (root / "albums" / "first").mkdir(parents=True)
    (root / "albums" / "first" / "one.FLAC").touch()
    (root / "letters").mkdir()
    (root / "letters" / "one.txt").touch()
    (root / "models").mkdir()
    (root / "suggested").mkdir()
    for number, path in enumerate((world.run / "config.json", world.tensors, root / "albums")):
        os.utime(path, (number, number))  # the older ones
    runs, adapters = ["runs/new", "runs/old"], ["runs/new/final", "runs/old/final"]
    kinds = {
        "checkpoints": ["models"],
        "songs": ["my songs", "albums"],
        "dataset.json": ["my songs/dataset.json"],
        "tensors": ["tensors/b", "tensors/a"],
        "adapter": adapters,
        "run": runs,
        "runs": ["runs"],
    }
    seen = set()
    for key, flow in FLOWS.items():
        for name, o in options_of(flow.config_class).items():
            if o.holds in kinds and name != "lm_adapter":
                assert offered(world, name, key) == kinds[o.holds], (key, name)
                seen.add(o.holds)
    assert seen == set(kinds)
    assert offered(world, "songs", "preprocess") == ["my songs/dataset.json", "my songs", "albums"]
    assert offered(world, "run", "resume") == runs
    assert offered(world, "tensor_output", "preprocess") == ["tensors/b", "tensors/a"]
    away, before = root / "far" / "runs" / "x", root / "gone"
    assert offered(world, "output_dir", "train", Path("runs/y"), output_dir=away) == ["runs/y", "far/runs/y"]
    assert offered(world, "output_dir", "train", root / "runs" / "y", output_dir=away) == ["far/runs/y"]
    assert offered(world, "dataset_dir", "train", root / "tensors" / "b", dataset_dir=before) == ["tensors/a"]
    kept = root / "kept"
    kept.mkdir()
    assert offered(world, "dataset_dir", "train", root / "tensors" / "b", dataset_dir=kept) == ["tensors/a", "kept"]


def test_a_disk_that_does_not_answer_is_not_waited_for(world, monkeypatch):
    answers, folders = Event(), path_checks._folders
    monkeypatch.setattr(path_checks, "NEAR_SECONDS", 0.01)
    monkeypatch.setattr(path_checks, "_folders", lambda folder: folders(folder) if answers.wait(60) else [])
    try:
        assert offered(world, "input", "build-dataset") == []
    finally:
        answers.set()


@pytest.mark.parametrize(
    ("adapter", "format", "suggested"),
    [
        ("runs/old/final", "comfyui", "exports/old-comfyui.safetensors"),
        ("runs/old/final", "peft", "exports/old-peft-2"),
        ("band.safetensors", "lycoris", "exports/band-lycoris.safetensors"),
    ],
)
def test_where_an_export_goes_is_suggested_by_the_run_and_the_program(world, monkeypatch, adapter, format, suggested):
    monkeypatch.chdir(world.root)
    (world.root / "exports" / "old-peft").mkdir(parents=True)
    wizard, _script, _ = session(world, menu="export", adapter=adapter, format=format)
    (world.root / "band.safetensors").touch()
    config = wizard.next().config
    assert config.output == Path(suggested)
    assert config.format == format


def test_adapters_and_tensors_that_lie_near_are_offered_beside_typing(world):
    wizard, script, _ = session(
        world,
        menu=["sample", "train"],
        adapter=str(world.adapter),
        prompt="x",
        **{name: value for name, value in paths(world).items() if name != "adapter"},
    )
    wizard.next()
    wizard.next()
    offered = {p.name: [choice.value for choice in p.choices] for p in script.asked if p.kind == "path"}
    assert offered["adapter"] == [str(world.adapter)]
    assert offered["dataset_dir"] == [str(world.tensors)]


def test_presets_stand_by_memory_and_a_test_is_not_suggested_again(world):
    def asked(**used):
        welcomed(world.root.parent / "home", **used)
        wizard, script, _ = session(world, menu="train", **paths(world))
        wizard.next()
        return next(prompt for prompt in script.asked if prompt.name == "preset")

    names = [choice.value for choice in asked().choices]
    cards = [name for name in names if name in PROFILES]
    assert cards == sorted(PROFILES, key=PROFILES.get)
    assert names[0] == "recommended"
    assert all(len(choice.note) <= 56 for choice in asked().choices)  # whole at 80 columns
    assert asked(preset="quick_test").default == "recommended"
    assert asked(preset="tight").default == "tight"


def test_what_was_used_is_the_suggestion_of_the_next_session(world):
    wizard, _, _ = session(world, menu="train", preset="", rank="24", **paths(world))
    wizard.finished(wizard.next(), True)
    again, script, _ = session(world, preset="")
    again.next()
    defaults = {prompt.name: prompt.default for prompt in script.asked}
    assert defaults["menu"] == "train"
    assert (str(defaults["checkpoint_dir"]), str(defaults["dataset_dir"]), defaults["rank"]) == (
        str(CHECKPOINTS),
        world.tensors.as_posix(),
        24,
    )


def test_rank_and_epochs_are_suggested_for_the_music_with_the_reason_unless_a_preset_sets_them(world):
    (world.tensors / "one.pt").unlink()
    for number in range(3):
        save_record(world.tensors / f"{number}.pt", record(number, 6000))
    index_records(world.tensors)
    advice = advise(3, 12.0, True)
    wizard, script, _ = session(world, menu="train", preset="", **paths(world))
    config = wizard.next().config
    prompts = {prompt.name: prompt for prompt in script.asked}
    assert (config.rank, config.epochs, config.alpha) == (advice.rank, advice.epochs, 2 * advice.rank)
    assert prompts["epochs"].help.endswith(f"Suggested: {advice.epochs} ({advice.reason}).")
    assert config.chunk_duration == 0  # was not asked
    wizard, script, _ = session(world, menu="train", preset="", adapter_type="lokr", **paths(world))
    assert wizard.next().config.rank == 64
    assert not any("Suggested" in prompt.help for prompt in script.asked if prompt.name == "rank")
    wizard, script, _ = session(world, menu="train", preset="recommended", **paths(world))
    assert (wizard.next().config.epochs, "epochs" in script.names) == (100, False)


def test_settings_apply_to_every_run(world):
    wizard, _, _ = session(world, menu=["settings", "demo", "train"], device="cpu", depth="advanced", **paths(world))
    wizard.next()
    assert wizard.next().config.device == "cpu"
    kept = json.loads((world.root.parent / "home" / "settings.json").read_text(encoding="utf-8"))["values"]
    assert (kept["device"], kept["depth"]) == ("cpu", "advanced")


def test_a_broken_settings_file_is_told(world):
    (world.root.parent / "home" / "settings.json").write_text("{", encoding="utf-8")
    assert "set aside" in session(world)[2].text()


# The first run


def test_the_first_run_asks_for_checkpoints_says_how_to_get_them_and_offers_the_demo(world):
    (world.root.parent / "home" / "settings.json").unlink()
    wizard, script, screen = session(world)
    assert type(wizard.next().config) is DemoConfig
    assert script.names == ["checkpoint_dir", "try_demo", "output_dir", "review"]
    assert "hf download ACE-Step/Ace-Step1.5" in screen.text()


def test_the_first_run_comes_once(world):
    (world.root.parent / "home" / "settings.json").unlink()
    wizard, script, _ = session(world, checkpoint_dir=str(CHECKPOINTS), try_demo=False, menu="exit")
    wizard.next()
    wizard, script, _ = session(world, menu="exit")
    wizard.next()
    assert script.names == ["menu"]


def test_a_new_user_reaches_training_with_twelve_answers_most_of_them_enter(world):
    (world.root.parent / "home" / "settings.json").unlink()
    typed = {"checkpoint_dir": str(CHECKPOINTS), "input": str(world.songs)}
    script, screen = Script(typed), Screen()
    wizard = Wizard(script, screen, world.outside())
    listed = wizard.next()
    assert type(listed.config) is BuildDatasetConfig
    wizard.finished(listed, True)
    preprocess = wizard.next()
    assert type(preprocess.config) is PreprocessConfig
    preprocess.config.tensor_output.mkdir(parents=True)
    (preprocess.config.tensor_output / "a.pt").write_bytes(b"")
    wizard.finished(preprocess, True)
    assert type(wizard.next().config) is TrainConfig
    assert len(script.asked) <= 12
    assert sum(str(prompt.default) != typed.get(prompt.name, str(prompt.default)) for prompt in script.asked) == 2


def test_from_the_first_start_to_an_adapter_that_is_heard_in_fifteen_answers(world):
    (world.root.parent / "home" / "settings.json").unlink()
    typed = {"checkpoint_dir": str(CHECKPOINTS), "input": str(world.songs), "tag": "mrnglght"}
    script, screen = Script(typed), Screen()
    wizard = Wizard(script, screen, world.outside())
    listed = wizard.next()
    described = {"metadata": {"custom_tag": "mrnglght"}, "samples": [{"audio_path": "a", "caption": "slow folk"}]}
    (world.songs / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    wizard.finished(listed, True)
    made = wizard.next()
    made.config.tensor_output.mkdir(parents=True)
    (made.config.tensor_output / "a.pt").write_bytes(b"")
    wizard.finished(made, True)
    trained = wizard.next()
    (trained.config.output_dir / "final").mkdir(parents=True)
    (trained.config.output_dir / "final" / "adapter_config.json").write_text("{}", encoding="utf-8")
    wizard.finished(trained, True)
    heard = wizard.next().config
    assert (heard.adapter, heard.prompt) == (trained.config.output_dir / "final", "mrnglght, slow folk")
    assert len(script.asked) <= 15, script.names


@pytest.mark.parametrize("text", ["", "[]", "{", '{"samples": 3, "metadata": []}', '{"samples": [3, {"caption": 7}]}'])
def test_a_list_that_holds_no_captions_suggests_no_prompt(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    assert a_prompt_of(tmp_path / "dataset.json") == ""


# Presets in the wizard


def test_presets_are_imported_shown_renamed_exported_and_deleted(world, tmp_path):
    (tmp_path / "p.json").write_text('{"rank": 8, "colour": "red"}', encoding="utf-8")
    wizard, _, screen = session(
        world,
        menu=["presets", "exit"],
        action=["import", "show", "rename", "export", "delete", "back"],
        file=str(tmp_path / "p.json"),
        name=["p", "p", "q", "q"],
        new_name="q",
        target=str(tmp_path / "out.json"),
        sure=True,
    )
    assert wizard.next() is None
    text = screen.text()
    assert "Imported as p. Ignored" in text
    assert "--rank" in text
    assert "p is now q" in text
    assert "q is deleted" in text
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rank"] == 8


def test_there_is_nothing_to_delete_at_first(world):
    wizard, _, screen = session(world, menu=["presets", "exit"], action=["delete", "back"])
    assert wizard.next() is None
    assert "none of yours yet" in screen.text()


# Numbered questions


def numbered(typed: str, prompt: Prompt) -> tuple[object, str]:
    out = io.StringIO()
    return NumberedAsk(Terminal(out, out, io.StringIO(typed)))(prompt), out.getvalue()


def prompt(kind, default="", choices=()):
    return Prompt(
        "x",
        "Which?",
        "help",
        kind,
        default,
        tuple(Choice(value, f"T{value}", "note") for value in choices),
        lambda reply: reply,
    )


@pytest.mark.parametrize(
    ("kind", "default", "choices", "typed", "reply"),
    [
        ("choice", "b2", ("a1", "b2"), "\n", "b2"),
        ("choice", "b2", ("a1", "b2"), "1\n", "a1"),
        ("choice", "b2", ("a1", "b2"), "ta1\n", "a1"),
        ("choice", "b2", ("a1", "b2"), "9\n", "9"),
        ("choice", "b2", ("weight decay", "weight"), "decay\n", "weight decay"),
        ("choice", "b2", ("weight decay", "weight"), "tweight\n", "weight"),
        ("choice", "b2", ("a1", "a2"), "ta\n", "ta"),
        ("choice", "b2", ("a1", "b2"), "b\n", BACK),
        ("several", ("a1",), ("a1", "b2"), "\n", ("a1",)),
        ("several", ("a1",), ("a1", "b2"), "1, 2\n", ("a1", "b2")),
        ("several", ("a1",), ("a1", "b2"), "none\n", ()),
        ("yes-no", True, (), "\n", True),
        ("yes-no", True, (), "n\n", False),
        ("yes-no", True, (), "what\ny\n", True),
        ("text", "64", (), "\n", "64"),
        ("text", "64", (), " 8 \n", "8"),
        ("text", "64", (), "b\n", BACK),
        ("path", "", ("/a",), "/somewhere\n", "/somewhere"),
        ("path", "", ("/a",), "1\n", "/a"),
    ],
)
def test_numbered_questions_take_numbers_words_and_enter(kind, default, choices, typed, reply):
    got, shown = numbered(typed, prompt(kind, default, choices))
    assert got == reply
    assert shown.isascii()
    assert "\x1b" not in shown


def test_the_end_of_input_leaves_like_ctrl_c():
    with pytest.raises(KeyboardInterrupt):
        numbered("", prompt("text"))


# Questions with cursor keys


def drawn(asked: Prompt, keys: str, meanwhile=lambda: None, out: io.StringIO | None = None) -> object:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        meanwhile()
        return QuestionaryAsk(RichTerminal(out or io.StringIO()))(asked)


@pytest.mark.parametrize(
    ("kind", "choices", "keys", "reply", "is_told"),
    [
        ("choice", ("a1", "b2"), "?2", "b2", True),
        ("yes-no", (), "?n", False, True),
        ("text", (), "?\r", "a1", True),
        ("text", (), "x?\r", "a1x?", False),  # a part of what is typed
    ],
)
def test_a_question_mark_tells_more_and_asks_again(kind, choices, keys, reply, is_told):
    out = io.StringIO()
    asked = replace(prompt(kind, True if kind == "yes-no" else "a1", choices), more="Sixty-four is usual.")
    assert drawn(asked, keys, out=out) == reply
    assert ("Sixty-four is usual." in out.getvalue()) == is_told
    assert "(?: more)" in out.getvalue()


def test_a_question_mark_tells_more_on_a_plain_terminal():
    reply, shown = numbered("?\n\n", replace(prompt("text", "64"), more="Sixty-four is usual."))
    assert reply == "64"
    assert shown.count("Sixty-four is usual.") == 1


@pytest.mark.parametrize(
    "name",
    ["rank", "alpha", "dropout", "cfg_ratio", "chunk_duration", "gradient_accumulation", "epochs", "lr", "val_split"],
)
def test_what_musicians_puzzle_over_has_a_line_for_the_ear_and_more_behind_it(name):
    o = options_of(TrainConfig)[name]
    asked = questions_of(FLOWS["train"], Context(), advanced=True)
    question = next(question for question in asked if question.name == name)
    assert (question.help, question.more) == (o.plain, o.more)
    assert len(o.plain) <= 120
    assert len(o.more.split(". ")) in (2, 3, 4)


@pytest.mark.parametrize("key", FLOWS)
def test_every_question_of_a_flow_has_a_line_in_plain_words_and_more_behind_it(key):
    for question in questions_of(FLOWS[key], Context(), advanced=True):
        assert tells_more(question), (question.name, question.more)
        assert question.help, question.name
        assert question.name.startswith("change ") or (len(question.help) <= 180 and " --" not in question.help)


def tells_more(asked: Prompt | Question) -> bool:
    return len(re.findall(r"[.!?](?= |$)", asked.more)) in (2, 3, 4)


@pytest.mark.parametrize(
    ("width", "keys"),
    [
        (80, "(number, or arrows, Enter, Esc: back, ?: more)"),
        (60, "(number, Esc: back, ?: more)"),
        (40, ""),
    ],
)
def test_a_menu_names_the_keys_that_fit_into_its_line(width, keys):
    menu = replace(prompt("choice", "a1", ("a1", "b2")), text="What would you like to do?", help="", more="More.")
    out = io.StringIO()
    with (
        create_pipe_input() as pipe,
        create_app_session(input=pipe, output=Vt100_Output(out, lambda: Size(24, width))),
    ):
        pipe.send_text("\r")
        assert asked(menu, "", width).unsafe_ask() == "a1"
    assert keys in out.getvalue()
    assert "arrow keys" not in out.getvalue()  # the library's own words


def test_the_questions_between_the_flows_tell_more_too(world):
    wizard, script, _ = session(
        world,
        menu=["presets", "settings", "train", "exit"],
        action=["export", "back"],
        target=str(world.root / "preset.json"),
        checkpoint_dir=str(CHECKPOINTS),
        dataset_dir=str(world.tensors),
        output_dir=str(world.root / "runs" / "new"),
        review=["save", "start"],
        preset_name="mine",
        next=["", "exit"],
    )
    wizard.last_used["welcomed"] = False
    request = wizard.next()
    assert request is not None
    wizard.finished(request, ok=False)
    assert wizard.next() is None
    assert {"try_demo", "menu", "action", "target", "depth", "review", "preset_name", "next"} < set(script.names)
    assert [prompt.name for prompt in script.asked if not tells_more(prompt)] == []


@pytest.mark.parametrize(("keys", "reply"), [("2", "b2"), ("\x1b[B\r", "b2"), ("\r", "a1"), ("9\r", "a1")])
def test_a_digit_takes_the_line_of_its_number(keys, reply):
    assert drawn(prompt("choice", "a1", ("a1", "b2")), keys) == reply


def test_the_menu_takes_digits_and_the_settings_of_a_flow_are_searched(world):
    _, script, _ = session(world, menu=["demo", "exit"], review=["change", "cancel"], setting=BACK)
    wizard = Wizard(script, Screen(), world.outside())
    assert wizard.next() is None
    menu, setting = (next(p for p in script.asked if p.name == name) for name in ("menu", "setting"))
    assert drawn(menu, "2") == menu.choices[1].value
    setting = replace(setting, choices=(Choice("a", "Weight decay"), Choice("b", "Learning rate")), default="a")
    assert drawn(setting, "rate\r") == "b"


@pytest.mark.parametrize("kind", ["choice", "text"])
def test_a_question_that_waits_for_news_is_left_for_it_and_answered_before(kind):
    news = Event()
    asked = replace(prompt(kind, "a1", ("a1", "b2") if kind == "choice" else ()), news=news)
    assert drawn(asked, "\r") == "a1"
    assert drawn(asked, "", lambda: Timer(0.05, news.set).start()) is NEWS
