"""Adapters on the decoder: which modules get one, the identity at the start, training, saving, loading, merging."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from safetensors.torch import load_file
from torch import nn

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.adapters.attach import adapter_state, attach, load_adapter_state, target_names
from sidestep.adapters.names import adaptable_names, in_model_order, is_adaptable, parts, to_diffusers, to_original
from sidestep.errors import JobError, UserError
from sidestep.settings.config import ADAPTER_TYPES, TrainConfig
from tests.conftest import FIXTURES

KINDS = [
    ("lora", {}),
    ("dora", {}),
    ("lokr", {}),
    ("lokr", {"lokr_decompose_both": True, "lokr_factor": 2, "rank": 1}),
    ("lokr", {"lokr_factor": 2, "rank": 2}),
    ("lokr", {"lokr_weight_decompose": True}),
    ("loha", {}),
    ("oft", {}),
]
kinds = pytest.mark.parametrize(
    ("adapter_type", "settings"), KINDS, ids=[f"{k}-{'-'.join(s) or 'plain'}" for k, s in KINDS]
)


def config(**settings) -> TrainConfig:
    here = Path("unused")
    return TrainConfig(
        checkpoint_dir=here, dataset_dir=here, output_dir=here, **{"rank": 4, "alpha": 8, "dropout": 0.0, **settings}
    )


@cache
def _turbo() -> nn.Module:
    return open_checkpoint(FIXTURES / "checkpoints", "turbo").load_decoder()


def turbo(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of the fixture's decoder."""
    return copy.deepcopy(_turbo()).to(dtype)


@cache
def golden_case() -> dict[str, torch.Tensor]:
    tensors = load_file(FIXTURES / "golden" / "acestep-v15-turbo.safetensors")
    return {name.removeprefix("0."): tensor for name, tensor in tensors.items() if name.startswith("0.")}


def deep_decoder() -> nn.Module:
    """Twelve layers, so that layer 1 and layer 11 both exist."""
    return AceStepTransformer1DModel(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        in_channels=6,
    ).requires_grad_(False)


