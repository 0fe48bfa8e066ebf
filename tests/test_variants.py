"""What a checkpoint's config and name say: its law, the shift of turbo's timesteps, and signs that contradict."""

import pytest

from sidestep.variants import detect

TURBO, BASE = {"is_turbo": True, "model_version": "turbo"}, {"is_turbo": False, "model_version": "base"}


@pytest.mark.parametrize(
    ("config", "folder", "shift", "why"),
    [
        (TURBO, "acestep-v15-turbo", 3, "turbo's own"),
        (TURBO, "acestep-v15-turbo-shift1", 1, "acestep-v15-turbo-shift1"),
        (TURBO, "acestep-v15-turbo-shift2", 2, "the folder is"),
        (TURBO, "acestep-v15-turbo-shift3", 3, "the folder is"),
        (TURBO, "acestep-v15-turbo-fix-inst-shift3", 3, "the folder is"),
        (TURBO, "my_turbo_SHIFT-2.5", 2.5, "the folder is"),
        (TURBO, "acestep-v15-turbo-continuous", 3, "any shift from 1 to 5"),
        ({"is_turbo": True, "model_version": "turbo-shift1"}, "acestep-v15-turbo-shift3", 1, "model_version is"),
        ({"is_turbo": True, "model_version": "turbo-continuous"}, "renamed", 3, "model_version is"),
        (TURBO, "gearshift", 3, "turbo's own"),
        (TURBO, "ACE-Step-Turbo-CONTINUOUS", 3, "any shift from 1 to 5"),
    ],
)
def test_the_shift_is_what_the_config_names_else_the_folder(config, folder, shift, why):
    variant = detect(config, folder)
    assert variant.shift == shift
    assert why in variant.shift_reason


@pytest.mark.parametrize(
    ("config", "folder", "signs"),
    [
        (TURBO, "acestep-v15-turbo", ()),
        (BASE, "acestep-v15-base-sft-fix-inst", ()),  # one law
        (BASE, "acestep-v15-turbo", ()),  # a fine-tune is what its config says
        (TURBO, "acestep-v15-merge-base-turbo", ("is_turbo=true", "acestep-v15-merge-base-turbo")),
        (BASE, "sft_turbo_0.5", ("is_turbo=false", "sft_turbo_0.5")),
        (TURBO, "acestep-v15-sft-merge", ("is_turbo=true", "acestep-v15-sft-merge")),
        (BASE, "acestep-v15-sft-merge", ()),  # base and sft follow one law
        ({"is_turbo": True, "model_version": "sft"}, "x", ("is_turbo=true", "model_version is 'sft'")),
        ({"is_turbo": False, "model_version": "turbo-xyz"}, "x", ("is_turbo=false", "model_version is 'turbo-xyz'")),
        (TURBO, "turbocharged-baseline", ()),  # whole words
    ],
)
def test_signs_of_both_laws_are_a_doubt(config, folder, signs):
    doubt = detect(config, folder).doubt
    assert bool(doubt) == bool(signs)
    assert all(sign in doubt for sign in signs)


def test_a_typed_mode_settles_a_doubt_and_leaves_a_clear_variant_alone():
    merged = detect(BASE, "base-turbo")
    assert merged.settled("discrete").timestep_mode == "discrete"
    assert merged.settled("discrete").cfg_ratio == 0
    assert merged.settled("logit-normal").cfg_ratio == 0.15
    assert not merged.settled("discrete").doubt
    assert detect(TURBO, "turbo").settled("logit-normal").timestep_mode == "discrete"


@pytest.mark.parametrize("word", ["merge", "merged", "mix", "mixed", "blend", "soup", "ta"])
def test_what_people_call_a_merge_is_one_and_names_of_songs_are_none(word):
    assert detect(TURBO, f"acestep-v15-base-{word}").doubt
    assert not detect(TURBO, f"acestep-v15-base-{word}s-of-mine").doubt


def test_the_law_of_a_model_without_shifts_has_the_figures_of_its_config():
    told = detect(BASE | {"timestep_mu": 0.25, "timestep_sigma": 1.5})
    assert (told.timestep_mu, told.timestep_sigma) == (0.25, 1.5)
    assert (detect(BASE).timestep_mu, detect(BASE).timestep_sigma) == (-0.4, 1.0)
    assert detect(TURBO, "x").reason == "config.json says is_turbo=true, model_version='turbo'"
    assert detect(TURBO, "base-turbo").settled("logit-normal").reason == detect(TURBO, "base-turbo").reason
