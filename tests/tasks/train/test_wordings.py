"""Several captions for a song, and what may be left out of its prompt: exact shares, the right conditions, resume."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import Text, encode_texts, lyric_prompt, text_prompt
from sidestep.data.batches import Windows, collate, item_of
from sidestep.data.records import index_records, load_record, save_record
from sidestep.errors import UserError
from sidestep.events import Notice, StepDone, Table
from sidestep.settings.advice import music_in
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.train.setup import open_accelerator, set_up
from sidestep.tasks.train.songs import plan_windows, songs_of, wordings
from tests.preprocessing import edit_library, job, make_library, tone
from tests.training_world import CHECKPOINTS, LYRICS, Log, adapter, differing, prepared, record, run, settings
from tests.training_world import song as in_memory

SAID = {
    "caption": "one",
    "prompt_caption": "sks, one",
    "custom_tag": "sks",
    "captions": '["two", "three"]',
    "bpm": 100,
    "keyscale": "A minor",
    "timesignature": "",
}


GENRE = {"genre": "techno", "genre_ratio": 30}


def shares(metadata, **changes) -> dict[tuple[str, str], float]:
    ways = wordings(metadata, settings(Path(), Path(), **changes))
    assert sum(way.share for way in ways) == pytest.approx(1)
    return {(way.caption, way.untold): pytest.approx(way.share) for way in ways}


@pytest.mark.parametrize(
    ("said", "changes", "expected"),
    [
        ({"captions": ""}, {}, {("sks, one", ""): 1.0}),
        ({}, {}, {("sks, one", ""): 1 / 3, ("sks, two", ""): 1 / 3, ("sks, three", ""): 1 / 3}),
        ({"captions": ""}, {"caption_dropout": 0.1}, {("sks, one", ""): 0.9, ("sks", ""): 0.1}),
        ({"captions": ""}, {"tag_dropout": 0.3}, {("sks, one", ""): 0.7, ("one", ""): 0.3}),
        (
            {"captions": "", "tag_position": "replace", "prompt_caption": "sks"},
            {"tag_dropout": 0.0},
            {("sks", ""): 1.0},
        ),
        (
            {"captions": ""},
            {"metadata_dropout": 0.4},
            {("sks, one", ""): 0.6, ("sks, one", "bpm"): 0.2, ("sks, one", "keyscale"): 0.2},
        ),
        ({"captions": "", "bpm": None, "keyscale": ""}, {"metadata_dropout": 0.4}, {("sks, one", ""): 1.0}),
        (
            {"captions": "", "genre": "techno", "prompt_caption": "sks, techno"},
            {"tag_dropout": 0.5},
            {("sks, techno", ""): 0.5, ("techno", ""): 0.5},
        ),
        (
            {"captions": "", "custom_tag": "", "prompt_caption": "one"},
            {"caption_dropout": 0.2},
            {("one", ""): 0.8, ("", ""): 0.2},
        ),
        ({"captions": ""}, {"caption_dropout": 1.0}, {("sks, one", ""): 0.0, ("sks", ""): 1.0}),
        ({"captions": "", **GENRE}, {}, {("sks, one", ""): 0.7, ("sks, techno", ""): 0.3}),
        (
            GENRE,
            {},
            {("sks, techno", ""): 0.3} | {(f"sks, {text}", ""): 0.7 / 3 for text in ("one", "two", "three")},
        ),
        (
            {"captions": "", **GENRE},
            {"tag_dropout": 0.5},
            {("sks, one", ""): 0.35, ("one", ""): 0.35, ("sks, techno", ""): 0.15, ("techno", ""): 0.15},
        ),
        (GENRE | {"genre_ratio": 100, "prompt_caption": "sks, techno"}, {}, {("sks, techno", ""): 1.0}),
        # a record of before has no share: its own prompt, by genre or not, and the captions beside it
        (
            {"captions": '["two"]', "genre": "techno", "prompt_caption": "sks, techno"},
            {},
            {("sks, techno", ""): 0.5, ("sks, two", ""): 0.5},
        ),
    ],
)
def test_each_setting_gives_its_wordings_their_shares(said, changes, expected):
    assert shares(SAID | said, **changes) == expected


def test_all_settings_together_multiply():
    found = shares(SAID, caption_dropout=0.1, tag_dropout=0.2, metadata_dropout=0.3)
    assert found["sks, two", ""] == 0.9 / 3 * 0.8 * 0.7
    assert found["three", "bpm"] == 0.9 / 3 * 0.2 * 0.15
    assert found["sks", "keyscale"] == 0.1 * 0.15
    assert len(found) == 7 * 3


EACH = {
    "captions": ({}, {}, lambda way: way.caption == "sks, two", 1 / 3),
    "genre ratio": (GENRE, {}, lambda way: way.caption == "sks, techno", 0.3),
    "--caption-dropout": ({}, {"caption_dropout": 0.1}, lambda way: way.caption == "sks", 0.1),
    "--tag-dropout": ({}, {"tag_dropout": 0.2}, lambda way: "sks" not in way.caption, 0.2),
    "--metadata-dropout": ({}, {"metadata_dropout": 0.15}, lambda way: bool(way.untold), 0.15),
    "--metadata-dropout, one line": ({}, {"metadata_dropout": 0.4}, lambda way: way.untold == "bpm", 0.2),
}


@pytest.mark.parametrize(("said", "changes", "is_meant", "share"), EACH.values(), ids=EACH)
def test_each_setting_alone_is_drawn_in_its_share_of_twenty_thousand_visits(said, changes, is_meant, share):
    ways = wordings(SAID | said, settings(Path(), Path(), **changes))
    nothing = torch.zeros(1, 32)
    windows = Windows(40, (0,), (0,), (nothing,) * len(ways), shares=tuple(way.share for way in ways))
    visited = in_memory("a", torch.zeros(40, 8), nothing, windows=windows)
    drawn = sum(is_meant(ways[item_of(visited, 0, visit, 42).text]) for visit in range(20_000))
    assert abs(drawn - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def told(**metadata):
    return record(1, 40, captions=["two", "three"], prompt_caption="sks, song 1", custom_tag="sks", **metadata)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_record(folder / "varied.pt", told())
    save_record(folder / "plain.pt", record(2, 40))
    return folder


DROPOUTS = {"caption_dropout": 0.1, "tag_dropout": 0.2, "metadata_dropout": 0.3}


def test_twenty_thousand_visits_are_drawn_in_exactly_those_shares_and_follow_from_the_seed(data, tmp_path):
    [plain, varied] = prepared(settings(data, tmp_path, **DROPOUTS)).songs
    assert varied.name == "varied.pt"
    drawn = [item_of(varied, 1, visit, 42).text for visit in range(20_000)]
    counts = Counter(drawn)
    for text, share in enumerate(varied.windows.shares):
        deviation = (20_000 * share * (1 - share)) ** 0.5
        assert abs(counts[text] - 20_000 * share) < 4 * deviation
    assert drawn[:50] == [item_of(varied, 1, visit, 42).text for visit in range(50)]
    assert drawn[:50] != [item_of(varied, 1, visit, 43).text for visit in range(50)]
    assert plain.windows is not None  # its tempo, key and time signature may be left out


def test_without_settings_a_song_with_one_caption_has_the_conditions_of_its_record(data, tmp_path):
    run = prepared(settings(data, tmp_path))
    assert run.songs[0].windows is None
    assert run.songs[1].windows.shares == pytest.approx((1 / 3,) * 3)


def test_a_wording_is_encoded_as_inference_would_and_kept_once(data, tmp_path):
    run = prepared(settings(data, tmp_path, metadata_dropout=0.5))
    varied = run.songs[1]
    ways = wordings(varied.metadata, run.config)
    for number, caption, untold in ((1, "sks, two", ""), (3, "sks, song 1", "bpm")):
        assert (ways[number].caption, ways[number].untold) == (caption, untold)
        bpm = None if untold == "bpm" else 100
        prompt = text_prompt(caption, bpm=bpm, timesignature="4", keyscale="A minor", duration=40 / 25)
        text = Text(prompt, lyric_prompt("[Instrumental]", "en"))
        [expected] = encode_texts(open_checkpoint(CHECKPOINTS, "turbo"), [text], torch.device("cpu"), torch.float32)
        torch.testing.assert_close(varied.windows.conditions[number], expected.states[0])
    log = Log()
    accelerator, precision = open_accelerator(run.config, log)
    set_up(run.config, log, accelerator, precision)
    assert not any("Encoding" in event.message for event in log.of(Notice))


def test_a_batch_has_the_conditions_of_the_wording_that_was_drawn(data, tmp_path):
    run = prepared(settings(data, tmp_path, **DROPOUTS))
    seen = set()
    for epoch in range(12):
        for step in run.plan(epoch):
            for micro_batch in step.micro_batches:
                batch = collate(run.songs, micro_batch)
                [item] = micro_batch.items
                assert torch.equal(batch.conditions[0], run.songs[item.song].windows.conditions[item.text])
                seen.add((item.song, item.text))
    assert len(seen) > 8


def test_a_run_of_many_wordings_goes_on_bit_for_bit(tmp_path):
    save_record(tmp_path / "data" / "varied.pt", told(**GENRE | {"genre_ratio": 50}, repeat=4))
    data = tmp_path / "data"
    changes = {"caption_dropout": 0.3, "tag_dropout": 0.4, "metadata_dropout": 0.5, "epochs": 3}
    changes |= {"gradient_accumulation": 1, "chunk_duration": 1.0, "scheduler_type": "constant", "timestep_shift": 2.0}
    whole = prepared(settings(data, tmp_path / "seen", **changes))
    ways = wordings(whole.songs[0].metadata, whole.config)
    items = [step.micro_batches[0].items[0] for epoch in range(3) for step in whole.plan(epoch)][3:]
    later = {ways[item.text] for item in items}
    assert {"sks", "sks, techno"} <= {way.caption for way in later}  # all is drawn once the run goes on
    assert any("sks" not in way.caption for way in later)
    assert any(way.untold for way in later)
    run(settings(data, tmp_path / "whole", **changes))
    run(settings(data, tmp_path / "cut", max_steps=3, **changes))
    run(settings(data, tmp_path / "cut", resume_from=Path("latest"), **changes))
    assert list(differing(adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "cut" / "final"))) == []


def summary(log: Log) -> dict[str, str]:
    """What the terminal tells at the end of a run, by setting."""
    return dict(row for table in log.of(Table) if table.title == "What varied, what was kept" for row in table.rows)


def test_page_and_terminal_tell_what_each_setting_came_to(data, tmp_path):
    folder = tmp_path / "data"
    save_record(folder / "varied.pt", told(**GENRE, repeat=3))
    save_record(folder / "untagged.pt", record(3, 40, bpm=None, keyscale="", timesignature=""))
    save_record(folder / "legacy.pt", replace(record(4, 40), metadata={}))
    save_record(tmp_path / "other" / "a.pt", record(9, 30))
    changes = {"caption_dropout": 0.1, "tag_dropout": 0.5, "metadata_dropout": 0.2, "mark_drop": 0.5, "epochs": 1}
    changes |= {"prior_data": tmp_path / "other", "prior_weight": 0.25}
    log = run(settings(folder, tmp_path / "run", **changes))
    said = summary(log)
    drift = log.of(StepDone)[-1].drift
    assert said == {
        "captions": "1 song with 3, 1.7 in the mean of all; each visit draws one",
        "genre": "in place of a caption in 30 % of visits to 1 song",
        # of five visits three are to the song with a trigger word, and one to one that is told nothing new
        "--caption-dropout 0.1": "the trigger word alone in 8.0% of visits",
        "--tag-dropout 0.5": "no trigger word in 27.0% of visits",
        "--metadata-dropout 0.2": "tempo, meter or key is N/A in 12.0% of visits",
        "--prior-weight 0.25": f"1 sample of 1 other song in each full step, 25% of its loss; drift {drift:.2g}",
        "--mark-drop 0.5": "0 marks so far",
    }
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for setting, words in said.items():
        assert re.search(rf"{setting}(</code>)?</th><td>{re.escape(words)}</td>", page), setting
    plain = run(settings(data, tmp_path / "plain", dataset_dir=tmp_path / "other", max_steps=1))
    assert summary(plain) == {}
    assert "What varied" not in (tmp_path / "plain" / "report.html").read_text(encoding="utf-8")


def test_captions_come_from_dataset_json_through_preprocessing(tmp_path):
    library, out = make_library(tmp_path / "songs", ["a.wav"]), tmp_path / "out"
    preprocess(job(library, out), lambda _event: None)
    before = load_record(out / "a.wav.pt")
    assert music_in(out) == (1, pytest.approx(len(before.target_latents) / 25 / 60))  # known at once, for the wizard
    edit_library(library, 0, captions=["another", " a third "])
    preprocess(job(library, out), lambda _event: None)
    after = load_record(out / "a.wav.pt")
    assert after.metadata["captions"] == ["another", "a third"]
    assert torch.equal(after.encoder_hidden_states, before.encoder_hidden_states)
    [song] = prepared(settings(out, tmp_path / "run")).songs
    assert len(song.windows.shares) == 3
    edit_library(library, 0, captions="no list")
    with pytest.raises(UserError, match=r"samples\[0\].captions: a list of texts is needed"):
        preprocess(job(library, out), lambda _event: None)


def test_the_genre_ratio_of_dataset_json_reaches_the_draw_and_changes_only_words(tmp_path):
    library, out = make_library(tmp_path / "songs", ["a.wav"]), tmp_path / "out"
    listed = json.loads((library / "dataset.json").read_text(encoding="utf-8"))
    listed["samples"][0]["genre"] = "techno"
    tensors, shares = [], {}
    for ratio in (0, 25, 100, 0):
        listed["metadata"] = {"genre_ratio": ratio, "custom_tag": "sks"}
        (library / "dataset.json").write_text(json.dumps(listed), encoding="utf-8")
        preprocess(job(library, out), lambda _event: None)
        made = load_record(out / "a.wav.pt")
        tensors.append((made.target_latents, made.encoder_hidden_states))
        [known] = songs_of(out, index_records(out)[0])
        shares[ratio] = [(w.caption, w.share) for w in wordings(known.metadata, settings(out, tmp_path))]
    assert shares == {
        0: [("sks, song 0", 1.0)],
        25: [("sks, song 0", 0.75), ("sks, techno", 0.25)],
        100: [("sks, techno", 1.0)],
    }
    same = [[torch.equal(a, b) for a, b in zip(tensors[0], other, strict=True)] for other in tensors[1:]]
    assert same == [[True, True], [True, False], [True, True]]  # audio is never encoded again


def test_each_wording_of_a_window_has_the_lyrics_of_that_window():
    said = SAID | {"lyrics": LYRICS, "language": "en"}
    sung = in_memory("a", torch.zeros(90, 8), torch.zeros(1, 32), metadata=said)
    plan = plan_windows(sung, 25, 25.0, 5, settings(Path(), Path()))
    assert len(set(plan.which)) > 1
    conditions = (torch.zeros(1, 32),) * len(plan.texts)
    windows = Windows(plan.frames, plan.starts, plan.which, conditions, shares=plan.shares)
    heard = set()
    for visit in range(200):
        item = item_of(replace(sung, windows=windows), 0, visit, 42)
        own = plan.texts[plan.which[plan.starts.index(item.start)]]
        assert plan.texts[item.text].lyrics == own.lyrics
        heard.add(plan.texts[item.text])
    assert heard == set(plan.texts)


def test_a_run_that_goes_on_with_another_genre_or_caption_is_refused_by_name(tmp_path):
    data = tmp_path / "data"
    save_record(data / "a.pt", record(1, 40, captions=["two"], **GENRE))
    config = settings(data, tmp_path / "run", epochs=1)
    run(config)
    again = replace(config, epochs=2, resume_from=Path("latest"))
    for changed in ({"genre": "trance"}, {"genre_ratio": 31}, {"captions": ["three"]}):
        save_record(data / "a.pt", record(1, 40, **{"captions": ["two"], **GENRE, **changed}))
        with pytest.raises(UserError, match=r"1 changed \(a\.pt: caption, lyrics or metadata\)"):
            run(again)
    save_record(data / "a.pt", record(1, 40, captions=["two"], **GENRE))
    run(again)


def test_captions_come_from_numbered_files_and_lists_beside_the_songs(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, tone(0.2), 48000)
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "a.caption.2.txt").write_text("second\n", encoding="utf-8")
    (tmp_path / "a.caption.3.txt").write_text("third", encoding="utf-8")
    (tmp_path / "b.json").write_text('{"caption": "b", "captions": ["other", "", "words"]}', encoding="utf-8")
    told = Log()
    config = BuildDatasetConfig(input=tmp_path)
    for _ in range(2):  # built again, nothing is lost
        found = {s.filename: (s.caption, s.captions) for s in build_dataset(config, told).dataset.samples}
        assert found["a.wav"] == ("first", ("second", "third"))
        assert found["b.wav"] == ("b", ("other", "words"))
        assert found["c.wav"][1] == ()
    assert not any("caption.2" in event.message for event in told.of(Notice))  # read, so not named as unread
    edit_library(tmp_path, 2, captions=["by hand"])
    assert build_dataset(config, told).dataset.samples[2].captions == ("by hand",)
