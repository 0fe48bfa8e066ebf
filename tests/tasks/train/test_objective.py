"""The wiring of the training loss: what a run's objective feeds the decoder, and what becomes of the loss.

The oracle is the original code's loss on the golden cases; where there is none (hints, weights, shares), the formula.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.data.batches import Batch, Item, MicroBatch, Song, Windows, collate
from sidestep.data.records import Record, save_record
from sidestep.errors import UserError
from sidestep.flow_matching.timesteps import logit_normal, stratified, turbo_timesteps
from sidestep.seeding import seed_for, uniform
from sidestep.tasks.train import objective
from sidestep.tasks.train.evaluation import grid_loss
from sidestep.tasks.train.loop import Metrics, optimizer_step, run_loop
from sidestep.tasks.train.objective import training_law
from sidestep.tasks.train.run import Run
from sidestep.variants import Variant
from tests.conftest import FIXTURES, assert_golden
from tests.training_world import prepared, settings, write_data

CASES = [0, 1]


def set_up_run(data: Path, output: Path, **changes) -> Run:
    """A run before its first step, by default without dropout in the adapter."""
    return prepared(settings(data, output, **{"dropout": 0.0} | changes))


def golden_run(golden, tmp_path: Path, **changes) -> Run:
    """A run whose songs are the golden cases, with conditions of their own for the hints: those of text, negated."""
    folder, expected = golden
    for case in CASES:
        latents, conditions, hints = (
            expected[f"{case}.{name}"][0] for name in ("latent_mean", "encoder_hidden_states", "cover_hints")
        )
        extra = {"cover_hints": hints, "hints_encoder_hidden_states": -conditions}
        save_record(tmp_path / "data" / f"case {case}.pt", Record(latents, conditions, {"caption": str(case)}, **extra))
    return set_up_run(tmp_path / "data", tmp_path / "run", model_variant=folder, **changes)


def loss_of_case(run: Run, expected: dict[str, torch.Tensor], case: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted loss [1], plain loss [1]) of a case's micro-step in epoch 0, at the golden noise and timestep."""
    (micro_batch,) = [m for step in run.plan(0) for m in step.micro_batches if m.items[0].song == case]
    batch = collate(run.songs, micro_batch)
    run.objective.noise = lambda step, batch, stream: expected[f"{case}.noise"]
    run.objective.timesteps = lambda step, samples, stream: expected[f"{case}.t"].expand(samples)
    weighted, plain, t = run.objective(run.wrapped, batch, step=0, samples=2)
    assert torch.equal(t, expected[f"{case}.t"])
    return weighted.detach(), plain


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("cfg_ratio", "name"), [(0.0, "loss"), (1.0, "loss_null")])
def test_a_micro_step_has_the_original_loss_with_and_without_its_condition(
    golden, golden_time_table, tmp_path, case, cfg_ratio, name
):
    run = golden_run(golden, tmp_path, cfg_ratio=cfg_ratio)
    weighted, plain = loss_of_case(run, golden[1], case)
    assert_golden(plain, golden[1][f"{case}.{name}"])
    assert_golden(weighted, golden[1][f"{case}.{name}"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cfg_ratio", [0.0, 1.0])
def test_a_micro_step_with_hints_has_them_as_context_and_their_own_condition(
    checkpoints, golden, golden_time_table, tmp_path, case, cfg_ratio
):
    folder, expected = golden
    run = golden_run(golden, tmp_path, cfg_ratio=cfg_ratio, hints_ratio=1.0)
    _, plain = loss_of_case(run, expected, case)

    checkpoint = open_checkpoint(checkpoints, folder)
    latents, noise, t, hints, conditions = (
        expected[f"{case}.{n}"] for n in ("latent_mean", "noise", "t", "cover_hints", "encoder_hidden_states")
    )
    context = torch.cat([hints, torch.ones_like(hints)], dim=-1)
    conditions = checkpoint.load_null_condition().expand_as(conditions) if cfg_ratio else -conditions
    with torch.inference_mode():
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * latents
        velocity = checkpoint.load_decoder()(x_t, t, t, conditions, context, return_dict=False)[0]
    assert_golden(plain, (velocity - (noise - latents)).square().mean((1, 2)))
    assert (plain - expected[f"{case}.{'loss_null' if cfg_ratio else 'loss'}"]).abs() > 1e-3  # silence gives another


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_min_snr_weighs_the_loss_that_is_learnt_from_and_not_the_one_that_is_shown(golden, tmp_path, t):
    run = golden_run(golden, tmp_path, loss_weighting="min_snr", snr_gamma=5.0)
    expected = golden[1] | {"0.t": torch.tensor([t])}
    weighted, plain = loss_of_case(run, expected, 0)
    snr = ((1 - t) / t) ** 2
    assert (weighted / plain).item() == pytest.approx(min(snr, 5.0) / (snr + 1), rel=1e-5)
    unweighted = golden_run(golden, tmp_path)
    assert torch.equal(loss_of_case(unweighted, expected, 0)[1], plain)


class Recorder(torch.nn.Module):
    """A decoder that remembers what it was given and answers with nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, torch.Tensor]] = []

    def forward(self, **given):
        self.calls.append(given)
        return (torch.zeros_like(given["hidden_states"]),)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), frames=(30, 30, 44, 44), hints=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_condition_dropout_takes_its_share_of_the_samples_whose_condition_becomes_the_null_condition(
    data, tmp_path, seed
):
    run, model = set_up_run(data, tmp_path, seed=seed, cfg_ratio=0.15, batch_size=2), Recorder()
    null = open_checkpoint(FIXTURES / "checkpoints", "turbo").load_null_condition()
    batch = collate(run.songs, MicroBatch((Item(0, 0, 30), Item(1, 0, 30)), (0, 1)))
    dropped = []
    for step in range(400):
        run.objective(model, batch, step, 2)
        for condition, own in zip(model.calls[-1]["encoder_hidden_states"], batch.conditions, strict=True):
            is_null = bool((condition == null[0]).all())
            assert is_null or torch.equal(condition, own)
            dropped.append(is_null)
    assert sum(dropped) / len(dropped) == pytest.approx(0.15, abs=0.04)  # three standard deviations of 800 draws
    pairs = {(a, b) for a, b in zip(dropped[::2], dropped[1::2], strict=True)}
    assert len(pairs) == 4  # each sample by itself, not the batch as a whole


def test_a_step_whose_conditions_all_drop_is_known_beforehand(data, tmp_path):
    objective = set_up_run(data, tmp_path, cfg_ratio=0.5).objective
    told = [objective.drops_all(step, 2) for step in range(40)]
    assert told == [
        dropped is not None and bool(dropped.all()) for dropped in (objective.dropped(s, (0, 1)) for s in range(40))
    ]
    assert set(told) == {True, False}
    assert not set_up_run(data, tmp_path, cfg_ratio=0.0).objective.drops_all(0, 2)


def test_dropout_of_conditions_is_that_of_the_model_unless_it_is_typed(data, tmp_path):
    config = settings(data, tmp_path)
    base = Variant("base", is_turbo=False, is_xl=False, timestep_mu=-0.4, timestep_sigma=1.0)
    turbo = Variant("turbo", is_turbo=True, is_xl=False, timestep_mu=-0.4, timestep_sigma=1.0)
    assert (training_law(config, base).cfg_ratio, training_law(config, turbo).cfg_ratio) == (0.15, 0.0)
    assert set_up_run(data, tmp_path, cfg_ratio=0.4).objective.law.cfg_ratio == 0.4
    typed = training_law(settings(data, tmp_path, cfg_ratio=0.4, timestep_mode="discrete"), base)
    assert typed.reason == f"{base.reason}; --timestep-mode and --cfg-ratio typed"


@pytest.mark.parametrize(
    ("variant", "typed", "name", "quartiles"),
    [
        ("turbo", {}, "discrete, 8 steps, shift 3", None),
        ("base", {}, "logit-normal, mu -0.4, sigma 1", (-0.4, 1.0)),
        ("base", {"timestep_mode": "discrete"}, "discrete, 8 steps, shift 3", None),
        ("turbo", {"timestep_mode": "logit-normal"}, "logit-normal, mu -0.4, sigma 1", (-0.4, 1.0)),
        ("base", {"timestep_mu": 0.5, "timestep_sigma": 2.0}, "logit-normal, mu 0.5, sigma 2", (0.5, 2.0)),
    ],
)
def test_the_law_is_the_models_but_for_what_was_typed(data, tmp_path, variant, typed, name, quartiles):
    variant = Variant(variant, is_turbo=variant == "turbo", is_xl=False, timestep_mu=-0.4, timestep_sigma=1.0)
    law = training_law(settings(data, tmp_path, **typed), variant)
    assert law.name == name
    assert law.reason == variant.reason + ("; --timestep-mode typed" if "timestep_mode" in typed else "")
    u = torch.tensor([0.3, 0.8], dtype=torch.float64)
    expected = logit_normal(*quartiles)(u) if quartiles else turbo_timesteps()[[2, 6]]
    torch.testing.assert_close(law.draw(u), expected)


def test_the_shift_of_turbos_timesteps_is_that_which_is_named(data, tmp_path):
    turbo = Variant("turbo", is_turbo=True, is_xl=False, timestep_mu=-0.4, timestep_sigma=1.0)
    law = training_law(settings(data, tmp_path, timestep_shift=1.0), turbo)
    assert (law.name, law.shift_reason) == ("discrete, 8 steps, shift 1", "; shift: --timestep-shift typed")
    eighths = torch.tensor([1, 3, 5, 7, 9, 11, 13, 15], dtype=torch.float64) / 16
    torch.testing.assert_close(law.draw(eighths).sort().values, torch.arange(1, 9, dtype=torch.float64) / 8)


def test_what_contradicts_itself_is_refused_with_the_flag_that_settles_it(data, tmp_path):
    base = Variant("merge", is_turbo=False, is_xl=False, timestep_mu=-0.4, timestep_sigma=1.0)
    with pytest.raises(UserError) as refused:
        training_law(settings(data, tmp_path), replace(base, doubt="two signs"))
    assert refused.value.problem == (
        "two signs: a merge of models that learnt under different laws of timesteps does not say which it follows."
    )
    assert refused.value.fix == (
        "Add --timestep-mode discrete if it makes good music in 8 steps without guidance, as turbo does; "
        "else --timestep-mode logit-normal"
    )
    with pytest.raises(UserError, match="--timestep-shift 2: only turbo's eight timesteps have a shift") as refused:
        training_law(settings(data, tmp_path, timestep_shift=2.0), base)
    assert refused.value.fix == "Leave it away; to move that law use --timestep-mu."


def test_the_draws_of_a_saved_run_stay_what_they_were(data, tmp_path):
    """A run is resumed by later versions too: each stream of random numbers has its own name and may never move."""
    run, model = set_up_run(data, tmp_path, seed=3, batch_size=2, cfg_ratio=0.5), Recorder()
    batch = collate(run.songs, MicroBatch((Item(0, 0, 30), Item(1, 0, 30)), (2, 3)))
    for slot, noise in zip(batch.slots, run.objective.noise(5, batch), strict=True):
        generator = torch.Generator().manual_seed(seed_for(3, "noise", 5, slot))
        assert torch.equal(noise, torch.randn(noise.shape, generator=generator))
    generator = torch.Generator().manual_seed(seed_for(3, "timesteps", 5))
    expected = run.objective.law.draw(stratified(4, generator)).float()
    assert torch.equal(run.objective.timesteps(5, 4), expected)
    drops = [uniform(3, "cfg", 5, slot) < 0.5 for slot in range(32)]
    assert run.objective.dropped(5, tuple(range(32))).tolist() == drops
    assert run.objective.dropped(5, (drops.index(False),)) is None
    run.objective(model, batch, 5, 4)
    assert torch.initial_seed() == seed_for(3, "dropout", 5, 2)


def test_everything_but_t_is_in_the_dtype_of_the_base(data, tmp_path):
    run, model = set_up_run(data, tmp_path, cfg_ratio=0.0), Recorder()
    run.objective.null_condition = run.objective.null_condition.bfloat16()  # as a base in bf16 has it
    run.objective(model, collate(run.songs, MicroBatch((Item(0, 0, 30),), (0,))), 0, 1)
    given = model.calls[-1]
    assert {given[name].dtype for name in ("hidden_states", "encoder_hidden_states", "context_latents")} == {
        torch.bfloat16
    }
    assert (given["timestep"].dtype, given["timestep_r"].dtype, given["return_dict"]) == (*[torch.float32] * 2, False)


def test_timesteps_and_drops_go_to_the_device_without_waiting(data, tmp_path, monkeypatch):
    run = set_up_run(data, tmp_path, cfg_ratio=1.0)
    batch, moves, original = collate(run.songs, MicroBatch((Item(0, 0, 30),), (0,))), [], torch.Tensor.to

    def to(tensor, *place, **how):
        if place and isinstance(place[0], torch.device | None):
            moves.append((tensor.dtype, place, how))
        return original(tensor, *place, **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    run.objective(Recorder(), batch, 0, 1)
    where = ((torch.device("cpu"),), {"non_blocking": False})
    assert moves == [(torch.float32, *where), (torch.bool, *where)]


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_a_batch_is_pinned_for_cuda_alone(data, tmp_path, monkeypatch, device):
    run, asked = set_up_run(data, tmp_path), []

    def recorded(songs, micro_batch, pin):
        asked.append(pin)
        return collate(songs, micro_batch)

    monkeypatch.setattr(objective, "collate", recorded)
    monkeypatch.setattr(type(run.objective), "device", torch.device(device))
    monkeypatch.setattr(Batch, "to", lambda _batch, to: to)
    assert run.objective.collate(run.songs, MicroBatch((Item(0, 0, 30),), (0,))) == torch.device(device)
    assert asked == [device == "cuda"]


@pytest.mark.parametrize("is_on", [True, False])
def test_activations_are_kept_elsewhere_only_on_request(data, tmp_path, monkeypatch, is_on):
    devices = []
    monkeypatch.setattr(
        "sidestep.tasks.train.objective.offload_activations", lambda device: devices.append(device) or nullcontext()
    )
    run = set_up_run(data, tmp_path, offload_activations=is_on)
    run.objective(Recorder(), collate(run.songs, MicroBatch((Item(0, 0, 30),), (0,))), 0, 1)
    assert devices == [torch.device("cpu")] * is_on


@pytest.mark.parametrize("hints_ratio", [0.0, 1.0])
def test_the_decoder_is_given_the_same_t_twice_noise_by_t_and_the_context_of_the_regime(data, tmp_path, hints_ratio):
    run, model = set_up_run(data, tmp_path, hints_ratio=hints_ratio, batch_size=2), Recorder()
    silence = torch.load(FIXTURES / "checkpoints/acestep-v15-turbo/silence_latent.pt").mT  # [1, 900, D]
    for micro_batch in (m for step in run.plan(0) for m in step.micro_batches):
        batch = collate(run.songs, micro_batch)
        noise = run.objective.noise(7, batch)
        _, loss, t = run.objective(model, batch, 7, 4)
        given = model.calls[-1]
        assert torch.equal(given["timestep"], t)
        assert torch.equal(given["timestep_r"], t)
        t_ = t[:, None, None]
        torch.testing.assert_close(given["hidden_states"], (1 - t_) * batch.latents + t_ * noise)
        torch.testing.assert_close(loss, (noise - batch.latents).square().mean((1, 2)))
        songs, frames = [run.songs[item.song] for item in micro_batch.items], micro_batch.items[0].frames
        source, ones = given["context_latents"].chunk(2, dim=-1)
        assert torch.equal(ones, torch.ones_like(source))
        records = [song.read() for song in songs]
        expected = [record.cover_hints[:frames] if hints_ratio else silence[0, :frames] for record in records]
        assert torch.equal(source, torch.stack(expected))
        for condition, record in zip(given["encoder_hidden_states"], records, strict=True):
            own = record.hints_encoder_hidden_states if hints_ratio else record.encoder_hidden_states
            assert torch.equal(condition[: len(own)], own)


def test_pad_tokens_of_a_batch_change_no_sample_of_it(data, tmp_path):
    run = set_up_run(data, tmp_path)
    items = (Item(0, 0, 30), Item(1, 0, 30))  # of 12 and 13 condition tokens
    together = collate(run.songs, MicroBatch(items, (0, 1)))
    assert together.condition_mask is not None
    _, losses, _ = run.objective(run.wrapped, together, 0, 2)
    for slot, item in enumerate(items):
        alone = collate(run.songs, MicroBatch((item,), (slot,)))
        _, loss, _ = run.objective(run.wrapped, alone, 0, 2)
        torch.testing.assert_close(losses[slot : slot + 1], loss)


def test_draws_follow_from_seed_step_and_slot_alone(data, tmp_path):
    objective = set_up_run(data, tmp_path / "a", seed=1, batch_size=2, cfg_ratio=0.5).objective
    again = set_up_run(data, tmp_path / "b", seed=1, cfg_ratio=0.5).objective
    other = set_up_run(data, tmp_path / "c", seed=2, cfg_ratio=0.5).objective
    songs = set_up_run(data, tmp_path / "d").songs
    pair = collate(songs, MicroBatch((Item(0, 0, 30), Item(1, 0, 30)), (2, 3)))
    alone = collate(songs, MicroBatch((Item(1, 0, 30),), (3,)))
    assert torch.equal(objective.noise(5, pair)[1:], again.noise(5, alone))
    assert not torch.equal(objective.noise(5, pair)[0], objective.noise(5, pair)[1])
    assert not torch.equal(objective.noise(5, alone), objective.noise(6, alone))
    assert not torch.equal(objective.noise(5, alone), other.noise(5, alone))
    assert torch.equal(objective.timesteps(5, 8), again.timesteps(5, 8))
    assert not torch.equal(objective.timesteps(5, 8), objective.timesteps(6, 8))
    assert not torch.equal(objective.timesteps(5, 8), other.timesteps(5, 8))
    many = tuple(range(64))
    assert torch.equal(objective.dropped(5, many), again.dropped(5, many))
    assert not torch.equal(objective.dropped(5, many), objective.dropped(6, many))
    assert not torch.equal(objective.dropped(5, many), other.dropped(5, many))


def test_an_optimizer_step_of_eight_samples_visits_each_of_turbos_timesteps_once(data, tmp_path):
    t = set_up_run(data, tmp_path).objective.timesteps(3, 8)
    torch.testing.assert_close(t.sort().values, turbo_timesteps().sort().values.float())


@pytest.mark.parametrize("law", ["discrete", "logit-normal"])
def test_the_grid_hears_the_middle_of_each_eighth_of_the_law_under_noise_of_name_window_and_timestep(
    data, tmp_path, law
):
    run, model = set_up_run(data, tmp_path, timestep_mode=law, batch_size=3, hints_ratio=1.0), Recorder()
    (song,) = run.songs[1:2]
    cells = run.objective.grid([song])
    assert [batch.slots for batch in cells] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert all(batch.items == (Item(0, 0, song.frames),) * len(batch.slots) and batch.hints for batch in cells)
    losses = torch.cat([run.objective.grid_loss(model, [song], batch) for batch in cells])
    t = torch.cat([given["timestep"] for given in model.calls])
    eighths = torch.tensor([1, 3, 5, 7, 9, 11, 13, 15], dtype=torch.float64) / 16
    torch.testing.assert_close(t, run.objective.law.draw(eighths).float(), rtol=0, atol=0)
    assert law != "discrete" or sorted(t.tolist()) == sorted(turbo_timesteps().float().tolist())
    latents, draws = song.read().target_latents, []
    for slot in range(8):
        generator = torch.Generator().manual_seed(seed_for("grid", song.name, 0, slot))
        draws.append(torch.randn(latents.shape, generator=generator))
    noise, t_ = torch.stack(draws), t[:, None, None]
    torch.testing.assert_close(
        torch.cat([given["hidden_states"] for given in model.calls]), (1 - t_) * latents + t_ * noise
    )
    torch.testing.assert_close(losses, (noise - latents).square().mean((1, 2)))


@pytest.mark.parametrize(("asked", "has_hints"), [(True, True), (True, False), (False, True)])
def test_a_song_in_windows_has_four_on_the_grid_evenly_spaced(asked, has_hints):
    starts = tuple(range(0, 99, 7))
    windows = Windows(20, starts, tuple(range(100, 100 + len(starts))), ())
    whole = Song("whole", 30, read=lambda: None)  # type: ignore[return-value]
    song = Song("cut", 120, read=lambda: None, has_hints=has_hints, windows=windows)  # type: ignore[return-value]
    cells = objective.grid([whole, song], 8, hints=asked)
    assert [batch.items[0] for batch in cells] == [
        Item(0, 0, 30),
        *(Item(1, start, 20, 100 + start // 7) for start in (0, 35, 63, 98)),
    ]
    assert [batch.hints for batch in cells] == [False, *[asked and has_hints] * 4]
    assert {batch.slots for batch in cells} == {tuple(range(8))}
    few = objective.grid([replace(song, windows=Windows(20, (0, 90), (0, 1), ()))], 8, hints=False)
    assert [batch.items[0].start for batch in few] == [0, 90]


def untie(run: Run) -> None:
    """Move the adapter away from the identity, so that its dropout changes the output."""
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))


def test_validation_has_no_dropout_and_training_has(data, tmp_path):
    run = set_up_run(data, tmp_path / "a", val_split=0.3)
    dropping = set_up_run(data, tmp_path / "b", val_split=0.3, dropout=0.5)
    untie(run)
    untie(dropping)
    without = grid_loss(run, run.held_out)
    assert grid_loss(dropping, dropping.held_out) == without == grid_loss(dropping, dropping.held_out)
    batch = collate(run.songs, run.plan(0)[0].micro_batches[0])
    losses = [one.objective(one.wrapped, batch, 0, 1)[1] for one in (run, dropping)]
    assert (losses[0] - losses[1]).abs() > 1e-4


def test_a_whole_run_validates_in_eval_mode_and_goes_on_in_train_mode(data, tmp_path):
    run = set_up_run(data, tmp_path, val_split=0.3, epochs=3)
    seen = []
    run.model.register_forward_pre_hook(lambda model, *_: seen.append((torch.is_grad_enabled(), model.training)))
    run_loop(run)
    assert set(seen) == {(True, True), (False, False)}
    assert seen[0] == (True, True)
    assert seen[-1] == (False, False)  # the last epoch's validation
    assert (False, False) in seen[: -run.total_steps]  # earlier epochs were validated as well


@pytest.mark.parametrize("accumulation", [3, 4])
def test_every_sample_of_an_optimizer_step_weighs_the_same(tmp_path, accumulation):
    data = write_data(
        tmp_path / "data", frames=(30, 30, 30, 44, 44)
    )  # batches of 2, 1 and 2: one step, a full one or a short one
    run = set_up_run(data, tmp_path / "run", batch_size=2, gradient_accumulation=accumulation, max_grad_norm=0.0)
    plan = next(step for step in run.plan(0) if len({len(m.items) for m in step.micro_batches}) > 1)

    total = [torch.zeros_like(p) for p in run.parameters]
    for micro_batch in plan.micro_batches:
        for item, slot in zip(micro_batch.items, micro_batch.slots, strict=True):
            alone = collate(run.songs, MicroBatch((item,), (slot,)))
            weighted, _, _ = run.objective(run.wrapped, alone, 0, plan.samples)
            for mean, gradient in zip(total, torch.autograd.grad(weighted.sum(), run.parameters), strict=True):
                mean += gradient / plan.samples

    applied: list[list[torch.Tensor]] = []
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: applied.append([p.grad.clone() for p in run.parameters]))
    optimizer_step(run, plan, Metrics())
    assert len(applied) == 1
    assert any(gradient.abs().max() > 0 for gradient in total)
    for found, mean in zip(applied[0], total, strict=True):
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share", [0.5, 2.0, None], ids=["clipped", "below the limit", "no limit"])
def test_a_gradient_above_max_grad_norm_is_scaled_down_to_it_and_told_as_it_was(tmp_path, share):
    run = set_up_run(write_data(tmp_path / "data"), tmp_path / "run", max_grad_norm=0.0)
    (plan, *_) = run.plan(0)
    applied: list[list[torch.Tensor]] = []
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: applied.append([p.grad.clone() for p in run.parameters]))
    start = [p.detach().clone() for p in run.parameters]
    metrics = Metrics()
    for limited in (False, True):
        norm = torch.nn.utils.get_total_norm(applied[0]) if limited else 0.0
        run.config = replace(run.config, max_grad_norm=float(norm) * (share or 0.0))
        with torch.no_grad():
            for parameter, value in zip(run.parameters, start, strict=True):
                parameter.copy_(value)
        optimizer_step(run, plan, metrics)
    scale = min(share or 1.0, 1.0)
    for free, limited in zip(*applied, strict=True):
        torch.testing.assert_close(limited, free * scale, rtol=1e-4, atol=1e-8)
    (_, before, _), (_, after, _) = metrics.steps
    assert after.item() == pytest.approx(before.item(), rel=1e-4)
    assert before.item() == pytest.approx(torch.nn.utils.get_total_norm(applied[0]).item(), rel=1e-4)
