"""Precision, ends and batches of the training mathematics: what a slip of a sign or an argument would change."""

import pytest
import torch

from sidestep.flow_matching.guidance import drop_conditions
from sidestep.flow_matching.loss import flow_matching_loss, uniform_weight
from sidestep.flow_matching.sampler import sampling_timesteps
from sidestep.flow_matching.timesteps import discrete, logit_normal, stratified, turbo_timesteps


@pytest.mark.parametrize("make", [lambda: discrete, lambda: logit_normal(-0.4, 1.0)], ids=["discrete", "logit-normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t_keeps_the_precision_of_u(make, dtype):
    assert make()(torch.tensor([0.2, 0.7], dtype=dtype)).dtype == dtype


def test_the_ends_of_u_are_the_ends_of_each_law():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert discrete(ends).tolist() == pytest.approx([1.0, 0.3])
    assert logit_normal(-0.4, 1.0)(ends).tolist() == [0.0, 1.0]


def test_mu_moves_and_sigma_widens_the_law():
    u = torch.tensor([0.25, 0.5, 0.81], dtype=torch.float64)
    low, base, wide = (logit_normal(mu, sigma)(u).logit() for mu, sigma in ((-1.4, 1.0), (-0.4, 1.0), (-0.4, 2.0)))
    torch.testing.assert_close(base - low, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(wide + 0.4, 2 * (base + 0.4))
    assert base[0].item() == pytest.approx(-0.4)  # the square root of 0.25 is the median of a single draw


def test_stratified_numbers_follow_the_generator_and_nothing_else():
    def draw(seed):
        torch.manual_seed(seed + 100)
        return stratified(64, torch.Generator().manual_seed(7))

    assert torch.equal(draw(1), draw(2))
    assert draw(1).dtype == torch.float64
    assert not torch.equal(draw(1), stratified(64, torch.Generator().manual_seed(8)))
    assert not torch.equal(draw(1).argsort(), torch.arange(64))  # in random order
    inside = (draw(1) * 64) % 1
    assert len(set(inside.tolist())) == 64


def test_each_sample_of_a_batch_has_its_own_loss_over_its_own_real_frames():
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, 2, 5, 4, generator=generator)
    t = torch.tensor([0.25, 0.75])
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1.0, 1, 1, 1, 1]])
    seen = []

    def velocity(noisy, t):
        seen.append(noisy)
        return predicted

    masked = flow_matching_loss(velocity, latents, noise, t, mask)
    plain = flow_matching_loss(velocity, latents, noise, t)
    error = (predicted - (noise - latents)) ** 2
    torch.testing.assert_close(masked, torch.stack([error[0, :3].mean(), error[1].mean()]))
    torch.testing.assert_close(plain, error.mean((1, 2)))
    torch.testing.assert_close(seen[0][0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(seen[0][1], 0.25 * latents[1] + 0.75 * noise[1])


def test_uniform_weights_are_ones_of_the_precision_of_t():
    assert torch.equal(uniform_weight(torch.tensor([0.3, 1.0])), torch.ones(2))


def test_dropped_samples_have_the_null_condition_at_every_position_in_the_dtype_of_the_conditions():
    conditions = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    null = torch.randn(1, 1, 4)
    dropped = drop_conditions(conditions, null, torch.tensor([True, False]))
    assert dropped.dtype == torch.bfloat16
    assert torch.equal(dropped[0], null[0].to(torch.bfloat16).expand(3, 4))
    assert torch.equal(dropped[1], conditions[1])


# The original model's tables of the timesteps of each shift.
TABLES = {
    1.0: [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    2.0: [1.0, 0.93333333333333, 0.85714285714286, 0.76923076923077, 0.66666666666667, 0.54545454545455, 0.4, 2 / 9],
    3.0: [1.0, 0.9545454545454546, 0.9, 0.8333333333333334, 0.75, 0.6428571428571429, 0.5, 0.3],
}


@pytest.mark.parametrize("shift", TABLES)
def test_the_eight_timesteps_of_a_shift_are_drawn_equally_often_in_twenty_thousand(shift):
    generator = torch.Generator().manual_seed(42)
    drawn = discrete(torch.cat([stratified(4, generator) for _ in range(5_000)]), shift)
    found, counts = drawn.unique(return_counts=True)
    torch.testing.assert_close(found.flip(0), torch.tensor(TABLES[shift], dtype=torch.float64), rtol=0, atol=1e-12)
    # each sample of a step has two timesteps to itself: the deviation is that of 5,000 throws of a coin
    assert max(abs(counts - 2_500)) < 4 * (5_000 / 4) ** 0.5
    assert all(counts[i] + counts[i + 1] == 5_000 for i in range(0, 8, 2))


@pytest.mark.parametrize("shift", TABLES)
def test_each_shift_has_the_timesteps_of_the_original_in_training_and_in_sampling(shift):
    table = torch.tensor(TABLES[shift], dtype=torch.float64)
    torch.testing.assert_close(turbo_timesteps(shift), table, rtol=0, atol=1e-12)
    u = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    torch.testing.assert_close(discrete(u, shift), table, rtol=0, atol=1e-12)
    torch.testing.assert_close(sampling_timesteps(8, shift)[:-1].double(), table, rtol=0, atol=1e-6)
