"""report.html: everything of a run on one page, safe whatever its songs are called, and alive in a real browser."""

import contextlib
import json
import math
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sidestep.adapters.attach import attach
from sidestep.audio.io import write_flac
from sidestep.events import Event, Notice, Saved
from sidestep.files import portable
from sidestep.pages.charts import by_layer
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import options_of
from sidestep.tasks.train import loop
from sidestep.tasks.train.report import (
    MOST_POINTS,
    PLACE,
    curve,
    judged,
    page,
    previews_in,
    ranks_of,
    tell_what_was_judged,
    write_report,
)
from sidestep.tasks.train.run import Evaluation, Point
from sidestep.tasks.train.setup import train
from sidestep.terminal.terminal import as_lines
from tests.adapters.test_adapters import config as adapter_settings
from tests.adapters.test_adapters import turbo
from tests.browser import in_browser, needs_chromium
from tests.tasks.train.test_previews import config, tensors
from tests.training_world import prepared

__all__ = ["tensors"]  # the fixture

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&amp;\u2028"


@pytest.mark.parametrize("adapter_type", ["lora", "oft"])
def test_the_rank_of_an_oft_is_the_size_of_its_blocks(adapter_type):
    ranks = ranks_of(attach(turbo(), adapter_settings(adapter_type=adapter_type, rank=8)))
    assert set(ranks.values()) == {8}


def values(**changes) -> dict:
    known = {
        "title": "night drive",
        "finished": True,
        "written": "2026-01-02T03:04:05+00:00",
        "adapter": "lokr",
        "model": "acestep-v15-turbo",
        "device": "cpu",
        "parameters": 1234567,
        "songs": 3,
        "held_out": 1,
        "music": "7:15",
        "step": 40,
        "total_steps": 40,
        "epoch": 4,
        "total_epochs": 4,
        "timesteps": "discrete, 8 steps, shift 3",
        "told": [("captions", "3 songs with 2"), ("--tag-dropout 0.1", "no trigger word in 10.0% of visits")],
        "marks": [{"epoch": 7, "loss": "0.4321", "below": "5.1%"}],
        "named": ["odd.pt"],
        "drift": 0.0012,
        "law": "config.json says is_turbo=true",
        "cfg_dropout": 0.15,
        "best": {"loss": 0.61, "epoch": 3, "by": "validation loss"},
        "points": [[i, 1 / i if i != 5 else None, 1e-4, 0.3, 2**31] for i in range(1, 41)],
        "epoch_losses": [[1, 0.9], [2, None], [3, 0.7], [4, 0.6543]],
        "validation": [[20, 0.8, None], [40, 0.7, 0.65]],
        "bins": [{"samples": 4 * i, "loss": i / 10 if i else None} for i in range(10)],
        "ranks": {"layers.0.self_attn.q_proj": 8, "layers.0.mlp.up_proj": 64, "layers.1.self_attn.q_proj": 32},
        "previews": [],
        "judged": "",
        "settings": [{"flag": "--rank", "value": "32", "default": "64", "help": "LoRA rank"}],
        "defaults": [{"flag": "--lr", "value": "0.0001", "default": "0.0001", "help": "learning rate"}],
        "command": "uv run train.py fixed --rank 32",
    }
    return known | changes


def preview(caption: str = "a song", base: str | None = "previews/base/01.flac", takes: int = 2) -> dict:
    urls = [
        {"step": 10 * n, "label": f"epoch {n}", "src": f"previews/epoch_{n:04}/01.flac"} for n in range(1, takes + 1)
    ]
    return {
        "prompt": {"caption": caption, "lyrics": "la\nla", "bpm": 90, "duration": 1.0, "seed": 42},
        "base": base,
        "model": "",
        "takes": urls,
        "written": [],
    }


