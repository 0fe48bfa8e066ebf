"""The figures of `score` on constructed cases: what is known beforehand comes out."""

import numpy as np
import pytest
import torch

from sidestep.tasks.score.metrics import (
    UNRELATED,
    Figure,
    between_songs,
    bootstrap,
    copying,
    drift,
    features,
    gain,
    nearest_window,
    relative_change,
    standardized,
    style,
    too_near,
)
from sidestep.tasks.score.recommend import Row, recommend


def width(figure: Figure) -> float:
    low, high = figure.interval
    return high - low


def test_gain_is_the_share_by_which_the_loss_is_lower():
    assert gain([0.5, 1.5], [1.0, 3.0]).value == 0.5
    assert gain([2.0, 2.0], [1.0, 1.0]).value == -1.0
    same = gain([0.3, 0.7], [0.3, 0.7])
    assert same.value == 0
    assert same.interval == (0, 0)


def test_equal_velocities_have_no_drift_and_doubled_ones_have_all():
    velocity = torch.randn(4, 10, 3)
    assert relative_change(velocity, velocity) == 0
    assert relative_change(2 * velocity, velocity) == pytest.approx(1)
    assert drift([0.0, 0.0, 0.0]).interval == (0, 0)
    assert drift([0.3, 0.4]).value == pytest.approx((0.125) ** 0.5)


def test_more_data_narrows_the_spread():
    values = np.random.default_rng(0).normal(1, 0.2, 400)
    few, many = (drift(values[:n].tolist()) for n in (10, 400))
    assert width(many) < width(few) / 3
    low, high = many.interval
    assert low < many.value < high


def test_an_interval_holds_the_middle_95_of_100_draws():
    assert Figure(0.0, np.linspace(-1, 1, 1001)).interval == pytest.approx((-0.95, 0.95))


def test_figures_are_compared_by_their_differences_and_not_by_their_intervals():
    base = np.random.default_rng(1).uniform(0.2, 2.0, 30)  # songs differ much more than adapters do
    a, b = gain(base * 0.90, base), gain(base * 0.88, base)
    spread = np.random.default_rng(2).normal(0, 0.05, 30)
    c = gain(base * (0.90 + spread), base)
    assert not a.equals(b)
    assert a.equals(c)
    assert a.equals(a)


def test_a_bootstrap_draws_the_same_units_each_time():
    assert np.array_equal(bootstrap(9, lambda i: i.sum()).draws, bootstrap(9, lambda i: i.sum()).draws)


def music(seed: int, frames: int = 200, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(frames, 6, generator=torch.Generator().manual_seed(seed)) + shift


SONGS = torch.stack([features(music(seed)) for seed in range(20)])
NAMES = [str(n) for n in range(20)]


def style_of(count: int, shift: float = 0.0, first: int = 100) -> Figure:
    return style(torch.stack([features(music(first + n, shift=shift)) for n in range(count)]), SONGS, NAMES)


def test_clips_are_farther_from_the_songs_the_farther_they_are_shifted():
    near, middle, far, farther = (style_of(12, shift) for shift in (0.0, 0.15, 1.0, 8.0))
    assert near.value < middle.value < far.value < farther.value
    assert not far.equals(near)
    assert not farther.equals(far)
    assert near.equals(style_of(12, first=500))


def test_style_is_unbiased_for_few_clips():
    values = [style_of(3, first=1000 * (k + 1)).value for k in range(30)]
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5


def test_more_clips_narrow_the_spread_of_style_and_copying():
    assert width(style_of(40)) < width(style_of(4)) / 2
    distances = [0.1, 1.3] * 20
    assert width(copying(distances, 1.0)) < width(copying(distances[:4], 1.0)) / 2


def test_windows_of_one_song_are_no_pairs():
    songs = torch.stack([features(music(0)), features(music(0)), features(music(1)), features(music(2))])
    of_three, of_four = (style(SONGS[:3], songs, names).value for names in (["a", "a", "b", "c"], list("abcd")))
    assert of_three < of_four  # twins as a pair would make the songs look less varied than they are


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.4])
def test_a_copy_is_found_where_it_is_and_unrelated_music_is_none(noise):
    raw = [music(seed) for seed in range(4)]
    songs = [standardized(song, raw) for song in raw]
    clip = music(99, 100)
    clip[50:100] = songs[2][73:123] + noise * music(5, 50)
    found = nearest_window(clip, songs, 50)
    assert (found.song, found.start, found.at) == (2, 73, 50)
    assert found.distance == pytest.approx(noise, abs=0.06)
    other = nearest_window(music(98, 100), songs, 50)
    limit = too_near(between_songs(songs, NAMES[:4], 100, 50, most=100))
    assert found.distance < limit
    assert other.distance == pytest.approx(limit, abs=0.15)
    assert copying([found.distance, 1.5], limit).value == 0.5


