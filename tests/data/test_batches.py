"""Windows cover songs evenly, batches need no padding, and an epoch's plan is a function of its number."""

import hashlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sidestep.data.batches import (
    Batch,
    Item,
    MicroBatch,
    Song,
    Windows,
    collate,
    fingerprint,
    item_of,
    nearest,
    plan_epoch,
    window_start,
)
from sidestep.data.records import Record
from sidestep.seeding import uniform


def song(name: str, frames: int, tokens: int = 5, repeat: int = 1, window: int = 0, hints: bool = False) -> Song:
    generator = torch.Generator().manual_seed(frames)
    latents = torch.randn(frames, 3, generator=generator)
    conditions = torch.randn(tokens, 4, generator=generator)
    windows = None
    if window and frames > window:
        starts = tuple(range(0, frames - window + 1, 5))
        windows = Windows(
            window,
            starts,
            tuple(i % 2 for i in range(len(starts))),
            (conditions + 1, conditions + 2),
            (conditions + 3, conditions + 4),
        )
    regime = {"cover_hints": latents + 1, "hints_encoder_hidden_states": conditions + 5} if hints else {}
    record = Record(latents, conditions, {}, **regime)
    return Song(name, frames, lambda: record, repeat, hints, windows)


PLAN = {"seed": 1, "batch_size": 1, "accumulation": 4}
lengths = st.lists(st.integers(20, 120), min_size=1, max_size=9)


@hypothesis_settings(deadline=None, max_examples=60)
@given(lengths, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50), st.sampled_from([0, 30]))
def test_every_song_comes_as_often_as_it_repeats_in_batches_of_one_length(
    frames, batch_size, accumulation, processes, epoch, window
):
    songs = [song(f"{i}", n, repeat=1 + i % 3, window=window) for i, n in enumerate(frames)]
    steps = plan_epoch(songs, epoch, seed=3, batch_size=batch_size, accumulation=accumulation, processes=processes)
    batches = [batch for step in steps for batch in step.micro_batches]
    assert Counter(item.song for batch in batches for item in batch.items) == {i: s.repeat for i, s in enumerate(songs)}
    for batch in batches:
        assert len({item.frames for item in batch.items}) == 1
        for item in batch.items:
            windows = songs[item.song].windows
            assert item.frames == (windows.frames if windows else songs[item.song].frames)
            assert 0 <= item.start <= songs[item.song].frames - item.frames
    for step in steps:
        slots = [slot for batch in step.micro_batches for slot in batch.slots]
        assert slots == list(range(step.samples))
    assert all(len(step.micro_batches) == accumulation * processes for step in steps[:-1])


@hypothesis_settings(deadline=None, max_examples=30)
@given(lengths, st.integers(1, 4))
def test_epochs_have_equally_many_steps(frames, batch_size):
    songs = [song(f"{i}", n) for i, n in enumerate(frames)]
    counts = {len(plan_epoch(songs, epoch, seed=3, batch_size=batch_size, accumulation=2)) for epoch in range(4)}
    assert len(counts) == 1


def test_the_plan_follows_from_seed_and_epoch_alone():
    songs = [song(f"{i}", 40 + i, window=30) for i in range(8)]
    assert plan_epoch(songs, 3, **PLAN) == plan_epoch(songs, 3, **PLAN)
    assert plan_epoch(songs, 3, **PLAN) != plan_epoch(songs, 4, **PLAN)
    assert plan_epoch(songs, 3, **PLAN) != plan_epoch(songs, 3, **(PLAN | {"seed": 2}))


def test_two_processes_share_the_plan_of_one_with_twice_the_accumulation():
    songs = [song(f"{i}", 40) for i in range(9)]
    assert plan_epoch(songs, 0, seed=1, batch_size=2, accumulation=1, processes=2) == plan_epoch(
        songs, 0, seed=1, batch_size=2, accumulation=2
    )


