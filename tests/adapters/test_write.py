"""Every kind of adapter, in every format, weighs the same in the programs that read it."""

import copy
import dataclasses
import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.adapters.adapter import Adapter, changed_weight
from sidestep.adapters.attach import adapter_of, adapter_state, attach, start_from
from sidestep.adapters.names import in_model_order, to_diffusers
from sidestep.adapters.read import find_adapter, read_adapter
from sidestep.adapters.write import (
    Card,
    save_comfyui,
    save_diffusers,
    save_final,
    save_folder,
    save_lycoris,
)
from sidestep.errors import JobError, UserError
from tests.adapters.test_adapters import close_velocities, config, shake, turbo
from tests.conftest import FIXTURES
from tests.consumers import (
    acestep_cpp_weights,
    app_lokr_weights,
    base_weights,
    comfyui_weights,
    diffusers_weights,
    header_of,
    lycoris_weights,
    peft_weights,
    trained_weights,
)

RANK_MAP = {
    "rank_pattern": {
        "layers.0.self_attn.q_proj": 4,
        "layers.1.self_attn.q_proj": 2,
        "layers.1.cross_attn.v_proj": 3,
        "layers.2.mlp.down_proj": 1,
        "layers.2.self_attn.o_proj": 4,
    },
    "alpha_pattern": {"layers.1.self_attn.q_proj": 1.0},
}
CASES = {
    "uniform": {},
    "rank map": {"rank_map": RANK_MAP},
    "self": {"attention_type": "self"},
    "cross": {"attention_type": "cross"},
    "MLP": {"target_modules": (), "target_mlp": True},
    "v and MLP": {"target_modules": ("v_proj",), "target_mlp": True},
    "v and o": {"target_modules": ("v_proj", "o_proj")},
}
TYPES = {
    "lora": {},
    "dora": {"adapter_type": "dora"},
    "lokr": {"adapter_type": "lokr"},
    "lokr low rank": {"adapter_type": "lokr", "lokr_factor": 2, "rank": 2},
    "lokr both low rank": {"adapter_type": "lokr", "lokr_factor": 4, "rank": 1, "lokr_decompose_both": True},
    "lokr decomposed": {"adapter_type": "lokr", "lokr_factor": 2, "rank": 2, "lokr_weight_decompose": True},
    "loha": {"adapter_type": "loha"},
    "oft": {"adapter_type": "oft"},
}
SOON = [(kind, case) for kind in TYPES for case in ("rank map", "MLP")] + [
    ("lora", case) for case in CASES if case not in ("rank map", "MLP")
]
LATER = [
    pytest.param(kind, case, marks=pytest.mark.slow) for kind in TYPES for case in CASES if (kind, case) not in SOON
]
every_kind_and_case = pytest.mark.parametrize(("kind", "case"), SOON + LATER)
READS = {  # which program takes which kind; the others are refused with a way out
    "peft": {"lora", "dora", "lokr", "lokr low rank", "lokr both low rank", "loha", "oft"},
    "diffusers": {"lora", "dora"},
    "comfyui": set(TYPES) - {"oft"},
    "lycoris": set(TYPES) - {"oft"},
    "app lokr": {"lokr", "lokr low rank", "lokr both low rank", "lokr decomposed"},
    "acestep.cpp": {"lora", "lokr", "lokr low rank", "lokr both low rank"},
}


