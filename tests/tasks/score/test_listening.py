"""The listening page: safe whatever things are called, equally loud, and alive in a real browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sidestep.acestep.conditions import Prompt
from sidestep.audio.io import write_flac
from sidestep.data.batches import Song
from sidestep.tasks.score.clips import BASE, Clip, Request
from sidestep.tasks.score.listening import Copy, page, volumes
from sidestep.tasks.score.metrics import Figure
from sidestep.tasks.score.recommend import Row, Verdict
from tests.browser import in_browser, needs_chromium

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&amp;\u2028"


def figure(value: float, spread: float) -> Figure:
    return Figure(value, value + spread * np.linspace(-1, 1, 100))


def row(name: str, strength: float, n: int) -> Row:
    """Of a run that learns, drifts and in the end copies."""
    gain, drift = 0.03 * n - 0.002 * n * n, 0.004 * 1.5**n * max(strength, 0.1)
    copying = figure(max(0.0, (n - 4) / 8), 0.06 if n > 4 else 0.0)
    return Row(name, strength, figure(gain, 0.02), figure(drift, drift / 4), figure(1 / (1 + n), 0.1), copying)


def example(
    folder: Path,
    names: tuple[str, ...] = ("epoch_0010", "epoch_0020", "final"),
    strengths: tuple[float, ...] = (1.0,),
    prompts: int = 2,
    caption: str = "a slow song",
    loudness: float | None = -14.0,
    louder: float = 0.0,
) -> str:
    """A page whose clips need not be there. The second name is recommended, and the last one copies.

    louder: by how many dB the base model's clips are.
    """
    base = Row(BASE, 0.0, figure(0, 0), figure(0, 0), figure(1, 0.2), figure(0, 0))
    rows = [row(name, strength, n) for n, name in enumerate(names, 1) for strength in strengths]
    clips = {
        (one.name, one.strength): [
            Clip(torch.zeros(1, 1), folder / "clips" / f"{n}-{prompt}.flac", loudness and loudness + louder * (n == 0))
            for prompt in range(prompts)
        ]
        for n, one in enumerate([base, *rows])
    }
    song = Song(f"{caption}.pt", 50, lambda: pytest.fail("read"))
    requests = [Request(song, Prompt(caption=caption, seed=n), torch.zeros(1)) for n in range(prompts)]
    last = clips[rows[-1].name, rows[-1].strength][-1]
    copy = Copy(rows[-1], prompts - 1, 0.5, song.name, 62, 1, 0.31, last, replace(last, audio=folder / "window.flac"))
    verdict = Verdict(rows[len(strengths)], "no other equals its gain and style", ("it may have learned nothing",))
    return page("night drive", "4 songs", folder, base, rows, verdict, requests, clips, [copy])


def test_clips_of_a_prompt_are_played_as_loud_as_the_quietest_but_one_that_is_hardly_there_is_no_measure():
    def of(*loudness: float | None) -> list[float]:
        return volumes([Clip(torch.zeros(1), Path(), one) for one in loudness])

    assert of(-14, -14) == [1, 1]
    assert of(-14, -17, -20) == pytest.approx([10 ** (-6 / 20), 10 ** (-3 / 20), 1])
    assert of(-14, -40, None) == [1, 1, 1]
    assert of(-10, -14.0) == pytest.approx([10 ** (-4 / 20), 1])


def test_the_page_shows_every_figure_its_interval_and_what_is_recommended_and_why(tmp_path):
    text = example(tmp_path, strengths=(0.5, 1.0))
    assert text.count('<tr class="recommended">') == 2  # in the grid and in the table
    assert "No other equals its gain and style" in text
    assert "it may have learned nothing" in text
    assert "<td>2.8 %<small>0.9 to 4.7</small></td>" in text
    assert text.count('class="dot marked"') == 4
    assert "final, prompt 2" in text
    assert "from 0:00, like a slow song.pt from 1:02" in text


def test_the_page_plays_a_louder_clip_softer_and_no_other(tmp_path):
    page = example(tmp_path, loudness=-18.0, louder=4.0)
    volumes_of_clips = [float(volume) for volume in re.findall(r'data-src="[^"]*" data-volume="([^"]*)"', page)]
    softer = 10 ** (-4 / 20)
    assert volumes_of_clips == pytest.approx([softer, softer] + [1.0] * 6, abs=1e-4)  # two prompts, the base first


def test_what_things_are_called_is_text_and_nothing_else(tmp_path):
    text = example(tmp_path, names=(HOSTILE, HOSTILE + "2"), caption=HOSTILE)
    assert "<img" not in text
    data = text.split('id="values">')[1].split("</script>")[0]
    assert json.loads(data)["prompts"] == [HOSTILE] * 2
    assert "#" not in text.split('data-src="')[1].split('"')[0]


def test_without_music_there_is_a_page_of_figures_and_no_script(tmp_path):
    rows = [replace(row(name, 1.0, n), style=None, copying=None) for n, name in enumerate(("a", "b"))]
    base = Row(BASE, 0.0, figure(0, 0), figure(0, 0))
    text = page("night drive", "4 songs", tmp_path, base, rows, Verdict(rows[0], "it is the only one"))
    assert text.count('class="dot') == 4
    assert "<script" not in text
    assert "Listen</h2>" not in text


# ---- in a real browser ----

HELP = """
  const button = (r, p) => document.querySelectorAll('.grid tbody tr')[r].querySelectorAll('button')[p];
  const here = () => {
    const [cell] = document.querySelectorAll('.grid .here'), line = cell.closest('tr');
    return [[...line.parentElement.children].indexOf(line), [...line.querySelectorAll('button')].indexOf(cell)];
  };
  const heard = () => document.querySelector('#player audio');
  const key = name => (document.activeElement ?? document.body).dispatchEvent(
    new KeyboardEvent('keydown', {key: name, bubbles: true, cancelable: true}));
  const plays = async () => {
    for (let i = 0; i < 50 && !(heard().currentTime > 0 && !heard().paused); i += 1) await wait(50);
  };
  const words = e => e.innerText.replace(/\\s+/g, ' ').trim();
