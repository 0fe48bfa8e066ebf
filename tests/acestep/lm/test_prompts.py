"""Prompts and answers of the language model, byte for byte as the original's."""

import pytest

from sidestep.acestep.lm.prompts import (
    EMPTY_PLAN,
    code_text,
    codes_prompt,
    create_prompt,
    format_prompt,
    negative_prompt,
    parse_answer,
    plan_prompt,
    plan_text,
    turns,
    understand_prompt,
    unquoted,
)


def test_plans_and_prompts_are_those_of_the_original(lm_golden):
    for case in lm_golden["plan"]:
        caption, lyrics = case["caption"], case["lyrics"]
        plan = plan_text(case["metadata"])
        assert plan == case["cot"]
        assert plan_prompt(caption, lyrics) == case["prompt_plan"]
        assert codes_prompt(caption, lyrics, plan) == case["prompt_codes"]
        assert negative_prompt() == negative_prompt(" \n") == case["prompt_codes_negative"]
        assert negative_prompt("noise, hiss") == case["prompt_codes_negative_custom"]


def test_the_other_three_prompts_are_those_of_the_original(lm_golden):
    for case in lm_golden["understand"]:
        assert understand_prompt(case["codes"]) == case["prompt"]
    for case in lm_golden["create"]:
        assert create_prompt(case["query"], case["instrumental"]) == case["prompt"]
    for case in lm_golden["format"]:
        assert format_prompt(case["caption"], case["lyrics"]) == case["prompt"]


def test_nothing_said_is_said_so():
    assert "user\nNO USER INPUT<|im_end|>" in understand_prompt([])
    assert "user\nNO USER INPUT\n\ninstrumental: true<|im_end|>" in create_prompt("  ", True)


def test_answers_good_and_bad_are_read_as_the_original_reads_them(lm_golden):
    for case in lm_golden["parse"]:
        answer = parse_answer(case["raw"], 64_000)
        assert answer.metadata == case["metadata"], case["raw"]
        assert list(answer.codes) == case["code_values"]
        assert answer.lyrics == case["lyrics"]
        plan = plan_text(answer.metadata)
        assert plan == (case["cot_again"] or EMPTY_PLAN)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("'no'", "no"),
        ("'dub: \"heavy\" bass, it''s slow'", 'dub: "heavy" bass, it\'s slow'),
        ('"two\\tparts"', "two\tparts"),
        ("'half", "'half"),
        ("'a' and 'b'", "a' and 'b"),
        ("it's", "it's"),
        ("'", "'"),
    ],
)
def test_quotes_that_yaml_needs_are_not_part_of_the_value(written, meant):
    assert unquoted({"language": written, "bpm": 90}) == {"language": meant, "bpm": 90}


def test_a_value_that_yaml_would_misread_comes_back_as_it_was():
    metadata = {"bpm": 90, "caption": 'dub: "heavy" bass, ' + "it's slow and very long " * 5, "language": "no"}
    metadata["caption"] = metadata["caption"].strip()
    assert unquoted(parse_answer(plan_text(metadata), 64_000).metadata) == metadata


def test_codes_are_written_without_anything_between():
    assert code_text([0, 63_999]) == "<|audio_code_0|><|audio_code_63999|>"
    assert turns("x", "y").endswith("<|im_start|>assistant\n")
