"""Merging streams a base file: every byte, offset, dtype and rounding is what the format and the formula say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep.adapters import merge
from sidestep.adapters.adapter import Adapter, changed_weight
from sidestep.adapters.merge import BaseWeights, Entry, merge_file, read_header, weight_name
from sidestep.errors import UserError

Q = "layers.0.self_attn.q_proj"


def raw(table: dict, data: bytes) -> bytes:
    """A safetensors file, its table written as it is given."""
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data


def parts(file: Path) -> tuple[int, bytes, bytes]:
    """(stated length, header, data) of a file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, content[8 : 8 + length], content[8 + length :]


def lora(seed: int = 0, rows: int = 4, columns: int = 6, name: str = Q) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
    return Adapter("lora", {name: {"lora_A": a, "lora_B": b}}, {name: 2})


@pytest.fixture
def base(tmp_path) -> Path:
    """A base with one weight that is merged into and others of every size of number."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        f"decoder.{Q}.weight": torch.randn(4, 6, generator=generator).bfloat16(),
        "decoder.layers.0.mlp.up_proj.weight": torch.randn(5, 3, generator=generator),
        "steps": torch.tensor([7, -1]),
        "mask": torch.tensor([True, False, True]),
        "eight": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "half": torch.randn(2, 2, generator=generator).half(),
        "double": torch.randn(3, generator=generator).double(),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt", "kept": "yes"})
    return tmp_path / "base.safetensors"


def test_a_header_is_read_in_the_order_of_the_bytes_with_positions_in_the_file(tmp_path):
    table = {
        "last": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
        "first": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
    }
    content = raw(table, bytes(range(12)))
    (tmp_path / "x.safetensors").write_bytes(content)
    entries, texts = read_header(tmp_path / "x.safetensors")
    start = len(content) - 12
    assert texts == {}
    assert entries == [
        Entry("first", "BF16", (1, 2), start, start + 4),
        Entry("empty", "F32", (0, 3), start + 4, start + 4),
        Entry("last", "F32", (2,), start + 4, start + 12),
    ]


@pytest.mark.parametrize("content", [b"", b"\0" * 8, raw({}, b"")[:-1], raw({"a": {"dtype": "F32"}}, b"")])
def test_a_damaged_base_is_refused_by_name(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: damaged or cut short") as refused:
        read_header(tmp_path / "x.safetensors")
    assert refused.value.fix == "Download this file again."


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"decoder.{Q}.weight", Q),
        (f"{Q}.weight", Q),
        ("layers.0.self_attn.to_q.weight", Q),
        (f"diffusion_model.decoder.{Q}.weight", Q),
        (f"model.diffusion_model.decoder.{Q}.weight", Q),
        ("decoder.layers.3.mlp.down_proj.weight", "layers.3.mlp.down_proj"),
        (f"decoder.{Q}.bias", None),
        (f"decoder.{Q}", None),
        (f"encoder.{Q}.weight", None),
        (f"decoder.decoder.{Q}.weight", None),
        ("decoder.proj_in.1.weight", None),
        ("decoder.layers.0.self_attn.q_norm.weight", None),
    ],
)
def test_weights_are_found_under_each_layouts_names(key, name):
    assert weight_name(key) == name


def test_a_merge_of_nothing_copies_every_byte(base, tmp_path):
    merge_file(base, tmp_path / "out.safetensors", [])
    assert parts(tmp_path / "out.safetensors")[2] == parts(base)[2]
    assert read_header(tmp_path / "out.safetensors")[1] == {"format": "pt", "kept": "yes"}


def test_the_header_is_compact_padded_to_eight_and_says_every_offset(tmp_path):
    table = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
        "ä": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]},
        "__metadata__": {"kept": "yes", "said": "before"},
    }
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(raw(table, b"\1\2" + torch.tensor([1.5, -2.0]).numpy().tobytes()))
    paddings = set()
    for extra in range(8):
        note = {"said": "x" * extra}
        merge_file(source, out, [], torch.float16, note)
        length, header, data = parts(out)
        expected = (
            '{"__metadata__":{"kept":"yes","said":"' + "x" * extra + '"},'
            '"ä":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},'
            '"b":{"dtype":"F16","shape":[2],"data_offsets":[2,6]}}'
        ).encode()
        assert header.rstrip(b" ") == expected
        assert length % 8 == 0
        assert length == len(header)
        assert len(header) - len(expected) < 8
        paddings.add(len(header) - len(expected))
        assert data == b"\1\2" + torch.tensor([1.5, -2.0]).half().numpy().tobytes()
    assert paddings == set(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_that_of_floating_point_tensors_only(dtype, base, tmp_path):
    merge_file(base, tmp_path / "out.safetensors", [], dtype)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        expected = tensor if key in ("steps", "mask", "eight") else tensor.to(dtype)
        assert after[key].dtype == expected.dtype
        assert after[key].shape == expected.shape
        assert torch.equal(after[key].view(torch.uint8), expected.view(torch.uint8))
    assert [e.key for e in read_header(base)[0]] == [e.key for e in read_header(tmp_path / "out.safetensors")[0]]


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("piece", [8, 16, 24])
def test_a_tensor_larger_than_a_piece_comes_out_whole(piece, dtype, base, tmp_path, monkeypatch):
    merge_file(base, tmp_path / "whole.safetensors", [(lora(), 1.0)], dtype)
    monkeypatch.setattr(merge, "PIECE_BYTES", piece)
    merge_file(base, tmp_path / "pieces.safetensors", [(lora(), 1.0)], dtype)
    assert (tmp_path / "pieces.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_no_more_than_a_piece_is_read_at_once(base, tmp_path):
    """A whole number of any dtype's numbers fits a piece, which stays far below the size of a base."""
    assert merge.PIECE_BYTES % 8 == 0
    assert 2**20 <= merge.PIECE_BYTES <= 2**26