@pytest.fixture(scope="module")
def pipeline() -> AceStepPipeline:
    checkpoint = open_checkpoint(FIXTURES / "checkpoints", "turbo")
    text_encoder, tokenizer = checkpoint.load_text_encoder()
    return AceStepPipeline(
        checkpoint.load_vae(),
        text_encoder,
        tokenizer,
        turbo(),
        checkpoint.load_condition_encoder(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def trained(kind: str, case: str):
    """(settings, model with an adapter that does something)."""
    if kind == "oft" and case == "rank map":
        pytest.skip("OFT has no ranks per module (refused, see test_adapters)")
    options = {**TYPES[kind], **CASES[case]}
    rank_map = options.pop("rank_map", None)
    if rank_map and "low" in kind:
        rank_map = {"rank_pattern": {name: min(rank, 2) for name, rank in rank_map["rank_pattern"].items()}}
    settings = config(**options)
    model = attach(turbo(), settings, rank_map).eval()
    shake(model)
    return settings, model


@cache
def base() -> dict:
    return base_weights(turbo())


def close(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected) == set(base())
    for name in base():
        torch.testing.assert_close(
            actual[name] - base()[name],
            expected[name] - base()[name],
            rtol=0,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def own_weights(path: Path) -> dict:
    """The weights as our own reader gives them to a merge."""
    adapter = read_adapter(path)
    return base() | {name: changed_weight(base()[name], factors) for name, factors in adapter.modules.items()}


@every_kind_and_case
def test_the_change_of_the_weights_is_the_same_in_every_program(kind, case, pipeline, tmp_path):
    settings, model = trained(kind, case)
    expected = trained_weights(model, base())
    changed = [name for name, weight in base().items() if not torch.equal(weight, expected[name])]
    assert len(changed) == len(adapter_of(model).modules)

    final = tmp_path / "final"
    save_final(model, final, settings)
    close(own_weights(final), expected)
    if kind in READS["peft"]:
        close(peft_weights(turbo(), final), expected)
    if kind in READS["diffusers"]:
        close(diffusers_weights(pipeline, final), expected)
        close(
            diffusers_weights(pipeline, save_diffusers(read_adapter(final), tmp_path / "diffusers.safetensors")),
            expected,
        )
    if kind in READS["comfyui"]:
        close(
            comfyui_weights(
                turbo(), save_comfyui(read_adapter(final), tmp_path / "comfyui.safetensors", weights=base().get)
            ),
            expected,
        )
        if kind not in ("dora", "lokr decomposed"):
            for file in final.glob("*.safetensors"):
                close(comfyui_weights(turbo(), file), expected)
    if kind in READS["lycoris"]:
        file = save_lycoris(read_adapter(final), tmp_path / "lycoris.safetensors")
        close(own_weights(file), expected)
        close(lycoris_weights(turbo(), file), expected)
    if kind in READS["app lokr"]:
        file = final / "lokr_weights.safetensors"
        close(app_lokr_weights(turbo(), file, json.loads(header_of(file)["lokr_config"])), expected)
        if not adapter_of(model).has_magnitudes and "both" not in kind:  # of which acestep.cpp skips what is split
            close(acestep_cpp_weights(turbo(), file), expected)
    if kind in READS["acestep.cpp"]:
        close(acestep_cpp_weights(turbo(), final), expected)


@every_kind_and_case
def test_round_trips_return_the_same_tensors(kind, case, tmp_path):
    settings, model = trained(kind, case)
    save_final(model, tmp_path / "final", settings)
    first = read_adapter(tmp_path / "final")
    written = []
    as_it_is = not (kind.startswith("lokr") and case == "rank map")  # there the factors become whole matrices
    if kind in READS["lycoris"] and as_it_is:
        written.append(save_lycoris(first, tmp_path / "lycoris.safetensors"))
    if kind in READS["comfyui"] and not first.has_magnitudes and as_it_is:
        written.append(save_comfyui(first, tmp_path / "comfyui.safetensors"))
    if kind in READS["diffusers"]:
        written.append(save_diffusers(first, tmp_path / "diffusers.safetensors"))
    if kind in READS["peft"]:
        save_folder(first, tmp_path / "again")
        written.append(tmp_path / "again")
    assert written or not as_it_is
    for path in written:
        again = read_adapter(path)
        assert (again.kind, list(again.modules), again.ranks) == (first.kind, list(first.modules), first.ranks), path
        for name, factors in first.modules.items():
            assert set(again.modules[name]) == set(factors)
            assert all(torch.equal(again.modules[name][factor], tensor) for factor, tensor in factors.items()), (
                path,
                name,
            )


@pytest.mark.parametrize("kind", TYPES)
def test_training_goes_on_from_any_format(kind, tmp_path):
    settings, model = trained(kind, "uniform")
    save_final(model, tmp_path / "final", settings)
    sources = [tmp_path / "final"]
    if kind in READS["lycoris"]:
        sources.append(save_lycoris(read_adapter(tmp_path / "final"), tmp_path / "lycoris.safetensors"))
    for source in sources:
        again = attach(turbo(), settings).eval()
        start_from(again, source)
        close_velocities(again, model)


def test_alpha_may_change_and_ranks_may_grow_when_training_goes_on(tmp_path):
    settings, model = trained("lora", "self")
    save_final(model, tmp_path, settings)
    wider = attach(turbo(), config(rank=6, alpha=3.0)).eval()
    start_from(wider, tmp_path)
    close_velocities(wider, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2}, "--rank 4"),
        ({"attention_type": "cross"}, "--attention-type"),
        ({"adapter_type": "lokr"}, "--adapter-type lora"),
        ({"adapter_type": "dora"}, "--adapter-type lora"),
    ],
)
def test_an_adapter_that_does_not_fit_the_run_is_refused(settings, message, tmp_path):
    own, model = trained("lora", "uniform")
    save_final(model, tmp_path, own)
    with pytest.raises(UserError, match=message):
        start_from(attach(turbo(), config(**settings)), tmp_path)


