"""The table of programs is what the programs do, and docs/interop.md is that table."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.adapters.adapter import Adapter
from sidestep.adapters.attach import adapter_of
from sidestep.adapters.programs import OTHERS, RULES, STAYS, WAYS, applied_by_each
from sidestep.adapters.read import DIGEST, find_adapter, read_adapter
from sidestep.adapters.write import save_comfyui, save_final, save_lycoris
from tests import interop_page
from tests.adapters.test_adapters import turbo
from tests.adapters.test_foreign_files import official_lokr
from tests.adapters.test_write import TYPES, base, close, pipeline, trained
from tests.consumers import (
    acestep_cpp_weights,
    app_lokr_weights,
    app_weights_at,
    comfyui_weights,
    diffusers_weights,
    header_of,
    lycoris_weights,
    peft_weights,
    trained_weights,
)

__all__ = ["pipeline"]  # the fixture
KINDS = {adapter_of(trained(kind, "self")[1]).title: kind for kind in TYPES}


def weights_file(path: Path) -> Path:
    """The file of a folder that a program which takes files is given."""
    names = ("lokr_weights.safetensors", "loha_weights.safetensors", "adapter_model.safetensors")
    return path if path.is_file() else next(path / name for name in names if (path / name).is_file())


def in_app(path: Path) -> dict:
    file = path / "lokr_weights.safetensors"
    if not file.is_file():
        return peft_weights(turbo(), path)
    return app_lokr_weights(turbo(), file, json.loads(header_of(file)["lokr_config"]))


def is_exact(program: str, path: Path, expected: dict, pipe) -> bool:
    """Whether a program computes with the trained weights when it is given a file or folder."""
    consumers = {
        "ACE-Step's app": lambda: in_app(path),
        "ComfyUI": lambda: comfyui_weights(turbo(), weights_file(path)),
        "diffusers": lambda: diffusers_weights(pipe, path),
        "peft": lambda: peft_weights(turbo(), path),
        "LyCORIS": lambda: lycoris_weights(turbo(), weights_file(path)),
        "acestep.cpp": lambda: acestep_cpp_weights(turbo(), path),
    }
    try:
        close(consumers[program](), expected)
    except (AssertionError, ValueError, KeyError, OSError, IndexError):
        return False
    return True


@pytest.mark.parametrize("title", KINDS)
def test_each_way_of_the_table_is_exact_and_final_is_only_where_it_says_so(title, pipeline, tmp_path):
    settings, model = trained(KINDS[title], "self")
    expected, final = trained_weights(model, base()), tmp_path / "final"
    save_final(model, final, settings)
    adapter = read_adapter(final)
    for program, way in WAYS[title].items():
        assert is_exact(program, final, expected, pipeline) == way.is_final, program
        if program == "ComfyUI" and way.is_final:  # the file that README.md names
            assert is_exact(program, final / "adapter_model.safetensors", expected, pipeline)
        if way.form == "lycoris":
            file = save_lycoris(adapter, tmp_path / "l.safetensors")
            assert is_exact(program, file, expected, pipeline), program
        if way.form == "comfyui --base":
            file = save_comfyui(adapter, tmp_path / "c.safetensors", weights=base().get)
            assert is_exact(program, file, expected, pipeline), program


@pytest.mark.parametrize("title", KINDS)
def test_inspect_says_of_a_final_folder_what_the_table_says(title, tmp_path):
    settings, model = trained(KINDS[title], "self")
    save_final(model, tmp_path, settings)
    for applied in applied_by_each(find_adapter(tmp_path))[1:]:
        way = WAYS[title][applied.program]
        if way.is_final:
            assert applied.strength == (1.0, 1.0), applied
            assert way.words in applied.note
        elif applied.strength:
            assert "not as trained" in applied.note
            assert f"--format {way.form}" in applied.note
        else:
            assert f"--format {way.form}" in applied.note


def test_a_lora_is_what_every_program_reads_as_the_documents_say():
    assert not any(way.form.startswith("merged") for way in WAYS["LoRA"].values())
    assert {kind for kind, row in WAYS.items() if row["ComfyUI"].is_final} == {"LoRA", "LoKr", "LoHa"}


def test_every_program_has_a_rule_and_a_way_for_each_kind():
    assert all(list(row) == list(RULES) for row in WAYS.values())
    assert set(KINDS) | {"weight-decomposed LoHa"} == set(WAYS)


@pytest.mark.parametrize("title", KINDS)
def test_what_the_apps_slider_leaves_in_place_at_0_is_said_of_it(title, tmp_path):
    settings, model = trained(KINDS[title], "self")
    save_final(model, tmp_path, settings)
    close(app_weights_at(1.0, turbo(), tmp_path), trained_weights(model, base()))
    left = app_weights_at(0.0, turbo(), tmp_path)
    stays = max((left[name] - weight).abs().max() for name, weight in base().items()) > 1e-3
    assert stays == (WAYS[title]["ACE-Step's app"].words == STAYS)
    if not stays:
        close(left, base())


def test_ranks_of_a_map_cost_no_byte_and_come_back_as_they_were(tmp_path):
    settings, model = trained("lora", "rank map")
    own = adapter_of(model)
    save_final(model, tmp_path, settings)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for f in own.modules.values() for t in f.values())
    again = read_adapter(tmp_path)
    assert again.ranks == own.ranks
    for name, factors in own.modules.items():
        assert all(torch.equal(again.modules[name][factor], tensor) for factor, tensor in factors.items())


def test_inspect_says_the_strength_of_a_rank_map_with_one_alpha_for_all(tmp_path):
    """As other trainers write it: alpha_pattern is right in peft and ignored by acestep.cpp."""
    own = adapter_of(trained("lora", "rank map")[1])
    pattern = {name: rank for name, rank in own.ranks.items() if rank != 4}
    tensors = {f"base_model.model.{n}.{k}.weight": t for n, f in own.modules.items() for k, t in f.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "rank_pattern": pattern, "alpha_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    strengths = {applied.program: applied.strength for applied in applied_by_each(find_adapter(tmp_path))}
    assert strengths["acestep.cpp"] == (1.0, 4.0)
    assert strengths["peft"] == strengths["ComfyUI"] == (1.0, 1.0)
    wrong, name = acestep_cpp_weights(turbo(), tmp_path), "layers.2.mlp.down_proj"
    change = own.modules[name]["lora_B"] @ own.modules[name]["lora_A"]
    torch.testing.assert_close(wrong[name] - base()[name], 4 * change, rtol=0, atol=1e-5)


def of_another_program(origin: str, tmp_path: Path, own: Adapter) -> Path:
    if origin.startswith("ACE-Step"):
        final = official_lokr(tmp_path, "lokr", frozen=0.0)[0]
        header = header_of(tmp_path / "final" / "lokr_weights.safetensors")
        del header[DIGEST]
        save_file(load_file(final), tmp_path / "x.safetensors", header)
        return tmp_path / "x.safetensors"
    prefix = {"ai": "transformer.decoder.", "Si": "base_model.model.decoder.", "Co": "diffusion_model.decoder."}[
        origin[:2]
    ]
    tensors = {}
    for name, factors in own.modules.items():
        if origin.startswith("Comfy"):
            tensors[f"{prefix}{name}.diff"] = factors["lora_B"] @ factors["lora_A"]
        else:
            tensors |= {f"{prefix}{name}.{factor}.weight": tensor for factor, tensor in factors.items()}
    if origin.startswith("Simple"):
        tensors["base_model.model.encoder.lyric_encoder.embed_tokens.lora_A.weight"] = torch.ones(4, 32)
        tensors["base_model.model.encoder.lyric_encoder.embed_tokens.lora_B.weight"] = torch.ones(32, 4)
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("origin", OTHERS)
def test_inspect_says_of_other_programs_files_what_the_table_says(origin, tmp_path):
    path = of_another_program(origin, tmp_path, adapter_of(trained("lora", "uniform")[1]))
    applied = applied_by_each(find_adapter(path))
    assert {each.program for each in applied if each.strength} - {"Side-Step"} == OTHERS[origin][1]
    assert all(each.strength in (None, (1.0, 1.0)) for each in applied)


def test_the_page_of_programs_is_up_to_date():
    assert interop_page.PAGE.read_text(encoding="utf-8") == interop_page.page(), "run: python -m tests.interop_page"


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_a_file_for_comfyui_has_names_that_old_and_new_versions_map(kind, tmp_path):
    adapter = adapter_of(trained(kind, "self")[1])
    keys = load_file(save_comfyui(adapter, tmp_path / "c.safetensors"))
    assert all(key.startswith("diffusion_model.decoder.layers.") for key in keys)
    assert {key.rpartition(".")[0] for key in keys if key.endswith(".alpha")} == {
        f"diffusion_model.decoder.{name}" for name in adapter.modules
    }


def test_no_text_promises_more_than_the_table():
    """No kind is read by every program: LyCORIS does not know the names in final/, others were not tried."""
    root = Path(__file__).parents[2]
    texts = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "sidestep").rglob("*.py")]
    promise = re.compile(r"(every|all) programs? (can )?(reads?|loads?|takes?|plays?)|same strength in (every|all)")
    assert [str(path) for path in texts if promise.search(path.read_text(encoding="utf-8"))] == []
