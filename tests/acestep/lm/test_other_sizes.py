"""The language model in other sizes, of other seeds, vocabularies and codebooks.

Against transformers' own class and computations by hand.
"""

import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import hints_of_codes
from sidestep.acestep.lm import decoding
from sidestep.acestep.lm.decoding import KEYSCALES, Sampling, understand, write_codes, write_plan
from sidestep.acestep.lm.loss import answer_loss
from sidestep.acestep.lm.model import codebook_size, load_language_model
from sidestep.acestep.lm.prompts import code_text, codes_prompt, negative_prompt, plan_prompt, plan_text
from sidestep.metadata import LANGUAGES
from tests.acestep.lm.test_decoding import GREEDY
from tests.acestep.lm.test_decoding import request as asked
from tests.conftest import assert_golden

SIZES = [(0, 64, 96, 1, 4, 4, 16), (1, 48, 80, 3, 6, 2, 8), (2, 32, 128, 2, 2, 1, 32)]


@pytest.fixture(params=SIZES, ids=lambda size: f"seed {size[0]}")
def both(request, tmp_path, lm_checkpoints):
    """(ours, transformers' own) of a model that was never seen before."""
    seed, width, inner, layers, heads, keys, head = request.param
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
        vocab_size=1059,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    folder = tmp_path / "acestep-5Hz-lm-0.6B-other"
    shutil.copytree(lm_checkpoints / "acestep-5Hz-lm-0.6B", folder)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return load_language_model(folder, 512), Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_and_losses_are_those_of_transformers(both):
    ours, theirs = both
    text = codes_prompt("techno", "la la", plan_text({"bpm": 90, "duration": 3})) + "<|audio_code_7|><|im_end|>"
    ids = torch.tensor([ours.tokens.ids(text)])
    with torch.inference_mode():
        logits = theirs(ids).logits
        torch.testing.assert_close(ours.model(ids).logits, logits, atol=1e-5, rtol=1e-5)
        states = ours.model.model(ids).last_hidden_state[0].clone()
    for n_prompt in (1, 20, ids.shape[1] - 2):
        labels = ids.clone()
        labels[:, :n_prompt] = -100
        with torch.inference_mode():
            expected = theirs(ids, labels=labels).loss.clone()
        found = answer_loss(states, ours.model.lm_head.weight, ids[0], n_prompt, piece=7)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_greedy_codes_are_those_of_a_loop_without_cache(both, scale):
    ours, theirs = both
    plan = plan_text({"bpm": 90, "duration": 3})
    found = write_codes(ours, "techno", "la la", plan, 3.0, Sampling(temperature=0, guidance=scale))
    with_caption = ours.tokens.ids(codes_prompt("techno", "la la", plan))
    without = ours.tokens.ids(negative_prompt())
    expected = []
    with torch.inference_mode():
        for _ in range(15):
            wanted, unwanted = (theirs(torch.tensor([ids])).logits[0, -1] for ids in (with_caption, without))
            guided = unwanted + scale * (wanted - unwanted)
            code = int(guided[ours.tokens.code_ids].argmax())
            expected.append(code)
            token = int(ours.tokens.code_ids[code])
            with_caption, without = [*with_caption, token], [*without, token]
    assert found == expected


def test_greedy_plans_are_those_of_a_loop_without_cache(both, monkeypatch):
    """Each field's values stand in a list, which is searched anew for every token."""
    monkeypatch.setattr(decoding, "CAPTION_TOKENS", 6)
    ours, theirs = both
    tokens, ids = ours.tokens, ours.tokens.ids(plan_prompt("techno", "la la"))
    begin = len(ids)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return theirs(torch.tensor([ids])).logits[0, -1]

    def likeliest(among: list[int], scores: torch.Tensor) -> int:
        return max(among, key=lambda token: float(scores[token]))

    def choose(values: list[str]) -> None:
        written, left = [], [tokens.ids(f" {value}\n") for value in values]
        while any(len(value) > len(written) for value in left):
            after = sorted({value[len(written)] for value in left if len(value) > len(written)})
            token = likeliest(after, logits())
            written.append(token)
            ids.append(token)
            left = [value for value in left if value[: len(written)] == written]

    ids += tokens.ids("<think>\nbpm:")
    choose([str(bpm) for bpm in range(30, 301)])
    ids += tokens.ids("caption:")
    vocabulary = tokens.tokenizer.get_vocab()
    marks = tokens.tokenizer.get_added_vocab()
    is_text = [id_ for text, id_ in vocabulary.items() if text not in marks and "`" not in text]
    ended = False
    for _ in range(6):
        scores = logits()
        if ids[-1] in tokens.ids("\n") and int(scores.argmax()) not in tokens.ids(" "):
            ended = True
            break
        ids.append(likeliest(is_text, scores))
    ids += [] if ended else tokens.ids("\n")
    for name, values in {
        "duration": [str(seconds) for seconds in range(10, 241)],
        "keyscale": list(KEYSCALES),
        "language": [*LANGUAGES, "unknown"],
        "timesignature": ["2", "3", "4", "6"],
    }.items():
        ids += tokens.ids(f"{name}:")
        choose(values)
    assert write_plan(ours, "techno", "la la", GREEDY, longest_seconds=240) == tokens.text(ids[begin:])


