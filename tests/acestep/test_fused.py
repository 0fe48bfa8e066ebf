"""The DiT's fused layers, the VAE's and the LoRA in one function compute what diffusers' and peft's own classes do."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.ace_step_transformer import AceStepTransformerBlock
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches import count, undo
from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import recompute_layers
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.fused import FusedAttention, FusedBlock, FusedNorm, fuse_layers, fuse_vae, rotate
from sidestep.adapters.attach import attach
from sidestep.adapters.layers import LowRankLinear, dropped, dropped_again
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.unfilled import LiveBytes

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "in_channels": 24,
    "audio_acoustic_hidden_dim": 8,
    "sliding_window": 16,
}


def config(**changes) -> TrainConfig:
    place = Path()
    plain = TrainConfig(checkpoint_dir=place, dataset_dir=place, output_dir=place, rank=4, alpha=6.0, dropout=0.0)
    return replace(plain, **changes)


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def model(dtype: torch.dtype = torch.float32, **changes) -> Any:
    torch.manual_seed(0)
    decoder: Any = AceStepTransformer1DModel(**SIZES)
    decoder = decoder.to(dtype).requires_grad_(False)
    randomise(decoder)
    fuse_layers(decoder)
    use_attention(decoder)
    adapted = attach(decoder, config(**changes)).train()
    randomise(adapted)
    return adapted


def both(adapted: Any) -> tuple[Any, Any]:
    """(the model, the same with diffusers' and peft's own classes)."""
    bare = copy.deepcopy(adapted)
    undo(bare)
    return adapted, bare


def inputs(frames: int, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(2)
    t = torch.rand(batch, generator=generator)
    latents, context, states = (
        torch.randn(batch, *shape, generator=generator) for shape in ((frames, 8), (frames, 16), (7, 32))
    )
    return {
        "hidden_states": latents,
        "context_latents": context,
        "encoder_hidden_states": states,
        "timestep": t,
        "timestep_r": t,
        "return_dict": False,
    }


def step(adapted: Any, given: dict, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Velocity and the gradients of all that is trained."""
    adapted.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        velocity = adapted(**given)[0]
    velocity.float().square().mean().backward()
    return [velocity.detach().float(), *(p.grad for p in adapted.parameters() if p.requires_grad)]


