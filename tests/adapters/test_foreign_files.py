"""Files of other trainers and programs, made after their formats: read with the exact change, or with what is lost."""

import json
from pathlib import Path

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidestep.adapters.adapter import Adapter, change_of
from sidestep.adapters.attach import adapter_of
from sidestep.adapters.names import adaptable_names, in_model_order, to_original
from sidestep.adapters.programs import applied_by_each
from sidestep.adapters.read import find_adapter, read_adapter
from sidestep.adapters.write import save_final, save_folder
from sidestep.errors import UserError
from sidestep.events import Notice
from sidestep.settings.config import ExportConfig, InspectConfig
from sidestep.tasks.export import export
from sidestep.tasks.inspect import inspect_adapter
from tests.adapters.test_adapters import turbo
from tests.adapters.test_write import base, close, own_weights, trained
from tests.consumers import OriginalNames, app_lokr_weights, response

# What LyCORIS adds on ACE-Step's decoder beside attention and MLP, in its flat names, with the shape of W2.
FROZEN = {
    "proj_in.1": (16, 12, 2),
    "condition_embedder": (16, 16),
    **{
        f"time_embed{r}.{layer}": shape
        for r in ("", "_r")
        for layer, shape in (("linear_1", (16, 128)), ("linear_2", (16, 16)), ("time_proj", (96, 16)))
    },
}


LOKR_SWITCHES = (
    *("decompose_both", "use_tucker", "use_scalar", "full_matrix", "bypass_mode", "rs_lora"),
    "unbalanced_factorization",
)


def lora() -> Adapter:
    return adapter_of(trained("lora", "uniform")[1])


def same_change(path: Path, expected: dict[str, Tensor]) -> None:
    """The change of every module of a file is that, and there are no others."""
    found = read_adapter(path)
    assert list(found.modules) == list(expected)
    for name, change in expected.items():
        torch.testing.assert_close(change_of(found.modules[name]), change, rtol=0, atol=1e-6)


def lost(path: Path) -> str:
    (note,) = read_adapter(path).notes
    return note


