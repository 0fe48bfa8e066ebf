"""The planner's peaks are those of the real step, and its advice fits."""

import dataclasses
import json

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from sidestep.acestep.attention import use_attention
from sidestep.acestep.recompute import recompute_layers
from sidestep.adapters.attach import attach
from sidestep.config import PlanConfig, TrainConfig
from sidestep.data.dataset import Batch
from sidestep.data.samples import Record, save_record
from sidestep.errors import UserError
from sidestep.events import silent
from sidestep.memory.device import GIB, Device, on_device
from sidestep.memory.gate import require_fit_on
from sidestep.memory.passes import first_pass_peak, second_pass_peak
from sidestep.memory.plan import plan
from sidestep.memory.step import Shape, StepModel, optimizer_bytes, step_peak
from sidestep.memory.tracker import LiveBytes
from sidestep.presets import find
from sidestep.training.objective import ConditionMask, Objective, TrainingLaw
from sidestep.variants import official_config

BF16 = torch.bfloat16
SMALL = official_config("base") | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 64,
}


def config_of(tmp_path, **changes) -> TrainConfig:
    return TrainConfig(checkpoint_dir=tmp_path, dataset_dir=tmp_path / "data", output_dir=tmp_path / "run", **changes)


def measured_peak(sizes: dict, config: TrainConfig, shape: Shape, dtype: torch.dtype) -> int:
    """Peak bytes of a second optimizer step that really computes."""
    names = AceStepTransformer1DModel.__init__.__wrapped__.__code__.co_varnames
    decoder = AceStepTransformer1DModel(**{k: v for k, v in sizes.items() if k in names}).to(dtype)
    mask = ConditionMask()
    mask.install(decoder)
    use_attention(decoder, config.attention, torch.device("cpu"), dtype)
    if config.gradient_checkpointing:
        recompute_layers(decoder, config.recompute_layers)
    model = attach(decoder, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    channels, width = sizes["audio_acoustic_hidden_dim"], sizes["hidden_size"]
    silence, null = torch.zeros(1, 15000, channels), torch.zeros(1, 1, width, dtype=dtype)
    objective = Objective(config, TrainingLaw("", lambda u: u, 0.0, ""), silence, null, mask)
    latents = torch.randn(shape.batch, shape.frames, channels)
    conditions = torch.randn(shape.batch, shape.tokens, width).to(dtype)
    batch = Batch(latents, conditions, None, None, ("",) * shape.batch, tuple(range(shape.batch)))
    memory = LiveBytes()
    memory.count([*model.parameters(), *model.buffers(), silence, null, latents, conditions])
    with memory:
        for _ in range(2):
            memory.restart_peak()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                weighted, _, _ = objective(model, batch, 0, shape.batch)
            weighted.sum().backward()
            del weighted
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return memory.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({}, Shape(1, 500, 60), torch.float32),
        ({"gradient_checkpointing": False}, Shape(1, 500, 60), torch.float32),
        ({"recompute_layers": 3}, Shape(1, 1000, 200), torch.float32),
        ({"rank": 16, "target_mlp": True}, Shape(2, 500, 60), torch.float32),
        ({"attention": "sdpa", "gradient_checkpointing": False}, Shape(1, 1000, 60), torch.float32),
        ({"rank": 128}, Shape(1, 1000, 60), BF16),
    ],
)
def test_the_predicted_peak_is_within_5_percent_of_the_measured_one(tmp_path, changes, shape, dtype):
    config = config_of(tmp_path, **changes)
    measured = measured_peak(SMALL, config, shape, dtype)
    predicted = step_peak(SMALL, config, shape, dtype).total
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}, {"recompute_layers": 10}])
def test_counting_blocks_gives_what_running_all_of_them_gives(tmp_path, changes, monkeypatch):
    config, shape = config_of(tmp_path, **changes), Shape(1, 1500, 500)
    counted = StepModel(official_config("turbo"), config, shape, BF16).peak(config)
    monkeypatch.setattr("sidestep.memory.step.FEW_BLOCKS", 48)
    whole = StepModel(official_config("turbo"), config, shape, BF16).peak(config)
    assert counted.total == pytest.approx(whole.total, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "seconds", "base_precision", "limit_gib"),
    [
        ("turbo", 240, "auto", 5.0),
        ("turbo", 60, "auto", 3.6),
        ("turbo", 60, "int8", 2.6),
        ("xl-turbo", 60, "auto", 9.5),
        ("xl-turbo", 60, "int8", 6.0),
        ("xl-turbo", 60, "nf4", 4.5),
    ],
)
def test_promised_peaks_are_kept(tmp_path, variant, seconds, base_precision, limit_gib):
    config = config_of(tmp_path, optimizer_type="adamw8bit", base_precision=base_precision)
    peak = step_peak(official_config(variant), config, Shape(1, 25 * seconds, 512), BF16)
    assert peak.total <= limit_gib * GIB


