"""The sampler follows the velocity field from noise to latents; guidance pushes it as the paper says."""

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from sidestep.flow_matching.guidance import guided
from sidestep.flow_matching.sampler import sample_euler, sampling_timesteps
from sidestep.flow_matching.timesteps import turbo_timesteps


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_turbo_is_sampled_at_the_timesteps_that_it_is_trained_on():
    timesteps = sampling_timesteps(8, 3.0)
    assert timesteps.dtype == torch.float32
    torch.testing.assert_close(timesteps[:-1].double(), turbo_timesteps(), rtol=0, atol=1e-6)
    assert timesteps[-1] == 0


def test_without_shift_steps_are_equal():
    torch.testing.assert_close(sampling_timesteps(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_straight_flow_is_followed_exactly_in_any_number_of_steps(steps):
    noise, latents, seen = normal(2, 6, 4), normal(2, 6, 4, seed=1), []

    def velocity(x, t):
        seen.append(t)
        torch.testing.assert_close(x, t[:, None, None] * noise + (1 - t[:, None, None]) * latents)
        return noise - latents

    torch.testing.assert_close(sample_euler(velocity, noise, sampling_timesteps(steps, 3.0)), latents)
    torch.testing.assert_close(torch.stack(seen), sampling_timesteps(steps, 3.0)[:-1, None].expand(-1, 2))


def test_a_step_in_half_precision_is_rounded_once():
    noise, change = normal(1, 6, 4).bfloat16(), normal(1, 6, 4, seed=1).bfloat16()
    ours = sample_euler(lambda x, t: change, noise, torch.tensor([1.0, 0.5]))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, (noise.float() - 0.5 * change.float()).bfloat16())


@pytest.mark.parametrize(("size", "batch"), [(0.1, 2), (1.0, 2), (30.0, 2), (1.0, 3)])
def test_guidance_equals_diffusers_own_over_several_steps(size, batch):
    conditions, null, momentum = normal(batch, 3, 5), normal(1, 1, 5, seed=1), MomentumBuffer(-0.75)
    outputs: list[torch.Tensor] = []

    def velocity(x, t, both):
        assert (len(x), len(t)) == (2 * batch, 2 * batch)
        assert torch.equal(both[:batch], conditions)
        assert torch.equal(both[batch:], null.expand(batch, 3, 5))
        outputs.append(size * normal(2 * batch, 20, 8, seed=2 + len(outputs)))
        return outputs[-1]

    guided_velocity = guided(velocity, conditions, null, 7.0)
    for _ in range(4):
        ours = guided_velocity(torch.zeros(batch, 20, 8), torch.ones(batch))
        with_, without = outputs[-1].chunk(2)
        exact = normalized_guidance(
            with_, without, 6.0, momentum, eta=0.0, norm_threshold=2.5, use_original_formulation=True, norm_dim=(1,)
        )
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5 * size)


def test_guidance_of_1_and_a_condition_that_changes_nothing_leave_the_velocity_alone():
    with_ = normal(1, 9, 4)
    different = guided(lambda x, t, c: torch.cat([with_, normal(1, 9, 4, seed=1)]), *normal(2, 1, 2, 3), 1.0)
    assert torch.equal(different(with_, torch.ones(1)), with_)
    same = guided(lambda x, t, c: torch.cat([with_, with_]), *normal(2, 1, 2, 3), 7.0)
    assert torch.equal(same(with_, torch.ones(1)), with_)


def test_guidance_keeps_the_precision_of_the_velocity():
    """The null condition may be in another one; the model is given one, and its answer stays as it is."""
    given = []

    def velocity(x, t, both):
        given.append(both.dtype)
        return x.bfloat16()

    guided_velocity = guided(velocity, normal(1, 3, 5).bfloat16(), normal(1, 1, 5), 7.0)
    assert guided_velocity(normal(1, 20, 8).bfloat16(), torch.ones(1)).dtype == torch.bfloat16
    assert given == [torch.bfloat16]
