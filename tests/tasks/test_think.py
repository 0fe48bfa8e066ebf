"""sample --think: language model, codes, hints, DiT, with either or both adapters, and what is said of it."""

import gc
import json
import shutil
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import COVER, Prompt, encode_texts, hints_of_codes
from sidestep.acestep.device import GIB, GpuMemory
from sidestep.acestep.lm.decoding import Sampling, write_codes
from sidestep.acestep.lm.model import LanguageModel
from sidestep.acestep.lm.prompts import plan_text
from sidestep.adapters.attach import attach
from sidestep.adapters.write import Card, save_final, save_language_adapter
from sidestep.cli.main import main
from sidestep.errors import ExitStatus, UserError
from sidestep.events import Decision, Progress, Table, null
from sidestep.settings.config import SampleConfig, TrainConfig
from sidestep.settings.option import options_of
from sidestep.tasks import think as module
from sidestep.tasks.plan.plan import check_sample, fit_into
from sidestep.tasks.sample import open_sampler, sample, sampling_for, thinking_of
from sidestep.tasks.think import hints_for
from sidestep.tasks.train.previews import previews_for
from sidestep.tasks.train.setup import train
from tests.acestep.lm.test_decoding import GREEDY
from tests.conftest import assert_golden
from tests.tasks.plan.test_plan import card  # noqa: F401  a fixture
from tests.tasks.train.test_language import VARIANT, write_songs
from tests.training_world import prepared, settings, write_data

CPU = torch.device("cpu")
MODEL = "acestep-5Hz-lm-0.6B"
KNOWN = {"bpm": 120, "keyscale": "A minor", "timesignature": "4"}  # with a length they need no plan


def config(home: Path, output: Path, **changes) -> SampleConfig:
    values = {"checkpoint_dir": home, "model_variant": VARIANT, "output": output, "device": "cpu", "prompt": "techno"}
    return SampleConfig(**values | {"duration": 2.0, "steps": 1, "think": True, "strength": (0.0,)} | changes)


def made(asked: SampleConfig, report=null) -> tuple[np.ndarray, dict]:
    """(audio [S, 2] of the last strength, what stands beside it)."""
    path = sample(asked, report)[-1]
    return soundfile.read(path, dtype="float32")[0], json.loads(path.with_suffix(".json").read_text("utf-8"))


