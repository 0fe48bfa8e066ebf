"""rank_map.json: what is written is read back, what was changed by hand or made for something else is refused."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.adapters import rank_map as maps
from sidestep.adapters.rank_map import Module, RankMap
from sidestep.errors import UserError
from tests.dying import Dies, dying_at

SHAPES = {"layers.0.self_attn.to_q": (8, 8), "layers.0.self_attn.to_k": (4, 8), "layers.0.mlp.up_proj": (16, 8)}


@pytest.fixture
def rank_map() -> RankMap:
    ranks = {"layers.0.self_attn.to_q": 3, "layers.0.self_attn.to_k": 0, "layers.0.mlp.up_proj": 2}
    modules = {
        name: Module(
            shape=SHAPES[name], rank=rank, score=rank * 1.5, confidence=0.5, spectrum=(4.0, 1 / 3), confirmed=(3.0, 0.1)
        )
        for name, rank in ranks.items()
    }
    return RankMap(
        model={"variant": "base", "identity": "abc"},
        data={"fingerprint": "def", "songs": 5},
        settings={"rank": 4, "alpha": 8.0, "focus": "balanced", "seed": 42},
        budget=100,
        spent=3 * 16 + 2 * 24,
        batches=64,
        converged=True,
        agreement=0.95,
        modules=modules,
        curve=((50, 0.5), (96, 0.9)),
    )


def test_a_map_is_read_as_it_was_written(tmp_path, rank_map):
    maps.write(tmp_path / "rank_map.json", rank_map)
    again = maps.read(tmp_path / "rank_map.json")
    assert again.rank_pattern == rank_map.rank_pattern
    assert again.modules["layers.0.mlp.up_proj"].spectrum == pytest.approx((4.0, 1 / 3), rel=1e-5)
    assert replace(again, modules=rank_map.modules) == rank_map
    assert [path.name for path in tmp_path.iterdir()] == ["rank_map.json"]


def test_alpha_over_rank_is_the_same_in_all_modules(rank_map):
    assert rank_map.rank_pattern == {"layers.0.self_attn.to_q": 3, "layers.0.mlp.up_proj": 2}
    assert {rank_map.alpha_pattern[name] / rank for name, rank in rank_map.rank_pattern.items()} == {2.0}
    typed = rank_map.patterns(scale=0.5)
    assert typed["alpha_pattern"] == {"layers.0.self_attn.to_q": 1.5, "layers.0.mlp.up_proj": 1.0}


def test_the_file_shows_patterns_and_excluded_modules(tmp_path, rank_map):
    maps.write(tmp_path / "rank_map.json", rank_map)
    content = json.loads((tmp_path / "rank_map.json").read_text(encoding="utf-8"))
    assert content["excluded"] == ["layers.0.self_attn.to_k"]
    assert content["rank_pattern"] == rank_map.rank_pattern
    assert content["alpha_pattern"] == rank_map.alpha_pattern


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="other"), "not a rank map"),
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c.pop("budget"), "'budget' is missing"),
        (lambda c: c["model"].pop("variant"), "'variant' is missing"),
        (lambda c: c["modules"]["layers.0.mlp.up_proj"].update(rank=-1), "-1"),
        (lambda c: c["modules"]["layers.0.mlp.up_proj"].update(rank=2.5), "2.5"),
        (lambda c: c["modules"]["layers.0.mlp.up_proj"].update(rank=9), "more than its 8 dimensions"),
        (lambda c: c["rank_pattern"].update({"layers.0.mlp.up_proj": 7}), "rank_pattern"),
        (lambda c: c.update(spent=1), "says 1"),
        (lambda c: [m.update(rank=0) for m in c["modules"].values()], "every module"),
        (lambda c: c["settings"].update(rank=0), "above 0"),
    ],
)
def test_a_damaged_map_is_refused_with_what_is_wrong(tmp_path, rank_map, change, said):
    path = tmp_path / "rank_map.json"
    maps.write(path, rank_map)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="rank_map.json") as error:
        maps.read(path)
    assert said in error.value.problem
    assert "--ignore-rank-map" in error.value.fix


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", "\x00"])
def test_a_file_that_is_no_map_is_refused(tmp_path, content):
    (tmp_path / "rank_map.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError):
        maps.read(tmp_path / "rank_map.json")


def test_a_map_is_refused_for_another_variant(rank_map):
    with pytest.raises(UserError, match="variant base, this run uses turbo"):
        maps.check_fit(rank_map, Path("m.json"), "turbo", SHAPES)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**SHAPES, "layers.0.mlp.up_proj": (16, 9)}, "shape"),
        ({k: v for k, v in SHAPES.items() if "mlp" not in k}, "does not have"),
    ],
)
def test_a_map_is_refused_for_other_shapes(rank_map, shapes, said):
    with pytest.raises(UserError, match=said):
        maps.check_fit(rank_map, Path("m.json"), "base", shapes)


def test_a_map_fits_where_it_was_made(rank_map):
    maps.check_fit(rank_map, Path("m.json"), "base", {**SHAPES, "layers.0.more": (1, 1)})
    assert maps.doubts(rank_map, Path("m.json"), "abc", "def") == []


@pytest.mark.parametrize(
    ("identity", "fingerprint", "converged", "said"),
    [("abc", "new", True, "other data"), ("new", "def", True, "other weights"), ("abc", "def", False, "not converged")],
)
def test_what_changed_since_is_a_warning(rank_map, identity, fingerprint, converged, said):
    found = maps.doubts(replace(rank_map, converged=converged), Path("m.json"), identity, fingerprint)
    assert len(found) == 1
    assert said in found[0]


def test_the_summary_says_what_the_map_does(rank_map):
    text = rank_map.summary()
    for word in ("2 modules", "2 to 3", "1 left out", "96 parameters", "5 songs", "base"):
        assert word in text


def test_a_kill_while_a_map_is_replaced_leaves_it_with_its_own_directions(tmp_path, rank_map):
    path, newer, seen = tmp_path / "rank_map.json", replace(rank_map, batches=99), set()
    for change in range(1, 14):
        maps.write_both(path, rank_map, b"old")
        with dying_at(change, tmp_path), contextlib.suppress(Dies):
            maps.write_both(path, newer, b"new")
        is_new = maps.read(path).batches == 99
        assert maps.directions_file(path).read_bytes() == (b"new" if is_new else b"old"), f"change {change}"
        seen.add((is_new, path.with_suffix(maps.NEWER).exists()))
    assert seen == {(False, False), (False, True), (True, True), (True, False)}
    maps.write_both(path, newer, b"again")
    assert maps.directions_file(path).read_bytes() == b"again"
    assert not path.with_suffix(maps.NEWER).exists()