def saved_and_heard(network: LycorisNetwork, model: OriginalNames, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """(a network of LyCORIS, changed and saved by itself; the weights that the model computes with under it)."""
    network.apply_to()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    network.eval()
    assert len(network.loras) == len(base())
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    return tmp_path / "x.safetensors", {name: response(model.get_submodule(name)) for name in base()}


def official_lokr(tmp_path: Path, kind: str, frozen: float) -> tuple[Path, dict[str, Tensor]]:
    """(a LoKr as ACE-Step's own trainer saves it, the weights it was trained to)."""
    settings, model = trained(kind, "uniform")
    save_final(model, tmp_path / "final", settings)
    tensors = load_file(tmp_path / "final" / "lokr_weights.safetensors")
    for name, shape in FROZEN.items():
        flat = f"lycoris_{name.replace('.', '_')}"
        tensors |= {f"{flat}.lokr_w1": torch.ones(2, 2), f"{flat}.lokr_w2": torch.full(shape, frozen)}
        tensors[f"{flat}.alpha"] = torch.tensor(4.0)
        if kind == "lokr decomposed":
            tensors[f"{flat}.dora_scale"] = torch.ones(2 * shape[0], 1)
    save_file(tensors, tmp_path / "official.safetensors")
    return tmp_path / "official.safetensors", own_weights(tmp_path / "final")


@pytest.mark.parametrize("kind", ["lokr", "lokr low rank", "lokr both low rank", "lokr decomposed"])
def test_identities_that_ace_steps_trainer_leaves_in_a_lokr_are_left_out(kind, tmp_path):
    file, expected = official_lokr(tmp_path, kind, frozen=0.0)
    close(own_weights(file), expected)
    assert "8 modules outside the decoder's attention and MLP are left out; nothing is lost" in lost(file)


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "lokr", "factor": 2},
        {"algo": "lokr", "factor": 2, "decompose_both": True, "linear_dim": 1},
        {"algo": "lokr", "full_matrix": True},
        {"algo": "lokr", "factor": 2, "use_scalar": True},
        {"algo": "lokr", "factor": 2, "rs_lora": True},
        {"algo": "lokr", "factor": 2, "unbalanced_factorization": True},
        {"algo": "lokr", "factor": 2, "unbalanced_factorization": True, "decompose_both": True, "linear_dim": 8},
        {"algo": "lokr", "factor": 2, "linear_dim": 64},
        {"algo": "lokr", "factor": 2, "dora_wd": True},
        {"algo": "loha"},
        {"algo": "loha", "rs_lora": True},
        {"algo": "loha", "use_scalar": True},
        {"algo": "loha", "dora_wd": True},
        {"algo": "lokr", "factor": 2, "decompose_both": True, "linear_dim": 1, "rs_lora": True, "use_scalar": True},
        {"algo": "lokr", "full_matrix": True, "dora_wd": True},
        {"algo": "lokr", "factor": 2, "unbalanced_factorization": True, "dora_wd": True, "rs_lora": True},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_what_lycoris_itself_saves_is_read_as_it_computes(options, tmp_path):
    model = OriginalNames(turbo())
    LycorisNetwork.apply_preset({"target_module": ["Linear"], "unet_target_module": ["Linear"]})
    network = create_lycoris(model, 1.0, **{"linear_dim": 2, "linear_alpha": 1.5, **options})
    file, expected = saved_and_heard(network, model, tmp_path)
    close(own_weights(file), expected)
    if options["algo"] == "lokr":  # as ACE-Step's trainer leaves it
        said = {key: options.get(key, False) for key in LOKR_SWITCHES} | {"weight_decompose": "dora_wd" in options}
        said |= {"linear_dim": options.get("linear_dim", 2), "linear_alpha": 1.5, "factor": options.get("factor", -1)}
        header = {"lokr_config": json.dumps(said | {"target_modules": list(base())})}
        tensors, official = load_file(file), tmp_path / "official.safetensors"
        save_file(tensors, official, header)
        close(app_lokr_weights(turbo(), official, json.loads(header["lokr_config"])), expected)
        for name, shape in FROZEN.items():
            flat = f"lycoris_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lokr_w1": torch.ones(2, 2), f"{flat}.lokr_w2": torch.zeros(shape)}
        save_file(tensors, official, header)
        close(own_weights(official), expected)
        # Without alpha tensors the header alone says the strength, of whole matrices none.
        save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}, official, header)
        close(own_weights(official), expected)


def test_what_an_older_lokr_has_learned_outside_is_said_to_be_lost(tmp_path):
    file, expected = official_lokr(tmp_path, "lokr", frozen=0.5)
    close(own_weights(file), expected)
    assert "what 8 modules outside the decoder's attention and MLP have learned is lost, such as cond" in lost(file)
    assert "--format merged" in lost(file)


@pytest.mark.parametrize("kind", ["lokr", "lokr decomposed"])
def test_what_an_older_lokr_has_learned_outside_goes_into_a_merged_base(kind, checkpoints, tmp_path):
    file, _ = official_lokr(tmp_path, kind, frozen=0.5)
    before, after = merged(file, checkpoints, tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in changed if key.removeprefix("decoder.").removesuffix(".weight") in FROZEN} == {
        f"decoder.{name}.weight" for name in FROZEN
    }
    for name in FROZEN:
        expected = before[f"decoder.{name}.weight"] + 0.5
        if kind == "lokr decomposed":
            expected = torch.nn.functional.normalize(expected.flatten(1), dim=1).reshape(expected.shape)
        torch.testing.assert_close(after[f"decoder.{name}.weight"], expected, rtol=0, atol=1e-6)