def velocity(decoder: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[1, T, D]: the decoder's output on the first golden case."""
    case = {name: tensor.to(dtype) for name, tensor in golden_case().items()}
    return decoder(
        hidden_states=case["noise"],
        timestep=case["t"],
        timestep_r=case["t"],
        encoder_hidden_states=case["encoder_hidden_states"],
        context_latents=case["context_latents"],
        return_dict=False,
    )[0]


@torch.no_grad()
def close_velocities(actual: nn.Module, expected: nn.Module) -> None:
    """Both decoders compute the same. In double precision: what is compared is the weights, not an order of adding."""
    mine, other = (velocity(model.double(), torch.float64) for model in (actual, expected))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.05, seed: int = 0) -> None:
    """Give the adapter weights that do something, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_the_identity_in_float32_on_a_frozen_base(adapter_type, settings, dtype):
    decoder = turbo(dtype)
    with torch.no_grad():
        before = velocity(decoder, dtype)
        model = attach(decoder, config(adapter_type=adapter_type, target_mlp=True, **settings)).eval()
        after = velocity(model, dtype)
    assert torch.equal(before, after)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(adapter_state(model)) > 0
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in trainable} == {dtype}


@kinds
def test_each_adapter_learns_saves_loads_and_merges(adapter_type, settings):
    settings = config(adapter_type=adapter_type, **settings)
    model = attach(turbo(), settings).eval()
    torch.manual_seed(0)
    target = torch.randn(golden_case()["noise"].shape)

    def loss() -> torch.Tensor:
        return (velocity(model) - target).square().mean()

    with torch.no_grad():
        before = loss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(6):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert loss() < before - 0.01

    trained = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with torch.no_grad():
        expected = velocity(model.eval())
        again = attach(turbo(), settings).eval()
        load_adapter_state(again, trained)
        assert all(torch.equal(tensor, trained[name]) for name, tensor in adapter_state(again).items())
        assert torch.equal(velocity(again), expected)
        close_velocities(again.merge_and_unload(), model)


@kinds
def test_dropout_is_used_in_training_only(adapter_type, settings):
    model = attach(turbo(), config(adapter_type=adapter_type, dropout=0.5, **settings))
    shake(model)
    with torch.no_grad():
        assert torch.equal(velocity(model.eval()), velocity(model))
        assert not torch.equal(velocity(model.train()), velocity(model))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {f"{part}_attn.to_{p}" for part in ("self", "cross") for p in ("q", "k", "v", "out.0")}),
        ({"attention_type": "self", "target_modules": ("q_proj", "o_proj")}, {"self_attn.to_q", "self_attn.to_out.0"}),
        ({"attention_type": "cross", "target_modules": ("k_proj",)}, {"cross_attn.to_k"}),
        (
            {"self_target_modules": ("q_proj",), "cross_target_modules": ("v_proj",)},
            {"self_attn.to_q", "cross_attn.to_v"},
        ),
        ({"target_modules": (), "target_mlp": True}, {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
    ],
)  # fmt: skip
def test_settings_select_modules_by_full_name(settings, expected):
    names = target_names(turbo(), config(**settings))
    assert {name.split(".", 2)[2] for name in names} == expected
    assert len(names) == 3 * len(expected) == len(set(names))


def test_settings_that_select_nothing_are_refused():
    with pytest.raises(UserError, match="--target-modules"):
        target_names(turbo(), config(target_modules=()))


@pytest.mark.parametrize("adapter_type", [k for k in ADAPTER_TYPES if k != "oft"])
def test_a_rank_map_gives_each_module_its_rank_and_the_others_no_adapter(adapter_type):
    ranks = {
        "layers.1.self_attn.q_proj": 2,
        "layers.11.self_attn.q_proj": 3,
        "layers.10.cross_attn.to_out.0": 1,
        "layers.0.mlp.up_proj": 2,
        "layers.5.mlp.up_proj": 0,
    }
    rank_map = {"rank_pattern": ranks, "alpha_pattern": {"layers.11.self_attn.q_proj": 9.0}}  # fmt: skip
    model = attach(deep_decoder(), config(adapter_type=adapter_type), rank_map)
    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "base_layer")
    }
    assert {to_original(name): m.r["default"] for name, m in layers.items()} == {
        to_original(n): r for n, r in ranks.items() if r
    }
    scales = {to_original(name): m.scaling["default"] for name, m in layers.items()}
    assert scales == {
        n: 3.0 if "11" in n else 2.0 for n in scales
    }  # alpha / rank of the settings, but where the map says otherwise


def test_a_rank_map_of_another_model_is_refused_by_name():
    with pytest.raises(UserError, match="layers.40.self_attn.q_proj"):
        attach(turbo(), config(), {"rank_pattern": {"layers.40.self_attn.q_proj": 4}})
    with pytest.raises(UserError, match="every module"):
        attach(turbo(), config(), {"rank_pattern": {"layers.0.self_attn.q_proj": 0}})


def test_oft_refuses_what_it_cannot_do():
    two = {"rank_pattern": {"layers.0.self_attn.q_proj": 4, "layers.1.self_attn.q_proj": 8}}
    with pytest.raises(UserError, match="one block size"):
        attach(turbo(), config(adapter_type="oft"), two)
    with pytest.raises(UserError, match="--rank 8"):
        attach(turbo(), config(adapter_type="oft", rank=7))
    attach(turbo(), config(adapter_type="oft"), {"rank_pattern": {"layers.0.self_attn.q_proj": 4}})


def test_lokr_refuses_a_factor_that_programs_would_read_in_different_ways():
    with pytest.raises(UserError, match="--lokr-factor 8") as refused:
        attach(turbo(), config(adapter_type="lokr", lokr_factor=8))
    assert "--lokr-factor 4" in refused.value.fix


def packed(decoder: nn.Module, shape=lambda weight: weight.shape) -> nn.Module:
    """The decoder with integer weights, as a quantiser leaves them."""
    for name in target_names(decoder, config()):
        module = decoder.get_submodule(name)
        module.weight = nn.Parameter(torch.zeros(shape(module.weight), dtype=torch.uint8), requires_grad=False)
    return decoder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_type": "lokr", "lokr_weight_decompose": True}, "--lokr-weight-decompose"),
        ({"adapter_type": "loha"}, "--adapter-type loha"),
    ],
)
def test_what_a_quantised_base_cannot_carry_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        attach(packed(turbo(), lambda weight: (weight.numel() // 2, 1)), config(**settings))


def test_lokr_needs_no_weights_of_the_base():
    attach(packed(turbo(), lambda weight: (weight.numel() // 2, 1)), config(adapter_type="lokr"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(next(iter(state))), "are missing from"),
        (
            lambda state: state.update({"base_model.model.layers.9.self_attn.to_q.lora_A.weight": torch.zeros(4, 32)}),
            "have no place",
        ),
        (lambda state: state.update({next(iter(state)): torch.zeros(2, 32)}), "have another shape"),
        (lambda state: state.clear(), "are missing from"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = attach(turbo(), config())
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    other = attach(turbo(), config())
    shake(other)
    state = dict(adapter_state(other))
    change(state)
    with pytest.raises(JobError, match=message):
        load_adapter_state(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


def test_names_go_both_ways():
    for name in adaptable_names(deep_decoder()):
        assert is_adaptable(name)
        assert to_original(to_diffusers(name)) == name
        layer, part, projection = parts(name)
        assert name == f"layers.{layer}.{part}.{projection}"
    assert to_diffusers("layers.0.mlp.up_proj") == to_original("layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"
    assert not any(
        is_adaptable(name)
        for name in (
            "layers.0.self_attn.q_proj.x",
            "../layers.0.self_attn.q_proj",
            "layers.00.mlp.up_proj",
            "proj_in",
            "",
        )
    )
    assert (
        in_model_order(["layers.10.mlp.up_proj", "layers.2.cross_attn.k_proj", "layers.2.self_attn.o_proj"])[0]
        == "layers.2.self_attn.o_proj"
    )


def test_attaching_works_on_meta_tensors():
    with torch.device("meta"):
        decoder = deep_decoder()
    for adapter_type in ADAPTER_TYPES:
        model = attach(decoder, config(adapter_type=adapter_type, lokr_weight_decompose=adapter_type == "lokr"))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        decoder = model.unload()


def test_the_factors_of_lokr_give_the_kronecker_product():
    model = attach(turbo(), config(adapter_type="lokr", lokr_factor=2, rank=2))
    shake(model)
    layer = model.get_submodule("base_model.model.layers.0.self_attn.to_q")
    x = torch.randn(2, 5, 32)
    full = x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer._get_delta_activations("default", x), full, rtol=0, atol=1e-5)


def test_parameter_counts_are_those_of_the_spec():
    """Rank 64 on q, k, v, o of both attentions: 44,040,192 parameters in 384 tensors; with the MLP 264 modules."""
    with torch.device("meta"):
        sizes = SimpleNamespace(plain=AceStepTransformer1DModel(), mlp=AceStepTransformer1DModel())
    plain = adapter_state(attach(sizes.plain, config(rank=64)))
    assert (len(plain), sum(t.numel() for t in plain.values())) == (384, 44_040_192)
    with_mlp = adapter_state(attach(sizes.mlp, config(rank=64, target_mlp=True)))
    assert (len(with_mlp) // 2, round(sum(t.numel() for t in with_mlp.values()) / 1e6, 1)) == (264, 81.8)
