"""The sketch sees the gradient of frozen Linears as an exact SVD would, at the cost it promises."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sidestep.tasks.estimate.sketch import Layout, Sketch, linear_shapes, spectrum, watch
from tests.tasks.train.test_speed import Waits

CPU = torch.device("cpu")


def decaying(out_features: int, in_features: int, decay: float, seed: int) -> torch.Tensor:
    """A matrix [out, in] with singular values 1, 1/2^decay, 1/3^decay, …: what gradients look like."""
    generator = torch.Generator().manual_seed(seed)
    size = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(in_features, size, generator=generator)).Q
    return left * torch.arange(1.0, size + 1) ** -decay @ right.T


def fed(layout: Layout, gradient: torch.Tensor, name: str = "m") -> torch.Tensor:
    """The state after a batch whose gradient is exactly `gradient` [out, in]."""
    sketch = Sketch(layout, CPU)
    sketch.add(name, torch.eye(gradient.shape[1]), gradient.T)
    return sketch.take()


@pytest.mark.parametrize("shape", [(256, 256), (384, 192), (192, 384)])
def test_top_singular_values_agree_with_the_exact_svd_within_two_percent_on_average(shape):
    errors = []
    for seed, decay in itertools.product(range(3), [1.0, 1.5, 2.0]):
        gradient = decaying(*shape, decay, seed)
        layout = Layout({"m": shape}, 32, seed)
        assert not layout.slots["m"].exact
        values = layout.decompose(fed(layout, gradient), "m")[1]
        exact = torch.linalg.svdvals(gradient.double())
        errors.append(((values[:8] - exact[:8]).abs() / exact[:8]).mean())
    assert torch.stack(errors).mean() < 0.02


def test_what_lies_outside_the_sketch_does_not_lift_the_energy_that_it_sees():
    ratios = []
    for seed in range(12):
        gradient, layout = decaying(256, 192, 1.0, seed), Layout({"m": (256, 192)}, 16, seed)
        basis = torch.linalg.qr(gradient.double() @ layout.omega[192].double()).Q  # all that the sketch can see
        values = layout.decompose(fed(layout, gradient), "m")[1]
        ratios.append(values.square().sum() / (basis.T @ gradient.double()).square().sum())
    assert torch.stack(ratios).mean() == pytest.approx(1.0, abs=0.03)  # 1.08 without the correction


def test_directions_are_the_singular_directions():
    gradient = decaying(256, 384, 1.5, 0)
    layout = Layout({"m": (256, 384)}, 32, 0)
    left, values, right = layout.decompose(fed(layout, gradient), "m")
    assert left.shape == (256, 32)
    assert right.shape == (384, 32)
    exact_left, _, exact_right = torch.linalg.svd(gradient.double())
    for i in range(3):
        assert (left[:, i] @ exact_left[:, i]).abs() > 0.99
        assert (right[:, i] @ exact_right[i]).abs() > 0.99
        assert torch.isclose(left[:, i] @ gradient.double() @ right[:, i], values[i], rtol=0.02)


@settings(max_examples=20, deadline=None)
@given(out_features=st.integers(1, 40), in_features=st.integers(1, 40), seed=st.integers(0, 99))
def test_small_modules_are_measured_exactly(out_features, in_features, seed):
    layout = Layout({"m": (out_features, in_features)}, 32, seed)
    gradient = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    left, values, right = layout.decompose(fed(layout, gradient), "m")
    assert layout.slots["m"].exact
    assert torch.allclose((left * values) @ right.T, gradient.double(), atol=1e-5)


class Net(nn.Module):
    """Two Linears, one of them twice in a row with a non-linearity, on an input that needs no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 96), nn.Linear(96, 24, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + x


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.requires_grad_(True)
    model.zero_grad()
    model(x).square().sum().backward()
    found = {name: m.weight.grad.clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_model_shows_the_gradients_of_its_weights(recompute):
    torch.manual_seed(0)
    model, x = Net().requires_grad_(False), torch.randn(3, 5, 24)
    layout = Layout(linear_shapes(model, ["first", "second"]), 40, 0)  # wide enough to hold both exactly
    sketch = Sketch(layout, CPU)
    with watch(model, sketch):
        (checkpoint(model, x, use_reentrant=False) if recompute else model(x)).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    state = sketch.take()
    for name, exact in gradients(model, x).items():
        left, values, right = layout.decompose(state, name)
        assert torch.allclose(((left * values) @ right.T).float(), exact, rtol=1e-4, atol=1e-4), name


def test_watching_never_makes_the_host_wait_and_a_take_is_one_transfer(monkeypatch):
    model, x = Net().requires_grad_(False), torch.randn(3, 5, 24)
    sketch = Sketch(Layout(linear_shapes(model, ["first", "second"]), 4, 0), CPU)
    with watch(model, sketch):
        model(x).square().sum().backward()  # the test matrices are on the device from here on
        read: list[str] = []
        for name in ("tolist", "numpy", "cpu", "to"):
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor,
                name,
                lambda self, *a, _o=original, _n=name, **k: (
                    read.append(_n) if "cpu" in (_n, *a) else None,
                    _o(self, *a, **k),
                )[1],
            )
        with Waits() as waits:
            model(x).square().sum().backward()
        assert not waits.seen
        assert not read
        sketch.take()
        assert read == ["to"]


def test_hooks_are_gone_after_watching():
    model = Net().requires_grad_(False)
    with watch(model, Sketch(Layout(linear_shapes(model, ["first"]), 8, 0), CPU)):
        assert model(torch.randn(2, 24)).requires_grad
    assert not model(torch.randn(2, 24)).requires_grad


def test_no_gradient_mode_leaves_the_sketch_empty():
    model = Net().requires_grad_(False)
    sketch = Sketch(Layout(linear_shapes(model, ["first"]), 8, 0), CPU)
    with watch(model, sketch), torch.no_grad():
        model(torch.randn(2, 24))
    assert not sketch.take().any()


def test_sketches_add_up():
    layout = Layout({"m": (300, 200)}, 16, 1)
    one, two = decaying(300, 200, 1, 1), decaying(300, 200, 1, 2)
    together = fed(layout, one + two)
    assert torch.allclose(fed(layout, one) + fed(layout, two), together, atol=1e-5)


def test_taking_the_state_empties_it():
    layout = Layout({"m": (8, 8)}, 4, 0)
    sketch = Sketch(layout, CPU)
    sketch.add("m", torch.ones(1, 8), torch.ones(1, 8))
    assert sketch.take().any()
    assert not sketch.take().any()


def test_the_seed_decides_the_random_matrices():
    same, other = Layout({"m": (64, 4096)}, 4, 7), Layout({"m": (64, 4096)}, 4, 8)
    again = Layout({"m": (64, 4096)}, 4, 7)
    assert torch.equal(same.omega[64], again.omega[64])
    assert not torch.equal(same.omega[64], other.omega[64])


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_a_round_of_half_precision_batches_keeps_the_leading_values(state):
    layout = Layout({"m": (300, 200)}, 16, 1)
    gradient = decaying(300, 200, 1, 1)
    sketch = Sketch(layout, CPU, state)
    for _ in range(8):
        sketch.add("m", torch.eye(200, dtype=torch.bfloat16), gradient.T.bfloat16() / 8)
    exact = layout.decompose(fed(layout, gradient), "m")[1]
    taken = sketch.take()
    assert taken.dtype == torch.float32
    assert torch.allclose(layout.decompose(taken, "m")[1][:8], exact[:8], rtol=0.02)


def test_noise_is_not_confirmed_but_signal_is():
    layout = Layout({"m": (128, 96)}, 96, 0)
    generator = torch.Generator().manual_seed(0)
    signal = 6 * decaying(128, 96, 3, 5)

    def half(with_signal: bool) -> torch.Tensor:
        return fed(layout, torch.randn(128, 96, generator=generator) / 20 + (signal if with_signal else 0))

    noisy = spectrum(layout, "m", half(False), half(False))
    clear = spectrum(layout, "m", half(True), half(True))
    assert sum(noisy.confirmed) < 0.1 * sum(noisy.energy)
    assert abs(noisy.agreement) < 0.1
    assert clear.agreement > 0.5
    assert clear.confirmed[0] == pytest.approx(float(signal.square().sum()), rel=0.2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 50), length=st.integers(1, 200))
def test_values_never_rise_and_go_on_past_the_sketch(seed, length):
    layout = Layout({"m": (48, 64)}, 8, seed)
    found = spectrum(layout, "m", fed(layout, decaying(48, 64, 1, seed)), fed(layout, decaying(48, 64, 1, seed + 1)))
    values = found.values(length)
    assert len(values) == length
    assert all(a >= b >= 0 for a, b in itertools.pairwise(values))