def test_progress_is_told_after_each_tensor_with_the_bytes_of_the_source(base, tmp_path):
    told, out = [], tmp_path / "out.safetensors"
    merge_file(base, out, [], torch.float64, done=lambda key, size: told.append((key, size)))
    assert told == [(entry.key, entry.end - entry.start) for entry in read_header(base)[0]]
    assert sum(size for _, size in told) == len(parts(base)[2])
    assert parts(out)[0] > 0


@pytest.mark.parametrize(("dtype", "kept"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_the_change_is_added_in_float32_and_rounded_once(dtype, kept, base, tmp_path):
    adapters = [(lora(0), 0.5), (lora(1), -2.0)]
    merge_file(base, tmp_path / "out.safetensors", adapters, dtype)
    weight = load_file(base)[f"decoder.{Q}.weight"].float()
    changes = [strength * (a.modules[Q]["lora_B"] @ a.modules[Q]["lora_A"]) for a, strength in adapters]
    merged = load_file(tmp_path / "out.safetensors")[f"decoder.{Q}.weight"]
    assert merged.dtype == kept
    expected = (weight.double() + sum(c.double() for c in changes)).to(kept)
    torch.testing.assert_close(merged, expected, rtol=0 if kept == torch.float32 else 0.01, atol=1e-5)
    once = weight.clone()
    for adapter, strength in adapters:
        once += changed_weight(weight, adapter.modules[Q], strength) - weight
    assert torch.equal(merged, once.to(kept))


def test_only_the_adapters_modules_change(base, tmp_path):
    merge_file(base, tmp_path / "out.safetensors", [(lora(), 1.0)])
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    changed = {k for k in before if not torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8))}
    assert changed == {f"decoder.{Q}.weight"}
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "kept": "yes"}


def test_base_weights_are_read_from_the_file_that_has_them(base, tmp_path):
    other = torch.arange(6.0).reshape(2, 3)
    save_file({"pad": torch.ones(3), "decoder.layers.1.mlp.up_proj.weight": other}, tmp_path / "second.safetensors")
    weights = BaseWeights([base, tmp_path / "second.safetensors"])
    assert set(weights.found) == {Q, "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}
    assert torch.equal(weights("layers.1.mlp.up_proj"), other)
    assert torch.equal(weights(Q), load_file(base)[f"decoder.{Q}.weight"])
    with pytest.raises(UserError, match=r"no weight for layers\.9\.mlp\.up_proj") as refused:
        weights("layers.9.mlp.up_proj")
    assert "--model-variant" in refused.value.fix


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lora(), None),
        (lora(rows=5), r"\[4, 6\] in the base and \[5, 6\] in the adapter"),
        (lora(rows=3), r"\[4, 6\] in the base and \[3, 6\] in the adapter"),
        (lora(columns=5), r"\[4, 6\] in the base and \[4, 5\] in the adapter"),
        (lora(name="layers.1.self_attn.q_proj"), "no weight for layers.1.self_attn.q_proj"),
        (Adapter("oft", {Q: {"oft_R": torch.zeros(3, 1)}}, {Q: 2}), None),
        (Adapter("oft", {Q: {"oft_R": torch.zeros(2, 1)}}, {Q: 2}), r"\[4, 4\] in the adapter"),
    ],
)
def test_an_adapter_of_another_model_is_refused_before_anything_is_written(adapter, message, base):
    if message is None:
        BaseWeights([base]).check(adapter)
        return
    with pytest.raises(UserError, match=message) as refused:
        BaseWeights([base]).check(adapter)
    assert "--model-variant" in refused.value.fix


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 6).to(torch.float8_e4m3fn), "stored in F8_E4M3"),
        (torch.zeros(4, 6, dtype=torch.int8), "stored in I8"),
        (torch.zeros(24), r"shape \[24\]"),
        (torch.zeros(4, 6, 1), r"shape \[4, 6, 1\]"),
    ],
)
def test_a_weight_that_cannot_take_a_change_is_refused(weight, message, tmp_path):
    save_file({f"{Q}.weight": weight}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        BaseWeights([tmp_path / "x.safetensors"]).check(lora())
    if "stored in" in message:
        assert refused.value.fix == "Use a base in bfloat16, float16 or float32."


@pytest.mark.parametrize(
    "key",
    [
        "decoder.proj_in.1.weight",  # the original's
        "proj_in.1.weight",
        "proj_in_conv.weight",  # diffusers'
        "model.diffusion_model.decoder.proj_in.1.weight",  # ComfyUI's checkpoints
        "diffusion_model.proj_in.1.weight",
    ],
)
def test_a_weight_outside_attention_has_one_name_in_all_programs_files(key, tmp_path):
    save_file({key: torch.ones(2, 3)}, tmp_path / "x.safetensors")
    assert list(BaseWeights([tmp_path / "x.safetensors"]).others) == ["proj_in_1"]
    assert merge.flat_name("time_embed.proj_in_convention.weight") == "time_embed_proj_in_convention"
    assert merge.flat_name("model.proj_out_conv") == "proj_out_1"
