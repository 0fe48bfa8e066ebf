"""The language model on disk: found, read in all its forms, with the original's numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.lm.model import (
    Tokens,
    choose_language_model,
    codebook_size,
    find_language_models,
    load_language_model,
    load_qwen3,
)
from sidestep.errors import UserError

CPU = torch.device("cpu")


def last_logits(lm, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([lm.tokens.ids(text)])).logits[0, -1]


def test_token_ids_are_those_of_the_original(lm_golden, tiny_lm):
    tokens = tiny_lm.tokens
    assert tokens.code_ids[0] == lm_golden["code_0_token"]
    for case in lm_golden["plan"]:
        for name in ("prompt_plan", "prompt_codes", "prompt_codes_negative"):
            assert tokens.ids(case[name]) == case[f"{name}_ids"]
    for case in (*lm_golden["understand"], *lm_golden["create"], *lm_golden["format"]):
        assert tokens.ids(case["prompt"]) == case["ids"]
        assert tokens.text(case["ids"]) == case["prompt"]


def test_logits_are_those_of_the_original(lm_golden, lm_numbers, tiny_lm):
    for i, case in enumerate(lm_golden["plan"]):
        for name in ("prompt_plan", "prompt_codes", "prompt_codes_negative"):
            expected = lm_numbers[f"plan.{i}.{name}.logits"]
            torch.testing.assert_close(last_logits(tiny_lm, case[name]), expected, atol=1e-5, rtol=1e-5)
    for i, case in enumerate(lm_golden["understand"]):
        expected = lm_numbers[f"understand.{i}.logits"]
        torch.testing.assert_close(last_logits(tiny_lm, case["prompt"]), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def copy(lm_checkpoints, tmp_path):
    folder = tmp_path / "acestep-5Hz-lm-1.7B"
    shutil.copytree(lm_checkpoints / "acestep-5Hz-lm-0.6B", folder)
    return folder


def store(copy: Path, form: str) -> None:
    """Write a language model's weights again as other sizes have them."""
    weights = load_file(copy / "model.safetensors")
    if form == "with a head of its own":
        weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    else:
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    if form == "bare names in two shards":
        (copy / "model.safetensors").unlink()
        names = sorted(weights)
        shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        for file, own in shards.items():
            save_file({name: weights[name] for name in own}, copy / file)
        index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, copy / "model.safetensors")


@pytest.mark.parametrize("form", ["bare names", "bare names in two shards", "with a head of its own"])
def test_all_forms_of_names_are_read(form, copy, tiny_lm):
    store(copy, form)
    read = load_qwen3(copy, CPU, torch.float32).state_dict()
    expected = tiny_lm.model.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("precision", "off"), [("int8", 0.05), ("nf4", 0.5)])
def test_a_quantised_model_is_close_to_the_whole_one(precision, off, lm_checkpoints, lm_golden, tiny_lm):
    folder = lm_checkpoints / "acestep-5Hz-lm-0.6B"
    small = load_language_model(folder, 512, CPU, torch.float32, precision)
    prompt = lm_golden["plan"][0]["prompt_codes"]
    whole, quantised = last_logits(tiny_lm, prompt), last_logits(small, prompt)
    assert 0 < float((whole - quantised).abs().max() / whole.abs().max()) < off


def test_the_app_s_own_size_is_taken_first(lm_checkpoints, tmp_path):
    for name in ("acestep-v15-512-codes", "acestep-5Hz-lm-0.6B"):
        shutil.copytree(lm_checkpoints / name, tmp_path / name)
    layout = open_checkpoint(tmp_path, "acestep-v15-512-codes").layout
    assert choose_language_model(layout, "auto").name == "acestep-5Hz-lm-0.6B"
    (tmp_path / "acestep-5Hz-lm-4B").mkdir()  # an unfinished download
    assert [path.name for path in find_language_models(layout)] == ["acestep-5Hz-lm-0.6B"]
    for name in ("1.7B", "4B", "mine"):
        shutil.copytree(tmp_path / "acestep-5Hz-lm-0.6B", tmp_path / f"acestep-5Hz-lm-{name}", dirs_exist_ok=True)
    assert choose_language_model(layout, "auto").name == "acestep-5Hz-lm-1.7B"
    for wanted in ("mine", "acestep-5Hz-lm-mine", str(tmp_path / "acestep-5Hz-lm-mine")):
        assert choose_language_model(layout, wanted) == tmp_path / "acestep-5Hz-lm-mine"


@pytest.mark.parametrize("wanted", ["auto", "4B"])
def test_a_missing_model_is_named_with_what_to_fetch(wanted, lm_checkpoints, tmp_path):
    shutil.copytree(lm_checkpoints / "acestep-v15-512-codes", tmp_path / "acestep-v15-512-codes")
    layout = open_checkpoint(tmp_path, "acestep-v15-512-codes").layout
    with pytest.raises(UserError) as caught:
        choose_language_model(layout, wanted)
    assert str(tmp_path) in str(caught.value)
    assert "acestep-5Hz-lm-0.6B (1.3 GB)" in caught.value.fix


def test_a_tokenizer_without_the_dit_s_codes_is_refused(lm_checkpoints, checkpoints):
    codebook = codebook_size(open_checkpoint(checkpoints, "turbo"))
    assert codebook == 64_000
    with pytest.raises(UserError, match=r"512 codes, the DiT 64,000 \(<\|audio_code_512\|> is missing\)"):
        Tokens(lm_checkpoints / "acestep-5Hz-lm-0.6B", codebook)


def test_another_kind_of_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "llama"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a llama model, not qwen3"):
        load_qwen3(copy, CPU, torch.float32)