def test_where_the_codes_stand_in_the_vocabulary_is_the_tokenizer_s_matter(tmp_path, lm_checkpoints, lm_golden):
    """The same model with its code tokens in another order writes and hears the same."""
    folder = tmp_path / "acestep-5Hz-lm-0.6B"
    shutil.copytree(lm_checkpoints / folder.name, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    codes = [token for token in tokenizer["added_tokens"] if token["content"].startswith("<|audio_code_")]
    before = {token["content"]: token["id"] for token in codes}
    names = list(before)
    random.Random(0).shuffle(names)
    for token, name in zip(codes, names, strict=True):
        token["content"] = name
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    moved = embedding.clone()
    for token in codes:
        moved[token["id"]] = embedding[before[token["content"]]]
    save_file(weights | {"model.embed_tokens.weight": moved}, folder / "model.safetensors")
    lm = load_language_model(folder, 512)
    assert lm.tokens.code_ids.tolist() != sorted(lm.tokens.code_ids.tolist())
    learnt = [case for case in lm_golden["greedy"] if case["margin"] > 1]  # no matter of the order of sums
    written = [case for case in learnt if case["kind"].startswith("codes")]
    heard = [case for case in learnt if case["kind"].startswith("understand")]
    assert (len(written), len(heard)) == (2, 2)
    for case in written:
        sampling = Sampling(temperature=0, guidance=case["settings"]["cfg_scale"])
        assert code_text(write_codes(lm, *asked(case), 10.0, sampling)) == case["audio_codes"]
    for case in heard:
        question = next(u for u in lm_golden["understand"] if u["prompt"] == case["prompt"])
        assert understand(lm, question["codes"], GREEDY)[1] == case["raw"]


def test_a_code_that_the_dit_does_not_know_is_not_written(lm_checkpoints, lm_golden):
    """Real tokenizers have 65,535 codes, real DiTs 64,000."""
    lm = load_language_model(lm_checkpoints / "acestep-5Hz-lm-0.6B", 60)
    [case, *_] = [case for case in lm_golden["greedy"] if case["kind"].startswith("codes")]
    codes = write_codes(lm, *asked(case), 10.0, GREEDY)
    assert len(codes) == 50
    assert max(codes) < 60 < len(lm.tokens.all_code_ids)


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (5, 4, 3), (7, 2)])
def test_codes_of_any_codebook_become_hints_by_the_formula(levels, tmp_path, lm_home):
    name = "acestep-v15-512-codes"
    for part in (name, "vae", "Qwen3-Embedding-0.6B"):
        shutil.copytree(lm_home / part, tmp_path / part)
    said = json.loads((tmp_path / name / "config.json").read_text("utf-8")) | {"fsq_input_levels": list(levels)}
    (tmp_path / name / "config.json").write_text(json.dumps(said), "utf-8")
    weights, generator = load_file(tmp_path / name / "model.safetensors"), torch.Generator().manual_seed(len(levels))
    projections = {"project_in.weight": (len(levels), 32), "project_in.bias": (len(levels),)}
    projections["project_out.weight"] = (32, len(levels))
    for part, shape in projections.items():
        weights[f"tokenizer.quantizer.{part}"] = torch.randn(shape, generator=generator)
    save_file(weights, tmp_path / name / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, name)
    number = math.prod(levels)
    assert codebook_size(checkpoint) == number
    tokenizer, detokenizer = checkpoint.load_audio_tokenizer(), checkpoint.load_audio_detokenizer()
    codes = [0, 1, number // 2, number - 2, number - 1]
    values = []
    for code in codes:
        digits = [code // math.prod(levels[:k]) % level for k, level in enumerate(levels)]
        values.append([2 * digit / (level - 1) - 1 for digit, level in zip(digits, levels, strict=True)])
    out, bias = weights["tokenizer.quantizer.project_out.weight"], weights["tokenizer.quantizer.project_out.bias"]
    quantized = torch.tensor(values) @ out.T + bias
    with torch.inference_mode():
        assert_golden(hints_of_codes(tokenizer, detokenizer, codes), detokenizer(quantized[None]))
    alone = [hints_of_codes(tokenizer, detokenizer, [code]) for code in codes]
    assert_golden(hints_of_codes(tokenizer, detokenizer, codes), torch.cat(alone, dim=1))
    assert torch.equal(hints_of_codes(tokenizer, detokenizer, [number + 9]), alone[-1])
