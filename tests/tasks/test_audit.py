"""--audit: everything that deserves a look is found, nothing else is, and the page works in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from immich_memories_music import tracks_dir

from sidestep.audio.io import SAMPLE_RATE, AudioInfo, decode
from sidestep.cli.main import main
from sidestep.data.manifest import Sample
from sidestep.errors import ExitStatus, UserError
from sidestep.events import Progress, Saved, Table
from sidestep.pages import templates
from sidestep.pages.charts import bars, histogram, waveform
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.audit import (
    CACHE,
    Song,
    Variety,
    audit,
    captions_told,
    find,
    guess,
    measure,
    measure_pieces,
    same_recording,
    token_counter,
    url,
    variety,
)
from sidestep.tasks.build_dataset import build_dataset
from tests.song_library import make_library, tone, write_ffmpeg, write_sndfile

INFO = AudioInfo(seconds=12, sample_rate=48_000, channels=2, format="WAV/PCM_16")


def audited(folder: Path, **settings):
    """(finding → names of its songs, audit, events) of a folder."""
    path = build_dataset(BuildDatasetConfig(input=folder), lambda e: None).path
    events = []
    result = audit(path, events.append, **settings)
    return {f.what: set(f.songs) for f in result.findings}, result, events


def music(seconds: float = 12, seed: int = 0) -> np.ndarray:
    """Float32 [S, 2]: noise whose level and colour change twice a second."""
    rng = np.random.default_rng(seed)
    parts = [
        np.convolve(rng.normal(0, rng.uniform(0.02, 0.2), 24_000), np.ones(rng.integers(1, 30)) / 10, "same")
        for _ in range(round(seconds * 2))
    ]
    return np.repeat(np.concatenate(parts)[:, None].clip(-0.8, 0.8), 2, axis=1).astype(np.float32)


def test_each_finding_is_made_where_it_is_due_and_nowhere_else(tmp_path):
    song = (music() * 32767).astype(np.int16)  # whole numbers are the same in every lossless format
    for name, audio, how in [
        ("good.wav", song, {}),
        ("copy.flac", song, {"format": "FLAC"}),
        ("coded.mp3", song / np.float32(32768), {"format": "MP3"}),
        ("other.wav", music(seed=1), {}),
        ("silent.wav", music(seed=2) * 1e-4, {}),
        ("half silent.wav", music(seed=3) * np.r_[np.ones(230_400), np.zeros(345_600)][:, None].astype(np.float32), {}),
        ("loud.wav", (music(seed=4) * 20).clip(-1, 1), {}),
        ("short.wav", music(3, seed=5), {}),
        ("sung.wav", music(seed=6), {}),
        ("words.wav", music(seed=7), {}),
        ("noted.wav", music(seed=8), {}),
    ]:
        write_sndfile(tmp_path / name, audio, 48_000, **how)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption: x, {name}", encoding="utf-8")
    (tmp_path / "other.txt").write_text("caption: As in a TOWN", encoding="utf-8")
    (tmp_path / "noted.txt").write_text("caption: as in a town!", encoding="utf-8")
    (tmp_path / "short.caption.2.txt").write_text("X: short, wav", encoding="utf-8")
    (tmp_path / "coded.caption.2.txt").write_text("very long " * 300, encoding="utf-8")
    write_sndfile(tmp_path / "dull.wav", music(seed=9)[::6], 8_000)
    (tmp_path / "sung.txt").write_text("caption: x\nis_instrumental: no", encoding="utf-8")
    (tmp_path / "words.txt").write_text(
        "caption: " + "very long " * 300 + "\nlyrics: " + "la la la\n" * 3000, encoding="utf-8"
    )
    write_sndfile(
        tmp_path / "broken.flac",
        np.random.default_rng(0).normal(0, 0.1, (960_000, 2)).astype(np.float32),
        48_000,
        format="FLAC",
    )
    whole = (tmp_path / "broken.flac").read_bytes()
    (tmp_path / "broken.flac").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "gone.wav").write_bytes((tmp_path / "other.wav").read_bytes())
    path = build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None).path
    (tmp_path / "gone.wav").unlink()
    data = json.loads(path.read_text(encoding="utf-8"))
    next(s for s in data["samples"] if s["audio_path"] == "noted.wav")["duration"] = 200
    path.write_text(json.dumps(data), encoding="utf-8")
    found = {f.what: set(f.songs) for f in audit(path, lambda e: None).findings}
    assert found == {
        "cannot be read": {"gone.wav"},
        "break off": {"broken.flac"},
        "same sound": {"good.wav"},
        "same recording in another coding": {"copy.flac"},
        "near-silence": {"silent.wav", "half silent.wav"},
        "clipping": {"loud.wav"},
        "shorter than 10 s": {"short.wav"},
        "no caption": {"broken.flac", "dull.wav", "gone.wav"},
        "sung, but no lyrics": {"sung.wav"},
        "caption of another song, word by word": {"other.wav"},
        "one caption several times": {"short.wav"},
        "prompt of more than 256 tokens": {"words.wav", "coded.mp3"},
        "lyrics of more than 2048 tokens": {"words.wav"},
        "other length than noted": {"noted.wav", "broken.flac"},
        "low sample rate": {"dull.wav"},
    }


def test_a_sound_data_set_has_no_findings_and_the_table_says_so(tmp_path):
    write_sndfile(tmp_path / "a.wav", music(), 48_000)
    (tmp_path / "a.txt").write_text("caption: x", encoding="utf-8")
    found, result, events = audited(tmp_path)
    assert found == {}
    assert [e.rows for e in events if isinstance(e, Table)] == [(("nothing amiss", "1 of 1", ""),)]
    assert [type(e) for e in events] == [Progress, Table, Saved]
    assert events[2].path == str(result.page)


@pytest.mark.parametrize(
    ("captions", "found"),
    [
        ([], (0, 0, None)),
        (["slow jazz"], (1, 1, None)),
        (["slow jazz", "Slow, jazz!"], (2, 1, 1.0)),  # case and punctuation are no words
        (["slow jazz", "jazz slow"], (2, 2, 1.0)),
        (["slow jazz", "fast rock"], (2, 2, 0.0)),
        (["slow jazz", "slow rock", "slow slow"], (3, 3, 0.6)),  # 2 + 2 + 1 words: three times slow, in both others
        (["", ""], (2, 1, None)),
    ],
)
def test_the_variety_of_captions_is_counted_by_their_words(captions, found):
    assert variety(captions) == Variety(*found)


def sample_of(*captions: str, genre: str = "") -> Sample:
    return Sample(audio_path=Path("a.wav"), id="a", caption=captions[0], captions=captions[1:], genre=genre)


def test_what_is_said_of_captions_follows_how_many_there_are():
    assert captions_told([]) == captions_told([sample_of("slow jazz")]) == {}
    assert captions_told([sample_of("slow jazz"), sample_of("", genre="jazz")]) == {  # its genre is its caption
        "songs with several captions": "0 of 2",
        "different captions": "2 of 2",
        "words in common, songs": "67%",
    }
    assert captions_told([sample_of("slow jazz", "slow night")]) == {
        "songs with several captions": "1 of 1",
        "different captions": "2 of 2",
        "words in common, captions of a song": "50% (50% to 50%)",
    }


def test_page_terminal_and_json_say_how_varied_the_captions_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    songs = tmp_path / "songs"
    for number, (caption, further) in enumerate(
        [("slow jazz", ["late <piano> jazz", "slow night"]), ("slow jazz", []), ("fast rock", ["loud guitars"])]
    ):
        write_sndfile(songs / f"{number}.wav", music(10, seed=number), 48_000)
        told = {"caption": caption, "captions": further}
        (songs / f"{number}.json").write_text(json.dumps(told), encoding="utf-8")
    assert main(["--plain", "build-dataset", "--input", str(songs), "--tag", "sks", "--audit"]) == ExitStatus.OK
    said = {
        "songs with several captions": "2 of 3",
        "different captions": "5 of 6",
        "words in common, captions of a song": "14% (0% to 29%)",  # 4 of 7 · 2 pairs, and none
        "words in common, songs": "33%",  # slow and jazz, each twice, of 6 · 2
    }
    page = (songs / "dataset-audit.html").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    for name, value in said.items():
        assert f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' in page
        assert any(name in line and value in line for line in lines), name
    assert lines[-2] == "Next:", "what to do next stands after all that was found"
    assert "preprocess" in lines[-1]
    assert "3 captions, 3 different, 29% of words in common" in page
    assert "late &lt;piano&gt; jazz" in page
    assert Page(page).open == []
    known = json.loads((songs / "dataset-audit.json").read_text(encoding="utf-8"))
    assert known["captions"] == {
        "all": {"captions": 6, "different": 5, "shared": pytest.approx(12 / 65)},
        "between_songs": {"captions": 3, "different": 2, "shared": pytest.approx(1 / 3)},
    }
    assert [song["captions"]["captions"] for song in known["songs"]] == [3, 1, 2]
    assert known["songs"][1]["caption"] == "sks, slow jazz"
    assert known["songs"][1]["measured"]["seconds"] == 10
    [like] = [f for f in known["findings"] if f["what"] == "caption of another song, word by word"]
    assert like["songs"] == [{"name": "1.wav", "note": "like 0.wav"}]


def test_a_song_that_cannot_be_heard_is_named_and_never_ends_the_audit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    songs = tmp_path / "songs"
    absurd = music()
    absurd[5000] = 1e29
    write_sndfile(songs / "absurd.wav", absurd, 48_000, subtype="FLOAT")
    write_sndfile(songs / "good.wav", music(), 48_000)
    assert main(["build-dataset", "--input", str(songs), "--audit"]) == ExitStatus.SOME_FAILED
    assert "absurd.wav: has samples up to 1e29" in "".join(capsys.readouterr())
    page = Page((songs / "dataset-audit.html").read_text(encoding="utf-8"))
    assert page.players == ["./good.wav"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
def test_a_song_that_became_a_pipe_is_a_finding(tmp_path):
    write_sndfile(tmp_path / "a.wav", music(), 48_000)
    path = build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None).path
    (tmp_path / "a.wav").unlink()
    os.mkfifo(tmp_path / "a.wav")
    results = []
    thread = threading.Thread(target=lambda: results.append(audit(path, lambda e: None)), daemon=True)
    thread.start()
    thread.join(20)
    assert [song.reason for song in results[0].songs] == ["is not a regular file"]


def test_measurements_do_not_depend_on_how_a_song_is_cut_into_pieces():
    audio = (music(30).T * np.linspace(0.2, 8, 30 * SAMPLE_RATE, dtype=np.float32)).clip(-1, 1)
    whole = measure_pieces(INFO, [audio])
    pieces = measure_pieces(INFO, np.split(audio, [2 * SAMPLE_RATE, 12 * SAMPLE_RATE, 22 * SAMPLE_RATE], axis=1))
    assert whole.clipped > 1000
    assert pieces.clipped == pytest.approx(whole.clipped, rel=0.01)  # a run may end at the end of a piece
    assert pieces.loudness_lufs == pytest.approx(whole.loudness_lufs)
    assert replace(pieces, sound="", clipped=0, loudness_lufs=0) == replace(whole, sound="", clipped=0, loudness_lufs=0)


def test_measurements_are_those_of_the_signal():
    audio = 0.5 * np.ones((2, 12 * SAMPLE_RATE), np.float32)
    audio[:, ::2] *= -1
    audio[:, : 3 * SAMPLE_RATE] = 0
    measured = measure_pieces(INFO, [audio])
    assert measured.seconds == 12
    assert measured.silence == pytest.approx(0.25)
    assert measured.clipped == 0
    assert measured.peak_db == pytest.approx(-6.02, abs=0.01)
    assert measured.envelope[0] == 0
    assert measured.envelope[-1] == 0.5


@pytest.mark.parametrize(("gain", "clipped"), [(1.0, False), (2.0, False), (4.0, True), (40.0, True)])
def test_clipping_is_what_was_cut_off_not_what_is_loud(gain, clipped):
    audio = (tone(seconds=2).T * gain).clip(-1, 1)
    assert (measure_pieces(INFO, [audio]).clipped > 50) is clipped


def test_a_file_beyond_full_scale_counts_as_clipped():
    assert measure_pieces(INFO, [tone(seconds=1).T * 5]).clipped > 1000


def test_one_recording_is_known_in_every_coding_and_two_are_told_apart(tmp_path):
    clips = [decode(p, max_seconds=14) for p in sorted(tracks_dir().rglob("calm_*.opus"))[:3]]
    measured = [measure_pieces(INFO, [clip]) for clip in clips]
    assert not any(
        same_recording(a, replace(b, seconds=a.seconds)) for i, a in enumerate(measured) for b in measured[:i]
    )
    write_sndfile(tmp_path / "a.mp3", clips[0].T, 48_000, format="MP3")
    write_sndfile(tmp_path / "a.ogg", clips[0].T * 0.5, 48_000, format="OGG")
    write_ffmpeg(tmp_path / "a.m4a", clips[0].T, 48_000, "aac", "ipod")
    for name in ("a.mp3", "a.ogg", "a.m4a"):
        assert same_recording(measured[0], measure(tmp_path / name)), name


def test_among_many_songs_the_same_pairs_are_found_as_one_by_one(tmp_path):
    random = np.random.default_rng(0)
    kinds = [random.integers(-60, 0, (40, 12)) for _ in range(4)]
    songs = []
    for i in range(60):
        seconds = float(random.choice([8, 9.9, 10, 11.5, 12.4, 13.1, 60, 60.8, 61.7, 62, 63]))
        shape = kinds[i % 4][: int(seconds // 2)] + random.integers(-4, 4, (int(seconds // 2), 12))
        heard = replace(
            measure_pieces(INFO, [np.zeros((2, 48_000), np.float32)]),
            **{"seconds": seconds, "sound": f"{i}", "shape": tuple(map(int, shape.ravel()))},
        )
        songs.append(Song(Sample(audio_path=tmp_path / f"{i}.wav", id=f"{i}"), f"{i:02}", heard))
    pairs = [(a, b) for i, b in enumerate(songs) for a in songs[:i] if same_recording(a.measured, b.measured)]
    expected = {later.name: f"like {earlier.name}" for earlier, later in reversed(pairs)}
    (found,) = [f.notes for f in find(songs) if f.what == "same recording in another coding"]
    assert found == expected
    assert 20 < len(found) < 60


@pytest.mark.slow
def test_tokens_are_counted_as_the_model_gets_them_and_guessed_without_it(checkpoints):
    from sidestep.acestep.checkpoint import open_checkpoint
    from sidestep.acestep.conditions import token_ids

    tokenizer = open_checkpoint(checkpoints, "turbo").load_tokenizer()
    count = token_counter(checkpoints)
    for text in ("A song.\n", "沈むように溶けてゆくように", "# Languages\nen\n\n# Lyric\nla<|endoftext|>", ""):
        ids, lost = token_ids(tokenizer, text, 2048)
        assert count(text) == ids.shape[1] + lost
    assert guess("a" * 350) == 100
    assert guess("沈む") == 2


def test_a_folder_without_tokenizer_is_told(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        token_counter(tmp_path)


def test_songs_are_listened_to_once_however_often_the_audit_runs(tmp_path):
    write_sndfile(tmp_path / "a.wav", music(), 48_000)
    first = audited(tmp_path)[1]
    cache = tmp_path / CACHE
    data = json.loads(cache.read_text(encoding="utf-8"))
    next(iter(data["songs"].values()))["peak_db"] = -99.0
    cache.write_text(json.dumps(data), encoding="utf-8")
    assert audited(tmp_path)[1].songs[0].measured == replace(first.songs[0].measured, peak_db=-99.0)
    cache.write_text("{", encoding="utf-8")
    assert audited(tmp_path)[1].songs == first.songs


def test_nothing_to_find_in_nothing():
    assert find([]) == []


def drawn(chart: dict) -> str:
    """A bar chart as SVG."""
    return vars(templates.get_template("charts.j2").module)["bars"](chart)


@pytest.mark.parametrize(
    "values", [[3.0], [3.0, 3.0], [0.0], [-14.2, -13.9, -40.0], [0.1, 600.0, 12_000.0], list(np.linspace(1, 2, 500))]
)
def test_a_histogram_shows_every_value_once(values):
    svg = drawn(histogram(values, "s", "Title <&>"))
    assert sum(int(n) for n in re.findall(r"<title>[^<]*: (\d+)</title>", svg)) == len(values)
    assert "Title &lt;&amp;&gt;" in svg
    assert "nan" not in svg


def test_bars_and_waveforms_stay_inside_their_frame():
    svg = drawn(bars({"<b>": 3}, "u", "t"))
    assert svg.count("<rect") == 1
    assert "<b>" not in svg
    assert all(0 <= float(y) <= 40 for y in re.findall(r",([\d.]+)", waveform([0.0, 0.5, 1.0])))
    assert waveform([]) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a b/#1 100%.wav", "./a%20b/%231%20100%25.wav"),
        ("日.wav", "./%E6%97%A5.wav"),
        ("c:d.wav", "./c%3Ad.wav"),
        ("../x?.wav", "./../x%3F.wav"),
    ],
)
def test_songs_are_referred_to_by_relative_url(tmp_path, name, expected):
    assert url(tmp_path / name, tmp_path) == expected


class Page(HTMLParser):
    """The players of a page and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.players, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "audio":
            self.players.append(dict(attributes)["src"])
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_has_a_player_for_every_song_that_can_be_read(tmp_path):
    entries = make_library(tmp_path)
    _, result, _ = audited(tmp_path)
    page = Page(result.page.read_text(encoding="utf-8"))
    assert page.open == []
    assert sorted(unquote(src)[2:] for src in page.players) == sorted(name for name, e in entries.items() if e.readable)
    assert str(tmp_path) not in result.page.read_text(encoding="utf-8")


