"""Every page can be read: by day and by night, on a desk, on a phone and on paper."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.adapters.rank_map import Module, RankMap
from sidestep.cli.main import main
from sidestep.errors import ExitStatus
from sidestep.events import Event, Table
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.audit import audit
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.estimate.run import SHADES, heat_map, top_modules
from sidestep.tasks.estimate.run import page as rank_page
from sidestep.tasks.train.report import page as report_page
from tests.browser import in_frames, needs_chromium
from tests.song_library import tone, write_sndfile
from tests.tasks.score.test_listening import example as listening_page
from tests.tasks.train.test_report import preview
from tests.tasks.train.test_report import values as run_values

PROJECTIONS = [
    *(f"{part}_attn.to_{letter}" for part in ("self", "cross") for letter in ("q", "k", "v", "out.0")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


COLUMNS = dict(
    zip(
        [*(f"{part} {letter}" for part in ("self", "cross") for letter in "qkvo"), "mlp gate", "mlp up", "mlp down"],
        PROJECTIONS,
        strict=True,
    )
)


def energies(total: float, falls: float) -> tuple[float, ...]:
    """Of 32 directions, each `falls` times the one before."""
    parts = [falls**i for i in range(32)]
    return tuple(total * part / sum(parts) for part in parts)


def rank_map(**changes) -> RankMap:
    """24 layers in which the first module is the loudest and says one thing, and the others get more to say."""
    modules = {}
    for layer in range(24):
        for column, name in enumerate(PROJECTIONS):
            found = energies(10.0 ** -(layer / 4 + column / 3), 0.1 + 0.07 * column)
            rank = 4 + 3 * column
            modules[f"layers.{layer}.{name}"] = Module(
                shape=(64, 64), rank=rank, score=sum(found), confidence=0.9, spectrum=found, confirmed=found
            )
    known = {
        "model": {"variant": "turbo", "folder": "acestep-v15-turbo", "identity": "x"},
        "data": {"fingerprint": "x", "songs": 9},
        "settings": {"focus": "balanced", "seed": 42},
        "budget": 700_000,
        "spent": 655_000,
        "batches": 64,
        "converged": True,
        "agreement": 0.97,
        "modules": modules,
        "curve": ((0, 0.0), (200_000, 0.7), (655_000, 0.931), (1_000_000, 0.98)),
    }
    return RankMap(**known | changes)


def audit_page(folder: Path) -> str:
    """Of songs that are quiet, short, without caption, and of one that cannot be read."""
    for name, seconds, how in (("a.wav", 12, 1), ("quiet.wav", 12, 0.001), ("short.flac", 3, 1), ("c.wav", 31, 0.75)):
        write_sndfile(folder / name, tone(seconds=seconds) * how, 48_000)
    words = "caption: a slow song\nbpm: 90\nkey: Am\nlyrics: [Verse]\\nla la la"
    (folder / "a.txt").write_text(words, encoding="utf-8")
    (folder / "broken.mp3").write_bytes(b"no music")
    built = build_dataset(BuildDatasetConfig(input=folder), lambda event: None)
    return audit(built.path, lambda event: None, unreadable=built.failed).page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    many = [
        {"flag": f"--setting-{n}", "value": "checkpoints/x", "default": "none", "help": "a folder of checkpoints " * 6}
        for n in range(9)
    ]
    run = run_values(previews=[preview(), preview("another")], settings=many, drift=0.01)
    return {
        "report": report_page(run),
        "audit": audit_page(tmp_path_factory.mktemp("songs")),
        "rank map": rank_page(rank_map()),
        "listening": listening_page(
            tmp_path_factory.mktemp("clips"),
            names=(*(f"epoch_{n:04}" for n in range(10, 90, 10)), "another/adapter-of-a-program.safetensors"),
            strengths=(0.5, 0.75, 1.0, 1.25),
            prompts=8,
        ),
    }


# Colours are painted to know them, whatever their notation, each over what is behind it.
LOOK = """
  await wait(300);
  const brush = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const painted = colours => {
    brush.clearRect(0, 0, 1, 1);
    for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data];
  };
  const backgrounds = e => e ? [...backgrounds(e.parentElement), getComputedStyle(e).backgroundColor] : ['white'];
  const light = ([r, g, b]) => [r, g, b]
    .map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const shown = e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().width > 0;
  const drawn = e => e instanceof SVGElement;
  const texts = [...document.body.querySelectorAll('*')].filter(e =>
    hasText(e) && shown(e) && !e.closest('script, style, option, select, title'));
  const name = e => `${e.tagName} ${e.getAttribute('class') ?? ''} ${e.textContent.trim().slice(0, 40)}`;
  found.texts = texts.length;
  found.pale = texts.map(e => {
    const below = backgrounds(drawn(e) ? e.closest('svg').parentElement : e);
    const ink = getComputedStyle(e)[drawn(e) ? 'fill' : 'color'];
    const [a, b] = [light(painted(below)), light(painted([...below, ink]))].sort((x, y) => y - x);
    return [name(e), Math.round((a + 0.05) / (b + 0.05) * 10) / 10];
  }).filter(([, contrast]) => contrast < 4.5);
  found.tiny = texts.map(e => {
    const scale = drawn(e) ? e.getScreenCTM().a : 1;
    return [name(e), Math.round(parseFloat(getComputedStyle(e).fontSize) * scale * 10) / 10];
  }).filter(([, size]) => size < 9);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
  const box = e => e.getBoundingClientRect();
  found.overlaps = []; found.cut = []; found.empty = 0;
  for (const picture of document.querySelectorAll('svg')) {
    if (!shown(picture)) continue;
    const words = [...picture.querySelectorAll('text')], bars = [...picture.querySelectorAll('rect.bar')];
    words.forEach((word, i) => {
      for (const other of [...words.slice(i + 1), ...bars])
        if (meet(box(word), box(other))) found.overlaps.push([name(word), name(other)]);
      const [inner, outer] = [box(word), box(picture)];
      if (inner.left < outer.left - 2 || inner.top < outer.top - 3 || inner.right > outer.right + 2)
        found.cut.push(name(word));
    });
    found.empty += picture.querySelectorAll('path, polyline, polygon, rect').length === 0;
  }
  const wide = [...document.body.querySelectorAll('*')].filter(e => shown(e) && !e.closest('.scroll, svg'));
  found.outside = wide.filter(e => box(e).right > innerWidth + 1).map(name);
  const lines = e => {
    const range = document.createRange();
    range.selectNodeContents(e);
    return new Set([...range.getClientRects()].map(r => r.top)).size;
  };
  found.split = [...document.querySelectorAll('.settings td')].filter(e => shown(e) && e.textContent.length < 14
    && lines(e) > 1).map(name);
