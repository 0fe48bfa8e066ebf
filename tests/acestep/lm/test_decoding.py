"""What the language model writes under its grammars, against the original's constrained decoding."""

import re

import pytest
import torch

from sidestep.acestep.lm.decoding import (
    KEYSCALES,
    CodesGrammar,
    OneOf,
    PlanGrammar,
    Sampling,
    compose,
    only,
    understand,
    write,
    write_codes,
    write_plan,
)
from sidestep.acestep.lm.prompts import FIELDS, code_text, parse_answer, plan_text
from sidestep.metadata import LANGUAGES

GREEDY = Sampling(temperature=0, guidance=1)


def request(case: dict) -> tuple[str, str, str]:
    """(caption, lyrics, plan) of a golden's prompt."""
    user, _, rest = case["prompt"].partition("user\n# Caption\n")[2].partition("\n<|im_end|>\n<|im_start|>assistant\n")
    caption, _, lyrics = user.partition("\n\n# Lyric\n")
    return caption, lyrics, rest.removesuffix("\n\n")


def test_greedy_plans_are_those_of_the_original(lm_golden, tiny_lm):
    cases = [case for case in lm_golden["greedy"] if case["kind"].startswith("plan") and case["stop_at_think_end"]]
    assert len(cases) == 3
    for case in cases:
        settings = case["settings"]
        left_out = {name for name in ("caption", "language") if settings.get(f"skip_{name}")}
        caption, lyrics, _ = request(case)
        names = [name for name in FIELDS if name not in left_out]
        raw = write_plan(tiny_lm, caption, lyrics, GREEDY, settings.get("user_metadata"), names, 240)
        assert f"{raw}<|im_end|>" == case["raw"]
        assert parse_answer(raw, 512).metadata == case["metadata"]


def test_greedy_codes_are_those_of_the_original(lm_golden, tiny_lm):
    cases = [case for case in lm_golden["greedy"] if case["kind"].startswith("codes")]
    assert len(cases) == 5
    for case in cases:
        settings = case["settings"]
        sampling = Sampling(temperature=0, guidance=settings["cfg_scale"], negative=settings.get("negative_prompt", ""))
        caption, lyrics, plan = request(case)
        codes = write_codes(tiny_lm, caption, lyrics, plan, settings["target_duration"], sampling)
        assert code_text(codes) == case["audio_codes"], case["kind"]
        assert len(codes) == 50


def test_what_is_heard_is_what_the_original_hears(lm_golden, tiny_lm):
    cases = [case for case in lm_golden["greedy"] if case["kind"].startswith("understand")]
    heard = [(case, next(u for u in lm_golden["understand"] if u["prompt"] == case["prompt"])) for case in cases]
    assert len(heard) == 2
    for case, question in heard:
        answer, raw = understand(tiny_lm, question["codes"], GREEDY)
        assert raw == case["raw"]
        assert (answer.metadata, answer.lyrics) == (case["metadata"], case["lyrics"])
        without, _ = understand(tiny_lm, question["codes"], GREEDY, with_lyrics=False)
        assert (without.metadata, without.lyrics) == (case["metadata"], "")


def test_both_phases_are_those_of_the_original(lm_golden, tiny_lm):
    [case] = [case for case in lm_golden["greedy"] if case["kind"].startswith("two phases")]
    request = next(song for song in lm_golden["plan"] if song["name"] == "full")
    song = compose(tiny_lm, request["caption"], request["lyrics"], Sampling(temperature=0), case["metadata"], 10.0)
    assert code_text(song.codes) == case["audio_codes"]
    assert (song.metadata, song.seconds) == (case["metadata"], 10.0)
    assert len(lm_golden["greedy"]) == 3 + 5 + 2 + 1  # plans, codes, what is heard and this: no case is left out


def test_what_the_user_has_said_makes_a_plan_needless(lm_golden, tiny_lm):
    given = {"bpm": 128, "keyscale": "F# major", "timesignature": "4/4"}
    song = compose(tiny_lm, "techno", "", GREEDY, given, seconds=4.5)
    assert song.plan == "<think>\nbpm: 128\nduration: 4\nkeyscale: F# major\ntimesignature: 4\n</think>"
    assert len(song.codes) == 22
    assert song.codes == compose(tiny_lm, "techno", "", GREEDY, given, seconds=4.5).codes


def test_a_plan_says_how_long_the_song_is_where_the_user_does_not(lm_golden, tiny_lm):
    case = lm_golden["plan"][0]
    song = compose(tiny_lm, case["caption"], case["lyrics"], GREEDY)
    assert song.seconds == song.metadata["duration"] == 12
    assert song.plan == case["cot"]
    assert len(song.codes) == 60