@torch.no_grad()
def changed(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, lm_home) -> dict[str, Path]:
    """An adapter of each model that does something, as training leaves them."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = TrainConfig(
        checkpoint_dir=lm_home, dataset_dir=folder, output_dir=folder, rank=4, alpha=8.0, attention_type="self"
    )
    lm = module.load_language_model(lm_home / MODEL, 512)
    save_language_adapter(changed(attach(lm.model.model, settings)), folder / "lm", None, Card(base_model=MODEL))
    dit = changed(attach(open_checkpoint(lm_home, VARIANT).load_decoder(), settings))
    save_final(dit, folder / "dit", settings, None, Card(base_model=VARIANT))
    return {"lm": folder / "lm", "dit": folder / "dit"}


def test_the_dit_follows_the_codes_that_the_language_model_wrote(tmp_path, lm_home, tiny_lm):
    asked = config(lm_home, tmp_path, seed=7, lm_temperature=3.0, lm_top_p=1.0, **KNOWN)
    audio, said = made(asked)
    plan = plan_text({"bpm": 120, "duration": 2, "keyscale": "A minor", "timesignature": "4"})
    codes = write_codes(tiny_lm, "techno", "[Instrumental]", plan, 2.0, Sampling(seed=7, temperature=3.0, top_p=1.0))
    assert said["composed"]["codes"] == codes
    assert len(codes) == 10
    checkpoint = open_checkpoint(lm_home, VARIANT)
    hints = hints_of_codes(checkpoint.load_audio_tokenizer(), checkpoint.load_audio_detokenizer(), codes)
    prompt = Prompt(caption="techno", duration=2.0, seed=7, **KNOWN)
    [conditions] = encode_texts(checkpoint, [prompt.text_for(False, COVER)], CPU, torch.float32)
    sampling = sampling_for(checkpoint.variant, steps=1)
    decoder = checkpoint.load_decoder()
    sampler = open_sampler(checkpoint, decoder, CPU, torch.float32, sampling, offload=False)
    contexts = []
    decoder.register_forward_pre_hook(
        lambda _, __, inputs: contexts.append(inputs["context_latents"]), with_kwargs=True
    )
    expected = sampler.audio(sampler.latents(prompt, conditions.states, hints), prompt)
    np.testing.assert_allclose(audio, expected.T, atol=1e-4)  # as 24 bits hold it
    [context] = contexts
    silence = checkpoint.silence_latent()
    assert context.shape[1] == 128
    assert torch.equal(context[:, :50, :8], hints)
    assert torch.equal(context[:, 50:, :8], silence[:, 50:128])  # what the codes do not reach
    without, plain = made(config(lm_home, tmp_path / "without", seed=7, think=False, **KNOWN))
    assert "composed" not in plain
    assert np.abs(without - audio).max() > 1e-3


def test_a_velocity_under_hints_is_that_of_the_original(lm_home, lm_golden, lm_numbers, golden_time_table):
    facts = lm_golden["hints"][1]
    expected = {key.rsplit(".", 1)[1]: value for key, value in lm_numbers.items() if f".{facts['checkpoint']}." in key}
    checkpoint = open_checkpoint(lm_home, facts["checkpoint"])
    user = facts["text"].partition("# Caption\n")[2].partition("\n\n")[0]
    lyrics = facts["lyric"].partition("# Lyric\n")[2].removesuffix("<|endoftext|>")
    prompt = Prompt(
        caption=user, lyrics=lyrics, language="en", bpm=84, keyscale="D minor", timesignature="4", duration=2.4
    )
    [conditions] = encode_texts(checkpoint, [prompt.text_for(False, COVER)], CPU, torch.float32)
    assert_golden(conditions.states, expected["encoder_hidden_states"])
    hints = hints_of_codes(checkpoint.load_audio_tokenizer(), checkpoint.load_audio_detokenizer(), facts["codes"])
    sampling = sampling_for(checkpoint.variant)
    sampler = open_sampler(checkpoint, checkpoint.load_decoder(), CPU, torch.float32, sampling, offload=False)
    with torch.inference_mode():
        found = sampler.velocity(expected["noise"], expected["t"], conditions.states, hints)
    assert_golden(found, expected["velocity"])


@pytest.mark.slow
def test_either_adapter_and_both_are_heard(tmp_path, lm_home, adapters):
    heard, codes = {}, {}
    for name, changes in {
        "none": {},
        "lm": {"lm_adapter": adapters["lm"]},
        "lm at 0": {"lm_adapter": adapters["lm"], "lm_strength": 0.0},
        "dit": {"adapter": adapters["dit"], "strength": (1.0,)},
        "both": {"adapter": adapters["dit"], "strength": (1.0,), "lm_adapter": adapters["lm"]},
    }.items():
        audio, said = made(config(lm_home, tmp_path / name, **KNOWN, **changes))
        heard[name], codes[name] = audio.tobytes(), said["composed"]["codes"]
    assert codes["none"] == codes["dit"] == codes["lm at 0"] != codes["lm"] == codes["both"]
    assert heard["none"] == heard["lm at 0"]
    assert len(set(heard.values())) == 4


def test_an_adapter_of_the_language_model_writes_what_peft_writes_with_it(tmp_path, lm_home, adapters, tiny_lm):
    _, said = made(config(lm_home, tmp_path, lm_adapter=adapters["lm"], lm_temperature=0.0, **KNOWN))
    base = Qwen3ForCausalLM.from_pretrained(lm_home / MODEL, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapters["lm"]).eval()
    lm = LanguageModel(lm_home / MODEL, adapted, tiny_lm.tokens)
    plan = plan_text({"bpm": 120, "duration": 2, "keyscale": "A minor", "timesignature": "4"})
    greedy = replace(GREEDY, guidance=2.0)
    assert said["composed"]["codes"] == write_codes(lm, "techno", "[Instrumental]", plan, 2.0, greedy)
    assert (said["composed"]["model"], said["composed"]["strength"]) == (MODEL, 1.0)


@pytest.mark.slow
def test_what_it_wrote_is_shown_and_told_to_the_dit(tmp_path, lm_home, lm_golden):
    case = lm_golden["plan"][0]
    events = []
    asked = config(lm_home, tmp_path, prompt=case["caption"], lyrics=case["lyrics"], duration=0.0, lm_temperature=0.0)
    _, said = made(replace(asked, rewrite_caption=True), events.append)
    assert said["composed"]["wrote"] == case["metadata"]
    told = said["prompt"]
    assert (told["caption"], told["bpm"], told["keyscale"]) == (case["metadata"]["caption"], 84, "D minor")
    assert (told["duration"], told["timesignature"], told["language"]) == (12.0, "4", "unknown")
    [table] = [event for event in events if isinstance(event, Table)]
    assert ("caption", case["metadata"]["caption"]) in table.rows
    assert ("codes", "60, for 12 s") in table.rows
    _, said = made(replace(asked, output=tmp_path / "own"))  # by default the caption stays the user's
    assert said["prompt"]["caption"] == case["caption"]
    assert "caption" not in said["composed"]["wrote"]
    assert {"bpm", "duration", "keyscale", "language", "timesignature"} == set(said["composed"]["wrote"])


def test_what_the_user_says_is_not_written_otherwise(tmp_path, lm_home, lm_golden):
    case = lm_golden["plan"][0]
    asked = config(lm_home, tmp_path, prompt=case["caption"], lyrics=case["lyrics"], lm_temperature=0.0)
    _, said = made(replace(asked, bpm=91, keyscale="E minor", language="fr"))
    wrote = said["composed"]["wrote"]
    assert (wrote["bpm"], wrote["keyscale"], wrote["language"], wrote["duration"]) == (91, "E minor", "fr", 2)
    told = said["prompt"]
    assert (told["bpm"], told["keyscale"], told["language"], told["duration"]) == (91, "E minor", "fr", 2.0)
    assert len(said["composed"]["codes"]) == 10


def test_it_draws_as_the_app_does():
    values = {name: option.default for name, option in options_of(SampleConfig).items()}
    drawn = thinking_of(SampleConfig(checkpoint_dir=Path(), prompt="x")).sampling
    assert drawn == Sampling(temperature=0.85, top_k=0, top_p=0.9, repetition_penalty=1.0, guidance=2.0, negative="")
    assert (values["think"], values["rewrite_caption"], values["lm_strength"]) == (False, False, 1.0)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_language_model_is_gone_before_the_dit_is_loaded(tmp_path, lm_home, adapters, monkeypatch, with_adapter):
    alive, at = [], {}
    load = module.load_language_model

    def remembered(*arguments):
        lm = load(*arguments)
        alive.append(weakref.ref(lm.model.model.embed_tokens.weight))
        return lm

    monkeypatch.setattr(module, "load_language_model", remembered)

    def watched(name):
        own = getattr(Checkpoint, name)

        def call(*arguments):
            at[name] = [ref() is not None for ref in alive]
            return own(*arguments)

        return call

    for name in ("load_audio_tokenizer", "load_text_encoder", "load_decoder"):
        monkeypatch.setattr(Checkpoint, name, watched(name))
    gc.disable()
    try:
        made(config(lm_home, tmp_path, lm_adapter=adapters["lm"] if with_adapter else None, **KNOWN))
    finally:
        gc.enable()
    assert at == {"load_audio_tokenizer": [False], "load_text_encoder": [False], "load_decoder": [False]}


WRONG = [
    ({"think": False, "duration": 0.0}, "--duration 0: only a composer", "--think"),
    ({"think": False, "lm_adapter": Path("x")}, "--lm-adapter: nothing is composed", "--think"),
    ({"lm": "4B"}, "--lm 4B: this language model was not found", "acestep-5Hz-lm-4B"),
]


@pytest.mark.parametrize(("changes", "said", "fix"), WRONG)
def test_a_wrong_call_is_told_what_is_wrong(tmp_path, lm_home, changes, said, fix):
    with pytest.raises(UserError, match=said) as caught:
        sample(config(lm_home, tmp_path / "out", **changes), null)
    assert fix in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_adapters_in_each_other_s_place_are_told_apart(tmp_path, lm_home, adapters):
    with pytest.raises(UserError, match=f"language model {MODEL}") as caught:
        sample(config(lm_home, tmp_path, adapter=adapters["lm"]), null)
    assert "--think --lm-adapter" in caught.value.fix
    with pytest.raises(UserError, match=f"--lm-adapter .*: was not trained on a language model but on {VARIANT}"):
        sample(config(lm_home, tmp_path, lm_adapter=adapters["dit"]), null)
    training = TrainConfig(
        checkpoint_dir=lm_home,
        model_variant=VARIANT,
        dataset_dir=tmp_path,
        output_dir=tmp_path,
        preview_prompt="x",
        preview_think=True,
        preview_adapter=adapters["dit"],
    )
    device = torch.device("cpu")
    with pytest.raises(UserError, match="--preview-adapter .*: was not trained on a language model"):
        previews_for(training, open_checkpoint(lm_home, VARIANT), (), device, torch.float32, null)


def test_each_setting_of_the_composer_reaches_it(tmp_path):
    drawing = {"lm_temperature": 0.5, "lm_top_p": 0.8, "lm_guidance": 3.0, "lm_negative": "noise"}
    typed = {"lm": "0.6B", "lm_adapter": tmp_path, "lm_strength": 0.4, "rewrite_caption": True}
    asked = config(tmp_path, tmp_path, base_precision="int8", **typed, **drawing)
    found = asdict(thinking_of(asked))
    drawn = found.pop("sampling")
    assert {f"lm_{name}": drawn[name] for name in ("temperature", "top_p", "guidance", "negative")} == drawing
    assert found == {
        "lm": "0.6B",
        "adapter": tmp_path,
        "flag": "--lm-adapter",
        "strength": 0.4,
        "rewrites": True,
        "base_precision": "int8",
    }


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_composers_adapter_writes_at_the_strength_that_is_typed(tmp_path, lm_home, adapters, strength):
    typed = {"lm_adapter": adapters["lm"], "lm_strength": strength}
    _, plain = made(config(lm_home, tmp_path / "plain"))
    _, changed_one = made(config(lm_home, tmp_path / "changed", **typed))
    assert (plain["composed"]["codes"] == changed_one["composed"]["codes"]) == (strength == 0.0)


def test_the_composer_is_kept_in_as_many_bits_as_are_typed(tmp_path, lm_home, monkeypatch):
    load, asked = module.load_language_model, []
    monkeypatch.setattr(module, "load_language_model", lambda *how: asked.append(how[4]) or load(*how))
    made(config(lm_home, tmp_path / "out", base_precision="int8"))
    data = write_data(tmp_path / "data")
    changes = {"preview_prompt": "x", "preview_think": True, "preview_duration": 1.0, "base_precision": "nf4"}
    prepared(settings(data, tmp_path / "run", checkpoint_dir=lm_home, model_variant=VARIANT, **changes))
    assert asked == ["int8", "nf4"]


def test_loading_the_language_model_is_told(tmp_path, lm_home, monkeypatch):
    monkeypatch.setattr("sidestep.acestep.weights.quiet_seconds", lambda _: 0.0)
    told = []
    made(config(lm_home, tmp_path), told.append)
    loaded = [e for e in told if isinstance(e, Progress) and e.task == "Loading the language model"]
    assert [loaded[0].done, loaded[-1].done] == [0, loaded[-1].total]


def test_the_command_thinks(tmp_path, lm_home, capsys):
    command = ["sample", "--checkpoint-dir", str(lm_home), "--model-variant", VARIANT, "--device", "cpu"]
    typed = ["--prompt", "techno", "--duration", "1", "--steps", "1", "--think", "--bpm", "120", "--keyscale", "Am"]
    status = main([*command, *typed, "--timesignature", "4", "--strength", "0", "--output", str(tmp_path)])
    assert status == ExitStatus.OK
    out = capsys.readouterr().out
    assert "composer" in out
    assert 'Composed for "techno"' in out
    assert list(tmp_path.glob("*.flac"))


def test_the_gate_knows_that_the_larger_of_the_two_decides(lm_home, tmp_path, card, monkeypatch):  # noqa: F811
    asked, told = config(lm_home, tmp_path), []
    monkeypatch.setattr("sidestep.tasks.plan.plan.preview_peak", lambda *_: GIB)  # known to other tests, and slow
    monkeypatch.setattr("sidestep.tasks.plan.plan.Planner.peak", lambda *_: SimpleNamespace(weights=GIB))
    card(8 * GIB)
    check_sample(replace(asked, think=False), told.append)
    check_sample(asked, told.append)
    monkeypatch.setattr("sidestep.tasks.plan.plan.writing_bytes", lambda *_: 7 * GIB)
    check_sample(asked, told.append)
    without, small, large = [event.value for event in told if isinstance(event, Decision)]
    assert without == small != large
    monkeypatch.setattr("sidestep.tasks.plan.plan.writing_bytes", lambda *_: 9 * GIB)
    check_sample(replace(asked, think=False), told.append)
    with pytest.raises(UserError, match="would run out of memory") as caught:
        check_sample(asked, told.append)
    assert "--lm 0.6B" in caught.value.fix


@pytest.mark.slow
def test_models_that_play_a_song_play_the_same_one_which_is_composed_once(tmp_path, lm_home, capsys, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(lm_home, home)
    other = home / "acestep-v15-base"
    shutil.copytree(home / VARIANT, other)
    weights = load_file(other / "model.safetensors")
    moved = {name: weight * 1.5 for name, weight in weights.items() if name.startswith("detokenizer.")}
    save_file(weights | moved, other / "model.safetensors")
    hints = []
    monkeypatch.setattr("sidestep.tasks.sample.hints_for", lambda *a: hints.extend(hints_for(*a)) or hints[-1:])
    command = ["sample", "--checkpoint-dir", str(home), "--model-variant", VARIANT, "--device", "cpu"]
    typed = ["--prompt", "techno", "--duration", "1", "--steps", "1", "--think", "--bpm", "120", "--keyscale", "Am"]
    command += [*typed, "--timesignature", "4", "--preview-variant", VARIANT, "base", "--strength", "0"]
    assert main([*command, "--output", str(tmp_path / "out")]) == ExitStatus.OK
    assert capsys.readouterr().out.count("Composed for") == 1
    made = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "out").glob("*.json")]
    assert {said["checkpoint"] for said in made} == {VARIANT, "acestep-v15-base"}
    assert made[0]["composed"] == made[1]["composed"]
    assert len({path.read_bytes() for path in (tmp_path / "out").glob("*.flac")}) == 2
    assert not torch.equal(*hints)  # each model has its own idea of the codes


@pytest.mark.slow
def test_previews_of_a_training_follow_what_the_composer_wrote_before_it(tmp_path, lm_home, adapters):
    data = write_songs(tmp_path / "data", 1)
    values = {"checkpoint_dir": lm_home, "model_variant": VARIANT, "dataset_dir": data, "device": "cpu", "rank": 2}
    values |= {"epochs": 1, "lr": 1e-2, "log_every": 1, "max_steps": 2}
    train(TrainConfig(**values, output_dir=tmp_path / "without"), null)
    heard = {"preview_prompt": "techno", "preview_duration": 1.0, "preview_think": True}
    told = []
    run = TrainConfig(**values, output_dir=tmp_path / "run", preview_adapter=adapters["lm"], **heard)
    train(run, told.append)
    same = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("without", "run")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[1])
    assert len([table for table in told if isinstance(table, Table) and "Composed for" in table.title]) == 1
    asked = config(lm_home, tmp_path / "sample", duration=1.0, steps=None, lm_adapter=adapters["lm"])
    final = replace(asked, adapter=tmp_path / "run" / "final", strength=(0.0, 1.0))
    base, now = sample(final, null)
    folder = tmp_path / "run" / "previews"
    assert (folder / "base" / "01-techno.flac").read_bytes() == base.read_bytes()
    [audio] = [path for path in folder.rglob("*.flac") if path.parent.name != "base"]
    assert audio.read_bytes() == now.read_bytes() != base.read_bytes()
    said, expected = (json.loads(path.with_suffix(".json").read_text("utf-8")) for path in (audio, now))
    assert said["composed"] == expected["composed"]
    assert "What the composer wrote" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_thinking_before_previews_is_refused_where_the_language_model_cannot_fit(tmp_path, lm_home, monkeypatch):
    planned = TrainConfig(
        **{"checkpoint_dir": lm_home, "model_variant": VARIANT, "dataset_dir": write_songs(tmp_path, 1)},
        **{"output_dir": tmp_path / "run", "rank": 2, "preview_prompt": "techno", "preview_think": True},
    )
    monkeypatch.setattr("sidestep.tasks.plan.plan.writing_bytes", lambda *_: 9 * GIB)
    with pytest.raises(UserError, match="--preview-think: the language model needs"):
        fit_into(GpuMemory(8 * GIB, "a card"), planned, null)

    def reached(*_):
        raise LookupError

    monkeypatch.setattr("sidestep.tasks.plan.plan.require_ram", reached)  # behind the check; it takes seconds
    for changes in ({"preview_think": False}, {"preview_prompt": ""}, {"even_if_it_does_not_fit": True}):
        with pytest.raises(LookupError):
            fit_into(GpuMemory(8 * GIB, "a card"), replace(planned, **changes), null)
    with pytest.raises(LookupError):
        fit_into(GpuMemory(16 * GIB, "a card"), planned, null)


def test_the_gate_counts_the_size_that_the_adapter_was_trained_on(tmp_path, lm_home, adapters, card, monkeypatch):  # noqa: F811
    home = tmp_path / "home"
    shutil.copytree(lm_home, home)
    own = home / "acestep-5Hz-lm-1.7B"
    shutil.copytree(home / MODEL, own)
    said = json.loads((own / "config.json").read_text("utf-8"))
    (own / "config.json").write_text(json.dumps(said | {"hidden_size": 4711}), "utf-8")
    widths = []
    monkeypatch.setattr(
        "sidestep.tasks.plan.plan.writing_bytes", lambda sizes, *_: widths.append(sizes["hidden_size"]) or 9 * GIB
    )
    monkeypatch.setattr("sidestep.tasks.plan.plan.preview_peak", lambda *_: GIB)
    monkeypatch.setattr("sidestep.tasks.plan.plan.Planner.peak", lambda *_: SimpleNamespace(weights=GIB))
    card(8 * GIB)
    planned = TrainConfig(
        **{"checkpoint_dir": home, "model_variant": VARIANT, "dataset_dir": write_songs(tmp_path / "data", 1)},
        **{"output_dir": tmp_path / "run", "rank": 2, "preview_prompt": "techno", "preview_think": True},
    )
    for adapter in (None, adapters["lm"]):
        with pytest.raises(UserError, match="would run out of memory"):
            check_sample(config(home, tmp_path, lm_adapter=adapter), null)
        with pytest.raises(UserError, match="--preview-think: the language model needs"):
            fit_into(GpuMemory(8 * GIB, "a card"), replace(planned, preview_adapter=adapter), null)
    assert widths == [4711, 4711, 64, 64]
    with pytest.raises(UserError, match="would run out of memory"):
        check_sample(config(home, tmp_path, lm="1.7B", lm_adapter=adapters["lm"]), null)
    assert widths[-1] == 4711  # what was typed counts


def test_a_model_of_other_codes_is_not_given_a_composed_song(tmp_path, lm_home, checkpoints):
    home = tmp_path / "home"
    shutil.copytree(lm_home, home)
    shutil.copytree(checkpoints / "acestep-v15-turbo", home / "acestep-v15-turbo")
    with pytest.raises(UserError, match=r"--preview-variant turbo: knows 64,000 codes, and .* 512"):
        sample(config(home, tmp_path / "out", preview_variant=(VARIANT, "turbo")), null)