def test_no_name_or_caption_can_break_out_of_the_page(tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    name = "<script>alert(1)<&'b.wav" if sys.platform != "win32" else "&'b.wav"
    write_sndfile(tmp_path / name, music(), 48_000)
    words = f"caption: {hostile}\nkey: {hostile}\nlyrics: [Verse]\\n{hostile}"
    (tmp_path / name).with_suffix(".txt").write_text(words, encoding="utf-8")
    text = audited(tmp_path)[1].page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.players == [url(tmp_path / name, tmp_path)]
    assert text.count("<script") == 1
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in text


PROBE = """<script>
const problems = [], told = console.error;
addEventListener('error', e => problems.push(String(e.message)));
console.error = (...words) => { problems.push(words.join(' ')); told(...words); };
addEventListener('load', async () => {
  const played = {};
  for (const player of document.querySelectorAll('audio')) {
    player.volume = 0;
    played[decodeURI(player.src).split('/').pop()] = await new Promise(done => {
      player.addEventListener('timeupdate', () => player.currentTime > 0.05 && done(player.duration));
      player.addEventListener('error', () => done(-1));
      player.play().catch(e => done(-2));
      setTimeout(() => done(-3), 8000);
    });
    player.pause();
  }
  const size = e => e.getBoundingClientRect();
  const hasBars = p => [...p.querySelectorAll('.bar')].some(b => size(b).height > 20);
  const plots = [...document.querySelectorAll('.plot')];
  const drawn = plots.map(p => [size(p).width > 100 && size(p).height > 50, hasBars(p)]);
  const search = document.querySelector('.search');
  search.value = 'good'; search.dispatchEvent(new Event('input'));
  const shown = [...document.querySelectorAll('.song')].filter(s => size(s).height > 0).length;
  const fits = document.documentElement.scrollWidth <= innerWidth;
  const answer = JSON.stringify({played, plots: drawn, shown, fits, problems});
  fetch('http://127.0.0.1:PORT/', {method: 'POST', mode: 'no-cors', body: answer});
});
</script></head>"""


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_in_a_browser_plots_are_drawn_players_play_and_nothing_is_logged(tmp_path):
    for name, how in [
        ("good.wav", {}),
        ("b #1 ü.flac", {"format": "FLAC"}),
        ("c.ogg", {"format": "OGG"}),
        ("d.mp3", {"format": "MP3"}),
    ]:
        write_sndfile(tmp_path / "songs" / name, music(seed=len(name)), 48_000, **how)
        (tmp_path / "songs" / name).with_suffix(".txt").write_text(
            "caption: <script>alert(1)</script>\nbpm: 90\nkey: Am\nlyrics: [Verse]\nla", encoding="utf-8"
        )
    _, result, _ = audited(tmp_path / "songs")
    received, answer = threading.Event(), {}

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            answer.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            received.set()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = result.page.read_text(encoding="utf-8").replace(
            "</head>", PROBE.replace("PORT", str(server.server_port)), 1
        )
        probed = result.page.with_name("probed.html")
        probed.write_text(page, encoding="utf-8")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--autoplay-policy=no-user-gesture-required",
            "--enable-logging=stderr",
            "--window-size=1200,900",
        ]
        with (tmp_path / "log").open("wb") as log:
            browser = subprocess.Popen(
                [
                    "chromium",
                    *flags,
                    f"--user-data-dir={tmp_path / 'profile'}",
                    "--remote-debugging-port=0",
                    probed.as_uri(),
                ],
                stderr=log,
            )
            try:
                assert received.wait(240), (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
            finally:
                browser.terminate()
                browser.wait(20)
        server.shutdown()
    assert sorted(answer["played"]) == ["b %231 ü.flac", "c.ogg", "d.mp3", "good.wav"]
    assert all(11 < seconds < 13 for seconds in answer["played"].values()), answer
    assert len(answer["plots"]) >= 6, answer
    assert all(plot == [True, True] for plot in answer["plots"]), answer
    assert (answer["shown"], answer["fits"], answer["problems"]) == (1, True, [])
    assert "CONSOLE" not in (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
