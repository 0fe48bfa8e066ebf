"""Windowed attention: what diffusers' dense mask computes, at a cost that grows with the length, not its square."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AceStepTransformer1DModel
from diffusers.models.transformers import ace_step_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sidestep.acestep import attention
from sidestep.acestep.attention import (
    MaskCache,
    WindowProcessor,
    difference_in_trial,
    flash_attention,
    local_attention,
    use_attention,
)
from sidestep.acestep.blocks import compile_layers
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.errors import UserError
from tests.conftest import assert_golden

CPU = torch.device("cpu")


def tensors(batch, tokens, heads, groups, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, n, dim, generator=generator).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


def dense(query, key, value, window):
    i = torch.arange(query.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    seen = (i[:, None] - i).abs() <= window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True).transpose(1, 2)


def local(query, key, value, window, block, masks=None):
    return local_attention(query, key, value, window, 0.3, 0.0, masks or MaskCache(), block)


def tiny_decoder(window=6, layers=3, layer_types=None, **sizes):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=24,
        **sizes,
    )
    decoder = AceStepTransformer1DModel(
        num_hidden_layers=layers, audio_acoustic_hidden_dim=8, sliding_window=window, layer_types=layer_types, **sizes
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(
                0.05 * torch.randn_like(parameter)
            )  # the initial gates and projections would hide most of the attention
    return decoder


def step_inputs(batch=2, frames=131, condition=7, dtype=torch.float32, device=CPU):
    generator = torch.Generator().manual_seed(1)
    latents, context, states = (
        torch.randn(batch, *s, generator=generator).to(device, dtype)
        for s in ((frames, 8), (frames, 16), (condition, 32))
    )
    t = torch.rand(batch, generator=generator).to(device)
    return {
        "hidden_states": latents,
        "timestep": t,
        "timestep_r": t,
        "encoder_hidden_states": states,
        "context_latents": context,
        "return_dict": False,
    }


def gradients(decoder, inputs):
    decoder.zero_grad()
    velocity = decoder(**inputs)[0]
    velocity.float().square().mean().backward()
    return velocity.detach(), {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


LENGTHS = [  # tokens, window, block
    (1, 6, 16),
    (6, 6, 16),
    (7, 6, 16),
    (8, 6, 16),
    (33, 6, 16),
    (48, 6, 16),
    (49, 6, 16),
    (64, 16, 16),
    (65, 16, 16),
    (200, 50, 8),  # a window wider than a block
    (300, 0, 16),
    (750, 128, 192),
]


@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 4, 4), (3, 4, 2)])
@pytest.mark.parametrize(("tokens", "window", "block"), LENGTHS)
def test_local_attention_equals_the_dense_window_with_its_gradients(tokens, window, block, batch, heads, groups):
    inputs = tensors(batch, tokens, heads, groups)
    weight = torch.randn(batch, tokens, heads, 8, generator=torch.Generator().manual_seed(9))
    results = []
    for attend in (lambda *x: dense(*x, window), lambda *x: local(*x, window, block)):
        out = attend(*inputs)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 400),
    window=st.integers(0, 140),
    block=st.sampled_from([8, 24, 64, 128]),
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
)
def test_local_attention_equals_the_dense_window_at_any_length(tokens, window, block, batch, groups):
    inputs = tensors(batch, tokens, 4, groups)
    torch.testing.assert_close(local(*inputs, window, block), dense(*inputs, window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_local_attention_in_half_precision_is_as_near_as_the_dense_one(dtype, tolerance):
    exact = dense(*tensors(2, 100, 4, 2), 6)
    ours = local(*tensors(2, 100, 4, 2, dtype=dtype), 6, 16)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), exact, atol=tolerance, rtol=tolerance)


def test_tokens_beyond_the_window_change_nothing():
    query, key, value = tensors(1, 100, 2, 2)
    out = local(query, key, value, 6, 16)
    with torch.no_grad():
        key[:, 57:], value[:, 57:] = 100.0, 100.0
    torch.testing.assert_close(local(query, key, value, 6, 16)[:, :51], out[:, :51], atol=0, rtol=0)


def test_cost_per_token_of_the_window_does_not_grow_with_the_length():
    def per_token(attend, tokens):
        inputs = tensors(1, tokens, 2, 2)
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):  # the CPU's fused kernel is not counted
            attend(*inputs).sum().backward()
        return counter.get_total_flops() / tokens

    windowed = [per_token(lambda *x: local(*x, 128, 192), tokens) for tokens in (1536, 3072, 6144)]
    assert max(windowed) / min(windowed) < 1.01
    assert per_token(lambda *x: dense(*x, 128), 3072) > 5 * windowed[1]


@pytest.mark.parametrize("request_", ["auto", "local"])
def test_velocity_equals_the_original_code(checkpoints, golden, golden_time_table, request_):
    folder, tensors_ = golden
    checkpoint = open_checkpoint(checkpoints, folder)
    decoder = checkpoint.load_decoder()
    assert use_attention(decoder, request_).value == "local"
    for case in range(2):
        g = {name.split(".", 1)[1]: value for name, value in tensors_.items() if name.startswith(f"{case}.")}
        t = g["t"]
        latents = g["latent_mean"]
        noisy = t[:, None, None] * g["noise"] + (1 - t[:, None, None]) * latents
        velocity = decoder(noisy, t, t, g["encoder_hidden_states"], g["context_latents"], return_dict=False)[0]
        assert_golden(velocity, g["velocity"])


@pytest.mark.parametrize("frames", [5, 131, 400])
@pytest.mark.parametrize("recompute", [False, True])
def test_velocity_and_gradients_equal_those_of_the_dense_mask(frames, recompute):
    decoder, inputs = tiny_decoder(), step_inputs(frames=frames)
    if recompute:
        decoder.enable_gradient_checkpointing()
    decoder.train()
    use_attention(decoder, "sdpa")
    velocity, exact = gradients(decoder, inputs)
    use_attention(decoder, "local")
    ours, found = gradients(decoder, inputs)
    torch.testing.assert_close(ours, velocity, atol=1e-5, rtol=0)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            atol=1e-4 * gradient.abs().max().item() + 1e-9,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_autocast_computes_what_the_dense_mask_computes_under_it():
    decoder, inputs = tiny_decoder(), step_inputs()
    results = []
    for kind in ("sdpa", "local"):
        use_attention(decoder, kind)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(decoder(**inputs)[0].detach().float())
    torch.testing.assert_close(results[1], results[0], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    "layer_types", [None, ["full_attention", "sliding_attention"], ["sliding_attention", "sliding_attention"]]
)
def test_no_dense_mask_is_built_whatever_the_order_of_layers(layer_types, monkeypatch):
    decoder, inputs = tiny_decoder(layers=2, layer_types=layer_types), step_inputs()
    use_attention(decoder, "sdpa")
    exact = decoder(**inputs)[0]
    use_attention(decoder, "local")
    monkeypatch.setattr(ace_step_transformer, "_create_4d_mask", lambda *a, **k: pytest.fail("a dense mask was built"))
    torch.testing.assert_close(decoder(**inputs)[0], exact, atol=1e-5, rtol=0)


def test_key_heads_are_repeated_where_no_kernel_takes_fewer(monkeypatch):
    decoder, inputs = tiny_decoder(layers=1, layer_types=["full_attention"]), step_inputs()
    processor = WindowProcessor(local)
    decoder.layers[0].self_attn.set_processor(processor)
    expected = gradients(decoder, inputs)
    seen, sdpa = [], F.scaled_dot_product_attention

    def watched(query, key, value, **options):
        seen.append((query.shape[1], key.shape[1], options["enable_gqa"]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "takes_grouped_heads", lambda device, dtype: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(gradients(decoder, inputs), expected, atol=1e-5, rtol=1e-5)
    assert (4, 4, False) in seen


def test_the_window_can_be_fitted_inside_an_adapter_and_taken_out_again():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_decoder(), peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    exact = model(**step_inputs())[0]
    use_attention(model, "local")
    torch.testing.assert_close(model(**step_inputs())[0], exact, atol=1e-5, rtol=0)
    use_attention(model, "sdpa")
    torch.testing.assert_close(model(**step_inputs())[0], exact, atol=0, rtol=0)


def test_a_step_runs_on_meta_tensors():
    decoder = tiny_decoder().to("meta")
    use_attention(decoder, "local")
    velocity, found = gradients(decoder, step_inputs(device=torch.device("meta")))
    assert velocity.is_meta
    assert all(g.is_meta for g in found.values())


def test_masks_are_built_once_per_length_and_bounded():
    masks = MaskCache(limit_bytes=500_000)
    first = masks.get(100, 16, 6, torch.float32, CPU)
    assert masks.get(100, 16, 6, torch.float32, CPU) is first
    assert masks.get(100, 16, 6, torch.bfloat16, CPU) is not first
    for tokens in range(200, 3000, 100):
        masks.get(tokens, 16, 6, torch.float32, CPU)
        assert masks.nbytes <= 500_000
    assert masks.get(2900, 16, 6, torch.float32, CPU) is masks.get(2900, 16, 6, torch.float32, CPU)
    assert copy.deepcopy(masks).nbytes == 0


def test_a_mask_first_used_without_gradients_or_in_a_plan_does_not_spoil_training():
    decoder, inputs = tiny_decoder(), step_inputs()
    use_attention(decoder, "local")
    with torch.inference_mode():
        decoder(**inputs)
    gradients(decoder, inputs)
    masks = MaskCache()
    with FakeTensorMode():
        masks.get(300, 16, 6, torch.float32, CPU)
    assert type(masks.get(300, 16, 6, torch.float32, CPU)) is torch.Tensor


@pytest.mark.parametrize("request_", ["auto", "sdpa", "local", "flash"])
def test_every_choice_gives_its_reason(request_):
    decoder = tiny_decoder()
    if request_ == "flash":
        with pytest.raises(UserError, match="--attention flash.*CUDA.*cpu") as error:
            use_attention(decoder, request_)
        assert "--attention auto" in error.value.fix
    else:
        choice = use_attention(decoder, request_)
        assert choice.value == {"auto": "local"}.get(request_, request_)
        assert choice.reason


def test_songs_are_packed_for_torchs_flash_kernel_and_unpacked_again(monkeypatch):
    def kernel(query, key, value, starts_q, starts_k, max_q, max_k, *, scale, window_size, enable_gqa):
        """What the CUDA kernel documents, song by song."""
        assert (scale, enable_gqa, max_q, max_k) == (0.3, True, 140, 140)
        assert window_size[0] == window_size[1]
        assert starts_q.dtype == torch.int32
        songs = [slice(a, b) for a, b in zip(starts_q.tolist(), starts_k.tolist()[1:], strict=False)]
        return torch.cat([dense(query[None, s], key[None, s], value[None, s], window_size[0])[0] for s in songs])

    monkeypatch.setattr(attention.flash, "varlen_attn", kernel)
    inputs = tensors(3, 140, 4, 2)
    torch.testing.assert_close(flash_attention(*inputs, 6, 0.3, 0.0), dense(*inputs, 6), atol=1e-5, rtol=1e-5)


def test_a_kernel_that_computes_something_else_is_found_in_the_trial():
    layer = tiny_decoder().layers[0].self_attn
    exact = partial(local_attention, masks=MaskCache())

    def verdict(kernel):
        return difference_in_trial(kernel, exact, layer, CPU, torch.float32)

    def broken(*inputs):
        raise RuntimeError("no kernel image is available\nfor this device")

    assert verdict(exact) == ""
    assert "differs" in verdict(lambda q, k, v, window, scale, dropout: exact(q, k, v, window - 1, scale, dropout))
    assert "differs" in verdict(lambda *inputs: exact(*inputs) * float("nan"))
    assert verdict(broken) == "it fails on this device (no kernel image is available)"


def test_a_model_without_sliding_layers_keeps_its_attention():
    choice = use_attention(tiny_decoder(layer_types=["full_attention"] * 3), "auto")
    assert choice.value == "sdpa"
    assert "no sliding" in choice.reason


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["around", "inside"])
def test_compiled_layers_are_not_compiled_again_after_an_epoch_of_mixed_lengths(recompute):
    torch._dynamo.reset()
    counters.clear()
    decoder = tiny_decoder(layers=2)
    use_attention(decoder, "local")
    if recompute == "around":
        decoder.enable_gradient_checkpointing()
    exact = gradients(decoder, step_inputs(batch=1, frames=700))
    recomputed = decoder.layers[:1] if recompute == "inside" else ()  # the other one is kept
    compile_layers(decoder, CPU, recomputed, backend="aot_eager")

    def epoch(lengths):
        for frames, condition in lengths:
            results = gradients(decoder, step_inputs(batch=1, frames=frames, condition=condition))
        return results

    epoch([(700, 7), (131, 30), (1201, 9)])
    after_first = counters["stats"]["unique_graphs"]
    velocity, found = epoch([(90, 8), (801, 31), (334, 11), (1500, 40), (5, 3), (77, 22), (412, 7), (700, 7)])
    assert after_first
    assert counters["stats"]["unique_graphs"] == after_first
    assert not counters["graph_break"]
    torch.testing.assert_close(velocity, exact[0], atol=1e-5, rtol=0)
    for name, gradient in exact[1].items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * gradient.abs().max().item() + 1e-9, rtol=1e-4)


@pytest.mark.slow
def test_recomputation_inside_the_compiled_code_keeps_no_more_than_around_it():
    def kept_bytes(recompute):
        torch._dynamo.reset()
        decoder, kept = tiny_decoder(layers=1), {}
        use_attention(decoder, "local")
        if recompute == "around":
            decoder.enable_gradient_checkpointing()
        if recompute == "inside":
            compile_layers(decoder, CPU, decoder.layers, backend="aot_eager_decomp_partition")

        def note(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            decoder(**step_inputs(batch=1, frames=800))
        return sum(kept.values())

    assert kept_bytes("inside") < 1.1 * kept_bytes("around") < 0.3 * kept_bytes("none")
