"""Every flow walked at random: whatever is answered and stepped back over, what comes out runs."""

import contextlib
import os
import shutil
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidestep.cli.parser import configs_of, parse
from sidestep.settings import config
from sidestep.settings.config import command_words
from sidestep.settings.option import options_of, resolve
from sidestep.settings.path_checks import verify
from sidestep.wizard.questionnaire import BACK, NEWS, Prompt
from sidestep.wizard.session import Wizard
from tests.wizard_world import Screen, World, welcomed

PATIENCE = 60  # questions answered at random; then Enter is pressed until something starts
TYPED = (
    "",
    "b",
    "3",
    "8",
    "0",
    "-1",
    "0.5",
    "1e-3",
    "nonsense",
    "1, 2",
    "a b c",
    "latest",
    "A minor",
    "[x]",
    "--rank",
    "-7",
    "ü 日本",
    "'quoted'",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    before = os.environ.get("SIDE_STEP_HOME")
    world = World(tmp_path_factory.mktemp("world"))
    with contextlib.chdir(tmp_path_factory.mktemp("here")):  # exported presets land where the wizard was started
        yield world
    if before is None:
        os.environ.pop("SIDE_STEP_HOME", None)
    else:
        os.environ["SIDE_STEP_HOME"] = before


class Wanderer:
    """Answers at random, goes back at random, and in the end presses Enter."""

    def __init__(self, draw: Any, world: World):
        self.draw, self.world, self.count = draw, world, 0

    def __call__(self, prompt: Prompt) -> Any:
        if prompt.news and prompt.news.is_set() and self.draw(st.booleans()):
            return NEWS
        self.count += 1
        assert self.count < PATIENCE + 150, f"no way out of {prompt.name}: {prompt.error}"
        if self.count > PATIENCE:
            return self._safe(prompt)
        move = self.draw(st.sampled_from(("answer", "answer", "answer", "suggestion", "suggestion", "back")))
        if move == "back":
            return BACK
        if move == "suggestion":
            return prompt.default
        if prompt.name == "menu":
            return self.draw(st.sampled_from([choice.value for choice in prompt.choices if choice.value != "exit"]))
        if prompt.kind == "choice":
            return self.draw(st.sampled_from([choice.value for choice in prompt.choices]))
        if prompt.kind == "several":
            return tuple(self.draw(st.lists(st.sampled_from([choice.value for choice in prompt.choices]), unique=True)))
        if prompt.kind == "yes-no":
            return self.draw(st.booleans())
        if prompt.kind == "path":
            return self.draw(
                st.sampled_from(
                    (
                        self.world.path_for(prompt.name),
                        self.world.path_for(prompt.name),
                        str(self.world.root / "no" / "such" / "place"),
                        "",
                    )
                )
            )
        return self.draw(st.sampled_from(TYPED))

    def _safe(self, prompt: Prompt) -> Any:
        """The reply that leads to a start: the suggestion, unless it was refused or there is none."""
        values = [choice.value for choice in prompt.choices]
        if prompt.name in ("menu", "next", "action"):
            return next(value for value in ("demo", "", "back") if value in values)
        if prompt.name == "review":
            return "start" if "start" in values else "cancel"
        if prompt.kind == "path":
            return self.world.path_for(prompt.name)
        if prompt.kind == "choice":
            return prompt.default
        if prompt.error or prompt.default in ("", None):
            return ("7", "warm piano", "0.5", "")[self.count % 4]
        return prompt.default


def walk(world: World, draw: Any) -> None:
    """One session of two actions: each ends in a config that validates and a command line that parses to it."""
    for left in (
        world.root / "home",
        world.root / "other",
        *Path.cwd().iterdir(),
    ):  # of the walk before: presets, exported
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    welcomed(world.root / "home", depth=draw(st.sampled_from(("basic", "advanced"))))
    wizard = Wizard(Wanderer(draw, world), Screen(), world.outside())
    for _ in range(2):  # the second time what was chosen is carried over, and the next step is offered
        wizard.ask.count = 0
        chosen = wizard.next()
        if chosen is None:
            return
        assert resolve(type(chosen.config), vars(chosen.config)) == chosen.config
        assert configs_of(parse(command_words(chosen.config)), {}) == [chosen.config]
        wizard.finished(chosen, ok=draw(st.booleans()))


def test_the_world_has_an_answer_to_every_question_for_what_is_there_already(world):
    for kind in (kind for kind in vars(config).values() if isinstance(kind, type) and is_dataclass(kind)):
        for name, option in options_of(kind).items():
            if option.holds and not option.holds.startswith("new "):
                verify(option.holds, Path(world.path_for(name)), world.count_songs)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_few_walks_end_in_a_config_that_validates_and_a_command_line_that_parses_to_it(world, data):
    walk(world, data.draw)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_three_hundred_walks_end_in_a_config_that_validates_and_a_command_line_that_parses_to_it(world, data):
    walk(world, data.draw)