def test_a_loaded_adapter_changes_the_pipeline_as_the_trainers_own_model_does(pipeline, tmp_path):
    settings, model = trained("lora", "uniform")
    save_final(model, tmp_path, settings)

    def play() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            prompt="folk",
            lyrics="[Instrumental]",
            audio_duration=1.0,
            num_inference_steps=2,
            generator=generator,
            output_type="latent",
        ).audios

    plain = play()
    pipeline.load_lora_weights(str(tmp_path))
    loaded = play()
    pipeline.unload_lora_weights()
    before, pipeline.transformer = pipeline.transformer, model.merge_and_unload()
    own = play()
    pipeline.transformer = before
    assert not torch.allclose(plain, own, atol=1e-3)
    torch.testing.assert_close(loaded, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_final_states_alpha_as_rank_for_every_module(kind, tmp_path):
    settings, model = trained(kind, "rank map")
    save_final(model, tmp_path, settings)
    said = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert said["peft_type"] == "LORA"
    assert said["alpha_pattern"] == RANK_MAP["rank_pattern"]  # each module's own; acestep.cpp takes one
    assert not {"lora_alpha", "alpha"} & set(said)
    assert set(said["target_modules"]) == set(RANK_MAP["rank_pattern"])
    for key, tensor in tensors.items():
        name, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        rank = said["rank_pattern"].get(name, said["r"])
        assert factor.endswith("vector") or rank == tensor.shape[1 if factor == "B.weight" else 0]
    assert not [key for key in tensors if "alpha" in key]
    facts = json.loads(header_of(tmp_path / "adapter_model.safetensors")["sidestep"])
    assert facts["config_fingerprint"]
    assert facts["program"].startswith("Side-Step")


def test_the_fingerprint_is_that_of_the_settings_but_for_folders(tmp_path):
    _, model = trained("lora", "self")

    def fingerprint(**settings) -> str:
        save_final(model, tmp_path, dataclasses.replace(config(attention_type="self"), **settings))
        return json.loads(header_of(tmp_path / "adapter_model.safetensors")["sidestep"])["config_fingerprint"]

    own = fingerprint()
    assert len(own) == 32
    for private in ("dataset_dir", "output_dir", "checkpoint_dir", "resume_from"):
        assert fingerprint(**{private: Path("elsewhere")}) == own
        assert "elsewhere" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert fingerprint(seed=7) != own


def test_the_model_card_says_what_the_run_knows_and_quotes_what_it_was_given(tmp_path):
    settings, model = trained("lora", "self")
    card = Card(
        name="Ba|nd",
        base_model='my "base": x\n---',
        tag="zzt`ag",
        songs=12,
        audio_seconds=1800,
        steps=300,
        epochs=5,
        hints_ratio=0.25,
    )
    save_final(model, tmp_path, settings, card=card)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    front, body = text.split("\n---\n", 1)
    assert 'base_model: "my \\"base\\": x\\n---"' in front
    assert "# license:" in front
    for words in (
        "# Ba/nd",
        "zzt'ag",
        "12 songs, 30:00 of music",
        "300 optimizer steps, 5 epochs",
        "25% of the steps",
        "ComfyUI",
        "diffusers",
        '"rank": 4',
    ):
        assert words in body
    assert "output_dir" not in text


def test_a_state_given_by_hand_is_saved_in_place_of_the_models_own(tmp_path):
    settings, model = trained("lora", "self")
    snapshot = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    expected = copy.deepcopy(adapter_of(model))
    shake(model, seed=1)
    save_final(model, tmp_path, settings, state=snapshot)
    saved = read_adapter(tmp_path)
    assert all(
        torch.equal(saved.modules[n][f], t) for n, factors in expected.modules.items() for f, t in factors.items()
    )


def test_a_nan_is_never_saved(tmp_path):
    settings, model = trained("lora", "self")
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(JobError, match=r"not finite, first in layers.0.self_attn.q_proj"):
        save_final(model, tmp_path / "final", settings)
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize(
    ("kind", "write", "message"),
    [
        ("lokr", save_diffusers, "diffusers refuses LoKr"),
        ("loha", save_diffusers, "diffusers refuses LoHa"),
        ("oft", save_diffusers, "diffusers refuses OFT"),
        ("oft", save_comfyui, "OFT"),
        ("oft", save_lycoris, "OFT"),
        ("dora", save_comfyui, "--base"),
        ("lokr decomposed", save_comfyui, "--base"),
    ],
)
def test_what_a_program_cannot_take_is_refused_with_a_way_out(kind, write, message, tmp_path):
    _, model = trained(kind, "self")
    with pytest.raises(UserError, match=message) as refused:
        write(adapter_of(model), tmp_path / "x.safetensors")
    assert "--base" in refused.value.fix
    assert not list(tmp_path.iterdir())


def lora_tensors() -> Adapter:
    return adapter_of(trained("lora", "uniform")[1])


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight", None), ("lora_down.weight", "lora_up.weight", "alpha")
FOREIGN = {  # how a program spells a module, and its names of A, B and alpha
    "kohya": ("lora_unet_decoder_{flat}", KOHYA),
    "kohya, short": ("lora_unet_{flat}", KOHYA),
    "ai-toolkit": ("diffusion_model.{name}", PEFT),
    "ai-toolkit, with alpha": ("diffusion_model.decoder.{name}", (*PEFT[:2], "alpha")),
    "comfyui": ("diffusion_model.decoder.{name}", KOHYA),
    "diffusers": ("transformer.{diffusers}", PEFT),
    "a raw peft state": ("base_model.model.{name}", ("lora_A.default.weight", "lora_B.default.weight", None)),
    "peft on the whole model": ("base_model.model.decoder.{name}", PEFT),
    "LyCORIS": ("lycoris_{flat}", KOHYA),
    "no prefix": ("{name}", PEFT),
}


@pytest.mark.parametrize("program", FOREIGN)
def test_files_of_other_programs_are_read(program, tmp_path):
    spelled, (down, up, alpha) = FOREIGN[program]
    own = lora_tensors()
    tensors = {}
    for name, factors in own.modules.items():
        module = spelled.format(name=name, flat=name.replace(".", "_"), diffusers=to_diffusers(name))
        tensors[f"{module}.{down}"] = factors["lora_A"]
        tensors[f"{module}.{up}"] = factors["lora_B"] * (2 if alpha else 1)
        if alpha:
            tensors[f"{module}.{alpha}"] = torch.tensor(2.0)  # of rank 4: half strength
    save_file(tensors, tmp_path / "foreign.safetensors")
    found = read_adapter(tmp_path / "foreign.safetensors")
    assert list(found.modules) == list(own.modules) == in_model_order(own.modules)
    for name, factors in own.modules.items():
        assert all(torch.equal(found.modules[name][factor], tensor) for factor, tensor in factors.items())


@pytest.mark.parametrize("nested", ["", "adapter", "final"])
def test_older_side_step_folders_are_read_at_the_strength_their_config_says(nested, tmp_path):
    own = lora_tensors()
    folder = tmp_path / nested
    folder.mkdir(exist_ok=True)
    save_file(
        {
            f"base_model.model.{name}.{factor}.weight": t
            for name, factors in own.modules.items()
            for factor, t in factors.items()
        },
        folder / "adapter_model.safetensors",
    )
    said = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "alpha_pattern": {r"^layers\.1\.self_attn\.q_proj": 2, "cross_attn.v_proj": 16},
    }
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    found = find_adapter(tmp_path)
    assert found.format == "peft"
    scales = {name: found.scale(name) for name in found.modules}
    assert scales["layers.0.self_attn.q_proj"] == 2.0
    assert scales["layers.1.self_attn.q_proj"] == 0.5
    assert scales["layers.2.cross_attn.v_proj"] == 4.0
    assert torch.equal(
        found.adapter().modules["layers.1.self_attn.q_proj"]["lora_B"],
        own.modules["layers.1.self_attn.q_proj"]["lora_B"] * 0.5,
    )