class Seen(TorchDispatchMode):
    """While entered: the names of the operations that run, but for looks at a tensor's device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names += [name] * (name != "device")
        return func(*args, **(kwargs or {}))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def test_undoing_leaves_diffusers_and_peft():
    bare = both(model())[1]
    kinds = {type(module) for module in bare.modules()}
    assert not kinds & {FusedNorm, FusedAttention, FusedBlock, LowRankLinear}
    assert {RMSNorm, AceStepTransformerBlock, lora.Linear} <= kinds


@pytest.mark.parametrize("frames", [9, 801])  # shorter than the window, several blocks of it
@pytest.mark.parametrize("changes", [{}, {"target_mlp": True}, {"attention_type": "cross"}, {"adapter_type": "lokr"}])
def test_velocity_and_gradients_are_those_of_diffusers_and_peft(frames, changes):
    fused, bare = both(model(**changes))
    found, exact = (step(one, inputs(frames)) for one in (fused, bare))
    assert len(found) == len(exact) > 8
    assert max(map(error, found, exact)) < 1e-5


@pytest.mark.parametrize("swapped", [False, True])
def test_recomputed_layers_have_the_gradients_of_kept_ones(swapped):
    kept, again = model(dropout=0.3), model(dropout=0.3)
    recompute_layers(again.get_base_model(), 1 if swapped else None)
    torch.manual_seed(3)
    expected = step(kept, inputs(60))
    torch.manual_seed(3)
    for mine, theirs in zip(step(again, inputs(60)), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_under_autocast_no_result_is_further_from_fp32_than_the_bare_model_is():
    exact = step(both(model())[1], inputs(150))
    fused, bare = both(model(torch.bfloat16))
    errors = [
        sum(error(one, other) for one, other in zip(step(each, given, torch.bfloat16), exact, strict=True))
        for each in (fused, bare)
        for given in [{k: v.bfloat16() if torch.is_tensor(v) and v.ndim == 3 else v for k, v in inputs(150).items()}]
    ]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
@pytest.mark.parametrize("trained_input", [False, True])
def test_a_layer_is_pefts_with_the_same_dropped_numbers(p, bias, shape, trained_input):
    torch.manual_seed(0)
    host: Any = nn.ModuleDict({"to_q": nn.Linear(16, 24, bias=bias)}).requires_grad_(False)
    settings = LoraConfig(r=4, lora_alpha=6, lora_dropout=p, init_lora_weights=False, target_modules=["to_q"])
    # pyrefly: ignore[bad-argument-type]  # declared for transformers' models, made for any module
    adapted: Any = get_peft_model(host, settings).train()
    layer = adapted.get_base_model()["to_q"]
    results = []
    for kind in (lora.Linear, LowRankLinear):
        layer.__class__ = kind
        layer.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=trained_input)
        torch.manual_seed(2)
        out = layer(x)
        out.square().sum().backward()
        results.append([out.detach(), *(q.grad for q in layer.parameters() if q.requires_grad), x.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (results[1][-1] is not None) == trained_input


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_dropout_is_torchs_to_the_bit(dtype, p):
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for kind in (dropped, lambda x, p: torch.native_dropout(x, p, True)):
        torch.manual_seed(2)
        found.append(kind(x, p))
    (kept, mask), (expected, its_mask) = found
    assert torch.equal(kept, expected)
    assert torch.equal(mask, its_mask)
    assert mask.dtype == torch.bool  # by which what waits on the CPU is told
    assert torch.equal(dropped_again(x, mask, 1.3), torch.ops.aten.native_dropout_backward(x, mask, 1.3))


def test_a_gpus_dropout_is_one_kernel_in_both_directions():
    with FakeTensorMode():
        x = torch.randn(3, 8, device="cuda")
        with Seen() as operations:
            _, mask = dropped(x, 0.1)
            dropped_again(x, mask, 1 / 0.9)
    assert operations.names == ["native_dropout", "native_dropout_backward"]


def test_a_frozen_factor_gets_no_gradient_and_the_other_keeps_its_own():
    adapted = model()
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    whole = dict(zip(names, step(adapted, inputs(9))[1:], strict=True))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" in name)
    step(adapted, inputs(9))
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_A" in name)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, whole[name])


def test_without_the_adapter_the_model_is_the_base_and_with_it_again_the_trained_one():
    adapted = model()
    base: Any = AceStepTransformer1DModel(**SIZES)
    base.requires_grad_(False)
    base.load_state_dict(
        {
            key.replace(".base_layer", "").removeprefix("base_model.model."): value
            for key, value in adapted.state_dict().items()
            if "lora_" not in key
        }
    )
    given = inputs(30)
    with torch.no_grad():
        trained, plain = adapted(**given)[0], base(**given)[0]
        with adapted.disable_adapter():
            off = adapted(**given)[0]
        torch.testing.assert_close(off, plain, rtol=1e-5, atol=1e-5)
        assert error(trained, plain) > 1e-3
        assert torch.equal(adapted(**given)[0], trained)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(**given)[0], trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_diffusers_in_both_directions(dtype):
    norm = RMSNorm(32, eps=1e-6).to(dtype).requires_grad_(False)
    randomise(norm)
    gradient = torch.randn(3, 4, 32).to(dtype)
    results = []
    for kind in (RMSNorm, FusedNorm):
        norm.__class__ = kind
        x = (torch.arange(384.0).sin() * 3).view(3, 4, 32).to(dtype).requires_grad_()
        out = norm(x)
        out.backward(gradient)
        results.append((out.detach(), x.grad))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert error(mine.float(), theirs.float()) < tolerance


def test_a_trained_norm_and_inputs_of_another_dtype_are_left_to_diffusers():
    norm = RMSNorm(8, eps=1e-6)
    norm.__class__ = FusedNorm
    norm(torch.randn(2, 8)).sum().backward()
    assert norm.weight is not None
    assert norm.weight.grad is not None
    norm.requires_grad_(False).bfloat16()
    assert norm(torch.randn(2, 8)).dtype == torch.bfloat16


def test_rotation_is_diffusers_in_both_directions():
    angles = torch.rand(11, 4).repeat(1, 2)
    pair, gradient, results = (angles.cos(), angles.sin()), torch.randn(2, 11, 3, 8), []
    x = torch.randn(2, 11, 3, 8)
    for turn in (rotate, lambda x, pair: apply_rotary_emb(x, pair, use_real_unbind_dim=-2, sequence_dim=1)):
        leaf = x.clone().requires_grad_()
        out: Any = turn(leaf, pair)
        out.backward(gradient)
        results.append((out.detach(), leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_the_norm_of_a_gpu_is_one_kernel():
    with FakeTensorMode():
        with torch.device("cuda"):
            norm = RMSNorm(8, eps=1e-6).requires_grad_(False)
        norm.__class__ = FusedNorm
        x = torch.randn(2, 8, device="cuda")
        with Seen() as operations:
            norm(x)
    assert operations.names == ["_fused_rms_norm"]


@pytest.mark.parametrize(("recomputed", "limit"), [(False, 4369), (True, 6170)])  # at 60 s 4,645 and 6,506
def test_the_real_model_launches_no_more_kernels_than_its_limit(recomputed, limit):
    two, four = (count(layers, recomputed, dropout=0.1, seconds=20.0)["sum"] for layers in (2, 4))
    assert four + 10 * (four - two) <= limit  # of 24 layers, of two kinds that take turns


@pytest.mark.parametrize(
    ("dtype", "dropout", "share"),
    [(torch.float32, 0, 0.96), (torch.float32, 0.1, 0.83), (torch.bfloat16, 0, 0.72), (torch.bfloat16, 0.1, 0.64)],
)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_holds_less_memory_than_with_diffusers_and_peft(recomputed, dtype, dropout, share):
    held = []
    for one in both(model(dtype, dropout=dropout)):
        if recomputed:
            recompute_layers(one.get_base_model(), None)
        given = inputs(300)
        with LiveBytes() as memory:
            step(one, given, dtype)
        held.append(memory.peak)
    assert held[0] < share * held[1]


def test_the_decoder_of_a_checkpoint_is_fused(checkpoints):
    decoder = open_checkpoint(checkpoints, "turbo").load_decoder()
    assert all(type(layer) is FusedBlock for layer in decoder.layers)
    assert {type(m) for m in decoder.modules() if isinstance(m, RMSNorm)} == {FusedNorm}
    attached = attach(decoder, config())
    assert {type(m) for m in attached.modules() if isinstance(m, lora.Linear)} == {LowRankLinear}


def test_what_a_lora_keeps_can_wait_on_the_cpu():
    """Offloading leaves alone what no operation has made; a view made inside a function would look like that."""
    trained = model(dropout=0.5).train()
    [layer] = [m for n, m in trained.named_modules() if n.endswith("layers.0.self_attn.to_q")]
    assert isinstance(layer, LowRankLinear)
    left = []

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_leaf and tensor.dtype != torch.bool and not isinstance(tensor, nn.Parameter):
            left.append(tensor)
        return tensor

    x = torch.randn(1, 500, 32, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(to_cpu, lambda tensor: tensor):
        layer(x).sum().backward()
    assert 0 < sum(tensor.nbytes for tensor in left) < x.nbytes / 4  # the small A·x alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vae_gives_the_same_bits_from_less_memory(dtype):
    torch.manual_seed(0)
    vae: Any = AutoencoderOobleck(encoder_hidden_size=16, decoder_input_channels=8, decoder_channels=8)
    vae = vae.to(dtype).eval().requires_grad_(False)
    randomise(vae)
    audio, latents = (0.3 * torch.randn(1, *shape).to(dtype) for shape in ((2, 12000), (8, 7)))
    before = audio.clone(), latents.clone()

    def there_and_back() -> list[tuple[torch.Tensor, int]]:
        results = []
        for work in (lambda: vae.encode(audio).latent_dist.mode(), lambda: vae.decode(latents).sample):
            with LiveBytes() as memory, torch.no_grad():
                results.append((work(), memory.peak))
        return results

    plain = there_and_back()
    fuse_vae(vae)
    assert not any(name.endswith(("weight_g", "weight_v")) for name, _ in vae.named_parameters())
    assert not any(p.requires_grad for p in vae.parameters())
    for (exact, most), (found, least) in zip(plain, there_and_back(), strict=True):
        assert torch.equal(found, exact)
        assert least < 0.85 * most
    assert torch.equal(audio, before[0])
    assert torch.equal(latents, before[1])