"""
ON_PAPER = """
  for (const rule of [...document.styleSheets[0].cssRules].filter(rule => rule instanceof CSSMediaRule)) {
    if (rule.conditionText === 'print') rule.media.mediaText = 'all';
    else if (rule.conditionText.includes('screen')) rule.media.mediaText = 'not all';
  }
"""
FINE = {"pale": [], "tiny": [], "overlaps": [], "cut": [], "empty": 0, "outside": [], "split": []}


class TestInABrowser:
    pytestmark = needs_chromium

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_every_text_is_read_and_every_chart_drawn_on_a_desk_and_on_a_phone(self, pages, tmp_path, scheme):
        cases = [(name, width) for name in pages for width in (360, 1000)]
        answers = in_frames(tmp_path, [(pages[name], width) for name, width in cases], LOOK, scheme)
        for case, found in zip(cases, answers, strict=True):
            assert found.pop("texts") > 40, case
            assert found == FINE, case

    def test_paper_is_white_and_has_what_is_folded_up_but_no_buttons(self, pages, tmp_path):
        question = (
            ON_PAPER
            + LOOK
            + """
          const folded = [...document.querySelectorAll('details > :not(summary)')];
          found.folded = [folded.length > 0, folded.every(e => shown(e) && box(e).height > 5)];
          found.paper = getComputedStyle(document.body).backgroundColor;
          found.buttons = [...document.querySelectorAll('button, audio, input, select')].filter(shown).length;
        """
        )
        asked = [name for name in pages if name != "rank map"]
        for name, found in zip(
            asked, in_frames(tmp_path, [(pages[n], 720) for n in asked], question, "dark"), strict=True
        ):
            assert found.pop("texts") > 40, name
            assert found == FINE | {"folded": [True, True], "paper": "rgb(255, 255, 255)", "buttons": 0}, name


def test_the_rank_page_explains_a_strong_module_with_a_small_rank_by_one_of_its_own():
    text = rank_page(rank_map())
    assert "Why can a strong module get a small rank?" in text
    [(loud, times, rich, small, large, few, many)] = re.findall(
        r"<b>(.*?)</b> answers (.*?) times as strongly as <b>(.*?)</b>, yet gets rank (\d+), and the other (\d+)."
        r" (\d+) directions hold 95 % of what the first has to say; the second needs (\d+)",
        text,
    )
    modules = rank_map().modules
    first, second = (
        modules[f"layers.{at.rpartition(' ')[2]}.{COLUMNS[at.partition(' of')[0]]}"] for at in (loud, rich)
    )
    assert float(times.replace(",", "")) == pytest.approx(first.score / second.score, rel=0.05)
    assert (int(small), int(large)) == (first.rank, second.rank)
    for module, needed in ((first, int(few)), (second, int(many))):
        assert sum(module.confirmed[: needed - 1]) < 0.95 * sum(module.confirmed) <= sum(module.confirmed[:needed])
    assert first.rank < second.rank
    assert int(few) < int(many)


def test_where_the_strong_modules_have_the_large_ranks_no_such_example_is_made_up():
    rising = {name: replace(module, rank=34 - module.rank) for name, module in rank_map().modules.items()}
    assert "So it is here" not in rank_page(rank_map(modules=rising))


def test_files_that_cannot_be_read_are_on_the_audit_page_and_in_the_table_of_the_terminal(tmp_path, capsys):
    write_sndfile(tmp_path / "songs" / "a.wav", tone(seconds=11), 48_000)
    (tmp_path / "songs" / "brok&n.mp3").write_bytes(b"no music")
    assert main(["build-dataset", "--input", str(tmp_path / "songs"), "--audit"]) == ExitStatus.SOME_FAILED
    text = (tmp_path / "songs" / "dataset-audit.html").read_text(encoding="utf-8")
    assert "cannot be read: 1 song" in text
    assert "<li>brok&amp;n.mp3 <span" in text
    row = next(line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line)
    assert "1 of 2" in row
    assert "brok&n.mp3" in row


def figures(page: str) -> dict[str, str]:
    """The cards at the top of a page: name and value."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def cells(page: str, heading: str) -> list[str]:
    """The values of the shaded table under a heading."""
    return re.findall(r"<td style=[^>]*>([^<]*)</td>", page.split(f"<h2>{heading}</h2>")[1].split("</table>")[0])


