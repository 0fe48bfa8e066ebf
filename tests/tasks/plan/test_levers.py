"""What saves memory changes no number, or by no more than it says."""

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from sidestep.acestep.blocks import BlockSwap, offload_activations, recompute_layers
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.quantize import make_quantizable, quantize_weight, quantized_layers
from sidestep.adapters.attach import attach, load_adapter
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import save_final
from sidestep.settings.config import TrainConfig

CPU = torch.device("cpu")


def trained_config(checkpoints, tmp_path) -> TrainConfig:
    return TrainConfig(
        checkpoint_dir=checkpoints, dataset_dir=tmp_path, output_dir=tmp_path, rank=4, alpha=8, dropout=0.1
    )


def sample() -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(what the decoder is given, the velocity it should answer)."""
    generator = torch.Generator().manual_seed(1)
    noisy, target = torch.randn(2, 1, 50, 8, generator=generator)
    context_latents, conditions = (
        torch.randn(1, 50, 16, generator=generator),
        torch.randn(1, 30, 32, generator=generator),
    )
    t = torch.tensor([0.5])
    return (noisy, t, t, conditions, context_latents), target


def run_steps(
    checkpoints, tmp_path, prepare=None, context=None, quantize="", steps=4, folder="turbo", dtype=torch.float32
):
    """Losses of a few optimizer steps on one golden-sized sample, and the gradient norms; everything seeded."""
    checkpoint = open_checkpoint(checkpoints, folder)
    decoder = checkpoint.load_decoder(dtype=dtype, quantize=quantize)
    torch.manual_seed(0)
    model = attach(decoder, trained_config(checkpoints, tmp_path)).train()
    if prepare:
        prepare(decoder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, target = sample()
    values = []
    for step in range(steps):
        torch.manual_seed(step)
        with context() if context else torch.enable_grad():
            loss = (model(*inputs, return_dict=False)[0] - target).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values += [loss.item(), norm.item()]
    return values, model


@pytest.mark.parametrize("count", [0, 1, 2, None])
def test_recomputing_layers_changes_no_number(checkpoints, tmp_path, count):
    plain, _ = run_steps(checkpoints, tmp_path)
    recomputed, _ = run_steps(checkpoints, tmp_path, lambda decoder: recompute_layers(decoder, count))
    assert recomputed == plain


@pytest.mark.parametrize("recompute", [False, True])
def test_offloading_activations_changes_no_number(checkpoints, tmp_path, recompute):
    plain, _ = run_steps(checkpoints, tmp_path)
    prepare = recompute_layers if recompute else None
    offloaded, _ = run_steps(checkpoints, tmp_path, prepare, lambda: offload_activations(CPU))
    assert offloaded == plain


@pytest.mark.parametrize("count", [1, 2, 3])
def test_swapping_blocks_changes_no_number_and_leaves_no_copy(checkpoints, tmp_path, count):
    swaps = []

    def prepare(decoder):
        recompute_layers(decoder, count)
        swaps.append(BlockSwap(decoder, count, CPU))

    plain, _ = run_steps(checkpoints, tmp_path)
    swapped, _model = run_steps(checkpoints, tmp_path, prepare)
    assert swapped == plain
    for block in swaps[0].blocks:
        at_rest = [module._parameters[name] for module, name in block.owners]
        assert all(there is own for there, own in zip(at_rest, block.parameters, strict=True))
    assert not swaps[0].fetched


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.02), ("nf4", 0.35)])
def test_a_quantised_base_trains_and_stays_near_the_exact_one(checkpoints, tmp_path, precision, tolerance):
    exact, _ = run_steps(checkpoints, tmp_path, steps=12)
    quantised, model = run_steps(checkpoints, tmp_path, quantize=precision, steps=12)
    assert quantised[-2] < 0.9 * quantised[0]
    assert quantised[0] == pytest.approx(exact[0], rel=tolerance)
    kinds = {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    stored = {p.dtype for name, p in model.named_parameters() if ".base_layer.weight" in name}
    assert stored == {torch.int8 if precision == "int8" else torch.uint8}


def test_the_8bit_product_is_that_of_the_unpacked_weight_in_both_directions():
    """bitsandbytes' own rounds the inputs to 8 bits as well; its gradient is not that of what it computed."""
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(64, 48, bias=False)])})
    weight = layers["layers"][0].weight.detach()
    make_quantizable(layers, "int8", torch.float32)
    layer = layers["layers"][0]
    quantize_weight(layer, weight, CPU)
    x, out_gradient = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 48)
    out = layer(x)
    [gradient] = torch.autograd.grad(out, x, out_gradient)
    unpacked = layer.state.CB.float() * layer.state.SCB[:, None] / 127
    assert (unpacked - weight).abs().max() <= weight.abs().max() / 127
    torch.testing.assert_close(out, x @ unpacked.T)
    torch.testing.assert_close(gradient, out_gradient @ unpacked)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.02), ("nf4", 0.08)])
