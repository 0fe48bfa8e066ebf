"""Decoding ahead: in order, behind the device's back, within its bounds."""

import gc
import threading
import time
import weakref

import pytest

from sidestep.events import Progress
from sidestep.tasks.preprocess import first_pass, preprocess
from sidestep.tasks.preprocess.first_pass import ahead
from tests.preprocessing import Events, job, make_library


class Watched:
    """Counts how many outcomes live at once."""

    def __init__(self):
        self.lock, self.alive, self.most = threading.Lock(), 0, 0

    def make(self, item: int):
        outcome = Outcome(item)
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(outcome, self.gone)
        return outcome

    def gone(self) -> None:
        with self.lock:
            self.alive -= 1


class Outcome:
    def __init__(self, item: int):
        self.item = item


@pytest.mark.parametrize(("threads", "budget", "most"), [(4, 10**9, 5), (4, 0, 2), (4, 25, 3), (1, 10**9, 2)])
def test_no_more_wait_than_fit_whatever_their_number(threads: int, budget: int, most: int):
    watched = Watched()
    seen = []
    for item, future in ahead(range(50), watched.make, lambda item: 10, threads=threads, budget_bytes=budget):
        outcome = future.result()
        time.sleep(0.002)
        seen.append(outcome.item)
        assert outcome.item == item
        del future, outcome
    gc.collect()
    assert seen == list(range(50))
    assert watched.most <= most
    assert watched.alive <= 1


def test_the_next_one_is_prepared_while_this_one_is_used():
    started = [threading.Event() for _ in range(3)]

    def prepare(item: int) -> int:
        started[item].set()
        return item

    for item, _ in ahead(range(3), prepare, lambda item: 1, threads=2, budget_bytes=10):
        if item < 2:
            assert started[item + 1].wait(10)


def test_a_failure_comes_out_where_its_item_is_looked_at_and_the_rest_go_on():
    def prepare(item: int) -> int:
        if item == 1:
            raise ValueError("bad")
        return item

    results = [
        future.exception() or future.result()
        for _, future in ahead(range(4), prepare, lambda item: 1, threads=2, budget_bytes=10)
    ]
    assert results[0] == 0
    assert isinstance(results[1], ValueError)
    assert results[2:] == [2, 3]


def test_leaving_early_stops_what_has_not_begun():
    begun = []

    def prepare(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        return item

    for _ in ahead(range(100), prepare, lambda item: 1, threads=2, budget_bytes=10):
        break
    gc.collect()
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count < 10


def test_a_long_song_says_how_far_it_is_also_across_its_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(first_pass, "tile_frames_for", lambda _: 20)
    monkeypatch.setattr(first_pass, "SEGMENT_FRAMES", 60)
    library, events = make_library(tmp_path / "lib", ["a.wav"], seconds=6.0), Events()  # 150 frames
    preprocess(job(library, tmp_path / "out"), events)
    audio = [event for event in events.of(Progress) if event.task == "Pass 1: audio"]
    parts = [int(event.current.removeprefix("a.wav, 0:0")) for event in audio if event.rate and event.done == 0]
    assert parts == sorted(parts)
    assert set(parts) == set(range(1, 7))
    assert all(event.eta_seconds is None or event.eta_seconds >= 0 for event in audio)