@pytest.mark.slow
def test_preprocessing_stays_below_its_promises():
    assert first_pass_peak(BF16, 240) <= 3 * GIB
    assert second_pass_peak(official_config("turbo"), BF16) <= 1.6 * GIB
    assert second_pass_peak(official_config("xl-turbo"), BF16) <= 1.6 * GIB


def test_the_8bit_state_has_bitsandbytes_own_size():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.zeros(64, 256)), torch.nn.Parameter(torch.zeros(10, 10))]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tables = {"qmap1", "qmap2"}  # one pair for all parameters together
    real = sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if isinstance(t, torch.Tensor) and name not in tables and t.numel() > 1)
    assert optimizer_bytes("adamw8bit", parameters) == real


def test_live_bytes_counts_a_storage_once_and_forgets_it():
    with LiveBytes() as memory:
        x = torch.empty(1000, dtype=torch.float32)
        view = x[10:]
        assert memory.now == 4096
        del x
        assert memory.now == 4096
        del view
        assert memory.now == 0
        assert memory.peak == 4096


@pytest.mark.slow
def test_a_plan_for_xl_on_8_gib_finds_settings_that_fit():
    answer = plan(PlanConfig(model_variant="xl-turbo", vram=8), silent)
    assert answer.fits is False
    assert answer.best is not None
    assert answer.best.needed <= 8 * GIB
    assert "--base-precision int8" in answer.best.flags
    for lever in answer.levers:
        assert lever.needed <= answer.asked.needed


def test_a_model_of_unknown_size_needs_its_files():
    with pytest.raises(UserError, match="its sizes are not known"):
        plan(PlanConfig(model_variant="my-finetune", vram=8), silent)


@pytest.fixture
def small_run(tmp_path, checkpoints) -> TrainConfig:
    save_record(tmp_path / "data" / "song.pt", Record(torch.zeros(100, 8), torch.zeros(30, 32), {}))
    return TrainConfig(checkpoint_dir=checkpoints, dataset_dir=tmp_path / "data", output_dir=tmp_path / "run", rank=4)


def test_a_run_that_cannot_fit_is_refused_with_settings_or_the_override(small_run):
    tiny = Device(GIB // 4, "a very small card")
    with pytest.raises(UserError, match="would run out of memory") as caught:
        require_fit_on(tiny, small_run, silent)
    assert "--even-if-it-does-not-fit" in caught.value.fix
    events = []
    require_fit_on(tiny, dataclasses.replace(small_run, even_if_it_does_not_fit=True), events.append)
    require_fit_on(Device(8 * GIB, "a card"), small_run, events.append)
    assert [event.what for event in events] == ["memory", "memory"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comfortable", "standard", "tight", "minimal"])
@pytest.mark.parametrize("variant", ["turbo", "xl-turbo"])
def test_each_profile_fits_the_smallest_card_it_names(tmp_path, name, variant):
    """2B with whole 240 s songs; XL with whole songs from 16 GiB on, below that with 60 s windows."""
    gib = {"comfortable": 24, "standard": 16, "tight": 12, "minimal": 8}[name]
    settings = {
        k: v
        for k, v in find(f"{name}_xl" if name == "minimal" and variant == "xl-turbo" else name).values.items()
        if k in {f.name for f in dataclasses.fields(TrainConfig)}
    }
    planner_config = config_of(tmp_path, **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    seconds = 240 if variant == "turbo" or gib >= 16 else 60
    peak = step_peak(official_config(variant), planner_config, Shape(planner_config.batch_size, 25 * seconds, 512), BF16)
    assert on_device(peak.total) <= gib * GIB, json.dumps(dataclasses.asdict(peak))