def test_an_adapter_trained_on_a_quantised_base_does_the_same_on_the_bf16_one(tmp_path, precision, tolerance):
    """The exported adapter on the bf16 base gives the trained velocity within 2 % (int8) or 8 % (nf4).

    It keeps what was learnt.
    """
    exact, base = wider_decoder(), wider_decoder()
    weights = {name: layer.weight.detach() for name, layer in quantized_layers(exact).items()}
    make_quantizable(exact, precision, torch.float32)
    for name, weight in weights.items():
        quantize_weight(exact.get_submodule(name), weight, CPU)
    config = TrainConfig(
        checkpoint_dir=tmp_path, dataset_dir=tmp_path, output_dir=tmp_path, rank=8, alpha=16, dropout=0.0
    )
    trained = attach(exact, config).train()
    noisy, target = torch.randn(2, 2, 100, 64, generator=torch.Generator().manual_seed(1))
    inputs = (
        noisy,
        torch.tensor([0.3, 0.7]),
        torch.tensor([0.3, 0.7]),
        torch.randn(2, 30, 256),
        torch.randn(2, 100, 128),
    )
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(25):
        (trained(*inputs, return_dict=False)[0] - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_final(trained, tmp_path / "final", config)
    exported = load_adapter(base.bfloat16(), read_adapter(tmp_path / "final"))
    with torch.no_grad():
        expected = trained.eval()(*inputs, return_dict=False)[0]
        with torch.autocast("cpu", torch.bfloat16):
            inputs = tuple(tensor.bfloat16() for tensor in inputs)
            velocity = exported(*inputs, return_dict=False)[0].float()
            with exported.disable_adapter():
                untrained = base(*inputs, return_dict=False)[0].float()
    assert (velocity - expected).norm() < tolerance * expected.norm()
    assert (velocity - target).square().mean() < 0.85 * (untrained - target).square().mean()


def wider_decoder() -> AceStepTransformer1DModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    return AceStepTransformer1DModel(**sizes, is_turbo=True).eval().requires_grad_(False)


class RecordedStream:
    """A stand-in for a second queue of a CUDA device, which writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def copy(self, tensors):
        self.calls.append("copy")
        return [tensor.clone() for tensor in tensors], f"copy {self.calls.count('copy')}"

    def wait_for(self, done):
        self.calls.append(f"wait for {done}")


def test_a_block_computes_after_its_copy_while_the_next_one_is_copied(checkpoints, tmp_path):
    stream = RecordedStream()

    def prepare(decoder):
        recompute_layers(decoder)
        BlockSwap(decoder, 3, CPU, stream, pin=False)
        for layer in decoder.layers:
            layer.mlp.register_forward_hook(lambda *_: stream.calls.append("compute"))

    plain, _ = run_steps(checkpoints, tmp_path, steps=1)
    swapped, _ = run_steps(checkpoints, tmp_path, prepare, steps=1)
    assert swapped == plain
    forward = ["copy", "wait for copy 1", "copy", "compute", "wait for copy 2", "copy", "compute", "wait for copy 3"]
    assert stream.calls[:9] == [*forward, "compute"]
    # backward: from the last block to the first, each recomputed after its own copy
    backward = ["copy", "wait for copy 4", "copy", "compute", "wait for copy 5", "copy", "compute", "wait for copy 6"]
    assert stream.calls[9:] == [*backward, "compute"]
