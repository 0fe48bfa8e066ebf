"""Names go from a module to a key of each program's files and back."""

import pytest

from sidestep.adapters.adapter import FACTORS, MAGNITUDE
from sidestep.adapters.names import (
    FORMATS,
    comfyui_key,
    diffusers_key,
    lycoris_key,
    module_name,
    parse_key,
    peft_key,
    prefix_of,
)

NAMES = ["layers.0.self_attn.q_proj", "layers.11.cross_attn.o_proj", "layers.2.mlp.down_proj"]
KEYS = {
    peft_key: "base_model.model.layers.11.cross_attn.o_proj.lora_A.weight",
    diffusers_key: "transformer.layers.11.cross_attn.to_out.0.lora_A.weight",
    comfyui_key: "diffusion_model.decoder.layers.11.cross_attn.o_proj.lora_down.weight",
    lycoris_key: "lycoris_layers_11_cross_attn_o_proj.lora_down.weight",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_written_is_read_as_what_it_was(key):
    assert key(NAMES[1], "lora_A") == KEYS[key]
    kinds = FACTORS if key == peft_key else set(FACTORS) - {"oft"}  # whose rotations are peft's alone
    factors = [factor for kind in kinds for factor in FACTORS[kind]]
    for name in NAMES:
        for factor in (*factors, MAGNITUDE, "alpha"):
            assert parse_key(key(name, factor)) == (name, factor)


def test_a_format_is_told_from_the_beginning_of_a_key():
    formats = {key: FORMATS[prefix_of(key(NAMES[0], "lora_A"))] for key in KEYS}
    assert list(formats.values()) == ["peft", "diffusers", "comfyui", "lycoris"]
    assert prefix_of("layers.0.mlp.up_proj.lora_A.weight") == ""


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("base_model.model.model.decoder.layers.3.mlp.up_proj", "layers.3.mlp.up_proj"),
        ("lora_unet_decoder_layers_3_self_attn_to_out_0", "layers.3.self_attn.o_proj"),
        ("lycoris_layers_3_cross_attn_k_proj", "layers.3.cross_attn.k_proj"),
        ("transformer.layers.3.self_attn.to_q", "layers.3.self_attn.q_proj"),
        ("encoder.layers.3.self_attn.q_proj", None),
        ("layers.3.self_attn.to_x", None),
        ("layers_3_self_attn_q_proj_0", None),
    ],
)
def test_a_module_is_found_under_any_spelling(spelled, name):
    assert module_name(spelled) == name