def test_alphas_that_are_stated_for_modules_alone_are_read(tmp_path):
    names = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]
    tensors = {f"base_model.model.{name}.lora_{f}.weight": torch.ones(4, 4) for name in names for f in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "target_modules": names, "alpha_pattern": {names[0]: 2, names[1]: 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    assert [find_adapter(tmp_path).scale(name) for name in names] == [0.5, 3.0]


@pytest.mark.parametrize(
    ("kind", "run", "flags"),
    [
        ("lokr low rank", {"adapter_type": "lokr"}, {"rank": 2, "lokr_factor": 2}),
        ("lokr low rank", {"adapter_type": "lokr", "lokr_factor": 4, "rank": 2}, {"rank": 2, "lokr_factor": 2}),
        ("lokr low rank", {"adapter_type": "lokr", "lokr_factor": 2, "rank": 3}, {"rank": 2, "lokr_factor": 2}),
        (
            "lokr both low rank",
            {"adapter_type": "lokr"},
            {"rank": 1, "lokr_factor": 4, "lokr_decompose_both": True},
        ),
        ("loha", {"adapter_type": "loha", "rank": 3}, {"rank": 4}),
        ("oft", {"adapter_type": "oft", "rank": 8}, {"rank": 4}),
    ],
)
def test_an_adapter_factored_otherwise_says_the_flags_that_fit_and_they_do(kind, run, flags, tmp_path):
    own, model = trained(kind, "uniform")
    save_final(model, tmp_path, own)
    with pytest.raises(UserError, match="factored otherwise") as refused:
        start_from(attach(turbo(), config(**run)), tmp_path)
    said = dict(re.findall(r"--([a-z-]+)(?: (-?\d+))?", refused.value.fix))
    named = {name.replace("-", "_"): int(value) if value else True for name, value in said.items()}
    assert {**flags, **named} == named
    again = attach(turbo(), config(**{**run, **named})).eval()
    start_from(again, tmp_path)
    close_velocities(again, model)


def test_an_adapter_of_another_size_is_told_apart_from_one_factored_otherwise(tmp_path):
    adapter = adapter_of(trained("lokr", "uniform")[1])
    for factors in adapter.modules.values():
        factors["lokr_w2"] = torch.cat([factors["lokr_w2"], factors["lokr_w2"]])
    save_comfyui(adapter, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="made for a weight of shape") as refused:
        start_from(attach(turbo(), config(adapter_type="lokr")), tmp_path / "x.safetensors")
    assert "--model-variant" in refused.value.fix


@pytest.mark.parametrize("adapter_type", ["lora", "lokr", "loha"])
def test_a_flipped_bit_anywhere_in_an_adapter_is_refused(tmp_path: Path, adapter_type):
    """Not only in the exponents: the file says the digest of its tensors and of its header's texts."""
    settings, model = trained(adapter_type, "uniform")
    save_final(model, tmp_path, settings)
    draw = random.Random(4)
    for file in sorted(tmp_path.glob("*.safetensors")):
        original = file.read_bytes()
        before = read_adapter(file)
        for _ in range(10):
            damaged = bytearray(original)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                read_adapter(file)
            assert str(file) in caught.value.problem
        file.write_bytes(original)
        assert read_adapter(file).ranks == before.ranks
