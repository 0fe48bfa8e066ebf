"""The average of adapters: of what they do to the weights, held to dense matrices."""

from dataclasses import replace

import pytest
import torch

from sidestep.adapters.adapter import Adapter, change_of, rotation
from sidestep.adapters.average import average, low_rank, product_norm
from sidestep.errors import UserError

NAMES = ("epoch_0001", "epoch_0002", "epoch_0003")
MODULE = "layers.0.self_attn.q_proj"


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, rank: int = 3, **more: torch.Tensor) -> Adapter:
    factors = {"lora_A": noise(rank, 12, seed=seed), "lora_B": noise(10, rank, seed=seed + 50)}
    return Adapter("lora", {MODULE: factors | more}, {MODULE: rank}, {"base_model": "turbo"})


def lokr(seed: int, is_low_rank: bool = False) -> Adapter:
    w2 = {"lokr_w2": noise(5, 6, seed=seed + 50)}
    if is_low_rank:
        w2 = {"lokr_w2_a": noise(5, 2, seed=seed + 50), "lokr_w2_b": noise(2, 6, seed=seed + 90)}
    return Adapter("lokr", {MODULE: {"lokr_w1": noise(2, 3, seed=seed), **w2}}, {MODULE: 2})


def loha(seed: int) -> Adapter:
    shapes = {"hada_w1_a": (10, 2), "hada_w1_b": (2, 12), "hada_w2_a": (10, 2), "hada_w2_b": (2, 12)}
    return Adapter(
        "loha", {MODULE: {k: noise(*s, seed=seed + i) for i, (k, s) in enumerate(shapes.items())}}, {MODULE: 2}
    )


def oft(seed: int) -> Adapter:
    return Adapter("oft", {MODULE: {"oft_R": 0.1 * noise(3, 6, seed=seed)}}, {MODULE: 4})


def change(adapter: Adapter) -> torch.Tensor:
    factors = {k: t.double() for k, t in adapter.modules[MODULE].items()}
    if "oft_R" in factors:
        return rotation(factors["oft_R"]) - torch.eye(12)
    if "lokr_w2" in factors:
        return torch.kron(factors["lokr_w1"], factors["lokr_w2"])
    return change_of(factors).double()


def mean_change(adapters: list[Adapter]) -> torch.Tensor:
    return torch.stack([change(adapter) for adapter in adapters]).mean(dim=0)


def test_a_lora_and_its_mirror_image_do_the_same_and_so_does_their_average():
    one = lora(0)
    other = replace(one, modules={MODULE: {k: -t for k, t in one.modules[MODULE].items()}})
    made = average([one, other], NAMES[:2])
    torch.testing.assert_close(change(made.adapter), change(one))
    assert made.distance < 1e-6
    assert made.by_factors == pytest.approx(1.0)  # the means of the factors are zero: nothing would be left
    assert made.adapter.metadata == {"base_model": "turbo", "averaged": list(NAMES[:2])}
    assert {k: (t.shape, t.dtype) for k, t in made.adapter.modules[MODULE].items()} == {
        k: (t.shape, t.dtype) for k, t in one.modules[MODULE].items()
    }


def test_the_average_of_loras_is_the_nearest_of_their_rank_to_the_mean_of_their_products():
    adapters = [lora(seed) for seed in range(3)]
    exact = mean_change(adapters)
    u, s, v = torch.linalg.svd(exact)
    made = average(adapters, NAMES)
    torch.testing.assert_close(change(made.adapter), u[:, :3] @ torch.diag(s[:3]) @ v[:3], atol=1e-5, rtol=0)
    assert made.distance == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)
    means = [torch.stack([a.modules[MODULE][k].double() for a in adapters]).mean(dim=0) for k in ("lora_B", "lora_A")]
    assert made.by_factors == pytest.approx(float((means[0] @ means[1] - exact).norm() / exact.norm()), rel=1e-4)
    assert made.distance < made.by_factors


def test_products_are_averaged_within_several_modules_and_figures_are_of_all():
    each = [lora(0), lora(1)]
    other = "layers.0.mlp.up_proj"
    both = [replace(a, modules={MODULE: a.modules[MODULE], other: lora(7).modules[MODULE]}) for a in each]
    made, alone = average(both, NAMES[:2]), average(each, NAMES[:2])
    torch.testing.assert_close(change(made.adapter), change(alone.adapter))
    assert 0 < made.distance < alone.distance  # the second module is the same in both


