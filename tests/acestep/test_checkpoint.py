"""A checkpoint gives only the parts asked for, in both layouts, and says clearly what is wrong with a broken one."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestep.acestep import weights
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision
from sidestep.acestep.fused import FusedResidualUnit, FusedSnake
from sidestep.acestep.layout import TEXT_ENCODER_FOLDER, diffusers_key, original_key
from sidestep.errors import UserError
from sidestep.variants import detect, official_config

TURBO = "acestep-v15-turbo"


@pytest.fixture
def broken(checkpoints, tmp_path) -> Path:
    """A copy of the checkpoints that a test may damage."""
    return Path(shutil.copytree(checkpoints, tmp_path / "checkpoints"))


def load_everything(folder: Path, variant: str) -> None:
    checkpoint = open_checkpoint(folder, variant)
    checkpoint.load_decoder()
    checkpoint.load_condition_encoder()
    checkpoint.load_vae()
    checkpoint.load_text_encoder()


def test_training_reads_only_the_decoder_and_the_null_condition(checkpoints):
    checkpoint = open_checkpoint(checkpoints, "turbo")
    checkpoint.load_decoder()
    checkpoint.load_null_condition()
    assert {key.split(".")[0] for key in checkpoint.loaded_keys} == {"decoder", "null_condition_emb"}


def test_the_second_pass_reads_only_the_encoder(checkpoints):
    checkpoint = open_checkpoint(checkpoints, "xl-turbo")
    checkpoint.load_condition_encoder()
    assert {key.split(".")[0] for key in checkpoint.loaded_keys} == {"encoder", "null_condition_emb"}


def test_sharded_files_give_every_decoder_tensor(checkpoints):
    checkpoint = open_checkpoint(checkpoints, "xl-turbo")
    decoder = checkpoint.load_decoder()
    assert len(decoder.state_dict()) == sum(key.startswith("decoder.") for key in checkpoint.loaded_keys)
    assert not any(p.is_meta or p.requires_grad for p in decoder.parameters())


def test_keys_go_to_diffusers_names_and_back(checkpoints):
    for key in load_file(checkpoints / TURBO / "model.safetensors"):
        assert original_key(diffusers_key(key)) == key


def test_loading_casts_and_identity_follows_the_weights(broken):
    before, identity = open_checkpoint(broken, "turbo"), open_checkpoint(broken, "turbo").identity()
    assert next(before.load_decoder(dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert before.identity() == identity
    path = broken / TURBO / "model.safetensors"
    tensors = load_file(path)
    tensors["decoder.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, path)
    assert open_checkpoint(broken, "turbo").identity() != identity


@pytest.mark.parametrize(("prefix", "part"), [("decoder.", "transformer"), ("encoder.", "condition_encoder")])
def test_one_changed_value_anywhere_changes_the_identity_of_its_part_alone(broken, prefix, part):
    parts = ("transformer", "condition_encoder")
    before = {part: open_checkpoint(broken, "turbo").identity(part) for part in parts}
    path = broken / TURBO / "model.safetensors"
    tensors = load_file(path)
    largest = max((key for key in tensors if key.startswith(prefix)), key=lambda key: tensors[key].numel())
    tensors[largest].view(-1)[0] += 1e-3  # far from the middle
    save_file(tensors, path)
    after = {part: open_checkpoint(broken, "turbo").identity(part) for part in parts}
    assert {name for name in parts if after[name] != before[name]} == {part}


def test_large_files_are_read_once_and_again_when_they_change(broken, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "UNKEPT_BYTES", 0)
    path, read = broken / TURBO / "model.safetensors", []
    original = weights._digest
    monkeypatch.setattr(weights, "_digest", lambda *at: read.append(at) or original(*at))
    identity = open_checkpoint(broken, "turbo").identity()
    number = len(read)
    assert number > 0
    assert open_checkpoint(broken, "turbo").identity() == identity
    assert len(read) == number
    tensors = load_file(path)
    tensors["decoder.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, path)
    assert open_checkpoint(broken, "turbo").identity() != identity
    assert len(read) > number


def test_the_diffusers_layout_gives_the_same_numbers(checkpoints, golden, tmp_path):
    folder, expected = golden
    original = open_checkpoint(checkpoints, folder)
    encoder = original.load_condition_encoder()
    home = tmp_path / "diffusers"
    original.load_decoder().save_pretrained(home / "transformer")
    encoder.save_pretrained(home / "condition_encoder")
    original.load_vae().save_pretrained(home / "vae")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(checkpoints / "Qwen3-Embedding-0.6B", home / part)
    (home / "model_index.json").write_text("{}", encoding="utf-8")
    converted = open_checkpoint(home, "turbo")
    assert converted.variant.is_turbo
    assert converted.variant.is_xl == original.variant.is_xl
    torch.testing.assert_close(converted.silence_latent(), original.silence_latent())
    torch.testing.assert_close(converted.load_null_condition(), original.load_null_condition())
    noisy, t, conditions, context = (
        expected[f"0.{name}"].double() for name in ("noise", "t", "encoder_hidden_states", "context_latents")
    )
    with (
        torch.inference_mode()
    ):  # in double precision: mapped files differ in alignment, and with it in the order of sums
        theirs, ours = (
            c.load_decoder().double()(noisy, t, t, conditions, context, return_dict=False)[0]
            for c in (converted, original)
        )
        silence, order = original.silence_latent()[:, :750], torch.zeros(1, dtype=torch.long)
        timbre = [e.timbre_encoder(silence, order)[0] for e in (converted.load_condition_encoder(), encoder)]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(*timbre, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""], ids=["all in one", "model alone"])
def test_comfyuis_single_files_give_the_same_tensors(checkpoints, tmp_path, prefix):
    home = tmp_path / "comfyui"
    tensors = {prefix + key: tensor for key, tensor in load_file(checkpoints / TURBO / "model.safetensors").items()}
    if prefix:  # what else an all-in-one file holds is left alone
        tensors |= {
            "vae.decoder.conv1.weight": torch.ones(2, 2),
            "text_encoders.qwen3_06b.transformer.model.norm.weight": torch.ones(2),
        }
    home.mkdir()
    save_file(tensors, home / "aio.safetensors")
    with pytest.raises(UserError, match="do not fit its config.json|its config.json asks for"):
        open_checkpoint(home / "aio.safetensors", "turbo").load_decoder()  # a tiny model; the official turbo is larger
    with pytest.raises(UserError, match="put that model's config.json beside it as aio.json"):
        open_checkpoint(home / "aio.safetensors", "my-tune")
    shutil.copy(checkpoints / TURBO / "config.json", home / "aio.json")
    single, folder = open_checkpoint(home / "aio.safetensors", "turbo"), open_checkpoint(checkpoints, "turbo")
    for load in ("load_decoder", "load_null_condition"):
        ours, expected = getattr(single, load)(), getattr(folder, load)()
        if load == "load_decoder":
            ours, expected = ours.state_dict(), expected.state_dict()
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert {key.split(".")[0] for key in single.loaded_keys} == {"decoder", "null_condition_emb"}
    for load, message in [
        (single.load_vae, "The VAE was"),
        (single.load_text_encoder, "The text encoder was"),
        (single.silence_latent, "silence_latent.pt from any"),
    ]:
        with pytest.raises(UserError, match=message):
            load()
    for name in ("vae", "Qwen3-Embedding-0.6B"):
        shutil.copytree(checkpoints / name, home / name)
    shutil.copytree(checkpoints / TURBO, home / TURBO, ignore=lambda *_: ["model.safetensors", "config.json"])
    load_everything(home / "aio.safetensors", "turbo")
    assert torch.equal(open_checkpoint(home / "aio.safetensors", "turbo").silence_latent(), folder.silence_latent())


def pointer(home: Path) -> None:
    (home / TURBO / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8"
    )


def cut(home: Path) -> None:
    path = home / TURBO / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def reconfigure(**changes):
    def change(home: Path) -> None:
        path = home / TURBO / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def drop_key(home: Path) -> None:
    path = home / TURBO / "model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.norm_out.weight"]
    save_file(tensors, path)


def extra_key(home: Path) -> None:
    path = home / TURBO / "model.safetensors"
    save_file(load_file(path) | {"decoder.surprise.weight": torch.zeros(1)}, path)


def pickled_silence(home: Path) -> None:
    torch.save({"run": print}, home / TURBO / "silence_latent.pt")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (pointer, "Git LFS pointer"),
        (cut, "cut short"),
        (reconfigure(hidden_size=64), "has shape"),
        (reconfigure(num_hidden_layers=4, layer_types=None), "missing"),
        (drop_key, "1 missing (norm_out.weight)"),
        (extra_key, "1 unknown (surprise.weight)"),
        (pickled_silence, "not a plain tensor file"),
        (lambda home: (home / TURBO / "silence_latent.pt").unlink(), "silence_latent.pt is missing"),
        (lambda home: (home / TURBO / "config.json").write_text("{", encoding="utf-8"), "not readable as JSON"),
        (lambda home: (home / TURBO / "config.json").unlink(), "config.json is missing"),
        (lambda home: (home / TURBO / "model.safetensors").unlink(), "no weights here"),
        (lambda home: shutil.rmtree(home / "vae"), "The VAE was not found"),
        (lambda home: shutil.rmtree(home / "Qwen3-Embedding-0.6B"), "The text encoder was not found"),
    ],
)
def test_a_broken_checkpoint_gets_a_clear_message(broken, damage, said):
    damage(broken)
    with pytest.raises(UserError) as caught:
        load_everything(broken, "turbo")
    assert said in str(caught.value)
    assert caught.value.fix


def test_a_missing_shard_is_named(broken):
    (broken / "acestep-v15-xl-turbo" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        open_checkpoint(broken, "xl-turbo").load_decoder()


def test_a_shard_outside_its_folder_is_refused(broken):
    index = broken / "acestep-v15-xl-turbo" / "model.safetensors.index.json"
    facts = json.loads(index.read_text(encoding="utf-8"))
    facts["weight_map"] = {key: "../" + name for key, name in facts["weight_map"].items()}
    index.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match="outside its folder"):
        open_checkpoint(broken, "xl-turbo").load_decoder()


def test_a_missing_folder_lists_what_is_there_and_how_to_fetch_what_is_not(checkpoints, tmp_path):
    own = "uv run hf download ACE-Step/acestep-v15-sft --local-dir {}/acestep-v15-sft"
    with pytest.raises(UserError, match="--preview-variant sft: .*acestep-v15-turbo") as refused:
        open_checkpoint(checkpoints, "sft", flag="--preview-variant")
    download, other = refused.value.fix.split("\n")
    assert download == f"Download it: {own.format(checkpoints)}"
    assert other.startswith("Use one of them: --preview-variant ")
    with pytest.raises(UserError) as refused:
        open_checkpoint(checkpoints, "turbl")
    assert refused.value.fix.startswith("Did you mean turbo")
    released = "uv run hf download ACE-Step/Ace-Step1.5 --local-dir {}"
    with pytest.raises(UserError, match="no such folder") as refused:
        open_checkpoint(checkpoints.parent / "nowhere", "turbo")
    assert released.format(checkpoints.parent / "nowhere") in refused.value.fix
    assert "Folders beside it: checkpoints, golden" in refused.value.fix
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match="folders there: none") as refused:
        open_checkpoint(tmp_path, "base")  # the release first: it has what all models share
    assert refused.value.fix == f"Download it: {released.format(tmp_path)}"


@pytest.mark.parametrize("part", ["vae", TEXT_ENCODER_FOLDER])
def test_a_missing_part_that_all_models_share_is_fetched_with_the_release(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(UserError, match="was not found") as refused:
        load_everything(broken, "turbo")
    assert refused.value.fix == f"Download it: uv run hf download ACE-Step/Ace-Step1.5 --local-dir {broken}"


def test_code_that_a_checkpoint_brings_is_never_run(broken):
    for name in ("configuration_acestep_v15.py", "modeling_acestep_v15_turbo.py"):
        (broken / TURBO / name).write_text("raise SystemExit('run!')", encoding="utf-8")
    load_everything(broken, "turbo")


def test_the_text_encoder_of_a_whole_language_model_is_read(broken):
    clean, _ = open_checkpoint(broken, TURBO).load_text_encoder()
    path = broken / "Qwen3-Embedding-0.6B" / "model.safetensors"
    tensors = {f"model.{key}": tensor for key, tensor in load_file(path).items()}
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 32)}, path, {"format": "pt"})
    model, _ = open_checkpoint(broken, TURBO).load_text_encoder()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in clean.state_dict().items())


SOMEBODYS_CODE = {
    "auto_map": dict.fromkeys(("AutoModel", "AutoConfig", "AutoTokenizer"), "somebody/repository--code.Class"),
    "custom_pipelines": {"text": {"impl": "code.Class", "pt": ["AutoModel"]}},
    "_attn_implementation": "somebody/kernel",
    "attn_implementation": "somebody/kernel",
    "experts_implementation": "somebody/kernel",
    "_name_or_path": "somebody/repository",
    "base_model_name_or_path": "somebody/repository",
    "quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "somebody/kernel"},
    "architectures": ["SomebodysModel"],
    "model_type": "somebodys",
    "_class_name": "SomebodysModel",
    "tokenizer_class": "SomebodysTokenizer",
    "processor_class": "SomebodysProcessor",
    "vocab_file": "../../elsewhere/vocab.json",
    "tokenizer_file": "../../elsewhere/tokenizer.json",
    "chat_template": "{{ cycler.__init__.__globals__.os.system('touch run') }}",
    "use_kernels": True,
    "use_flash_attn": True,
    "device_map": "auto",
    "dtype": "somebodys",
}
CONFIGS = (
    f"{TURBO}/config.json",
    "vae/config.json",
    "Qwen3-Embedding-0.6B/config.json",
    "Qwen3-Embedding-0.6B/tokenizer_config.json",
    "Qwen3-Embedding-0.6B/adapter_config.json",  # transformers would load the base that it names instead
    "Qwen3-Embedding-0.6B/generation_config.json",
    "Qwen3-Embedding-0.6B/special_tokens_map.json",
    "vae/adapter_config.json",
)


@pytest.mark.parametrize(
    "field", [None, "_attn_implementation", "base_model_name_or_path", "quantization_config", "tokenizer_class"]
)
def test_no_config_names_code_kernels_or_other_files_to_be_read(broken, field):
    """field: one alone, since one may hide another; None for all at once."""
    clean = everything(broken)
    foreign = SOMEBODYS_CODE if field is None else {field: SOMEBODYS_CODE[field]}
    for name in CONFIGS:
        path = broken / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(config | foreign), encoding="utf-8")
    for folder in (TURBO, "vae", "Qwen3-Embedding-0.6B"):
        (broken / folder / "code.py").write_text("raise SystemExit('run!')", encoding="utf-8")
    opened, now = watched(lambda: everything(broken))
    assert all(torch.equal(now[name], tensor) for name, tensor in clean.items())
    assert {path for path in opened if not path.startswith(str(Path(torch.__file__).parents[1]))} <= {
        str(broken / name) for name in READ
    }


READ = (
    f"{TURBO}/config.json",
    f"{TURBO}/model.safetensors",
    f"{TURBO}/silence_latent.pt",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "Qwen3-Embedding-0.6B/config.json",
    "Qwen3-Embedding-0.6B/model.safetensors",
    "Qwen3-Embedding-0.6B/tokenizer.json",
)


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's parts, what its text encoder attends by, and the ids of a text."""
    checkpoint = open_checkpoint(folder, "turbo")
    text_encoder, tokenizer = checkpoint.load_text_encoder()
    assert text_encoder.config._attn_implementation == "sdpa"
    parts = {"decoder": checkpoint.load_decoder(), "encoder": checkpoint.load_condition_encoder()}
    parts |= {"vae": checkpoint.load_vae(), "text": text_encoder}
    found = {f"{part}.{name}": t for part, model in parts.items() for name, t in model.state_dict().items()}
    return found | {"ids": tokenizer("caption: one <|endoftext|>", return_tensors="pt").input_ids}