def test_the_audit_page_counts_as_the_terminal_does(tmp_path):
    events: list[Event] = []
    audit_page(tmp_path)  # makes the songs
    built = build_dataset(BuildDatasetConfig(input=tmp_path), events.append)
    shown = figures(audit(built.path, events.append, unreadable=built.failed).page.read_text(encoding="utf-8"))
    said, found, _ = (dict(row[:2] for row in event.rows) for event in events if isinstance(event, Table))
    assert (shown["Songs"], shown["Music"]) == (said["songs"], said["length"].split(" in all")[0])
    assert [f"{shown[name]} of 4" for name in ("With lyrics", "With tempo", "With key")] == [
        said[name] for name in ("lyrics", "tempo", "key")
    ]
    assert found == {
        "cannot be read": "1 of 5",
        "near-silence": "1 of 5",
        "shorter than 10 s": "1 of 5",
        "no caption": "3 of 5",
    }
    assert said["could not be read"] == "1"


def test_the_rank_page_shows_the_ranks_and_scores_of_the_terminal():
    found = rank_map()
    text = rank_page(found)
    assert cells(text, "Ranks") == [cell.strip(SHADES) for row in heat_map(found).rows for cell in row[1:]]
    rounded = [f"{float(score.replace('&lt;', '')):.0f}" for score in cells(text, "Scores")]
    highest = sorted(rounded, key=int, reverse=True)
    assert [row[2] for row in top_modules(found).rows] == highest[:12]
