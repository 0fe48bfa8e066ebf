"""The checkpoint's parts give the original code's numbers."""

import shutil

import pytest
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import (
    LYRIC_TOKENS,
    TEXT_TOKENS,
    context_latents,
    cover_hints,
    embed_lyrics,
    encode_conditions,
    encode_text,
    hints_of_codes,
    lyric_prompt,
    text_prompt,
    tiled_silence,
    token_ids,
)
from sidestep.acestep.vae import decode, encode_mean
from sidestep.acestep.weights import Weights
from tests.conftest import assert_golden, golden_audio

CASES = (0, 1)


@pytest.fixture(scope="module")
def vae(checkpoints):
    return open_checkpoint(checkpoints, "turbo").load_vae()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile_frames", [0, 8, 13])
def test_vae_mean_equals_the_original_in_tiles_and_in_one_piece(vae, golden, golden_cases, case, tile_frames):
    audio = torch.from_numpy(golden_audio(case, golden_cases[case]["seconds"]))[None]
    assert_golden(encode_mean(vae, audio, tile_frames), golden[1][f"{case}.latent_mean"])


@pytest.mark.parametrize(("device", "tiles"), [("cpu", [132, 139, 57]), ("meta", [300])])
def test_a_cpu_encodes_in_smaller_tiles(checkpoints, device, tiles, monkeypatch):
    """Of 125 frames and 7 of each neighbour; elsewhere 500 frames are one."""
    vae, heard = open_checkpoint(checkpoints, "turbo").load_vae().to(device), []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda audio: (heard.append(audio.shape[-1] // 1920), encode(audio))[1])
    encode_mean(vae, torch.zeros(1, 2, 300 * 1920, device=device))
    assert heard == tiles


def test_decoding_in_tiles_equals_decoding_in_one_piece(vae):
    latents = torch.randn(1, 90, vae.config.decoder_input_channels, generator=torch.Generator().manual_seed(0))
    assert_golden(decode(vae, latents, 20), decode(vae, latents, 0))


@pytest.mark.parametrize("case", CASES)
def test_token_ids_and_conditions_equal_the_original(checkpoints, golden, golden_cases, case):
    folder, expected = golden
    facts = golden_cases[case]
    checkpoint = open_checkpoint(checkpoints, folder)
    text_encoder, tokenizer = checkpoint.load_text_encoder()
    text = text_prompt(
        facts["caption"],
        bpm=facts["bpm"],
        timesignature=facts["timesignature"],
        keyscale=facts["keyscale"],
        duration=facts["duration"],
    )
    lyric = lyric_prompt(facts["lyrics"], facts["language"])
    assert (text, lyric) == (facts["text"], facts["lyric"])
    text_ids, text_lost = token_ids(tokenizer, text, TEXT_TOKENS)
    lyric_ids, lyric_lost = token_ids(tokenizer, lyric, LYRIC_TOKENS)
    assert text_lost == lyric_lost == 0
    assert text_ids.tolist() == expected[f"{case}.text_ids"].tolist()
    assert lyric_ids.tolist() == expected[f"{case}.lyric_ids"].tolist()
    states = encode_conditions(
        checkpoint.load_condition_encoder(),
        encode_text(text_encoder, text_ids),
        embed_lyrics(text_encoder, lyric_ids),
        checkpoint.silence_latent()[:, : checkpoint.timbre_frames],
    )
    assert_golden(states, expected[f"{case}.encoder_hidden_states"])


# where an overflow is put into the tiny checkpoint
OVERFLOWS = {
    "first MLP of the lyrics": "encoder.lyric_encoder.layers.0.mlp.down_proj.weight",
    "last MLP of the lyrics": "encoder.lyric_encoder.layers.1.mlp.down_proj.weight",
    "attention of the lyrics": "encoder.lyric_encoder.layers.0.self_attn.o_proj.weight",
    "residual stream of the lyrics": "encoder.lyric_encoder.embed_tokens.weight",
    "text projection": "encoder.text_projector.weight",
    "timbre encoder": "encoder.timbre_encoder.layers.0.mlp.down_proj.weight",
    "text encoder": "layers.0.mlp.down_proj.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("tensor", OVERFLOWS.values(), ids=OVERFLOWS)
def test_what_leaves_the_range_of_fp16_before_the_dit_keeps_its_conditions(checkpoints, golden, monkeypatch, tensor):
    """As trained weights do in the lyric encoder (505,000). Not compared with the goldens: the weights differ."""
    folder, expected = golden
    largest, read, changed = [], Weights.read, []

    def read_large(weights, keys, dtype, device, **how):
        for key, value in read(weights, keys, dtype, device, **how):
            is_it = key.removeprefix("model.") == tensor
            changed.extend([key] * is_it)
            yield key, value.sign() * 1e7 if is_it else value

    monkeypatch.setattr(Weights, "read", read_large)

    def conditions(dtype: torch.dtype) -> torch.Tensor:
        checkpoint = open_checkpoint(checkpoints, folder)
        text_encoder, _ = checkpoint.load_text_encoder(dtype=dtype)
        encoder = checkpoint.load_condition_encoder(dtype=dtype)
        for module in (*text_encoder.modules(), *encoder.modules()):
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _module, _inputs, out: largest.append(out.abs().max().item()))
        text = encode_text(text_encoder, expected["0.text_ids"])
        lyrics = embed_lyrics(text_encoder, expected["0.lyric_ids"])
        silence = checkpoint.silence_latent()[:, : checkpoint.timbre_frames]
        return encode_conditions(encoder, text, lyrics, silence).float()

    exact = conditions(torch.float32)
    assert changed
    assert max(largest) > torch.finfo(torch.float16).max
    torch.testing.assert_close(conditions(torch.float16), exact)


@pytest.mark.parametrize("case", CASES)
def test_velocity_and_null_condition_equal_the_original(checkpoints, golden, golden_time_table, case):
    folder, expected = golden
    checkpoint = open_checkpoint(checkpoints, folder)
    decoder = checkpoint.load_decoder()
    latents, noise, t = (expected[f"{case}.{name}"] for name in ("latent_mean", "noise", "t"))
    context = context_latents(tiled_silence(checkpoint.silence_latent(), latents.shape[1]))
    assert_golden(context, expected[f"{case}.context_latents"])
    noisy = t[:, None, None] * noise + (1 - t[:, None, None]) * latents
    conditions = expected[f"{case}.encoder_hidden_states"]
    null = checkpoint.load_null_condition().expand_as(conditions)
    with torch.inference_mode():
        assert_golden(decoder(noisy, t, t, conditions, context, return_dict=False)[0], expected[f"{case}.velocity"])
        assert_golden(decoder(noisy, t, t, null, context, return_dict=False)[0], expected[f"{case}.velocity_null"])


@pytest.mark.parametrize("case", CASES)
def test_audio_codes_and_cover_hints_equal_the_original(checkpoints, golden, case):
    folder, expected = golden
    checkpoint = open_checkpoint(checkpoints, folder)
    codes, hints = cover_hints(
        checkpoint.load_audio_tokenizer(),
        checkpoint.load_audio_detokenizer(),
        expected[f"{case}.latent_mean"],
        checkpoint.silence_latent(),
    )
    assert codes.tolist() == expected[f"{case}.audio_codes"].tolist()
    assert_golden(hints, expected[f"{case}.cover_hints"])


@pytest.mark.parametrize("case", [0, 1])
def test_codes_become_hints_and_conditions_as_in_the_original(
    checkpoints, lm_checkpoints, lm_golden, lm_numbers, golden_time_table, tmp_path, case
):
    facts = lm_golden["hints"][case]
    name = facts["checkpoint"]
    home = (checkpoints if (checkpoints / name).is_dir() else lm_checkpoints) / name
    for part, source in ((name, home), *((p, checkpoints / p) for p in ("vae", "Qwen3-Embedding-0.6B"))):
        shutil.copytree(source, tmp_path / part)
    checkpoint = open_checkpoint(tmp_path, name)
    expected = {key.removeprefix(f"hints.{name}."): value for key, value in lm_numbers.items() if f".{name}." in key}
    tokenizer, detokenizer = checkpoint.load_audio_tokenizer(), checkpoint.load_audio_detokenizer()
    codes = torch.tensor(facts["codes"])
    assert_golden(tokenizer.quantizer.get_output_from_indices(codes[None, :, None]), expected["quantized"])
    hints = hints_of_codes(tokenizer, detokenizer, facts["codes"])
    assert_golden(hints, expected["hints"])
    last = tokenizer.quantizer.codebook_size - 1
    beyond = hints_of_codes(tokenizer, detokenizer, [last + 7, 65_534])
    assert torch.equal(beyond, hints_of_codes(tokenizer, detokenizer, [last, last]))
    again, _ = cover_hints(tokenizer, detokenizer, hints, checkpoint.silence_latent())
    assert again.tolist() == expected["codes_of_hints"].tolist()
    assert_golden(context_latents(hints), expected["context_latents"])

    text_encoder, text_tokenizer = checkpoint.load_text_encoder()
    text_ids, _ = token_ids(text_tokenizer, facts["text"], TEXT_TOKENS)
    lyric_ids, _ = token_ids(text_tokenizer, facts["lyric"], LYRIC_TOKENS)
    states = encode_conditions(
        checkpoint.load_condition_encoder(),
        encode_text(text_encoder, text_ids),
        embed_lyrics(text_encoder, lyric_ids),
        checkpoint.silence_latent()[:, : checkpoint.timbre_frames],
    )
    assert_golden(states, expected["encoder_hidden_states"])
    with torch.inference_mode():
        t = expected["t"]
        found = checkpoint.load_decoder()(expected["noise"], t, t, states, context_latents(hints), return_dict=False)[0]
    assert_golden(found, expected["velocity"])