def watched(work):
    """(paths that `work` opens by Python's own means, its result)."""
    opened, original = [], io.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", lambda file, *a, **k: opened.append(str(file)) or original(file, *a, **k))
        patch.setattr("builtins.open", io.open)
        result = work()
    return opened, result


def test_the_folder_itself_may_be_given(checkpoints):
    checkpoint = open_checkpoint(checkpoints / TURBO, "turbo")
    assert checkpoint.folder.name == TURBO
    checkpoint.load_vae()


@pytest.mark.parametrize(
    ("config", "mode", "cfg_ratio"),
    [
        ({"is_turbo": True, "model_version": "turbo"}, "discrete", 0.0),
        ({"is_turbo": False, "model_version": "base"}, "logit-normal", 0.15),
        ({"is_turbo": False, "model_version": "my-finetune"}, "logit-normal", 0.15),
        ({"model_version": "turbo"}, "discrete", 0.0),
    ],
)
def test_the_variant_is_what_its_config_says(config, mode, cfg_ratio):
    variant = detect(config)
    assert (variant.timestep_mode, variant.cfg_ratio) == (mode, cfg_ratio)


@pytest.mark.parametrize(("variant", "parameters"), [("turbo", 1_575_458_880), ("xl-base", 4_168_897_088)])
def test_official_sizes_are_the_published_ones(variant, parameters):
    from diffusers import AceStepTransformer1DModel

    from sidestep.acestep.checkpoint import accepted

    with torch.device("meta"):
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, official_config(variant)))
    assert sum(p.numel() for p in decoder.parameters()) == parameters