def merged(file: Path, checkpoints: Path, tmp_path: Path, events: list | None = None, **settings):
    """(tensors of the turbo base, of the base with an adapter merged in)."""
    config = ExportConfig(adapter=file, output=tmp_path / "merged", format="merged", base=checkpoints, **settings)
    export(config, (events if events is not None else []).append)
    return (load_file(f / "model.safetensors") for f in (checkpoints / "acestep-v15-turbo", tmp_path / "merged"))


def test_every_form_of_a_change_outside_is_merged_exactly_at_its_strength(checkpoints, tmp_path):
    draw = torch.Generator().manual_seed(0)
    own, tensors = lora(), {}
    for name, factors in own.modules.items():
        tensors |= {f"diffusion_model.decoder.{name}.{factor}.weight": t for factor, t in factors.items()}
    f = {  # module → factors: low-rank and whole Kronecker factors of a convolution, LoRA, LoHa, plain differences
        "decoder.proj_in.1": {"lokr_w1": (2, 4), "lokr_w2_a": (16, 3), "lokr_w2_b": (3, 12)},
        "decoder.time_embed.linear_1": {"lora_down.weight": (3, 256), "lora_up.weight": (32, 3)},
        "decoder.time_embed.linear_2": {f"hada_w{i}_{x}": ((32, 2), (2, 32))[x == "b"] for i in (1, 2) for x in "ab"},
        "decoder.norm_out": {"diff": (32,)},
        "decoder.proj_out.1": {"diff_b": (8,)},
        "encoder.lyric_encoder.embed_tokens": {"diff": (32, 32)},
    }
    f = {m: {k: torch.randn(shape, generator=draw) / 8 for k, shape in given.items()} for m, given in f.items()}
    tensors |= {f"diffusion_model.{m}.{k}": tensor for m, given in f.items() for k, tensor in given.items()}
    tensors["diffusion_model.decoder.time_embed.linear_1.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "x.safetensors")
    events = []
    before, after = merged(tmp_path / "x.safetensors", checkpoints, tmp_path, events, strength=0.5)
    conv, low, had = f["decoder.proj_in.1"], f["decoder.time_embed.linear_1"], f["decoder.time_embed.linear_2"]
    w2 = (conv["lokr_w2_a"] @ conv["lokr_w2_b"]).reshape(16, 6, 2)
    expected = {
        "decoder.proj_in.1.weight": torch.einsum("ab,cdk->acbdk", conv["lokr_w1"], w2).reshape(32, 24, 2),
        "decoder.time_embed.linear_1.weight": 2 * low["lora_up.weight"] @ low["lora_down.weight"],
        "decoder.time_embed.linear_2.weight": (had["hada_w1_a"] @ had["hada_w1_b"])
        * (had["hada_w2_a"] @ had["hada_w2_b"]),
        "decoder.norm_out.weight": f["decoder.norm_out"]["diff"],
        "decoder.proj_out.1.bias": f["decoder.proj_out.1"]["diff_b"],
        "encoder.lyric_encoder.embed_tokens.weight": f["encoder.lyric_encoder.embed_tokens"]["diff"],
    }
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(expected) | {f"decoder.{name}.weight" for name in own.modules}
    for key, change in expected.items():
        torch.testing.assert_close(after[key], before[key] + 0.5 * change, rtol=0, atol=1e-6)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any("what 6 modules outside" in message and "is merged too" in message for message in told)
    assert not any("lost" in message for message in told)


def test_changes_outside_that_a_base_cannot_take_are_named(checkpoints, tmp_path):
    own, tensors = lora(), {}
    for name, factors in own.modules.items():
        tensors |= {f"base_model.model.decoder.{name}.{factor}.weight": t for factor, t in factors.items()}
    tensors |= {"base_model.model.decoder.condition_embedder.lora_A.weight": torch.ones(1, 5)}  # of another size
    tensors |= {"base_model.model.decoder.condition_embedder.lora_B.weight": torch.ones(5, 1)}
    tensors["base_model.model.decoder.norm_out.diff"] = torch.ones(32)
    save_file(tensors, tmp_path / "x.safetensors")
    events = []
    before, after = merged(tmp_path / "x.safetensors", checkpoints, tmp_path, events)
    key = "decoder.condition_embedder.weight"
    assert torch.equal(before[key], after[key])
    told = " ".join(event.message for event in events if isinstance(event, Notice))
    assert "such as condition_embedder, is lost" in told
    assert "such as norm_out, is merged too" in told


def test_identities_in_a_loha_are_left_out(tmp_path):
    settings, model = trained("loha", "uniform")
    save_final(model, tmp_path / "final", settings)
    tensors = load_file(tmp_path / "final" / "loha_weights.safetensors")
    for factor, shape in (("w1_a", (8, 2)), ("w1_b", (2, 8)), ("w2_a", (8, 2)), ("w2_b", (2, 8))):
        name = f"lycoris_condition_embedder.hada_{factor}"
        tensors[name] = torch.zeros(shape) if factor == "w2_a" else torch.ones(shape)
    save_file(tensors, tmp_path / "official.safetensors")
    close(own_weights(tmp_path / "official.safetensors"), own_weights(tmp_path / "final"))
    assert "nothing is lost" in lost(tmp_path / "official.safetensors")


def test_of_a_whole_model_adapter_the_decoders_part_is_read(tmp_path):
    """SimpleTuner 1.5: peft on the whole model, no alpha."""
    own, tensors = lora(), {}
    for name, factors in own.modules.items():
        tensors |= {f"base_model.model.decoder.{name}.{factor}.weight": t for factor, t in factors.items()}
    for module in ("encoder.lyric_encoder.layers.0.self_attn.q_proj", "tokenizer.audio_acoustic_proj"):
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(4, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(8, 4)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file)
    same_change(file, {name: change_of(factors) for name, factors in own.modules.items()})
    left, strength = read_adapter(file).notes
    assert "what 2 modules outside the decoder's attention and MLP have learned is lost" in left
    assert "cannot be known" in strength
    applied = {each.program: each.strength for each in applied_by_each(find_adapter(file))}
    assert applied["diffusers"] is None
    assert applied["ComfyUI"] is None


@pytest.mark.parametrize("other", [0.0, 0.25])
def test_full_differences_of_comfyuis_train_node_are_read(other, tmp_path):
    names = adaptable_names(turbo())
    changes = {name: torch.randn(base()[name].shape) for name in names}
    tensors = {f"diffusion_model.decoder.{name}.diff": change.clone() for name, change in changes.items()}
    unchanged = names[3]
    tensors[f"diffusion_model.decoder.{unchanged}.diff"].zero_()
    del changes[unchanged]
    for outside in ("layers.0.self_attn_norm", "layers.1.cross_attn.q_norm", "norm_out", "proj_in.1"):
        tensors[f"diffusion_model.decoder.{outside}.diff"] = torch.full((8,), other)
    tensors["diffusion_model.decoder.proj_in.1.diff_b"] = torch.full((8,), other)
    tensors[f"diffusion_model.decoder.{names[0]}.diff_b"] = torch.zeros(8)
    save_file(tensors, tmp_path / "node.safetensors")
    same_change(tmp_path / "node.safetensors", changes)
    assert ("nothing is lost" in lost(tmp_path / "node.safetensors")) == (other == 0.0)
    save_folder(read_adapter(tmp_path / "node.safetensors"), tmp_path / "peft")
    same_change(tmp_path / "peft", changes)


def test_ai_toolkits_lokr_with_full_matrices_and_full_differences_is_read(tmp_path):
    settings, model = trained("lokr", "self")
    save_final(model, tmp_path / "final", settings)
    own = read_adapter(tmp_path / "final")
    tensors = {}
    for name, factors in own.modules.items():
        tensors |= {f"transformer.decoder.{name}.{factor}": t for factor, t in factors.items()}
        tensors[f"transformer.decoder.{name}.alpha"] = torch.tensor(1e9)  # full matrices ignore it
    whole = {"layers.2.mlp.down_proj": torch.randn(base()["layers.2.mlp.down_proj"].shape)}
    tensors |= {f"transformer.decoder.{name}.diff": change for name, change in whole.items()}
    save_file(tensors, tmp_path / "toolkit.safetensors")
    expected = {name: change_of(factors) for name, factors in own.modules.items()} | whole
    same_change(tmp_path / "toolkit.safetensors", {name: expected[name] for name in in_model_order(expected)})


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{name}",
        "module.{name}",
        "base_model.model._orig_mod.module.{name}",
        "_fsdp_wrapped_module.{layer}._fsdp_wrapped_module.{rest}",
        "base_model.model.{layer}._checkpoint_wrapped_module.{rest}",
    ],
)
def test_wrappers_in_a_name_are_taken_off(wrapped, tmp_path):
    own, tensors = lora(), {}
    for name, factors in own.modules.items():
        _, number, rest = name.split(".", 2)
        module = wrapped.format(name=name, layer=f"layers.{number}", rest=rest)
        tensors |= {f"{module}.{factor}.weight": tensor for factor, tensor in factors.items()}
    save_file(tensors, tmp_path / "wrapped.safetensors")
    same_change(tmp_path / "wrapped.safetensors", {name: change_of(factors) for name, factors in own.modules.items()})
    assert read_adapter(tmp_path / "wrapped.safetensors").notes == ()


