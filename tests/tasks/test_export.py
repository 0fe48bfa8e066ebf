"""`export`: adapters combined, at another strength, for another program, or merged into a base that stays as it is."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep import files
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.adapters import merge
from sidestep.adapters.attach import attach
from sidestep.adapters.names import to_diffusers
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import save_final
from sidestep.errors import JobError, UserError
from sidestep.events import Finished, Notice, Progress, Saved, null
from sidestep.settings.config import ExportConfig
from sidestep.tasks.export import export
from tests.adapters.test_adapters import close_velocities, config, shake, turbo
from tests.adapters.test_write import TYPES, base, close, own_weights, pipeline  # noqa: F401 (a fixture)
from tests.conftest import FIXTURES
from tests.consumers import comfyui_weights, diffusers_weights, lycoris_weights, peft_weights, trained_weights
from tests.dying import Dies, dying_at

CHECKPOINTS = FIXTURES / "checkpoints"


def make(folder: Path, seed: int = 0, **settings):
    """(folder of a saved adapter, the model it is from)."""
    own = config(**settings)
    model = attach(turbo(), own).eval()
    shake(model, seed=seed)
    save_final(model, folder, own)
    return folder, model


def run(adapter: Path, output: Path, report=null, **settings) -> Path:
    return export(ExportConfig(adapter=adapter, output=output, **settings), report)


def digest(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def decoder_weights(checkpoint_dir: Path, variant: str) -> dict:
    decoder = open_checkpoint(checkpoint_dir, variant).load_decoder()
    return {name: decoder.get_submodule(to_diffusers(name)).weight for name in base()}


@pytest.mark.parametrize("kind", TYPES)
def test_a_merged_base_is_a_checkpoint_with_the_trained_weights(kind, tmp_path):
    adapter, model = make(tmp_path / "adapter", **TYPES[kind])
    before = digest(CHECKPOINTS)
    events = []
    out = run(adapter, tmp_path / "checkpoints" / "mine", events.append, format="merged", base=CHECKPOINTS)
    close(decoder_weights(tmp_path / "checkpoints", "mine"), trained_weights(model, base()))
    assert digest(CHECKPOINTS) == before
    own, merged = (
        load_file(CHECKPOINTS / "acestep-v15-turbo" / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    changed = {key for key in own if not torch.equal(own[key], merged[key])}
    assert changed == {f"decoder.{name}.weight" for name in read_adapter(adapter).modules}
    assert {p.name for p in out.iterdir()} == {p.name for p in (CHECKPOINTS / "acestep-v15-turbo").iterdir()}
    assert [e for e in events if isinstance(e, Progress)][-1].done == [e for e in events if isinstance(e, Progress)][
        -1
    ].total
    [command] = next(e for e in events if isinstance(e, Finished)).next_commands
    assert f"--checkpoint-dir {CHECKPOINTS} --model-variant mine" in command
    assert any(f"move it into {CHECKPOINTS}." in e.message for e in events if isinstance(e, Notice))
    assert not list(tmp_path.rglob(".*partial*"))


def test_a_sharded_base_stays_sharded_and_can_be_trained_again(tmp_path):
    xl = open_checkpoint(CHECKPOINTS, "xl-turbo").load_decoder()
    settings = config(target_mlp=True)
    model = attach(xl, settings)
    shake(model)
    save_final(model, tmp_path / "adapter", settings)
    out = run(
        tmp_path / "adapter", tmp_path / "xl", format="merged", base=CHECKPOINTS, model_variant="xl-turbo", dtype="bf16"
    )
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    source = json.loads(
        (CHECKPOINTS / "acestep-v15-xl-turbo" / "model.safetensors.index.json").read_text(encoding="utf-8")
    )
    assert index["weight_map"] == source["weight_map"]
    again = open_checkpoint(tmp_path, "xl").load_decoder()
    merged = model.merge_and_unload()
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[name].bfloat16().float(), rtol=0, atol=0)
    attach(again, config())


def test_merging_takes_strengths_and_several_adapters_of_any_kind(tmp_path):
    first, one = make(tmp_path / "one", adapter_type="dora")
    second, two = make(tmp_path / "two", seed=1, adapter_type="lokr", target_mlp=True)
    run(first, tmp_path / "c" / "mine", format="merged", base=CHECKPOINTS, strength=0.5, add=(f"{second}:-2",))
    a, b = trained_weights(one, base()), trained_weights(two, base())
    close(
        decoder_weights(tmp_path / "c", "mine"), {n: w + 0.5 * (a[n] - w) - 2 * (b[n] - w) for n, w in base().items()}
    )


def test_a_single_file_base_is_merged_into_a_single_file(tmp_path):
    adapter, model = make(tmp_path / "adapter")
    own = load_file(CHECKPOINTS / "acestep-v15-turbo" / "model.safetensors")
    save_file(
        {f"model.diffusion_model.{key}": t for key, t in own.items()} | {"vae.x": torch.ones(3)},
        tmp_path / "all.safetensors",
        {"kept": "yes"},
    )
    out = run(adapter, tmp_path / "merged.safetensors", format="merged", base=tmp_path / "all.safetensors")
    merged = load_file(out)
    expected = trained_weights(model, base())
    close({name: merged[f"model.diffusion_model.decoder.{name}.weight"] for name in base()}, expected)
    assert torch.equal(merged["vae.x"], torch.ones(3))
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata()["kept"] == "yes"
        assert "merged" in opened.metadata()["sidestep"]


def test_combining_concatenates_ranks_exactly(tmp_path):
    first, one = make(tmp_path / "one", attention_type="self")
    second, two = make(tmp_path / "two", seed=1, rank=2, target_mlp=True)
    out = run(first, tmp_path / "both", add=(f"{second}:0.5",), strength=2.0)
    a, b = trained_weights(one, base()), trained_weights(two, base())
    close(own_weights(out), {n: w + 2 * (a[n] - w) + 0.5 * (b[n] - w) for n, w in base().items()})
    close(peft_weights(turbo(), out), own_weights(out))
    assert set(read_adapter(out).ranks.values()) == {6, 2}


def test_every_format_from_the_command(tmp_path, pipeline):  # noqa: F811
    adapter, model = make(tmp_path / "adapter", target_modules=("v_proj",), target_mlp=True)
    expected = trained_weights(model, base())
    close(peft_weights(turbo(), run(adapter, tmp_path / "peft")), expected)
    close(comfyui_weights(turbo(), run(adapter, tmp_path / "c.safetensors", format="comfyui")), expected)
    close(diffusers_weights(pipeline, run(adapter, tmp_path / "d", format="diffusers")), expected)
    close(lycoris_weights(turbo(), run(adapter, tmp_path / "l.safetensors", format="lycoris")), expected)


def test_a_foreign_mlp_adapter_needs_the_base_for_a_peft_folder(tmp_path, pipeline):  # noqa: F811
    _, model = make(tmp_path / "adapter", adapter_type="dora", target_modules=(), target_mlp=True)
    foreign = run(tmp_path / "adapter", tmp_path / "foreign.safetensors", format="diffusers")
    with pytest.raises(UserError, match="q_proj") as refused:
        run(foreign, tmp_path / "out")
    assert "--base" in refused.value.fix
    close(diffusers_weights(pipeline, run(foreign, tmp_path / "out", base=CHECKPOINTS)), trained_weights(model, base()))


def test_a_dora_for_comfyui_takes_the_norms_of_the_base(tmp_path):
    adapter, model = make(tmp_path / "adapter", adapter_type="dora")
    out = run(adapter, tmp_path / "c.safetensors", format="comfyui", base=CHECKPOINTS)
    close(comfyui_weights(turbo(), out), trained_weights(model, base()))
    with pytest.raises(UserError, match="rewritten for ComfyUI"):
        read_adapter(out)


def test_dtype_is_that_of_the_file_and_the_rounding_is_said(tmp_path):
    adapter, _ = make(tmp_path / "adapter")
    events = []
    out = run(adapter, tmp_path / "bf16", events.append, dtype="bf16")
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert any(isinstance(e, Notice) and "bf16" in e.message for e in events)
    assert any(isinstance(e, Saved) for e in events)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lora", {"format": "merged"}, "--base"),
        ("lora", {"format": "merged", "base": CHECKPOINTS, "model_variant": "xl-turbo"}, "has shape"),
        ("dora", {"strength": 0.5}, "--strength 0.5"),
        ("oft", {"strength": 0.5}, "--strength 0.5"),
        ("oft", {"format": "comfyui"}, "OFT"),
        ("lokr", {"format": "diffusers"}, "diffusers refuses"),
        ("lokr decomposed", {"format": "peft"}, None),
        ("lokr", {"add": ("self",)}, "only LoRAs can be combined"),
        ("lora", {"add": ("missing:0.5",)}, "missing: no such"),
        ("lora", {"add": ("self:1e9",)}, "1e9"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(kind, settings, message, tmp_path):
    adapter, _ = make(tmp_path / "adapter", **TYPES[kind])
    if "add" in settings:
        settings = settings | {"add": tuple(a.replace("self", str(adapter)) for a in settings["add"])}
    out = tmp_path / ("out" if settings.get("format", "peft") in ("peft", "merged") else "out.safetensors")
    if message is None:
        run(adapter, out, **settings)  # as a LyCORIS file in the folder; peft has no such kind
        assert {p.name for p in out.iterdir()} == {"lokr_weights.safetensors", "README.md"}
        return
    with pytest.raises(UserError, match=message):
        run(adapter, out, **settings)
    assert not out.exists()


def test_inputs_and_what_is_already_there_are_left_alone(tmp_path):
    adapter, _ = make(tmp_path / "adapter")
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(CHECKPOINTS / "acestep-v15-turbo", checkpoints / "acestep-v15-turbo")
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine.txt").write_text("mine", encoding="utf-8")
    before = digest(tmp_path)
    for output, settings in (
        (adapter, {"overwrite": True}),
        (adapter / "adapter_model.safetensors", {"format": "comfyui", "overwrite": True}),
        (checkpoints / "acestep-v15-turbo", {"format": "merged", "base": checkpoints, "overwrite": True}),
        (checkpoints / "acestep-v15-turbo" / "inside", {"format": "merged", "base": checkpoints}),
        (there, {}),
        (there, {"format": "merged", "base": checkpoints, "overwrite": True}),
        (there / "x.safetensors", {"format": "peft"}),
        (there / "x.safetensors", {"format": "merged", "base": checkpoints}),
    ):
        with pytest.raises(UserError, match="--output"):
            run(adapter, output, **settings)
        assert digest(tmp_path) == before
    run(adapter, there, overwrite=True)
    assert (there / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_overwriting_leaves_no_mixture_of_two_kinds(tmp_path):
    lokr, _ = make(tmp_path / "lokr", adapter_type="lokr")
    lora, _ = make(tmp_path / "lora")
    out = tmp_path / "out"
    run(lokr, out)
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    run(lora, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == sorted([*(path.name for path in lora.iterdir()), "mine.txt"])
    assert read_adapter(out).title == read_adapter(lora).title
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_overwriting_export_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch):
    lokr, _ = make(tmp_path / "lokr", adapter_type="lokr")
    lora, _ = make(tmp_path / "lora")
    run(lokr, tmp_path / "out")
    before = digest(tmp_path / "out")

    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sidestep.adapters.write.write_text", full)
    with pytest.raises(JobError, match="No space left"):
        run(lora, tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("settings", "over", "said"),
    [
        ({"format": "comfyui"}, "peft", "adapter_model.safetensors is there already"),
        ({"format": "diffusers"}, "peft", "adapter_model.safetensors is there already"),
        ({"format": "lycoris"}, "comfyui", "comfyui.safetensors is there already"),
        ({"format": "comfyui"}, "lycoris", "lycoris.safetensors is there already"),
        ({"format": "merged", "base": CHECKPOINTS}, "peft", "something already"),
        ({"format": "peft"}, "a file", "a file, not a folder"),
        ({"format": "merged", "base": CHECKPOINTS}, "a file", "a file, not a folder"),
    ],
)
def test_a_folder_of_another_kind_is_not_mixed_with(settings, over, said, tmp_path):
    adapter, _ = make(tmp_path / "adapter")
    other, _ = make(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    if over == "a file":
        out.write_text("mine", encoding="utf-8")
    else:
        run(other, out, format=over)
    before = digest(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        run(adapter, out, overwrite=True, **settings)
    assert "--output" in refused.value.problem
    assert digest(tmp_path) == before


@pytest.mark.parametrize("over", ["comfyui", "diffusers", "lycoris"])
def test_the_folder_for_every_program_replaces_one_of_any_kind_whole(over, tmp_path):
    adapter, _ = make(tmp_path / "adapter")
    other, _ = make(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    run(other, out, format=over)
    (out / "songs").mkdir()
    (out / "songs" / "mine.txt").write_text("mine", encoding="utf-8")
    run(adapter, out, overwrite=True)
    assert contents(out) == contents(run(adapter, tmp_path / "reference")) | {"songs/mine.txt": b"mine"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_given_for_a_single_file_may_hold_others(tmp_path):
    """As ComfyUI's models/loras does."""
    adapter, _ = make(tmp_path / "adapter")
    loras = tmp_path / "loras"
    loras.mkdir()
    (loras / "README.md").write_text("mine", encoding="utf-8")
    (loras / "somebodys.safetensors").write_bytes(b"x")
    run(adapter, loras, format="comfyui")
    with pytest.raises(UserError, match="something already"):
        run(adapter, loras, format="comfyui")
    run(adapter, loras, format="comfyui", overwrite=True)
    assert sorted(path.name for path in loras.iterdir()) == [
        "README.md",
        "comfyui.safetensors",
        "somebodys.safetensors",
    ]
    assert (loras / "README.md").read_text(encoding="utf-8") == "mine"


