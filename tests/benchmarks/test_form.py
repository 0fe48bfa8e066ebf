"""The page on the language model shows the figures that the form benchmark has stored."""

import json
import re

from benchmarks.form import ROOT, table

STORED = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "language-model.md").read_text("utf-8")


def figures(text: str, first_word: str) -> list[str]:
    """The cells behind the title of each row that begins with a word."""
    return [row.split("|")[2:4] for row in text.splitlines() if row.startswith(f"| {first_word}")]


def test_the_page_has_the_figures_that_were_measured():
    results = json.loads((STORED / "form.json").read_text("utf-8"))
    made = table(results)
    assert (STORED / "form.md").read_text("utf-8") == made
    assert figures(PAGE, "loss on songs") == figures(made, "held-out loss")
    assert figures(PAGE, "sections in their place") == figures(made, "sections in place")
    assert f"--seeds {len(results)}`" in PAGE
    lowest = [f"{result['after']['drawn']:.2f}" for result in results[1:]]
    assert re.search(
        rf"drew fewer sections right \({lowest[0]} and {lowest[1]}\)|\({lowest[1]} and {lowest[0]}\)", PAGE
    )


def test_form_was_learnt_with_each_seed():
    for result in json.loads((STORED / "form.json").read_text("utf-8")):
        before, after = result["before"], result["after"]
        assert after["held-out loss"] < 0.8 * before["held-out loss"]
        assert after["greedy"] == 1.0
        assert after["drawn"] > 0.6 > 0.2 > before["drawn"]