@pytest.mark.parametrize("algo", ["lokr", "loha"])
def test_a_rank_stabilised_network_is_read_at_alpha_over_the_root_of_its_rank(algo, tmp_path):
    """As LyCORIS' route for kohya's trainers makes it; `create_lycoris` of ACE-Step's trainer drops the wish."""
    LycorisNetwork.apply_preset({"target_module": ["Linear"], "unet_target_module": ["Linear"]})
    options = {"lora_dim": 2, "alpha": 1.0, "network_module": algo, "factor": 2, "rs_lora": True}
    model = OriginalNames(turbo())
    network = LycorisNetwork(model, 1.0, **options)
    assert {round(module.scale, 4) for module in network.loras} == {round(0.5**0.5, 4)}
    file, expected = saved_and_heard(network, model, tmp_path)
    close(own_weights(file), expected)


def test_export_and_inspect_say_what_is_left_out(tmp_path):
    file, _ = official_lokr(tmp_path, "lokr", frozen=0.5)
    events = []
    export(ExportConfig(adapter=file, output=tmp_path / "out.safetensors", format="comfyui"), events.append)
    assert any("learned is lost" in event.message for event in events if isinstance(event, Notice))
    events = []
    assert inspect_adapter(InspectConfig(path=file), events.append).notes == [lost(file)]
    assert any("learned is lost" in event.message for event in events if isinstance(event, Notice))


def test_a_file_that_changes_only_what_adapters_cannot_sit_on_is_refused(tmp_path):
    save_file({"diffusion_model.decoder.proj_in.1.diff": torch.ones(8, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no adapter tensors"):
        read_adapter(tmp_path / "x.safetensors")


def test_a_rank_stabilised_lora_of_peft_has_alpha_over_the_root_of_its_rank(tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["to_q", "to_v"],
        rank_pattern={"layers.1.self_attn.to_q": 9},
        init_lora_weights=False,
    )
    model = get_peft_model(turbo(), config)
    expected = dict(base())
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            rank = 9 if name == "layers.1.self_attn.to_q" else 4
            change = module.lora_B["default"].weight @ module.lora_A["default"].weight
            expected[to_original(name)] = base()[to_original(name)] + 6 / rank**0.5 * change.detach()
    model.save_pretrained(tmp_path)
    close(own_weights(tmp_path), expected)
