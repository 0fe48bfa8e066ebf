"""A module of the DiT that leaves the range of fp16 is named, wherever it is, in training and in sampling."""

import math

import pytest
import torch

from sidestep.acestep.blocks import OffloadedModule
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import Prompt
from sidestep.acestep.fp16 import name_what_overflows
from sidestep.errors import JobError
from sidestep.tasks.sample import Sampler, Sampling
from sidestep.tasks.train.loop import run_loop
from tests.training_world import prepared, settings, write_data

WHERE = {
    "proj_in_conv": "the result of proj_in_conv",
    "condition_embedder": "the result of condition_embedder",
    "layers.0.self_attn.to_out.0": "the result of layers.0.self_attn.to_out.0",
    "layers.1.cross_attn.to_v": "the result of layers.1.cross_attn.to_v",
    "layers.2.mlp.up_proj": "the result of layers.2.mlp.up_proj",
    "layers.1.mlp.down_proj": "the result of layers.1.mlp.down_proj",
    "proj_out_conv": "the result of proj_out_conv",
}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What the tiny DiT is given."""
    generator = torch.Generator().manual_seed(0)
    noisy, context, conditions = (
        torch.randn(1, n, width, generator=generator).to(dtype) for n, width in ((20, 8), (20, 16), (9, 32))
    )
    t = torch.tensor([0.5], dtype=dtype)
    return noisy, t, t, conditions, context


def half_decoder(checkpoints) -> torch.nn.Module:
    return open_checkpoint(checkpoints, "turbo").load_decoder(dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "said"), WHERE.items())
def test_the_module_that_leaves_the_range_of_fp16_is_named(checkpoints, module, said):
    decoder = half_decoder(checkpoints)
    with torch.no_grad(), name_what_overflows(decoder):
        decoder(*inputs(torch.float16), return_dict=False)
        decoder.get_submodule(module).weight.fill_(6e4)
    with torch.no_grad(), pytest.raises(JobError, match=f"{said} is beyond") as raised, name_what_overflows(decoder):
        decoder(*inputs(torch.float16), return_dict=False)
    assert "--precision fp32" in raised.value.fix
    assert not [m for m in decoder.modules() if m._forward_hooks or m._forward_pre_hooks], "it looks no longer"


def test_a_sum_that_leaves_the_range_is_named_by_what_it_is_given_to(checkpoints):
    decoder = half_decoder(checkpoints)
    for layer in decoder.layers[:2]:  # each within the range, but not their sum
        layer.cross_attn.register_forward_hook(lambda _module, _given, out: torch.full_like(out, 4e4))
    said = r"what layers\.1\.mlp_norm is given is beyond"
    with torch.no_grad(), pytest.raises(JobError, match=said), name_what_overflows(decoder):
        decoder(*inputs(torch.float16), return_dict=False)


def test_what_comes_into_the_model_as_no_number_is_not_its_fault(checkpoints):
    decoder = half_decoder(checkpoints)
    noisy, *rest = inputs(torch.float16)
    with torch.no_grad(), name_what_overflows(decoder):
        decoder(noisy * math.inf, *rest, return_dict=False)


@pytest.mark.slow
def test_training_in_fp16_names_the_module_in_its_first_step_and_after_one_left_out(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", frames=(30, 30))
    run = prepared(settings(data, tmp_path / "run"))
    monkeypatch.setattr(type(run.accelerator), "mixed_precision", "fp16")  # which no CPU is asked to compute in
    run.total_steps = 1
    run_loop(run)
    assert not run.looks_at_range, "a step is looked at, not every one"
    projection = run.model.get_base_model().get_submodule("layers.1.mlp.down_proj")
    projection.weight.data.fill_(1e38)
    run.total_steps = 4
    with pytest.raises(JobError, match=r"the result of layers\.1\.mlp\.down_proj is beyond"):
        run_loop(run)


def test_sampling_in_fp16_names_the_module(checkpoints):
    checkpoint, decoder = open_checkpoint(checkpoints, "turbo"), half_decoder(checkpoints)
    null = checkpoint.load_null_condition(dtype=torch.float16)
    vae = OffloadedModule(lambda place: checkpoint.load_vae(place), torch.device("cpu"))
    sampler = Sampler(decoder, checkpoint.silence_latent(), null, vae, Sampling(2, 1.0, 3.0), 25.0, 48_000)
    prompt, states = Prompt(caption="x", duration=1.0), torch.zeros(1, 9, 32)
    assert torch.isfinite(sampler.latents(prompt, states)).all()
    decoder.get_submodule("layers.2.mlp.down_proj").weight.data.fill_(6e4)
    with pytest.raises(JobError, match=r"the result of layers\.2\.mlp\.down_proj is beyond"):
        sampler.latents(prompt, states)