def test_the_same_seed_draws_the_same_and_another_another(tiny_lm):
    plan = plan_text({"bpm": 111, "duration": 10})
    draws = [
        write_codes(tiny_lm, "a song nobody knows", "", plan, 4, Sampling(seed=seed, guidance=1, temperature=2.0))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def walk(tiny_lm, grammar, pick) -> str:
    """What comes of choosing by `pick` among what a grammar allows."""
    ids = torch.tensor([[0]])
    generator = torch.Generator().manual_seed(1)
    for _ in range(700):
        scores = grammar(ids, torch.randn(1, 1059, generator=generator))
        token = int(pick(scores[0], generator))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == tiny_lm.tokens.end_id:
            break
    return tiny_lm.tokens.text(ids[0, 1:])


def drawn(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_is_a_plan(seed, tiny_lm):
    torch.manual_seed(seed)
    raw = walk(tiny_lm, PlanGrammar(tiny_lm.tokens, 1059, longest_seconds=240), drawn)
    assert raw.endswith("<|im_end|>")
    metadata = parse_answer(raw, 512).metadata
    assert 30 <= metadata["bpm"] <= 300
    assert 10 <= metadata["duration"] <= 240
    assert metadata["keyscale"] in KEYSCALES
    assert metadata["language"] in (*LANGUAGES, "unknown")
    assert metadata["timesignature"] in ("2", "3", "4", "6")
    assert "`" not in raw
    assert "audio_code" not in raw


def test_a_caption_without_an_end_is_ended(tiny_lm):
    letter = tiny_lm.tokens.ids("z")[0]

    def prefers_letters(scores, generator):
        return letter if scores[letter] > -torch.inf else scores.argmax()

    raw = walk(tiny_lm, PlanGrammar(tiny_lm.tokens, 1059, names=["caption", "bpm"]), prefers_letters)
    assert re.search(r"\ncaption:z{512}\n<\|im_end\|>$", raw)


def after(tiny_lm, grammar, written: str) -> torch.Tensor:
    """Which tokens [V] a grammar allows when so much is written."""
    ids = torch.tensor([[0]])
    for token in tiny_lm.tokens.ids(written):
        grammar(ids, torch.zeros(1, 1059))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return torch.isfinite(grammar(ids, torch.zeros(1, 1059))[0])


def test_a_caption_is_any_text_but_marks_and_backticks(tiny_lm):
    allowed = after(tiny_lm, PlanGrammar(tiny_lm.tokens, 1059, names=["caption"]), "<think>\ncaption:")
    backticks = {id_ for id_ in range(1059) if "`" in tiny_lm.tokens.text([id_])}
    assert backticks
    assert set((~allowed).nonzero().flatten().tolist()) == backticks | tiny_lm.tokens.added_ids


def test_the_likeliest_first_token_is_not_left_to_chance(tiny_lm):
    logits = torch.tensor([0.0, 1.0, 0.5, 3.0, 2.0])
    value = OneOf([[1, 2], [4, 2], [4, 3]], likeliest_first=True)
    assert value.allowed(logits) == [4]
    value.accept(4)
    assert value.allowed(logits) == [2, 3]
    assert OneOf([[1, 2], [4, 2]]).allowed(logits) == [1, 4]
    grammar = PlanGrammar(tiny_lm.tokens, 1059, names=["language"])
    assert int(after(tiny_lm, grammar, "<think>\nlanguage:").sum()) == 1


def test_codes_are_counted_and_nothing_else_is_allowed(tiny_lm):
    grammar = CodesGrammar(tiny_lm.tokens, 1, 3)
    for written, expected in ((0, 512), (2, 512), (3, 1)):
        scores = grammar(torch.zeros(1, 1 + written, dtype=torch.long), torch.zeros(1, 1059))
        assert int(torch.isfinite(scores).sum()) == expected
    assert int(scores.argmax()) == tiny_lm.tokens.end_id


def test_a_mask_keeps_what_is_allowed():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert only(scores, [1]).tolist() == [[-torch.inf, 2.0, -torch.inf]]
    assert only(scores, torch.tensor([True, False, True])).tolist() == [[1.0, -torch.inf, 3.0]]


def test_top_k_of_one_is_greedy_whatever_the_temperature(tiny_lm, lm_golden):
    case = lm_golden["plan"][0]
    prompt = tiny_lm.tokens.ids(case["prompt_codes"])
    ids = write(tiny_lm, prompt, None, 20, Sampling(temperature=3.0, top_k=1, top_p=1.0, seed=9))
    assert ids == write(tiny_lm, prompt, None, 20, GREEDY)
