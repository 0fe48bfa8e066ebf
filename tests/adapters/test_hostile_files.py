"""Files that are broken or meant to do harm get a clear refusal."""

import contextlib
import json
import pickle
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save, save_file

from sidestep.adapters.read import read_adapter
from sidestep.errors import UserError
from tests import hostile
from tests.fuzz_adapters import use

Q = "base_model.model.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": torch.randn(2, 8), f"{Q}.lora_B.weight": torch.randn(8, 2)}


def lora(**changes):
    tensors = dict(GOOD)
    for key, tensor in changes.items():
        tensors[f"{Q}.{key}"] = tensor
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


WHOLE = save(GOOD)
CASES = {
    "empty": (b"", "not a whole safetensors"),
    "cut in the header": (WHOLE[:20], "not a whole safetensors"),
    "cut in the data": (WHOLE[:-10], "not a whole safetensors"),
    "a header of 2^63 bytes": (raw({}, length=2**63), "not a whole safetensors"),
    "a header larger than the file": (raw({}, length=90_000_000), "not a whole safetensors"),
    "offsets beyond the end": (
        raw({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}),
        "not a whole safetensors",
    ),
    "deeply nested": (raw(b"[" * 200_000), "not a whole safetensors"),
    "a picture": (b"\x89PNG\r\n" + bytes(100), "not a whole safetensors"),
    "a pickle by another name": (pickle.dumps({"a": 1}), "not a whole safetensors"),
    "integers": (save(lora(**{"lora_A.weight": torch.ones(2, 8, dtype=torch.int64)})), "I64"),
    "float8": (save(lora(**{"lora_A.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)})), "F8_E4M3"),
    "no B": (save(lora(**{"lora_B.weight": None})), "no lora_B"),
    "another rank in B": (save(lora(**{"lora_B.weight": torch.ones(8, 3)})), "no rank in common"),
    "three axes": (save(lora(**{"lora_B.weight": torch.ones(8, 2, 1)})), "not that of a matrix"),
    "no rows": (
        save(lora(**{"lora_A.weight": torch.ones(0, 8), "lora_B.weight": torch.ones(8, 0)})),
        "not that of a matrix",
    ),
    "an alpha of many": (save(lora(alpha=torch.ones(3))), "alpha is one number"),
    "an alpha of nan": (save(lora(alpha=torch.tensor(float("nan")))), "not a finite number"),
    "an alpha alone": (save({f"{Q}.alpha": torch.ones(())}), "no adapter tensors"),
    "two kinds in one module": (save(lora(lokr_w1=torch.ones(2, 2))), "several kinds"),
    "magnitudes of another size": (save(lora(dora_scale=torch.ones(5, 1))), "magnitudes"),
    "magnitudes of the columns": (
        save(
            {
                f"{Q}.lora_A.weight": torch.ones(2, 6),
                f"{Q}.lora_B.weight": torch.ones(8, 2),
                f"{Q}.dora_scale": torch.ones(1, 6),
            }
        ),
        "magnitudes",
    ),
    "the same module twice": (
        save(GOOD | {k.replace("base_model.model.", "transformer."): v + 1 for k, v in GOOD.items()}),
        "two tensors for lora_",
    ),
    "a path in a name": (save({"../../etc/passwd.lora_A.weight": torch.ones(2, 8)}), "not part of"),
    "a layer of no number": (
        save({"base_model.model.layers.٣.mlp.up_proj.lora_A.weight": torch.ones(2, 8)}),
        "not part of",
    ),
    "Stable Diffusion": (
        save({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8)}),
        "another model",
    ),
    "one stranger among friends": (
        save(GOOD | {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2)}),
        "1 of 3 tensors",
    ),
    "a whole model": (save({"decoder.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}), "is no adapter"),
    "a name that would redraw the terminal": (save({"\x1b[2J\n.lora_A.weight": torch.ones(2, 8)}), r"\?\[2J"),
    "half a LoKr": (
        save({f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2_a": torch.ones(4, 2)}),
        "needs either lokr_w2",
    ),
    "no rotation": (save({f"{Q}.oft_R.weight": torch.ones(2, 7)}), "no set of rotations"),
    "a part of a change outside": (
        save(GOOD | {"base_model.model.condition_embedder.lora_A.weight": torch.ones(2, 8)}),
        "do not make one change",
    ),
    "numbers for factors outside": (
        save(GOOD | {f"base_model.model.norm_out.lokr_w{i}": torch.ones(()) for i in (1, 2)}),
        "do not make one change",
    ),
    "no tensors": (save({}), "no adapter tensors"),
    "a broken header of ours": (save(GOOD, {"sidestep": "{"}), "JSON"),
    "a nested header of ours": (save(GOOD, {"sidestep": "[" * 100_000}), "JSON"),
    "a header of ours that is a list": (save(GOOD, {"sidestep": "[]"}), "table was expected"),
    "a strength that is text": (
        save(GOOD, {"lora_adapter_metadata": '{"transformer.lora_alpha": "loud"}'}),
        "not a finite number",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_is_refused(case, tmp_path):
    data, message = CASES[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(file)
    assert str(file) in refused.value.problem
    assert refused.value.fix
    assert refused.value.problem.isprintable()
    assert len(refused.value.problem) < len(str(file)) + 400


CONFIGS = {
    "no JSON": (b"{", "JSON"),
    "not text": (b"\xff\xfe\x00", "not a text file"),
    "deeply nested": (b"[" * 100_000, "JSON"),
    "a list": (b"[]", "table was expected"),
    "another method": (b'{"peft_type": "PROMPT_TUNING"}', "PROMPT_TUNING"),
    "a list for a method": (b'{"peft_type": ["LORA"]}', "peft_type"),
    "an infinite alpha": (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "not a finite number"),
    "a huge alpha": (b'{"peft_type": "LORA", "lora_alpha": 1' + b"0" * 400 + b"}", "not a finite number"),
    "a pattern that never ends": (
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+$": 3}}',
        "no module's name",
    ),
    "a pattern that is no table": (b'{"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": [1]}', "not a table"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config_is_refused(case, tmp_path):
    data, message = CONFIGS[case]
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt", "lora.ckpt", "lora.pth", "lora.pkl"])
def test_pickles_are_never_opened(name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match="pickle, which could run code"):
            read_adapter(path)
    assert not (tmp_path / "boom").exists()


def test_a_folder_without_an_adapter_says_what_it_found(tmp_path):
    for path, message in ((tmp_path, "no .safetensors file"), (tmp_path / "missing", "no such file or folder")):
        with pytest.raises(UserError, match=message):
            read_adapter(path)
    for name in ("a", "b"):
        save_file(GOOD, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="2 .safetensors files"):
        read_adapter(tmp_path)


def test_peft_weights_without_their_config_are_refused_because_their_strength_is_unknown(tmp_path):
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="strength"):
        read_adapter(tmp_path)


def test_a_file_with_a_bit_flipped_anywhere_is_read_or_refused(tmp_path):
    choose = random.Random(0)
    for _ in range(300):
        data = bytearray(WHOLE)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        (tmp_path / "x.safetensors").write_bytes(data)
        with contextlib.suppress(UserError):
            read_adapter(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=hostile.folders())
@pytest.mark.slow
def test_whatever_the_folder_only_a_refusal_comes_out(files, tmp_path_factory):
    use(files, tmp_path_factory.getbasetemp() / "hostile")


@pytest.mark.parametrize(("value", "is_damage"), [(1e35, True), (-2e7, True), (900.0, False)])
def test_a_flipped_exponent_is_told_as_damage(tmp_path, value, is_damage):
    tensors = {key: tensor.clone() for key, tensor in GOOD.items()}
    tensors[f"{Q}.lora_B.weight"][3, 1] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="the file is damaged") if is_damage else contextlib.nullcontext():
        read_adapter(tmp_path / "x.safetensors")