@pytest.mark.parametrize("window", [25, 100, 190])
def test_windows_cover_a_song_evenly_over_time(window):
    one = [song("long", 200, window=window)]
    heard = torch.zeros(200)
    for epoch in range(200):
        item = plan_epoch(one, epoch, **PLAN)[0].micro_batches[0].items[0]
        heard[item.start : item.start + item.frames] += 1
    share = heard / heard.mean()
    assert share.min() > 0.45  # the very ends are under fewer windows
    assert share[window // 2 : -window // 2].std() < 0.12 if window < 100 else True
    first_visits = torch.zeros(200)
    for epoch in range(3 * 200 // window):  # and soon: no part waits for chance
        item = plan_epoch(one, epoch, **PLAN)[0].micro_batches[0].items[0]
        first_visits[item.start : item.start + item.frames] += 1
    assert first_visits.min() >= 1


def test_a_window_brings_the_conditions_of_its_own_place():
    songs = [song("a", 60, window=30, hints=True)]
    cut = songs[0].windows
    for place, start in enumerate(cut.starts):
        batch = MicroBatch((Item(0, start, 30, cut.which[place]),), (0,))
        assert torch.equal(collate(songs, batch).conditions[0], cut.conditions[place % 2])
        hinted = collate(songs, MicroBatch(batch.items, (0,), hints=True))
        assert torch.equal(hinted.conditions[0], cut.hints_conditions[place % 2])
        assert torch.equal(hinted.source[0], songs[0].read().cover_hints[start : start + 30])


def test_hints_take_their_share_of_the_micro_steps():
    songs = [song(f"{i}", 40, hints=True) for i in range(10)]
    counts = Counter(
        batch.hints
        for epoch in range(60)
        for step in plan_epoch(songs, epoch, **PLAN, hints_ratio=0.3)
        for batch in step.micro_batches
    )
    assert counts[True] / 600 == pytest.approx(0.3, abs=0.06)
    assert not any(batch.hints for step in plan_epoch(songs, 0, **PLAN) for batch in step.micro_batches)


def test_conditions_of_unequal_length_are_masked_and_others_are_not():
    songs = [song("a", 40, tokens=3), song("b", 40, tokens=5)]
    mixed = collate(songs, MicroBatch((Item(0, 0, 40), Item(1, 0, 40)), (0, 1)))
    assert mixed.condition_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert collate(songs, MicroBatch((Item(0, 0, 40),), (0,))).condition_mask is None


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20, unique=True), st.integers(0, 1100))
def test_the_nearest_start_is_chosen(starts, wanted):
    starts.sort()
    assert abs(starts[nearest(starts, wanted)] - wanted) == min(abs(start - wanted) for start in starts)


def test_the_plan_of_a_saved_run_stays_what_it_was():
    """A run is resumed by later versions too: the order, the windows and the regimes of its epochs may never move."""
    songs = [song(f"s{i}", 90 + 7 * i, repeat=1 + i % 2, window=40, hints=i != 2) for i in range(5)]
    songs += [song("whole", 60), song("longer", 62, hints=True)]
    assert digest_of(songs, batch_size=1) == "2182ead02ddffd1d"
    assert digest_of(songs, batch_size=2) == "4397589e04fd1a33"
    assert digest_of(songs, batch_size=2, hints_ratio=0.5) == "2da1b54b39baf906"


def digest_of(songs: list[Song], **how) -> str:
    steps = [plan_epoch(songs, epoch, **(PLAN | {"accumulation": 2} | how)) for epoch in range(3)]
    return hashlib.sha256(repr(steps).encode()).hexdigest()[:16]


def test_only_songs_of_one_length_share_a_batch_and_with_other_partners_in_every_epoch():
    songs = [song(f"{i}", 40 if i < 8 else 50) for i in range(13)]
    partners = []
    for epoch in range(6):
        steps = plan_epoch(songs, epoch, **(PLAN | {"batch_size": 4}))
        groups = [frozenset(item.song for item in batch.items) for step in steps for batch in step.micro_batches]
        assert sorted(map(len, groups)) == [1, 4, 4, 4]  # as full as the lengths allow
        partners += [group for group in groups if len(group) > 1]
    assert len(set(partners)) > len(partners) * 0.8


