"""docs/interop.md, made from the table in `adapters/programs.py`. `python -m tests.interop_page` writes it."""

from pathlib import Path

from sidestep.adapters.programs import OTHERS, WAYS, Way
from sidestep.tasks.sample import LEAST_FRAMES, described, sampling_for
from sidestep.variants import detect

PAGE = Path(__file__).parent.parent / "docs" / "interop.md"
PROGRAMS = list(WAYS["LoRA"])
TEXT = """# Which program makes what of an adapter

Made by `python -m tests.interop_page` from `sidestep/adapters/programs.py`; `tests/adapters/test_programs.py` holds
it against peft, diffusers and LyCORIS themselves and against the rules of ComfyUI, acestep.cpp and the app's strength
slider. `inspect` says the same of any file.

## What Side-Step writes

Which form a program applies [exactly as it was trained](guarantees.md#music), at strength 1. `final/` is the folder
that a run leaves; a format is one of `export`'s; merged weights sound the same everywhere.

{ways}

{notes}

By the rules of the app's slider a strength of 0 is the base model for a LoRA and a LoKr; it leaves the magnitudes of a
DoRA and of a weight-decomposed LoKr in place, and all of a LoHa and of an OFT. What unload leaves in place is not the
same in every version of the app, for a LoRA neither: to be sure of the base model, start the app again.

What that costs: nothing for a LoRA. acestep.cpp knows one alpha for all modules, divides it by each module's own rank,
and takes that rank where no alpha is stated. So `adapter_config.json` of a LoRA whose ranks differ (a rank map) states
each module's alpha in `alpha_pattern` and has no `lora_alpha`. Factors of a LoKr, which are small, stand twice in
`adapter_model.safetensors`.

## What other programs write

Side-Step reads all of these wherever an adapter is given. `yes`: read at the strength that the file states.

{others}

Whether ai-toolkit and SimpleTuner go on from a `final/` is not promised: it was not tried, and neither of them writes
the names that stand in it.

## Why the same adapter sounds different: defaults

Compare with the same steps, shift, guidance, seed and prompt. What each takes when nothing is said:

{defaults}

Side-Step and the app fill clips under 5.12 s ({frames} frames) up for the model and cut off what it made there;
diffusers does not. Training takes songs and windows at their own length, also under 5.12 s: what the model makes of
the frames that are cut off is not known beforehand, so no filling would be what it meets when it makes music. Windows
of `--chunk-duration 6` and more are lengths that every program computes. All send the mask value 1 for text to music.
"""


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The whole text of docs/interop.md."""
    said: list[str] = []

    def cell(way: Way) -> str:
        form = "`final/`" if way.is_final else f"`--format {way.form}`"
        if not way.words:
            return form
        if way.words not in said:
            said.append(way.words)
        return f"{form} ({said.index(way.words) + 1})"

    ways = table(["kind", *PROGRAMS], [[kind, *map(cell, row.values())] for kind, row in WAYS.items()])
    others = [
        [origin, names, *("yes" if p in readers else "no" for p in PROGRAMS)]
        for origin, (names, readers) in OTHERS.items()
    ]
    ours = [
        [f"Side-Step, {name}", described(sampling_for(detect({"model_version": name}))), "off"]
        for name in ("turbo", "base", "sft")
    ]
    theirs = [
        ["ACE-Step's app, turbo", "8 steps, shift 3, no guidance", "on once the language model is loaded"],
        ["ACE-Step's app, base", "32 steps, shift 3, guidance 7", "on once the language model is loaded"],
        ["ACE-Step's app, sft", "50 steps, shift 3, guidance 7", "on once the language model is loaded"],
        ["its HTTP API", "8 steps", "off"],
        ["its Python parameters", "8 steps, shift 1", "as asked"],
        ["diffusers", "8 steps for every variant", "has none"],
        ["ComfyUI", "as the nodes of the workflow are set", "as the nodes are set"],
    ]
    return TEXT.format(
        ways=ways,
        notes="\n".join(f"{number}. {words}" for number, words in enumerate(said, 1)),
        others=table(["file of", "its names", *PROGRAMS], others),
        defaults=table(["front end", "sampling", "thinking mode"], ours + theirs),
        frames=LEAST_FRAMES,
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
