"""The path that a CUDA device takes, on tensors that say they are there and have no bytes.

An operation on tensors of two devices, or of two dtypes where that is not allowed, fails here as it would on a GPU. The
autograd engine refuses such tensors, so backward formulas of our own are called directly.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sidestep.acestep.attention import use_attention
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import Prompt, cover_hints, embed_lyrics
from sidestep.acestep.fp16 import wide
from sidestep.acestep.quantize import _Int8Product
from sidestep.acestep.vae import decode, encode_mean
from sidestep.acestep.weights import Weights
from sidestep.adapters.adapter import changed_weight
from sidestep.adapters.attach import adapter_of, adapter_scale, attach
from sidestep.data.batches import Batch
from sidestep.settings.config import TrainConfig
from sidestep.tasks.sample import Sampling, open_sampler
from sidestep.tasks.train.objective import ConditionMask, Objective, training_law

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
FRAMES, TOKENS = 300, 30


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def fake_cuda(monkeypatch):
    """A device without bytes: weights are read as shapes, modules move by their tensors."""

    def read(weights, keys, dtype, device, apart=False):
        for key in keys:
            yield key, torch.empty(weights.shapes[key], dtype=dtype, device=device)

    def move(module, *where, **_):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = tensor.detach().to(*where)
                        tensors[name] = (
                            nn.Parameter(moved, tensor.requires_grad) if tensors is part._parameters else moved
                        )
        return module

    monkeypatch.setattr(Weights, "read", read)
    monkeypatch.setattr(nn.Module, "to", move)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=CPU: generator())
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture
def checkpoint(checkpoints, monkeypatch):
    opened = open_checkpoint(checkpoints, "xl-turbo")  # with the token that the timbre encoder gets
    monkeypatch.setattr(type(opened), "silence_latent", lambda self: torch.zeros(1, 500, opened.latent_channels))
    return opened


def run_config(tmp_path, **changes) -> TrainConfig:
    return TrainConfig(checkpoint_dir=tmp_path, dataset_dir=tmp_path, output_dir=tmp_path, rank=4, alpha=8, **changes)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "oft"])  # peft's LoHa looks at a number
@pytest.mark.parametrize("hints", [False, True])
def test_the_loss_of_a_micro_step_is_computed_on_the_device(fake_cuda, checkpoint, tmp_path, kind, hints, dtype):
    config = run_config(tmp_path, adapter_type=kind, dropout=0.1, loss_weighting="min_snr", snr_gamma=5.0)
    decoder = checkpoint.load_decoder(CUDA, dtype)
    use_attention(decoder, "local")
    mask = ConditionMask()
    mask.install(decoder)
    model = attach(decoder, config).train()
    nn.Module.to(model, CUDA)
    null = checkpoint.load_null_condition(CUDA, dtype)
    objective = Objective(
        config, training_law(config, checkpoint.variant), torch.zeros(1, 500, 8, device=CUDA), null, mask
    )
    latents = torch.zeros(2, FRAMES, 8)
    seen = torch.ones(2, TOKENS, dtype=torch.bool)
    conditions = torch.zeros(2, TOKENS, null.shape[-1], dtype=dtype)
    batch = Batch(latents, conditions, seen, latents if hints else None, ("a", "b"), (0, 1)).to(CUDA)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        t, dropped = objective.timesteps(0, 2).to(CUDA), torch.tensor([True, False]).to(CUDA)
        loss = objective.loss(model, batch, objective.noise(0, batch), t, dropped)
        weighted = loss * objective.weight(t)
    assert (weighted.device, weighted.dtype, weighted.shape) == (CUDA, torch.float32, (2,))


def test_songs_are_encoded_and_decoded_in_tiles(fake_cuda, checkpoint):
    vae = checkpoint.load_vae(CUDA, torch.bfloat16)
    mean = encode_mean(vae, torch.zeros(1, 2, 1920 * 40), tile_frames=20)
    assert (mean.device, mean.dtype) == (CUDA, torch.bfloat16)
    assert decode(vae, mean.float(), tile_frames=20).device == CPU


def test_lyrics_and_hints_are_encoded(fake_cuda, checkpoint, dtype):
    silence = checkpoint.silence_latent()
    text_encoder, _ = checkpoint.load_text_encoder(CUDA, dtype)  # transformers' own; it computes on constants
    lyrics = embed_lyrics(text_encoder, torch.ones(1, 12, dtype=torch.long))
    assert (lyrics.device, lyrics.dtype) == (CUDA, wide(dtype))
    encoder = checkpoint.load_condition_encoder(CUDA, dtype).lyric_encoder  # the others look at numbers on the way
    states = encoder(lyrics, torch.ones(1, 12, dtype=torch.bool, device=CUDA))
    assert (states.device, states.dtype) == (CUDA, wide(dtype))
    tokenizer, detokenizer = (
        load(CUDA, dtype) for load in (checkpoint.load_audio_tokenizer, checkpoint.load_audio_detokenizer)
    )
    codes, hints = cover_hints(tokenizer, detokenizer, torch.zeros(1, 43, 8), silence)
    assert (codes.device, hints.device, hints.shape[1]) == (CUDA, CUDA, 43)


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_a_preview_is_sampled(fake_cuda, checkpoint, tmp_path, guidance):
    dtype = torch.bfloat16
    decoder = checkpoint.load_decoder(CUDA, dtype)
    use_attention(decoder, "local")
    model = attach(decoder, run_config(tmp_path)).eval()
    nn.Module.to(model, CUDA)
    sampler = open_sampler(checkpoint, decoder, CUDA, dtype, Sampling(3, guidance), offload=False)
    with adapter_scale(model, 0.5):
        latents = sampler.latents(
            Prompt(caption="strings", duration=4.0), torch.zeros(1, TOKENS, sampler.null_condition.shape[-1])
        )
    assert latents.device == CUDA


def test_a_trained_adapter_is_merged_where_the_base_is_read(fake_cuda, checkpoint, tmp_path):
    model = attach(checkpoint.load_decoder(CUDA, torch.bfloat16), run_config(tmp_path))
    nn.Module.to(model, CUDA)
    found = adapter_of(model)
    name, factors = next(iter(found.modules.items()))
    assert {tensor.device for tensor in factors.values()} == {CPU}
    weight = torch.zeros(factors["lora_B"].shape[0], factors["lora_A"].shape[1])
    merged = changed_weight(weight, factors)
    assert (merged.device, merged.dtype, merged.shape) == (CPU, weight.dtype, weight.shape), name


def test_a_quantised_product_runs_in_both_directions(fake_cuda, dtype):
    packed, scales = torch.zeros(48, 32, dtype=torch.int8, device=CUDA), torch.ones(48, device=CUDA)
    x, context = torch.zeros(2, 7, 32, dtype=dtype, device=CUDA), SimpleNamespace()
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    out = _Int8Product.forward(context, x, packed, scales)
    gradient, *others = _Int8Product.backward(context, torch.zeros_like(out))
    assert (gradient.shape, gradient.dtype, gradient.device, others) == (x.shape, x.dtype, CUDA, [None, None])


def test_mixing_devices_fails_here(fake_cuda, checkpoint):
    decoder = checkpoint.load_decoder(CUDA, torch.float32)
    with pytest.raises(RuntimeError, match="device"):
        decoder.layers[0].mlp(torch.zeros(1, 4, decoder.config.hidden_size))