REPLACED = {  # settings of the adapter that was there, of the export, its name
    "peft over lokr": ({"adapter_type": "lokr"}, {}, "out"),
    "peft over peft": ({"rank": 2}, {}, "out"),
    "comfyui file": ({"rank": 2}, {"format": "comfyui"}, "out.safetensors"),
    "diffusers in a folder": ({"rank": 2}, {"format": "diffusers"}, "out"),
    "lycoris in a folder": ({"rank": 2}, {"format": "lycoris"}, "out"),
    "merged file": ({"rank": 2}, {"format": "merged"}, "out.safetensors"),
    "merged folder, new": (None, {"format": "merged", "base": CHECKPOINTS}, "out"),
}


@pytest.mark.parametrize("in_one_step", [True, False], ids=["exchanged", "renamed twice"])
@pytest.mark.parametrize(
    "case", ["peft over lokr", *(pytest.param(case, marks=pytest.mark.slow) for case in [*REPLACED][1:])]
)
def test_a_kill_at_every_change_of_the_disk_leaves_the_old_export_or_the_new(case, in_one_step, tmp_path, monkeypatch):
    before, settings, name = REPLACED[case]
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_paths: False)
    adapter, _ = make(tmp_path / "adapter")
    if case == "merged file":
        settings = settings | {"base": tmp_path / "base.safetensors"}
        shutil.copyfile(CHECKPOINTS / "acestep-v15-turbo" / "model.safetensors", settings["base"])
    run(adapter, tmp_path / "reference" / name, **settings)
    old, new = {}, contents(tmp_path / "reference" / name)
    if before is not None:
        run(make(tmp_path / "other", seed=1, **before)[0], tmp_path / "old" / name, **settings)
        if not settings:
            (tmp_path / "old" / name / "mine.txt").write_text("mine", encoding="utf-8")
            new["mine.txt"] = b"mine"
        old = contents(tmp_path / "old" / name)
    assert old != new
    seen = set()
    for change in range(1, 200):
        home = tmp_path / f"try {change}"
        if before is not None:
            shutil.copytree(tmp_path / "old", home)
        died = True
        with dying_at(change, home), contextlib.suppress(Dies):
            run(adapter, home / name, overwrite=before is not None, **settings)
            died = False
        files.bring_back(home / name)  # what the next export does first
        now = contents(home / name)
        assert now in (old, new), f"a mixture after change {change}"
        seen.add("old" if now == old else "new")
        if not died:
            assert now == new
            break
        if now == old:
            run(adapter, home / name, overwrite=before is not None, **settings)
            assert contents(home / name) == new
            assert [path.name for path in home.iterdir() if not path.name.startswith(".tmp-")] == [name]
    assert seen == {"old", "new"}


