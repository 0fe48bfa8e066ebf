"""`inspect` says what a file is, who wrote it and what each program makes of it."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.adapters.adapter import change_of
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import save_comfyui, save_diffusers
from sidestep.errors import UserError
from sidestep.events import Notice, Table, null
from sidestep.settings.config import InspectConfig
from sidestep.tasks.inspect import Inspection, inspect_adapter, norm_of
from tests.adapters.test_write import TYPES
from tests.tasks.test_export import make


def inspection(path, report=null) -> Inspection:
    return inspect_adapter(InspectConfig(path=path), report)


@pytest.mark.parametrize("kind", TYPES)
def test_norms_are_those_of_the_change(kind, tmp_path):
    adapter = read_adapter(make(tmp_path, **TYPES[kind])[0])
    found = inspection(tmp_path)
    assert found.norms.keys() == adapter.modules.keys()
    assert all(found.norms.values())
    if kind != "oft":
        for factors in adapter.modules.values():
            assert norm_of(factors) == pytest.approx(torch.linalg.norm(change_of(factors)).item(), rel=1e-5)


def test_a_final_folder_has_strength_one_in_every_program(tmp_path):
    make(tmp_path, target_mlp=True)
    events = []
    found = inspection(tmp_path, events.append)
    assert (found.kind, found.format, found.modules, found.ranks, found.alphas, found.not_finite) == (
        "LoRA",
        "peft",
        33,
        [4],
        [4.0],
        [],
    )
    assert found.program.startswith("Side-Step")
    assert found.metadata["config_fingerprint"]
    programs = ["ACE-Step's app", "ComfyUI", "diffusers", "peft", "LyCORIS", "acestep.cpp"]
    assert list(found.programs) == ["Side-Step", *programs]
    not_read = [program for program, said in found.programs.items() if said["strength"] != [1.0, 1.0]]
    assert not_read == ["LyCORIS"]
    titles = [event.title for event in events if isinstance(event, Table)]
    assert titles[0] == "adapter_model.safetensors"
    assert "Strength in each program" in titles[1]
    assert titles[2] == "Norm of the change"
    heat = [event for event in events if isinstance(event, Table)][2]
    assert len(heat.rows) == 3
    assert heat.columns == (
        "layer",
        *(f"{a} {p}" for a in ("self", "cross") for p in "qkvo"),
        "mlp gate",
        "mlp up",
        "mlp down",
    )
    json.dumps(dataclasses.asdict(found))


def rewrite(folder, file, change, header=None):
    """A copy of a folder's tensors under other names."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), file, header)
    return file


def test_the_usual_file_plays_at_half_strength_elsewhere(tmp_path):
    """A PEFT folder with alpha 2·r, as most trainers write it: field note 28."""
    folder, _ = make(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    (tmp_path / "b" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.17.0"}), encoding="utf-8"
    )
    found = inspection(tmp_path / "b")
    assert (found.program, found.strength, found.alphas) == ("peft 0.17.0", [2.0, 2.0], [8.0])
    strengths = {program: said["strength"] for program, said in found.programs.items()}
    assert strengths == {
        "Side-Step": [1.0, 1.0],
        "ACE-Step's app": [1.0, 1.0],
        "ComfyUI": [0.5, 0.5],
        "diffusers": [0.5, 0.5],
        "peft": [1.0, 1.0],
        "LyCORIS": None,
        "acestep.cpp": [1.0, 1.0],
    }


def test_each_file_says_who_reads_it(tmp_path):
    folder, _ = make(tmp_path / "lora")
    adapter = read_adapter(folder)
    flat = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}

    def kohya(tensors):
        named = {}
        for key, tensor in tensors.items():
            name, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
            named[f"lora_unet_{name.replace('.', '_')}.{flat['lora_' + factor]}"] = tensor
        return named

    def ai_toolkit(tensors):
        return {key.replace("base_model.model.", "diffusion_model."): t for key, t in tensors.items()}

    files = {
        "comfyui": save_comfyui(adapter, tmp_path / "c.safetensors"),
        "diffusers": save_diffusers(adapter, tmp_path / "d.safetensors"),
        "kohya": rewrite(folder, tmp_path / "k.safetensors", kohya, {"ss_network_dim": "4"}),
        "ai-toolkit": rewrite(
            folder,
            tmp_path / "t.safetensors",
            ai_toolkit,
            {"software": '{"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"}'},
        ),
    }
    readers = {}
    for name, file in files.items():
        found = inspection(file)
        readers[name] = {program for program, said in found.programs.items() if said["strength"]} - {"Side-Step"}
        assert {"kohya": "kohya's sd-scripts, or one like it", "ai-toolkit": "ai-toolkit"}.get(
            name, found.program
        ) == found.program
    assert readers == {
        "comfyui": {"ComfyUI", "acestep.cpp"},
        "diffusers": {"diffusers"},
        "kohya": set(),
        "ai-toolkit": {"acestep.cpp"},
    }


@pytest.mark.parametrize(
    ("kind", "readers"),
    [
        ("dora", {"ACE-Step's app", "ComfyUI", "diffusers", "peft", "acestep.cpp"}),
        ("lokr", {"ACE-Step's app", "ComfyUI", "peft", "LyCORIS", "acestep.cpp"}),
        ("loha", {"ACE-Step's app", "ComfyUI", "peft", "LyCORIS"}),
        ("oft", {"ACE-Step's app", "peft"}),
        ("lokr decomposed", {"ACE-Step's app", "ComfyUI", "LyCORIS", "acestep.cpp"}),
    ],
)
def test_each_kind_says_who_reads_its_final_folder(kind, readers, tmp_path):
    make(tmp_path, **TYPES[kind])
    found = inspection(tmp_path)
    assert {program for program, said in found.programs.items() if said["strength"]} - {"Side-Step"} == readers
    if found.kind in ("DoRA", "weight-decomposed LoKr"):
        assert "not as trained" in found.programs["ComfyUI"]["note"]


def test_a_nan_is_found_and_named(tmp_path):
    make(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.1.cross_attn.k_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    events = []
    found = inspection(tmp_path, events.append)
    assert found.not_finite == ["layers.1.cross_attn.k_proj"]
    assert "layers.1.cross_attn.k_proj" not in found.norms
    assert [event.level for event in events if isinstance(event, Notice)] == ["error"]
    json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))


def test_an_adapter_that_does_nothing_is_said_to(tmp_path):
    make(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}, file)
    events = []
    inspection(tmp_path, events.append)
    assert any("changes nothing" in event.message for event in events if isinstance(event, Notice))


def test_json_reports_no_tables(tmp_path):
    make(tmp_path)
    events = []
    inspect_adapter(InspectConfig(path=tmp_path, json=True), events.append)
    assert not events


def test_what_is_no_adapter_is_refused(checkpoints):
    with pytest.raises(UserError, match="not part of ACE-Step 1.5's decoder"):
        inspection(checkpoints / "acestep-v15-turbo" / "model.safetensors")
