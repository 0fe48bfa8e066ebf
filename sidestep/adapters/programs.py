"""At which strength each program applies an adapter file as it is: acestep-facts §5, for files of any origin."""

from dataclasses import dataclass

from sidestep.adapters.keys import spelling
from sidestep.adapters.read import DIFFUSERS_HEADER, LOKR_WEIGHTS, PEFT_CONFIG, Found, lora_rank

COMFYUI_NAMES = ("base_model.model.layers.", "diffusion_model.decoder.layers.", "lycoris_layers_", "lora_unet_decoder_layers_")


@dataclass(frozen=True)
class Applied:
    """What a program does with a file. `strength`: least and greatest of its modules, 1 being what the file states; None: not read."""

    program: str
    strength: tuple[float, float] | None
    note: str = ""

    def __str__(self) -> str:
        if self.strength is None:
            return "not read"
        low, high = self.strength
        return f"{low:g}" if abs(high - low) < 1e-6 * max(abs(low), abs(high), 1) else f"{low:g} to {high:g}"


def applied_by_each(found: Found, keys: list[str]) -> list[Applied]:
    """How ACE-Step's app, ComfyUI, diffusers and Side-Step apply a file. keys: its tensor names."""
    return [Applied("Side-Step", (1.0, 1.0)), _app(found), _comfyui(found, keys), _diffusers(found, keys)]


def _ratio(found: Found, scales: dict[str, float]) -> tuple[float, float]:
    ratios = [scales[name] / stated if (stated := found.scale(name)) else 1.0 for name in found.modules]
    return min(ratios), max(ratios)


def _app(found: Found) -> Applied:
    program = "ACE-Step's app"
    if found.config:
        if (found.path.parent / LOKR_WEIGHTS).is_file():
            return Applied(program, (1.0, 1.0), f"takes {LOKR_WEIGHTS} beside it")
        return Applied(program, (1.0, 1.0), f"alpha and rank from {PEFT_CONFIG}")
    if found.kind == "lokr" and ("lokr_config" in found.header or found.path.name == LOKR_WEIGHTS):
        if "lokr_config" not in found.header:
            return Applied(program, None, "there is no lokr_config in its header: the app would guess the shapes")
        if found.stated_by != "lokr_config":
            return Applied(program, (1.0, 1.0), "full matrices")
        scales = {name: found.stated.get(name, 1.0) for name in found.modules}
        return Applied(program, _ratio(found, scales), "linear_alpha / linear_dim of lokr_config; alpha tensors are not used")
    return Applied(program, None, f"needs a folder with {PEFT_CONFIG}: export --format peft")


def _comfyui(found: Found, keys: list[str]) -> Applied:
    if found.kind == "oft":
        return Applied("ComfyUI", None, "its OFT is another one: export --format merged")
    foreign = [key for key in keys if not key.startswith(COMFYUI_NAMES)]
    if foreign:
        return Applied("ComfyUI", None, f"does not know names such as {foreign[0]}: export --format comfyui")
    if any("magnitude" in key for key in keys):
        return Applied("ComfyUI", (1.0, 1.0), "without the magnitudes, so not as trained: export --format comfyui --base CHECKPOINT_DIR")
    if any(key.endswith(".dora_scale") for key in keys):
        return Applied("ComfyUI", (1.0, 1.0), "magnitudes over other norms, so not as trained: export --format comfyui --base CHECKPOINT_DIR")
    scales = {}
    for name, factors in found.modules.items():
        rank = lora_rank(factors)
        scales[name] = found.alphas[name] / rank if name in found.alphas and rank else 1.0
    return Applied("ComfyUI", _ratio(found, scales), "alpha tensors" if found.alphas else "no alpha tensors: 1 · up · down")


def _diffusers(found: Found, keys: list[str]) -> Applied:
    if found.kind != "lora":
        return Applied("diffusers", None, "takes LoRA and DoRA only: export --format merged")
    if found.alphas:
        return Applied("diffusers", None, "refuses alpha tensors: export --format diffusers")
    spellings = {spelling(key) for key in keys}
    if spellings == {"base_model.model."} and not any("q_proj" in key or "k_proj" in key for key in keys):
        return Applied("diffusers", None, "loads nothing from original names without a q_proj or k_proj: export --format diffusers")
    if not spellings <= {"base_model.model.", "transformer."} or len(spellings) > 1:
        return Applied("diffusers", None, "does not know these names: export --format diffusers")
    if DIFFUSERS_HEADER in found.header:
        return Applied("diffusers", (1.0, 1.0), f"alpha and rank from {DIFFUSERS_HEADER} in the header")
    return Applied("diffusers", _ratio(found, dict.fromkeys(found.modules, 1.0)), f"no {DIFFUSERS_HEADER}: 1 · B · A")
