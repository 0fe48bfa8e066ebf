"""What other programs make of an adapter file: each function gives the weights [out, in] that a program computes with.

peft, diffusers and lycoris-lora are run themselves; what ComfyUI and acestep.cpp compute is written out here.
"""

import copy
import json
import warnings
from pathlib import Path

import torch
from diffusers import AceStepPipeline
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sidestep.adapters.names import adaptable_names, to_diffusers, to_original

Weights = dict[str, Tensor]


def base_weights(decoder: nn.Module) -> Weights:
    """Every adaptable weight by original name, copied."""
    return {
        name: decoder.get_submodule(to_diffusers(name)).weight.detach().clone() for name in adaptable_names(decoder)
    }


def trained_weights(model: PeftModel, base: Weights) -> Weights:
    """The weights under the adapter as the trainer computes them: each module's output on the unit vectors."""
    adapted = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    return base | {to_original(name): response(layer) for name, layer in adapted.items()}


@torch.no_grad()
def response(layer: nn.Module) -> Tensor:
    """W [out, in] of a layer without bias, from its output on the unit vectors."""
    linear = layer
    while not hasattr(linear, "in_features"):
        linear = linear.base_layer
    return layer(torch.eye(linear.in_features)).T.clone()


class OriginalNames(nn.Module):
    """The decoder's projections under the original code's names, on copies of its layers."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList()
        for name in adaptable_names(decoder):
            _, index, part, projection = name.split(".")
            while len(self.layers) <= int(index):
                self.layers.append(nn.Module())
            layer = self.layers[int(index)]
            if not hasattr(layer, part):
                setattr(layer, part, nn.Module())
            setattr(getattr(layer, part), projection, copy.deepcopy(decoder.get_submodule(to_diffusers(name))))


def peft_weights(decoder: nn.Module, folder: Path) -> Weights:
    """`PeftModel.from_pretrained` on the original code's decoder, as ACE-Step's app does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that it did not find
        model = PeftModel.from_pretrained(OriginalNames(decoder), str(folder)).eval()
    return {name: response(model.base_model.model.get_submodule(name)) for name in adaptable_names(decoder)}


def diffusers_weights(pipeline: AceStepPipeline, path: Path) -> Weights:
    """`AceStepPipeline.load_lora_weights`."""
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    names = adaptable_names(pipeline.transformer)
    pipeline.load_lora_weights(str(folder), weight_name=file)
    try:
        return {name: response(pipeline.transformer.get_submodule(to_diffusers(name))) for name in names}
    finally:
        pipeline.unload_lora_weights()


def app_weights_at(strength: float, decoder: nn.Module, folder: Path) -> Weights:
    """ACE-Step's app with its slider at a strength, by its rules.

    A LoKr is a network of LyCORIS, whose multiplier is set. Of peft's layers those count that show "lora" in their
    name, class or package, or have a lora_A, and can be scaled; all others stay as they are.
    """
    file = folder / "lokr_weights.safetensors"
    if file.is_file():
        return app_lokr_weights(decoder, file, json.loads(header_of(file)["lokr_config"]), strength)
    model = PeftModel.from_pretrained(OriginalNames(decoder), str(folder)).eval()
    for name, layer in model.named_modules():
        shown = f"{name} {type(layer).__name__} {type(layer).__module__}".lower()
        if ("lora" in shown or hasattr(layer, "lora_A")) and hasattr(layer, "set_scale"):
            layer.set_scale("default", strength)
    return {name: response(model.base_model.model.get_submodule(name)) for name in adaptable_names(decoder)}


def app_lokr_weights(decoder: nn.Module, file: Path, config: dict, strength: float = 1.0) -> Weights:
    """A LoKr file in ACE-Step's app: the network is rebuilt from `lokr_config`, then the tensors are loaded by name."""
    model = OriginalNames(decoder)
    LycorisNetwork.apply_preset({"unet_target_name": config["target_modules"], "target_name": config["target_modules"]})
    options = {
        k: config[k]
        for k in (
            "factor",
            "decompose_both",
            "use_tucker",
            "use_scalar",
            "full_matrix",
            "bypass_mode",
            "rs_lora",
            "unbalanced_factorization",
        )
    }
    network = create_lycoris(
        model,
        1.0,
        linear_dim=config["linear_dim"],
        linear_alpha=config["linear_alpha"],
        algo="lokr",
        dora_wd=config["weight_decompose"],
        **options,
    )
    network.apply_to()
    state = network.load_weights(str(file))
    assert "unexpected keys" not in state, state
    trained = {f"lycoris_{name.replace('.', '_')}" for name in config["target_modules"]}
    assert not [key for key in state.get("missing keys", []) if key.split(".")[0] in trained]
    network.set_multiplier(strength)
    network.eval()
    return {name: response(model.get_submodule(name)) for name in adaptable_names(decoder)}


def lycoris_weights(decoder: nn.Module, file: Path) -> Weights:
    """lycoris-lora rebuilding any network from its file alone."""
    model = OriginalNames(decoder)
    network, state = create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    network.load_state_dict(state, strict=False)
    network.eval()
    assert len(network.loras) == len({key.split(".")[0] for key in state})
    return {name: response(model.get_submodule(name)) for name in adaptable_names(decoder)}