def test_a_batch_carries_names_slots_and_fp32_latents_of_its_windows():
    songs = [song("a", 40, hints=True), song("b", 50, hints=True)]
    halves = [replace(s.read(), target_latents=s.read().target_latents.to(torch.bfloat16)) for s in songs]
    songs = [replace(s, read=lambda half=half: half) for s, half in zip(songs, halves, strict=True)]
    items = (Item(0, 3, 20), Item(1, 30, 20))
    text, hinted = (collate(songs, MicroBatch(items, (4, 5), hints=hints)) for hints in (False, True))
    assert text.songs == ("a", "b")
    assert text.slots == (4, 5)
    assert text.latents.dtype == torch.float32
    assert torch.equal(text.latents[1], halves[1].target_latents[30:50].float())
    assert text.source is None
    assert torch.equal(text.conditions[0], halves[0].encoder_hidden_states)
    assert torch.equal(hinted.conditions[1], halves[1].hints_encoder_hidden_states)
    assert torch.equal(hinted.source[0], halves[0].cover_hints[3:23])


def test_a_batch_moves_whole():
    songs = [song("a", 40, tokens=3, hints=True), song("b", 40, tokens=5, hints=True)]
    batch = collate(songs, MicroBatch((Item(0, 0, 40), Item(1, 0, 40)), (0, 1), hints=True))
    moved = batch.to(torch.device("meta"))
    tensors = (moved.latents, moved.conditions, moved.condition_mask, moved.source)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.songs, moved.slots) == (batch.songs, batch.slots)
    plain = collate(songs, MicroBatch((Item(0, 0, 40),), (0,))).to(torch.device("meta"))
    assert (plain.condition_mask, plain.source) == (None, None)


def test_only_a_pinned_batch_is_pinned_and_copies_do_not_wait(monkeypatch):
    songs = [song("a", 40)]
    batch, pinned, moves = MicroBatch((Item(0, 0, 40),), (0,)), [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, **how: moves.append((place, how)) or tensor)
    collate(songs, batch).to(torch.device("cpu"))
    assert pinned == []
    assert moves == [((torch.device("cpu"),), {"non_blocking": False})] * 2
    collate(songs, batch, pin=True)
    assert pinned == [(1, 40, 3), (1, 5, 4)]


def test_a_song_of_exactly_a_window_is_heard_from_its_start():
    assert [window_start(30, 30, 1, "x", visit) for visit in range(4)] == [0] * 4
    starts = {window_start(31, 30, 1, "x", visit) for visit in range(40)}
    assert starts == {0, 1}


@pytest.mark.parametrize(("device", "beside"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_copies_to_a_device_run_beside_the_computation_on_cuda_alone(monkeypatch, device, beside):
    copied = []
    batch = Batch(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), None, None, ("a",), (0,))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, to, non_blocking: copied.append((to.type, non_blocking)) or x)
    batch.to(torch.device(device))
    assert copied == [(device, beside)] * 2


def test_songs_are_known_again_by_all_that_is_learnt_of_them_and_in_any_order():
    def song(name="a", repeat=1, audio="x", conditions="y") -> Song:
        digests = {"audio": audio, "conditions": conditions}
        return Song(name, 9, read=lambda: None, repeat=repeat, digests=digests)  # type: ignore[return-value]

    both = [song(), song("b")]
    others = [song("c"), song(repeat=2), song(audio="z"), song(conditions="z"), song("\udcff")]
    digests = [fingerprint([song("b"), one]) for one in (song(), *others)]
    assert len(set(digests)) == 6
    assert fingerprint(both[::-1]) == fingerprint(both) == digests[0]
    assert all(len(digest) == 32 for digest in digests)


def test_each_song_draws_its_wordings_by_itself_and_a_saved_run_the_same_again():
    windows = Windows(20, (0,), (0,), (torch.zeros(1, 2), torch.ones(1, 2)), shares=(0.5, 0.5))
    songs = [Song(name, 20, read=lambda: None, windows=windows) for name in ("a", "b")]  # type: ignore[return-value]
    drawn = [[item_of(song, 0, visit, seed).text for visit in range(40)] for song in songs for seed in (1, 2)]
    assert all(set(which) == {0, 1} for which in drawn)
    assert len({tuple(which) for which in drawn}) == 4
    for which, (name, seed) in zip(drawn, ((n, s) for n in "ab" for s in (1, 2)), strict=True):
        assert which == [windows.wording(uniform(seed, "wording", name, visit)) for visit in range(40)]
