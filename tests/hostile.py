"""Adapter files as an attacker or a bad disk would make them: shared by the tests and by the fuzz script."""

import json
from pathlib import Path

from hypothesis import strategies as st

NUMBERS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
FACTORS = [
    *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_down.weight", "lora_up.weight", "alpha"),
    *("dora_scale", "lora_magnitude_vector", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "oft_R.weight", "lokr_t2", "diff", "lora_B.bias"),
]
PREFIXES = [
    "base_model.model.",
    "transformer.",
    "diffusion_model.decoder.",
    "lycoris_",
    "lora_unet_",
    "",
    "../../",
    "model.decoder.",
]
MODULES = [
    *("layers.0.self_attn.q_proj", "layers.1.cross_attn.to_out.0", "layers_0_self_attn_q_proj", "layers.2.mlp.up_proj"),
    *("layers.9999.self_attn.k_proj", "layers.-1.mlp.up_proj", "proj_in", "/etc/passwd", "a" * 500),
    *("text_model.encoder.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj" * 40),
]

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
keys = st.builds(
    "".join, st.tuples(st.sampled_from(PREFIXES), st.sampled_from(MODULES), st.just("."), st.sampled_from(FACTORS))
) | st.text(max_size=40)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=4)
configs = st.fixed_dictionaries(
    {"peft_type": st.sampled_from(["LORA", "LOKR", "LOHA", "OFT", "IA3", None]) | anything},
    optional={
        "r": st.integers(-2, 9) | anything,
        "lora_alpha": st.integers(-2, 9) | st.floats() | anything,
        "alpha": anything,
        "use_rslora": anything,
        "rank_pattern": st.dictionaries(
            st.sampled_from(["q_proj", "(a+)+$", "^layers.0.self_attn.q_proj", "layers.*", ""]),
            st.integers(-1, 5) | anything,
        )
        | anything,
        "alpha_pattern": st.dictionaries(
            st.sampled_from(["q_proj", "(a+)+$", ".*", "[", "layers.0.self_attn.q_proj"]), st.integers(-1, 5) | anything
        )
        | anything,
        "target_modules": anything,
    },
)
plain_configs = st.builds(
    lambda kind, r, alpha: json.dumps({"peft_type": kind, "r": r, "lora_alpha": alpha, "alpha": alpha}).encode(),
    st.sampled_from(["LORA", "LOKR", "LOHA", "OFT"]),
    st.integers(1, 9),
    st.integers(1, 9),
)
headers = st.dictionaries(
    st.sampled_from(["sidestep", "lora_adapter_metadata", "lokr_config", "ss_network_dim", "software", "format"]),
    st.text(max_size=30) | anything.map(lambda v: json.dumps(v)),
)


SETS = {  # factors that belong together, as shapes of a weight of 8 × 4
    "lora": {"lora_A.weight": [2, 4], "lora_B.weight": [8, 2]},
    "kohya": {"lora_down.weight": [2, 4], "lora_up.weight": [8, 2], "alpha": []},
    "dora": {"lora_A.weight": [2, 4], "lora_B.weight": [8, 2], "lora_magnitude_vector": [8]},
    "lycoris dora": {"lora_down.weight": [2, 4], "lora_up.weight": [8, 2], "alpha": [], "dora_scale": [8, 1]},
    "lokr": {"lokr_w1": [2, 2], "lokr_w2": [4, 2], "alpha": [1]},
    "low lokr": {"lokr_w1_a": [2, 1], "lokr_w1_b": [1, 2], "lokr_w2_a": [4, 1], "lokr_w2_b": [1, 2], "alpha": []},
    "loha": {"hada_w1_a": [8, 2], "hada_w1_b": [2, 4], "hada_w2_a": [8, 2], "hada_w2_b": [2, 4]},
    "oft": {"oft_R.weight": [2, 1]},
}


@st.composite
def tensors(draw) -> list[tuple[str, list[int]]]:
    """(key, shape) of a file: anything, or an adapter in which at most a thing or two is wrong."""
    if draw(st.integers(0, 3)) == 0:
        return [(key, draw(shapes)) for key in draw(st.lists(keys, max_size=6, unique=True))]
    prefix, factors = draw(st.sampled_from(PREFIXES[:4])), draw(st.sampled_from(list(SETS.values())))
    names = draw(
        st.lists(
            st.sampled_from(["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.1.cross_attn.v_proj"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    if "_" in prefix[-1]:
        names = [name.replace(".", "_") for name in names]
    found = [(f"{prefix}{name}.{factor}", list(shape)) for name in names for factor, shape in factors.items()]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(found) - 1))
        found[place] = draw(
            st.sampled_from([(found[place][0], draw(shapes)), (draw(keys), found[place][1]), found[place - 1]])
        )
    return list(dict(found).items())


@st.composite
def safetensors(draw) -> bytes:
    """A file that is nearly, or quite, well formed."""
    table, position, rare = {}, 0, draw(st.booleans())
    for key, shape in draw(tensors()):
        dtype = draw(st.sampled_from(["F32"] * 6 + list(NUMBERS))) if rare else "F32"
        size = NUMBERS[dtype]
        for n in shape:
            size *= n
        size = max(0, size + (draw(st.sampled_from([0] * 12 + [-1, 1, 2**40])) if rare else 0))
        start = position + (draw(st.sampled_from([0] * 15 + [-4, 4, 2**62])) if rare else 0)
        table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        position = min(position + size, 10_000)
    if draw(st.booleans()):
        table["__metadata__"] = draw(headers)
    try:
        header = json.dumps(table).encode("utf-8", "surrogatepass")
    except ValueError:
        header = b"{}"
    if not rare:
        return len(header).to_bytes(8, "little") + header + (draw(st.binary(max_size=64)) + bytes(position))[:position]
    header = draw(
        st.sampled_from([header] * 10 + [header[:-1], header + b" " * 7, b"{" * 5000, b"[]", b"\xff" + header])
    )
    length = draw(st.sampled_from([len(header)] * 15 + [0, 2**63, 2**64 - 1, len(header) + 100, 100_000_001]))
    data = draw(st.binary(max_size=64)) * 3 + bytes(position)
    whole = length.to_bytes(8, "little") + header + data[: position + draw(st.sampled_from([0] * 8 + [5, -5]))]
    return whole[: draw(st.sampled_from([len(whole)] * 8 + [0, 3, 8, len(whole) // 2]))]


@st.composite
def folders(draw) -> dict[str, bytes]:
    """Files of an adapter folder by name."""
    name = draw(
        st.sampled_from(
            ["adapter_model.safetensors"] * 3
            + ["lokr_weights.safetensors", "x.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin"]
        )
    )
    files = {name: draw(safetensors())}
    if draw(st.booleans()):
        try:
            files["adapter_config.json"] = draw(
                configs.map(lambda c: json.dumps(c).encode("utf-8", "surrogatepass"))
                | st.binary(max_size=40)
                | st.just(b"[" * 100_000)
            )
        except ValueError:
            files["adapter_config.json"] = b"{}"
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