"""


@pytest.fixture
def sounds(tmp_path) -> Path:
    """The clips of three rows and two prompts, four seconds each."""
    for number in range(4):
        for prompt in range(2):
            time = np.arange(4 * 48_000) / 48_000
            tone = 0.1 * np.sin(2 * np.pi * (200 + 50 * number) * time) * np.ones((2, 1))
            write_flac(tmp_path / "clips" / f"{number}-{prompt}.flac", tone.astype(np.float32), 48_000)
    write_flac(tmp_path / "window.flac", np.zeros((2, 4800), np.float32), 48_000)
    return tmp_path


class TestInABrowser:
    pytestmark = needs_chromium

    def test_what_is_switched_to_starts_at_the_same_place_by_click_and_by_key(self, sounds):
        question = (
            HELP
            + """
          found.first = here();
          button(1, 0).click(); await plays();
          heard().currentTime = 2; await wait(100);
          const old = heard();
          button(3, 1).click(); await plays();
          found.clicked = [here(), heard().currentTime >= 2, heard().currentTime < 3.5, old.paused];
          found.src = heard().src.split('/').pop();
          key('ArrowUp'); await plays();
          found.up = [here(), heard().currentTime >= 2, heard().paused];
          key('ArrowLeft'); key('ArrowLeft'); await plays();
          found.left = here();
          key(' '); found.paused = heard().paused;
          key('ArrowDown'); found.silent = [here(), heard().paused, heard().currentTime >= 2];
          key('ArrowDown'); found.around = here();
          found.playing = document.querySelectorAll('audio').length;
        """
        )
        found = in_browser(sounds, example(sounds), question)
        assert found == {
            "first": [2, 0],
            "clicked": [[3, 1], True, True, True],
            "src": "3-1.flac",
            "up": [[2, 1], True, False],
            "left": [2, 1],
            "paused": True,
            "silent": [[3, 1], True, True],
            "around": [0, 1],
            "playing": 3,
        }

    def test_the_volume_is_matched_and_keeps_its_match_when_a_person_changes_it(self, sounds):
        text = example(sounds).replace('data-volume="1.0"', 'data-volume="0.5"', 1)
        question = (
            HELP
            + """
          button(1, 0).click(); await plays(); found.full = heard().volume;
          button(0, 0).click(); await plays(); found.matched = heard().volume;
          heard().volume = 0.25; await wait(100);
          key('ArrowDown'); await wait(100); found.halved = heard().volume;
          key('ArrowUp'); heard().volume = 1; await wait(100); found.most = heard().volume;
          found.copies = [...document.querySelectorAll('.copy audio')].map(p => p.volume);
        """
        )
        found = in_browser(sounds, text, question)
        assert found == {"full": 1, "matched": 0.5, "halved": 0.5, "most": 0.5, "copies": [1, 1]}

    def test_blind_listening_hides_every_name_draws_anew_and_unveils_the_votes(self, sounds):
        names = ("zebra", "yak", "xerus")
        question = (
            HELP
            + """
          const shown = () => document.body.innerText, names = ['zebra', 'yak', 'xerus', 'without an adapter'];
          const drawn = new Set();
          for (let n = 0; n < 20; n += 1) {
            document.getElementById('blind').click();
            found.seen = names.filter(name => shown().includes(name));
            found.said = names.filter(name => document.querySelector('.grid').innerHTML.split('class="letter"')
              .some(part => part.includes(`aria-label="${name}`)));
            found.letters = [...document.querySelectorAll('.grid tbody th')].map(words);
            button(2, 1).click(); drawn.add(heard().src); heard().pause();
            if (n < 19) document.getElementById('blind').click();
          }
          found.draws = drawn.size > 1;
          found.hidden = document.getElementById('unveil').hidden;
          const voted = [];
          for (const [r, p] of [[2, 1], [0, 0], [1, 0]]) {
            button(r, p).click(); await plays();
            if (r) key('v'); else document.getElementById('vote').click();
            if (r !== 0) voted.push(+heard().src.split('/').pop()[0]);
          }
          found.stars = document.querySelectorAll('.grid .voted').length;
          document.getElementById('unveil').click();
          const rows = ['without an adapter', 'zebra', 'yak', 'xerus'];
          const tally = words(document.getElementById('tally'));
          found.tally = voted.every(n => tally.includes(rows[n]));
          found.counts = (tally.match(/[0-9]+ of 2 votes/g) ?? []).map(part => parseInt(part)).reduce((a, b) => a + b);
          const marked = [...document.querySelectorAll('.grid .voted')].map(e => words(e.closest('tr').children[0]));
          found.marked = marked.every(name => voted.some(n => name.startsWith(rows[n])));
          found.names = [...document.querySelectorAll('.grid tbody th')].map(words);
          found.paused = heard().paused;
          document.getElementById('blind').click();
          found.again = [document.querySelectorAll('.voted').length, document.getElementById('tally').hidden];
        """
        )
        found = in_browser(sounds, example(sounds, names=names), question)
        assert found == {
            "seen": [],
            "said": [],
            "letters": ["A", "B", "C", "D"],
            "draws": True,
            "hidden": True,
            "stars": 2,
            "tally": True,
            "counts": 2,
            "marked": True,
            "names": ["without an adapter", *names],
            "paused": True,
            "again": [0, True],
        }

    def test_a_clip_that_is_gone_is_said_and_hostile_names_stay_text(self, tmp_path):
        question = (
            HELP
            + """
          button(0, 0).click(); await wait(500);
          found.said = document.getElementById('prompt').textContent;
          found.title = words(document.querySelectorAll('.grid tbody th')[1]).includes('<img');
        """
        )
        found = in_browser(tmp_path, example(tmp_path, names=(HOSTILE, "b"), caption=HOSTILE), question)
        assert "cannot be played" in found["said"]
        assert found["title"]
