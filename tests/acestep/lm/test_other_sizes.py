"""The language model in other sizes and of other seeds, against transformers' own class and a computation by hand."""

import shutil

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sidestep.acestep.lm.decoding import Sampling, write_codes
from sidestep.acestep.lm.loss import answer_loss
from sidestep.acestep.lm.model import load_language_model
from sidestep.acestep.lm.prompts import codes_prompt, negative_prompt, plan_text

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
