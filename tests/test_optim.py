"""Optimizers and schedules by name."""

import itertools
import shlex
from pathlib import Path

import pytest
import torch

from sidestep.cli.parser import configs_of, parse
from sidestep.errors import UserError
from sidestep.optim import learning_rate_note, make_optimizer, make_scheduler
from sidestep.settings.config import OPTIMIZER_TYPES, SCHEDULER_TYPES, TrainConfig
from tests.training_world import settings

CPU = torch.device("cpu")


def config(**changes):
    return settings(Path("data"), Path("out"), **changes)


def parameter() -> torch.nn.Parameter:
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(64, 8))


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_TYPES if name != "adamw8bit"])
def test_each_optimizer_goes_downhill_and_prints_nothing(name, capsys):
    p = parameter()
    optimizer = make_optimizer(config(optimizer_type=name, lr=1.0 if name == "prodigy" else 0.05), [p], CPU)
    before = p.square().mean().item()
    for _ in range(400 if name == "prodigy" else 60):  # it begins with tiny steps and finds the size
        p.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert p.square().mean().item() < 0.9 * before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", OPTIMIZER_TYPES)
def test_with_default_flags_each_optimizer_solves_a_lora_regression_that_starts_at_zero(name):
    """W = 2·B·A with the schedule and the clipping of a run, of a size that adamw8bit keeps in 8 bits."""
    call = parse(shlex.split(f"fixed --checkpoint-dir c --dataset-dir d --output-dir o --optimizer-type {name}"))
    [c] = configs_of(call, {})
    generator, steps = torch.Generator().manual_seed(0), 800
    x = torch.randn(128, 512, generator=generator)
    a = torch.nn.Parameter(torch.empty(8, 512).uniform_(-(512**-0.5), 512**-0.5, generator=generator))
    b = torch.nn.Parameter(torch.zeros(512, 8))
    target = 2 * x @ a.detach().T @ (0.01 * torch.randn(8, 512, generator=generator))
    try:
        optimizer = make_optimizer(c, [a, b], CPU)
    except UserError:
        pytest.skip("no 8-bit optimizer for this CPU")
    schedule = make_scheduler(c, optimizer, steps)

    def loss() -> torch.Tensor:
        return (2 * x @ a.T @ b.T - target).square().mean()

    start = loss().item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_([a, b], c.max_grad_norm)
        optimizer.step()
        schedule.step()
    assert loss().item() < 0.1 * start
    if name == "adamw8bit":
        assert optimizer.state[a]["state1"].dtype == torch.uint8


def test_adamw_is_the_fused_one():
    assert make_optimizer(config(), [parameter()], CPU).defaults["fused"]


@pytest.mark.parametrize("name", OPTIMIZER_TYPES)
def test_weight_decay_leaves_magnitudes_and_biases_alone(name):

    def trained(decay: float) -> list[torch.nn.Parameter]:
        parameters = [parameter(), torch.nn.Parameter(torch.ones(8))]
        lr = 1.0 if name == "prodigy" else 0.1
        optimizer = make_optimizer(config(optimizer_type=name, lr=lr, weight_decay=decay), parameters, CPU)
        for _ in range(40):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return parameters

    try:
        (matrix, magnitude), (decayed, same) = trained(0.0), trained(0.5)
    except UserError:
        pytest.skip("no 8-bit optimizer for this CPU")
    if name != "prodigy":  # its step size follows from all parameters
        assert torch.equal(magnitude, same)
    assert (magnitude - same).abs().max() < 0.1 * (matrix - decayed).abs().max()


def test_adamw8bit_runs_or_says_that_this_device_has_none():
    """It is never swapped for another one in silence."""
    refused = None
    try:
        optimizer = make_optimizer(config(optimizer_type="adamw8bit"), [parameter()], CPU)
    except UserError as error:
        refused = error
    if refused is None:
        assert type(optimizer).__name__ == "AdamW8bit"
    else:
        assert "adamw8bit" in refused.problem
        assert "cpu" in refused.problem
        assert "--optimizer-type adamw" in refused.fix


@pytest.mark.parametrize(("lr", "noted"), [(1e-4, True), (1.0, False), (0.5, False), (20.0, True)])
def test_prodigys_lr_is_a_multiplier_around_one(lr, noted):
    note = learning_rate_note(config(optimizer_type="prodigy", lr=lr))
    assert bool(note) == noted
    assert not noted or "around 1.0" in note
    assert not learning_rate_note(config(lr=lr))


def rates_of(c: TrainConfig) -> list[float]:
    """The learning rate of each of 400 optimizer steps."""
    optimizer = make_optimizer(c, [parameter()], CPU)
    schedule = make_scheduler(c, optimizer, 400)
    rates = []
    for _ in range(400):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULER_TYPES)
def test_schedules_warm_up_and_end_where_they_should(name):
    rates = rates_of(config(scheduler_type=name, warmup_steps=100, lr=1.0))
    if name != "constant":
        assert rates[0] < 0.05
        assert rates[40] == pytest.approx(1.0)
    assert rates[-1] < 0.01 if name in ("cosine", "linear", "warmup_stable_decay") else rates[200] > 0
    rises = sum(b > a + 0.5 for a, b in itertools.pairwise(rates))
    assert rises == (3 if name == "cosine_restarts" else 0)


@pytest.mark.parametrize(("typed", "taken"), [(0, 0), (7, 7), (40, 40), (41, 40)])
def test_a_run_warms_up_for_as_many_steps_as_are_typed_and_at_most_a_tenth_of_it(typed, taken):
    rates = rates_of(config(scheduler_type="linear", warmup_steps=typed, lr=1.0))
    assert rates.index(max(rates)) == taken
    assert max(rates) == 1.0