def test_the_device_is_chosen_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = choose_device("auto")
    assert choice.reason
    assert choose_precision("auto", torch.device("cpu")).value == torch.float32
    with pytest.raises(UserError, match="sees no cuda device"):
        choose_device("cuda:1")
    with pytest.raises(UserError, match="no such device"):
        choose_device("gpu")


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_old_gpus_get_fp16_and_new_ones_bf16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if has_bf16 else (7, 5))
    assert choose_precision("auto", torch.device("cuda")).value == expected


def test_reading_and_packing_a_large_part_is_told_from_its_first_byte_to_its_last(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "UNKEPT_BYTES", 0)
    told: list = []
    checkpoint = open_checkpoint(checkpoints, "turbo", told.append)
    loads = {
        "Loading the transformer": lambda: checkpoint.load_decoder(),
        "Loading the transformer and packing it in int8": lambda: checkpoint.load_decoder(quantize="int8"),
        "Loading the text encoder": checkpoint.load_text_encoder,
        "Reading model.safetensors once, to know it again": checkpoint.identity,
    }
    for task, load in loads.items():
        told.clear()
        load()
        assert {event.task for event in told} == {task}
        assert (told[0].done, told[0].unit) == (0, "bytes")
        assert told[-1].done == told[-1].total > 0
    told.clear()
    monkeypatch.setattr(weights, "UNKEPT_BYTES", 1 << 30)
    checkpoint.load_decoder()
    assert told == []


@pytest.mark.parametrize(
    ("field", "value"), [("encoder_hidden_size", 128), ("decoder_input_channels", 64), ("encoder_hidden_size", "16")]
)
def test_a_vae_of_another_models_channels_is_refused(broken, field, value):
    file = broken / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    checkpoint = open_checkpoint(broken, "turbo")
    with pytest.raises(UserError, match=f"{field} {value}.*{TURBO} works on 8 channels"):
        checkpoint.load_vae()


def test_a_vae_that_only_encodes_has_the_same_encoder_and_no_decoder(checkpoints):
    whole, half = (open_checkpoint(checkpoints, "turbo").load_vae(to_encode=choice) for choice in (False, True))
    assert {FusedSnake, FusedResidualUnit} <= {type(module) for module in half.modules()}
    encoder = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith("encoder.")}
    assert half.state_dict().keys() == encoder.keys()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in half.state_dict().items())
