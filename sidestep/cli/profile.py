"""`--vram-profile`: which of the presets for cards a call starts from."""

from sidestep.cli.parser import Call
from sidestep.errors import UserError
from sidestep.presets import PROFILES, profile_for
from sidestep.variants import OFFICIAL_FOLDERS
from sidestep.workspace import find_models


def profile_of(call: Call) -> tuple[str, str]:
    """(preset, why) for a call with `--vram-profile`. Raises UserError where there is nothing to choose by."""
    if call.preset:
        raise UserError(f"--preset {call.preset} and --vram-profile {call.vram_profile} are both given.", "Leave one of them away.")
    is_xl = _is_xl(call)
    if call.vram_profile != "auto":
        return profile_for(PROFILES[call.vram_profile], is_xl), "asked for"
    gib, card = call.typed.get("vram"), "--vram"
    if not gib:
        from sidestep.memory.device import GIB, this_device  # here, so that no other call waits for torch

        device = this_device()
        if device is None:
            raise UserError("--vram-profile auto: no GPU was found here.", f"Name a profile: --vram-profile {'|'.join(PROFILES)}")
        gib, card = device.bytes / GIB, device.source
    return profile_for(gib, is_xl), f"{card} has {gib:.0f} GiB"


def _is_xl(call: Call) -> bool:
    variant = call.typed.get("model_variant", "turbo")
    if variant in OFFICIAL_FOLDERS or "checkpoint_dir" not in call.typed:
        return variant.startswith("xl-")
    return any(model.name == variant and model.variant.startswith("xl-") for model in find_models(call.typed["checkpoint_dir"]))