def test_a_lasting_sound_and_silence_are_no_copies():
    raw = [music(seed) for seed in range(3)]
    raw[1][20:120] = 3.0
    songs = [standardized(song, raw) for song in raw]
    silent = nearest_window(songs[1][30:110].clone(), songs, 40)
    assert silent.distance == UNRELATED
    louder = nearest_window(songs[0][30:110] + 2.0, songs, 40)
    assert (louder.song, louder.start) == (0, 30)
    assert louder.distance < 0.01


def test_songs_are_compared_with_others_and_not_with_what_is_of_the_same_recording():
    song = music(0, 400)
    twins = [standardized(part, [song]) for part in (song, song[:150], music(1))]
    apart = between_songs(twins, ["a", "a", "b"], 100, 50, most=100)
    assert len(apart) == 4 + 1 + 2
    assert min(apart) > 1
    assert min(between_songs(twins, ["a", "b", "c"], 100, 50, most=100)) < 0.01
    assert between_songs(twins[:2], ["a", "a"], 100, 50, most=100) == []
    assert len(between_songs(twins, ["a", "a", "b"], 100, 50, most=3)) == 3


@pytest.mark.parametrize("count", [2, 8, 20, 21, 48, 100])
def test_at_most_one_of_twenty_usual_distances_counts_as_a_copy_however_few_there_are(count):
    usual = np.random.default_rng(count).uniform(1.0, 1.4, count).tolist()
    near = copying(usual, too_near(usual)).value
    assert near <= 0.05
    assert near > 0.05 - 1 / count - 1e-9  # and not far fewer


def test_a_song_shorter_than_a_piece_has_no_window():
    with pytest.raises(ValueError, match="no song has a window of 50 frames"):
        nearest_window(music(0, 50), [music(1, 20)], 50)


def figure(value: float, spread: float = 0.0) -> Figure:
    return Figure(value, value + spread * np.random.default_rng(round(1e6 * abs(value))).standard_normal(1000))


def row(name: str, gain_: float, drift_: float, style_: float | None = None, copied: tuple[float, ...] = ()) -> Row:
    near = None if style_ is None else figure(style_, 0.001)
    return Row(name, 1.0, figure(gain_, 0.001), figure(drift_), near, copying(copied, 1.0) if copied else None)


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        ([row("early", 0.1, 0.1), row("good", 0.2, 0.3), row("late", 0.2005, 0.8)], "good"),  # equal gain, less drift
        ([row("early", 0.1, 0.1), row("good", 0.2, 0.3), row("late", 0.25, 0.8)], "late"),  # surely better
        ([row("a", 0.2, 0.1, 0.5), row("b", 0.2003, 0.3, 0.1), row("c", 0.2002, 0.9, 0.1001)], "b"),  # and its style
        ([row("only", -0.1, 0.5)], "only"),
    ],
)
def test_the_smallest_drift_among_those_equal_to_the_best_is_recommended(rows, taken):
    assert recommend(rows).row.name == taken
    assert recommend(rows[::-1]).row.name == taken


def test_a_recommendation_says_what_speaks_against_it():
    assert "may have learned nothing" in recommend([row("only", 0.0, 0.5)]).doubts[0]
    assert recommend([row("only", 0.2, 0.5)]).doubts == ()


OWN, COPIED = (1.3,) * 8, (0.1,) * 8


def test_what_copies_is_taken_only_where_everything_does():
    base = copying(OWN, 1.0)
    rows = [row("moderate", 0.2, 0.3, 0.1, OWN), row("late", 0.4, 0.8, 0.1, COPIED)]
    verdict = recommend(rows, base)
    assert verdict.row.name == "moderate"
    assert "1 that copy the songs were left out" in verdict.reason
    assert recommend(rows, copying(COPIED, 1.0)).row.name == "late"  # so does the base: it is the songs that are alike
    verdict = recommend(rows[1:], base)
    assert verdict.row.name == "late"
    assert "100 % of its clips" in verdict.doubts[0]