class Outline(HTMLParser):
    """Elements of a page, and what they load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "data", "action")]


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    return parser


@pytest.fixture(scope="module")
def run(tensors, tmp_path_factory) -> tuple[Path, list[Event]]:
    folder, events = tmp_path_factory.mktemp("report") / "a <b> & c", []
    train(config(tensors, folder, preview_every=1, epochs=2, val_split=0.5), events.append)
    return folder, events


def test_a_run_leaves_a_page_with_its_curves_previews_settings_and_command(run):
    folder, events = run
    text = (folder / "report.html").read_text("utf-8")
    assert [e.path for e in events if isinstance(e, Saved) and e.what == "report"] == [str(folder / "report.html")]
    for words in (
        "a &lt;b&gt; &amp; c",
        "finished",
        "step 2 of 2",
        "LoRA adapter of",
        "acestep-v15-turbo",
        "Rank 2 in each of 24 modules",
        "--val-split",
    ):
        assert words in text, words
    assert f"--output-dir '{folder}'" in unescape(text)
    drawn = json.loads(text.split('id="values">')[1].split("</script>")[0])
    assert [p[0] for p in drawn["points"]] == [1, 2]
    assert [v[0] for v in drawn["validation"]] == [1, 2]
    assert sum(b["samples"] for b in drawn["bins"]) == 2
    players = [url for url in outline(text).loads if url.endswith(".flac")]
    assert len(players) == 4
    assert all((folder / url).is_file() for url in players)


def test_the_page_says_the_losses_that_the_terminal_says(run):
    folder, events = run
    text = (folder / "report.html").read_text("utf-8")
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    lines = [line for event in events for line in as_lines(event)]
    said = [re.search(r"mean loss ([\d.]+)", line) for line in lines if "done: mean loss" in line]
    measured = [re.search(r"loss ([\d.]+)", line) for line in lines if line.startswith("validation at step")]
    best = [re.search(r"loss ([\d.]+)", line) for line in lines if line.startswith("saved best")]
    assert shown["Loss of the last epoch"] == said[-1][1]
    assert shown["Validation"] == measured[-1][1]
    assert shown["Best"] == best[-1][1]
    [(loss, rate)] = [
        re.search(r"step 2/2.* loss ([\d.]+), lr (\S+),", line).groups() for line in lines if "step 2/2" in line
    ]
    drawn = json.loads(text.split('id="values">')[1].split("</script>")[0])["points"][-1]
    assert f"{drawn[1]:.4f}" == loss
    assert f"{drawn[2]:.1e}" == rate


def test_the_page_has_every_setting_that_the_run_had_with_its_value(run):
    folder, _ = run
    text = (folder / "report.html").read_text("utf-8")
    named = re.findall(r'<th scope="row"><code>(.*?)</code>', text)
    assert sorted(named) == sorted(o.flag for o in options_of(TrainConfig).values())
    assert re.search(r"<code>--val-split</code>.*?<td>0.5</td>", text)
    defaults = text.split("at their defaults</summary>")[1]
    assert re.search(r"<code>--weight-decay</code><small>[^<]*</small></th><td>0.01</td>", defaults)
    assert "<code>--val-split" not in defaults


def test_the_page_is_there_after_the_first_epoch_and_says_that_the_run_goes_on(tensors, tmp_path, monkeypatch):
    seen = []

    def write_and_read(run):
        write_report(run)
        seen.append((tmp_path / "report.html").read_text("utf-8"))

    monkeypatch.setattr(loop, "write_report", write_and_read)
    train(config(tensors, tmp_path, epochs=2), lambda event: None)
    assert ["running" in text.split("<h1>")[0] for text in seen] == [True, True]
    assert "epoch 1 of 2" in seen[0]
    assert "epoch 2 of 2" in seen[1]
    assert 'class="state finished"' in (tmp_path / "report.html").read_text("utf-8")


def test_the_page_of_a_hundred_thousand_steps_is_small(tensors, tmp_path):
    """Also where each of them was an epoch with a validation, as with one song."""
    run = prepared(config(tensors, tmp_path, epochs=1, ema_decay=0.9))
    for n in range(1, 100_001):
        loss = 1 / math.sqrt(n)
        run.history.points.append(Point(n, n, loss, 1e-4 * loss, 2 * loss, 2**31 + n))
        run.history.epoch_losses.append(loss / 3)
        run.history.evaluations.append(Evaluation(n, n, loss / 7, loss / 9))
    write_report(run)
    run.tensorboard.close()
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    drawn = json.loads((tmp_path / "report.html").read_text("utf-8").split('id="values">')[1].split("</script>")[0])
    assert [drawn[name][-1][0] for name in ("points", "epoch_losses", "validation")] == [100_000] * 3


def test_a_page_that_cannot_be_written_costs_a_warning_and_not_the_run(tensors, tmp_path):
    (tmp_path / "report.html").mkdir()
    events: list[Event] = []
    train(config(tensors, tmp_path, epochs=1), events.append)
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    assert {
        e.message.split(":")[-1].split("(")[0].strip() for e in events if isinstance(e, Notice) and e.level == "warning"
    } == {"not written this time"}
    assert [e.what for e in events if isinstance(e, Saved)] == ["checkpoint", "final"]  # it says of no page that it is


def test_tensorboard_gets_the_timestep_histogram_and_the_ranks(run):
    events = EventAccumulator(str(next((run[0] / "runs").iterdir())), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"timesteps", "ranks"} <= set(tags["histograms"])
    assert events.Histograms("timesteps")[-1].histogram_value.num == 2
    assert any(tag.startswith("loss by timestep/") for tag in tags["scalars"])


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "C:\\elsewhere", "What? 3:15", "CON", "a/b."])
def test_the_curves_stay_in_the_runs_folder_whatever_the_run_is_called(tensors, tmp_path, monkeypatch, name):
    curves = []
    monkeypatch.setattr("sidestep.tasks.train.setup.SummaryWriter", lambda folder, **_: curves.append(folder))
    with contextlib.suppress(AttributeError):  # the run ends where it would write the first curve
        prepared(replace(config(tensors, tmp_path / "run"), run_name=name))
    assert curves[0].parent == tmp_path / "run" / "runs"
    assert curves[0].name == portable(name)
    assert not set(curves[0].name) & set('<>:"|?*/\\')


def test_the_page_tells_what_was_judged_and_of_an_average_each_time_anew(tmp_path):
    assert judged(tmp_path) == PLACE
    (tmp_path / "report.html").write_text(page(values(judged=PLACE)), encoding="utf-8")
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "listen.html").touch()
    lines = []
    for found in ("", "[]", "{}", '{"average": null}', '{"average": "-1 % <b>"}', '{"average": "-2 % \\\\1"}'):
        (tmp_path / "score" / "results.json").write_text(found, encoding="utf-8")
        tell_what_was_judged(tmp_path)
        [line] = [line for line in (tmp_path / "report.html").read_text("utf-8").splitlines() if PLACE in line]
        assert line.count("score/listen.html") == 1
        assert line == judged(tmp_path)
        assert line in page(values(judged=judged(tmp_path)))  # as a run that goes on writes it
        lines.append(line.partition("</p>")[2])
    told = ("-1 % &lt;b&gt;", "-2 % \\1")
    assert lines == [*[""] * 4, *(f'<p class="quiet">{words}</p>' for words in told)]


def test_nothing_is_loaded_but_the_previews_themselves():
    found = outline(page(values(previews=[preview()])))
    assert sorted(found.loads) == ["previews/base/01.flac", "previews/epoch_0002/01.flac"]
    assert not {"link", "img", "iframe", "object"} & set(found.tags)


def test_no_name_or_text_can_break_out_of_the_page():
    hostile = values(
        title=HOSTILE,
        model=HOSTILE,
        law=HOSTILE,
        timesteps=HOSTILE,
        device=HOSTILE,
        told=[(HOSTILE, HOSTILE)],
        command=HOSTILE,
        best={"loss": 1.0, "epoch": 1, "by": HOSTILE},
        settings=[{"flag": HOSTILE, "value": HOSTILE, "default": HOSTILE, "help": HOSTILE}],
        previews=[
            preview(HOSTILE) | {"base": HOSTILE, "prompt": {"caption": HOSTILE, "lyrics": HOSTILE, "keyscale": HOSTILE}}
        ],
    )
    found = outline(page(hostile))
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    text = page(values(validation=[[1, 0.5, HOSTILE]])).split('id="values">')[1].split("</script>")[0]
    assert "<" not in text
    assert "&" not in text
    assert json.loads(text)["validation"] == [[1, 0.5, HOSTILE]]


def test_half_a_surrogate_pair_in_a_name_becomes_a_question_mark():
    assert "a?b" in page(values(title="a\udc80b", previews=[preview("c\ud800d")]))


EMPTY = {
    "points": [],
    "epoch_losses": [],
    "validation": [],
    "bins": [{"samples": 0, "loss": None}] * 10,
    "ranks": {},
    "best": None,
    "total_steps": 0,
    "step": 0,
    "settings": [],
}


def test_a_run_without_anything_yet_has_a_page_too():
    assert "No step has been logged yet." in page(values(**EMPTY))


def test_long_curves_are_averaged_and_numbers_that_are_none_left_out():
    points = [
        Point(step, 1, math.nan if step == 3 else float(step), 1e-4, 0.5, step)
        for step in range(1, 4 * MOST_POINTS + 1)
    ]
    rows = curve(points)
    assert len(rows) == MOST_POINTS
    assert rows[0] == [4, (1 + 2 + 4) / 3, 1e-4, 0.5, 4]
    assert curve([Point(1, 1, math.nan, 1e-4, math.inf)]) == [[1, None, 1e-4, None, None]]


def test_ranks_stand_in_rows_by_layer_and_columns_by_module():
    columns, rows = by_layer(values()["ranks"])
    assert columns == ["self q", "mlp up"]
    assert rows == [(0, [8, 64]), (1, [32, None])]
    assert by_layer({"layers.2.cross_attn.to_out.0": 1}) == (["cross o"], [(2, [1])])


def test_previews_are_found_with_urls_that_hold_for_any_name(tmp_path):
    for place, step in (("base", 0), ("epoch_0010", 40), ("epoch_0002", 8), ("step_000050", 50)):
        path = tmp_path / "previews" / place / "01-50% ö#?.flac"
        write_flac(path, np.zeros((2, 480), np.float32), 48000)
        said = {"prompt": {"caption": "x"}, "step": step, "epoch": int(place[-4:]) if "epoch" in place else 0}
        path.with_suffix(".json").write_text(json.dumps(said), "utf-8")
    (tmp_path / "previews" / "base" / "02.json").write_text("{", "utf-8")
    (tmp_path / "previews" / "base" / "03.json").write_text('{"prompt": {}, "step": 1, "epoch": 1}', "utf-8")
    [entry] = previews_in(tmp_path)
    assert entry["base"] == "previews/base/01-50%25%20%C3%B6%23%3F.flac"
    assert [take["label"] for take in entry["takes"]] == ["epoch 2", "epoch 10", "step 50"]


# ---- in a real browser ----


class TestInABrowser:
    pytestmark = needs_chromium

    def test_every_chart_is_drawn_and_answers_to_its_controls(self, tmp_path):
        question = """
          const charts = [...document.querySelectorAll('.chart')];
          found.drawn = charts.map(c => c.querySelectorAll('svg path, svg rect').length > 0);
          const path = () => document.querySelector('#chart-loss path:last-of-type').getAttribute('d');
          const ticks = () => [...document.querySelectorAll('#chart-loss text')].map(t => t.textContent).join(' ');
          const before = [path(), ticks()];
          const log = document.getElementById('log'); log.checked = true; log.dispatchEvent(new Event('input'));
          found.log = ticks() !== before[1]; log.checked = false; log.dispatchEvent(new Event('input'));
          const smooth = document.getElementById('smooth'); smooth.value = 0; smooth.dispatchEvent(new Event('input'));
          found.unsmoothed = document.querySelectorAll('#chart-loss path').length;
          const picture = document.querySelector('#chart-loss svg'), box = picture.getBoundingClientRect();
          picture.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 14, clientY: box.top + 60}));
          found.tip = document.querySelector('#chart-loss .tip').innerText.split('\\n');
          picture.dispatchEvent(new PointerEvent('pointerleave'));
          found.gone = document.querySelector('#chart-loss .tip').hidden;
        """
        found = in_browser(tmp_path, page(values()), question)
        assert found["drawn"] == [True] * 6
        assert found["log"]
        assert found["gone"]
        assert found["unsmoothed"] == 3
        assert found["tip"] == ["step 40", "training 0.025", "validation 0.7", "validation, averaged weights 0.65"]

    def test_the_players_of_a_real_run_play_and_switch_at_the_same_place(self, run, tmp_path):
        folder = tmp_path / "a #1 run"
        shutil.copytree(run[0], folder)
        question = """
          const players = [...document.querySelectorAll('audio')];
          for (let i = 0; i < 40 && players.some(p => !(p.duration > 0)); i += 1) await wait(100);
          found.seconds = players.map(p => Math.round(p.duration * 100) / 100);
          found.errors = players.map(p => p.error && p.error.message);
          const [base, adapted] = players;
          base.currentTime = 0.5; await base.play();
          document.querySelector('.switch').click();
          found.place = adapted.currentTime >= 0.4; found.paused = base.paused;
          const take = document.querySelector('.take'); take.selectedIndex = 0; take.dispatchEvent(new Event('change'));
          found.src = decodeURIComponent(adapted.src).split('/').slice(-2).join('/');
          adapted.pause();
        """
        found = in_browser(folder, (folder / "report.html").read_text("utf-8"), question)
        assert found == {
            "seconds": [1.0] * 4,
            "errors": [None] * 4,
            "place": True,
            "paused": True,
            "src": "epoch_0001/01-tag-song-a.flac",
        }

    @pytest.mark.parametrize("width", [360, 1000])
    def test_the_page_fits_a_phone_and_a_desk_and_runs_no_foreign_script(self, tmp_path, width):
        long = "--" + "very-long-" * 30
        settings = [{"flag": long, "value": long, "default": long, "help": HOSTILE}]
        hostile = values(title=HOSTILE + long, previews=[preview(HOSTILE)], settings=settings, command=long)
        question = """
          await wait(200);
          found.spare = innerWidth - document.documentElement.scrollWidth;
          found.title = document.querySelector('h1').textContent;
        """
        found = in_browser(tmp_path, page(hostile), question, width)
        assert found["spare"] >= 0
        assert found["title"] == HOSTILE + long

    def test_an_empty_page_and_one_with_a_single_step_work_too(self, tmp_path):
        one = values(points=[[1, 0.5, 1e-4, 0.0, None]], validation=[], epoch_losses=[[1, 0.5]])
        for place, shown in enumerate((values(**EMPTY), one)):
            (tmp_path / str(place)).mkdir()
            in_browser(tmp_path / str(place), page(shown), "found.ok = true;")
