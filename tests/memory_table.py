"""The table of docs/memory.md: what the planner advises for each card, size and song length.

`python -m tests.memory_table` rewrites it; a test compares.
"""

from pathlib import Path

import torch

from sidestep.acestep.device import GIB, GpuMemory
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.plan import Planner
from sidestep.variants import official_config

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
CARDS, SECONDS, TOKENS = (8, 12, 16, 24), (60, 240, 480), 512
INTRODUCTION = """# Memory

```
uv run train.py plan --model-variant xl-turbo --vram 8
```

says what a run takes, what each setting would save and the mildest settings that fit, without a checkpoint and without
a GPU. `--recompute-as-needed` (not run on a GPU here yet) recomputes no more layers than the GPU's free memory needs,
which is as fast as fits; the default is all of them.

What waits in the computer's own memory is counted too, and a run is refused where there is less of it: streamed blocks
(`--swap-blocks`), activations (`--offload-activations`), and the trained model's weights while another one plays
(`--preview-variant`).

## Peaks

The most that the tensors of a training step take, by the planner, for rank 64, 8-bit AdamW, batch 1, 512 condition
tokens. `tests/tasks/plan/test_plan.py` holds them and compares the planner with measured steps on the CPU.

| model | songs of | base | peak |
|---|---|---|---|
| 2B | 240 s | bf16 | 4.0 GiB |
| 2B | 60 s windows | bf16 | 3.5 GiB |
| 2B | 60 s windows | int8 | 2.2 GiB |
| XL | 60 s windows | bf16 | 8.8 GiB |
| XL | 60 s windows | int8 | 5.1 GiB |
| XL | 60 s windows | nf4 | 3.3 GiB |

## What fits on which card

The settings that the planner adds so that a step fits, for songs of so many seconds with 512 condition tokens. The
defaults are a LoRA of rank 64 on attention, batch 1, AdamW and all layers recomputed. `plan`, the check before a run
and `--vram-profile` rest on the same figures. Of every card 0.8 GiB or 8 % stays free, whichever is more; a context
(0.5 GiB) and the allocator's slack (6 %) are added to the tensors. Both were assumed: no GPU was at hand yet.

Settings come in the order of their cost: first what changes next to nothing (8-bit AdamW, int8 base), then what costs
time (`--offload-activations`, `--swap-blocks`), last what costs quality (nf4 base, windows). What an earlier setting
did not need to give is taken back.

| model | songs | card | add | needed then | or faster, with what is spare |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The page as it must be."""
    rows = []
    for model, variant in (("2B", "turbo"), ("XL", "xl-turbo")):
        for seconds in SECONDS:
            planner = Planner(official_config(variant) or {}, torch.bfloat16, seconds, TOKENS)
            asked = TrainConfig(checkpoint_dir=Path(), dataset_dir=Path(), output_dir=Path())
            for card in CARDS:
                usable = GpuMemory(card * GIB, "").usable
                best = planner.mildest(asked, usable)
                assert best is not None
                faster = planner.faster(asked, best.config, usable)
                added = " ".join(f"`{flag}`" for flag in best.flags)
                more = " ".join(f"`{flag}`" for flag in faster.flags) if faster else ""
                needed = f"{best.needed / GIB:.1f} GiB"
                rows.append(f"| {model} | {seconds} s | {card} GB | {added or 'nothing'} | {needed} | {more} |")
    return INTRODUCTION + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