def test_the_average_of_kronecker_products_is_the_nearest_one():
    one = lokr(0)
    w1, w2 = one.modules[MODULE].values()
    other = replace(one, modules={MODULE: {"lokr_w1": -2 * w1, "lokr_w2": -w2 / 2}})
    made = average([one, other], NAMES[:2])
    torch.testing.assert_close(change(made.adapter), change(one), atol=1e-5, rtol=0)
    assert made.distance < 1e-6 < made.by_factors
    adapters = [lokr(seed) for seed in range(3)]
    exact, made = mean_change(adapters), average(adapters, NAMES)
    assert made.distance == pytest.approx(float((change(made.adapter) - exact).norm() / exact.norm()), rel=1e-4)
    factors = [torch.stack([a.modules[MODULE][k] for a in adapters]).mean(dim=0) for k in ("lokr_w1", "lokr_w2")]
    by_factors = torch.kron(*factors).double()
    assert made.by_factors == pytest.approx(float((by_factors - exact).norm() / exact.norm()), rel=1e-4)
    assert made.distance < made.by_factors


def test_a_low_rank_part_of_a_kronecker_product_stays_one():
    adapters = [lokr(seed, is_low_rank=True) for seed in range(2)]
    made = average(adapters, NAMES[:2])
    assert {k: tuple(t.shape) for k, t in made.adapter.modules[MODULE].items()} == {
        "lokr_w1": (2, 3),
        "lokr_w2_a": (5, 2),
        "lokr_w2_b": (2, 6),
    }
    same = average([adapters[0]] * 2, NAMES[:2])
    torch.testing.assert_close(
        change_of(same.adapter.modules[MODULE]), change_of(adapters[0].modules[MODULE]), atol=1e-5, rtol=0
    )


def test_magnitudes_are_averaged_beside_the_products():
    adapters = [lora(seed, magnitude=noise(10, seed=seed + 20)) for seed in range(2)]
    made = average(adapters, NAMES[:2]).adapter
    mean = torch.stack([a.modules[MODULE]["magnitude"] for a in adapters]).mean(dim=0)
    torch.testing.assert_close(made.modules[MODULE]["magnitude"], mean)
    assert made.title == "DoRA"


@pytest.mark.parametrize("make", [loha, oft])
def test_kinds_without_a_nearest_one_average_their_factors_and_say_how_far_off_that_is(make):
    adapters = [make(seed) for seed in (0, 10)]
    made, exact = average(adapters, NAMES[:2]), mean_change(adapters)
    distance = float((change(made.adapter) - exact).norm() / exact.norm())
    assert distance > 1e-3
    assert made.distance == pytest.approx(distance, rel=1e-3)
    assert made.by_factors == made.distance
    assert average([adapters[0]] * 2, NAMES[:2]).distance < 1e-6


OTHERS = [
    (lokr(1), "one is a LoKr, the other a LoRA"),
    (lora(1, magnitude=torch.ones(10)), "one is a DoRA, the other a LoRA"),
    (lora(1, rank=4), "has rank 4 in one and 3 in the other"),
    (replace(lora(1), modules={"layers.1.self_attn.q_proj": lora(1).modules[MODULE]}), "they change other modules"),
]


@pytest.mark.parametrize(("other", "why"), OTHERS, ids=["kind", "magnitudes", "rank", "modules"])
def test_what_differs_in_kind_or_rank_has_no_average(other, why):
    with pytest.raises(UserError, match=f"epoch_0002 and epoch_0001 cannot be averaged: .*{why}"):
        average([lora(0), other], NAMES[:2])


def test_a_product_of_lower_rank_than_asked_is_filled_up_with_nothing():
    left, right = noise(4, 1, seed=0).double(), noise(1, 5, seed=1).double()
    near = low_rank(left, right, 3)
    assert [tuple(t.shape) for t in near] == [(4, 3), (3, 5)]
    torch.testing.assert_close(near[0] @ near[1], left @ right)
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()))
