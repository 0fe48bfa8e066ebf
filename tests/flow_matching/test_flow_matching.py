"""The training mathematics has the numbers of the spec, section 4."""

import pytest
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.flow_matching.guidance import drop_conditions
from sidestep.flow_matching.loss import flow_matching_loss, min_snr_weight
from sidestep.flow_matching.timesteps import discrete, logit_normal, stratified, turbo_timesteps
from tests.conftest import assert_golden

MANY = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def test_turbo_draws_its_eight_inference_steps_equally():
    expected = torch.tensor([1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(turbo_timesteps(), expected, atol=5e-5, rtol=0)
    values, counts = discrete(MANY).unique(return_counts=True)
    assert len(values) == 8
    assert set(counts.tolist()) == {len(MANY) // 8}


def test_base_draws_the_larger_of_two_logit_normals():
    t = logit_normal(-0.4, 1.0)(MANY)
    assert t.mean().item() == pytest.approx(0.535, abs=1e-3)
    draws = torch.sigmoid(
        torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.4
    ).amax(1)
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert t.quantile(q).item() == pytest.approx(draws[:200_000].quantile(q).item(), abs=5e-3)


def test_stratified_numbers_fall_one_in_each_part():
    u = stratified(8, torch.Generator().manual_seed(3))
    assert sorted((u * 8).long().tolist()) == list(range(8))


@pytest.mark.parametrize("law", [discrete, logit_normal(-0.4, 1.0)])
def test_laws_stay_finite_at_the_ends(law):
    t = law(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert torch.isfinite(t).all()
    assert (t >= 0).all()
    assert (t <= 1).all()


def test_min_snr_is_finite_and_right_at_both_ends():
    weight = min_snr_weight(5.0)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    expected = [0.0]  # snr is infinite: 5 / infinity
    for value in t[1:].tolist():
        snr = ((1 - value) / value) ** 2
        expected.append(min(snr, 5.0) / (snr + 1))
    torch.testing.assert_close(weight(t), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("case", [0, 1])
def test_loss_equals_the_original_with_and_without_condition(checkpoints, golden, golden_time_table, case):
    folder, expected = golden
    checkpoint = open_checkpoint(checkpoints, folder)
    decoder, null = checkpoint.load_decoder(), checkpoint.load_null_condition()
    latents, noise, t, conditions, context = (
        expected[f"{case}.{n}"] for n in ("latent_mean", "noise", "t", "encoder_hidden_states", "context_latents")
    )
    for dropped, name in ((False, "loss"), (True, "loss_null")):
        states = drop_conditions(conditions, null, torch.tensor([dropped]))
        with torch.inference_mode():
            loss = flow_matching_loss(
                lambda x, t, states=states: decoder(x, t, t, states, context, return_dict=False)[0], latents, noise, t
            )
        assert_golden(loss, expected[f"{case}.{name}"])


def test_padding_does_not_count():
    latents, noise = torch.randn(2, 1, 6, 4)
    mask = torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    whole = flow_matching_loss(lambda x, t: torch.zeros_like(x), latents, noise, torch.tensor([0.5]), mask)
    short = flow_matching_loss(lambda x, t: torch.zeros_like(x), latents[:, :4], noise[:, :4], torch.tensor([0.5]))
    torch.testing.assert_close(whole, short)