def contents(path: Path) -> dict[str, object]:
    """What a file or folder holds, nothing when it is not there; whatever the order in the headers of safetensors."""
    found: dict[str, object] = {}
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            content: object = file.read_bytes()
            if file.suffix == ".safetensors":
                size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
                content = json.loads(file.read_bytes()[8:size]), file.read_bytes()[size:]
            found[file.relative_to(path).as_posix()] = content
    return found


def test_an_interrupted_merge_leaves_nothing_behind(tmp_path):
    adapter, _ = make(tmp_path / "adapter")
    before = digest(CHECKPOINTS)

    def interrupt(event) -> None:
        if isinstance(event, Progress) and event.done > event.total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(adapter, tmp_path / "out", interrupt, format="merged", base=CHECKPOINTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert digest(CHECKPOINTS) == before


def test_a_broken_adapter_is_not_exported(tmp_path):
    adapter, _ = make(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, file, {"sidestep": "{}"})
    with pytest.raises(JobError, match="not finite"):
        run(adapter, tmp_path / "out")


def test_a_merge_reads_and_writes_any_dtype(tmp_path):
    tensors = {
        "decoder.layers.0.self_attn.q_proj.weight": torch.randn(4, 4).half(),
        "steps": torch.tensor(7),
        "mask": torch.ones(3, dtype=torch.bool),
        "odd": torch.randn(5).bfloat16(),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    for dtype in (None, torch.float32, torch.bfloat16):
        merge.merge_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", [], dtype)
        out = load_file(tmp_path / "out.safetensors")
        assert set(out) == set(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                out[name], tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor, rtol=0, atol=0
            )


MEASURE = """
import resource, sys
from pathlib import Path
from sidestep.settings.config import ExportConfig
from sidestep.events import null
from sidestep.tasks.export import export
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 2**20
before = peak()
export(ExportConfig(adapter=Path(sys.argv[1]), output=Path(sys.argv[2]), format="merged", base=Path(sys.argv[3])), null)
print(before, peak())
"""


def measured_merge(adapter: Path, output: Path, checkpoint: Path) -> tuple[float, float]:
    """(GiB resident before, at most) of a merge in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(adapter), str(output), str(checkpoint)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    before, peak = map(float, done.stdout.split()[-2:])
    return before, peak


def random_checkpoint(folder: Path, hidden: int, wide: int, layers: int, filler: int) -> None:
    """A checkpoint of the original layout with random bf16 weights, written in a stream.

    filler: parameters outside the decoder's layers.
    """
    table, shapes, position = {}, {}, 0
    kv = hidden // 2
    for layer in range(layers):
        for part in ("self_attn", "cross_attn"):
            shapes |= {
                f"decoder.layers.{layer}.{part}.{p}.weight": (rows, hidden)
                for p, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden))
            }
        shapes |= {f"decoder.layers.{layer}.mlp.{p}.weight": (wide, hidden) for p in ("gate_proj", "up_proj")} | {
            f"decoder.layers.{layer}.mlp.down_proj.weight": (hidden, wide)
        }
    shapes["encoder.filler"] = (filler,)
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(table).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"is_turbo": True, "model_version": "turbo"}), encoding="utf-8")
    noise = torch.randn(4 * 2**20).mul(0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        while position > 0:
            position -= f.write(noise[: min(len(noise), position)])


def random_lora(file: Path, hidden: int, layers: int, rank: int) -> None:
    tensors = {}
    for layer in range(layers):
        for part in ("self_attn", "cross_attn"):
            for p, rows in (("q_proj", hidden), ("k_proj", hidden // 2), ("v_proj", hidden // 2), ("o_proj", hidden)):
                name = f"base_model.model.layers.{layer}.{part}.{p}"
                tensors |= {
                    f"{name}.lora_A.weight": torch.randn(rank, hidden),
                    f"{name}.lora_B.weight": torch.randn(rows, rank),
                }
    save_file(tensors, file, {"sidestep": "{}"})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of Linux")
@pytest.mark.parametrize(
    ("hidden", "wide", "layers", "filler", "most"),
    [
        pytest.param(1024, 3072, 8, 300_000_000, 0.5, id="quarter", marks=pytest.mark.slow),
        pytest.param(2048, 6144, 24, 850_000_000, 1.5, id="2B", marks=pytest.mark.slow),
    ],
)
def test_merging_is_bounded_in_memory_whatever_the_size_of_the_base(hidden, wide, layers, filler, most, tmp_path):
    """The whole process stays below 3 GiB at the size of 2B; `most`: GiB above what Python with torch takes."""
    random_checkpoint(tmp_path / "c" / "acestep-v15-turbo", hidden, wide, layers, filler)
    random_lora(tmp_path / "adapter.safetensors", hidden, layers, 64)
    source = tmp_path / "c" / "acestep-v15-turbo" / "model.safetensors"
    size, stamp = source.stat().st_size, source.stat().st_mtime_ns
    before, peak = measured_merge(tmp_path / "adapter.safetensors", tmp_path / "out", tmp_path / "c")
    merged = (tmp_path / "out" / "model.safetensors").stat().st_size
    print(f"base {size / 2**30:.2f} GiB, before {before:.2f} GiB, peak {peak:.2f} GiB")
    assert abs(merged - size) < 10_000
    assert (source.stat().st_size, source.stat().st_mtime_ns) == (size, stamp)
    shutil.rmtree(tmp_path / "out")
    assert peak < 3.0
    assert peak - before < most


@pytest.mark.slow
def test_a_killed_merge_leaves_the_source_untouched_and_no_output(tmp_path):
    random_checkpoint(tmp_path / "c" / "acestep-v15-turbo", 256, 768, 4, 20_000_000)
    random_lora(tmp_path / "adapter.safetensors", 256, 4, 8)
    source = tmp_path / "c" / "acestep-v15-turbo" / "model.safetensors"
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    code = MEASURE.replace(
        "null)", "lambda event: __import__('os')._exit(9))"
    )  # dies at the first tensor, as by SIGKILL
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "adapter.safetensors", tmp_path / "out", tmp_path / "c"],
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )
    assert done.returncode == 9
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert not (tmp_path / "out").exists()
    events = []
    run(tmp_path / "adapter.safetensors", tmp_path / "out", events.append, format="merged", base=tmp_path / "c")
    assert any("delete it" in e.message for e in events if isinstance(e, Notice))


def test_the_merged_model_computes_as_the_trained_one(tmp_path):
    adapter, model = make(tmp_path / "adapter")
    run(adapter, tmp_path / "c" / "mine", format="merged", base=CHECKPOINTS)
    close_velocities(open_checkpoint(tmp_path / "c", "mine").load_decoder(), model)


def test_a_place_that_cannot_be_written_is_named_and_not_the_file_on_the_way(tmp_path):
    adapter, _ = make(tmp_path / "adapter", **TYPES["lora"])
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"file.x\.safetensors: could not be written") as failed:
        run(adapter, tmp_path / "file" / "x.safetensors", format="comfyui")
    assert "partial" not in str(failed.value)