def comfyui_weights(decoder: nn.Module, file: Path) -> Weights:
    """ComfyUI: `alpha/rank · up·down`, 1.0 without alpha; a Kronecker product for LoKr; DoRA over the base's norms."""
    tensors = load_file(file)
    used: set[str] = set()
    weights = base_weights(decoder)

    def take(key: str) -> Tensor | None:
        if key in tensors:
            used.add(key)
        return tensors.get(key)

    for name, base in list(weights.items()):
        for x in (f"diffusion_model.decoder.{name}", f"base_model.model.{name}", f"lycoris_{name.replace('.', '_')}"):
            change, rank = _comfyui_change(x, take)
            if change is None:
                continue
            alpha, magnitude = take(f"{x}.alpha"), take(f"{x}.dora_scale")
            change = change * (alpha.item() / rank if alpha is not None and rank else 1.0)
            # One patch to a weight: that of a second name for it takes the place of the first.
            weights[name] = base + change
            if magnitude is not None:
                norm = base.norm(dim=1, keepdim=True) + torch.finfo(base.dtype).eps
                weights[name] = (base + change) * (magnitude / norm)
    assert used == set(tensors), f"ComfyUI does not load {sorted(set(tensors) - used)[:3]}"
    return weights


def _comfyui_change(x: str, take) -> tuple[Tensor | None, int | None]:
    """(change before alpha, the rank that alpha is divided by) of the adapter that stands under the name x."""
    for up, down in ((f"{x}.lora_up.weight", f"{x}.lora_down.weight"), (f"{x}.lora_B.weight", f"{x}.lora_A.weight")):
        if take(up) is not None:
            return take(up) @ take(down), take(down).shape[0]
    if take(f"{x}.hada_w1_a") is not None:
        halves = [take(f"{x}.hada_w{i}_a") @ take(f"{x}.hada_w{i}_b") for i in (1, 2)]
        return halves[0] * halves[1], take(f"{x}.hada_w1_b").shape[0]
    rank, factors = None, []
    for part in ("lokr_w1", "lokr_w2"):
        factor = take(f"{x}.{part}")
        if factor is None and take(f"{x}.{part}_a") is not None:
            rank = take(f"{x}.{part}_b").shape[0]
            factor = take(f"{x}.{part}_a") @ take(f"{x}.{part}_b")
        factors.append(factor)
    return (torch.kron(*factors), rank) if None not in factors else (None, None)


def acestep_cpp_weights(decoder: nn.Module, path: Path) -> Weights:
    """acestep.cpp, from its rules. What it does not know it leaves alone, without an error.

    A folder: `adapter_model.safetensors`, else `lokr_weights.safetensors`. LoRA: alpha of the module's own tensor, else
    `lora_alpha` (or `alpha`) of the config, a whole number, for all modules, else, where that is 0 or not stated, the
    rank; over the rank of the module's shapes; magnitudes are not looked at. LoKr, told by a factor's name anywhere in
    the file: names of LyCORIS only, each module with its alpha and one W1; over the rank of a split W2, for a whole one
    over `linear_dim` of the header.
    """
    file = path
    if path.is_dir():
        file = next(f for f in (path / "adapter_model.safetensors", path / "lokr_weights.safetensors") if f.is_file())
    tensors, weights = load_file(file), base_weights(decoder)
    if any(".lokr_w1" in key or ".lokr_w2" in key for key in tensors):
        dim = json.loads((header_of(file) or {}).get("lokr_config", "{}")).get("linear_dim")
        for name, weight in weights.items():
            x = f"lycoris_{name.replace('.', '_')}."
            w1, w2, alpha = (tensors.get(x + factor) for factor in ("lokr_w1", "lokr_w2", "alpha"))
            rank = dim
            if w2 is None and f"{x}lokr_w2_b" in tensors:
                w2, rank = tensors[f"{x}lokr_w2_a"] @ tensors[f"{x}lokr_w2_b"], tensors[f"{x}lokr_w2_b"].shape[0]
            if w1 is not None and w2 is not None and alpha is not None and rank:
                weights[name] = weight + alpha.item() / rank * torch.kron(w1, w2)
                if f"{x}dora_scale" in tensors:
                    norm = weights[name].norm(dim=1, keepdim=True) + torch.finfo(torch.bfloat16).eps
                    weights[name] *= tensors[f"{x}dora_scale"] / norm
        return weights
    config = file.parent / "adapter_config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    stated = said.get("lora_alpha") or said.get("alpha") or 0
    for key, down in tensors.items():
        module, _, factor = key.partition(".lora_")
        if factor in ("A.weight", "down.weight"):
            up = tensors.get(f"{module}.lora_B.weight", tensors.get(f"{module}.lora_up.weight"))
            alpha = tensors[f"{module}.alpha"].item() if f"{module}.alpha" in tensors else int(stated)
            prefix = next((p for p in ("base_model.model.", "diffusion_model.") if module.startswith(p)), "")
            name = module.removeprefix(prefix).removeprefix("decoder.")
            if name in weights and up is not None:
                weights[name] = weights[name] + (alpha / len(down) if alpha else 1.0) * up @ down
    return weights


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()
