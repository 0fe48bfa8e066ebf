"""The published comparisons of adapters: what the docs tell is what was measured and stored."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.adaptation import COMPARISONS, RESULTS, SEEDS, paired_table

DOCS = Path(__file__).parents[2] / "docs"
TOLD = {  # row of docs/better-adapters.md: (comparison, loss)
    "acoustic music that no run hears": ("prior", "other acoustic"),
    "electronic music that no run hears": ("prior", "held-out electronic"),
    "the songs trained on, new captions": ("captions", "songs trained on, new captions"),
    "other songs, new captions": ("captions", "other songs, new captions"),
    "the songs trained on, the first caption": ("captions", "songs trained on, first caption"),
}


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_has_its_seeds_in_every_arm_and_its_table_is_made_of_them(name):
    results = stored(name)
    assert {len(runs) for runs in results["runs"].values()} == {len(SEEDS)} == {5}
    table = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert (
        table.splitlines()[: 2 + len(results["runs"])]
        == paired_table(results, name).splitlines()[: 2 + len(results["runs"])]
    )


@pytest.mark.parametrize("row", TOLD)
def test_the_docs_tell_each_figure_and_in_how_many_pairs_it_was_better(row):
    name, loss = TOLD[row]
    results = stored(name)
    without, with_it = (
        [100 * (run[loss] / results["before"][loss] - 1) for run in runs] for runs in results["runs"].values()
    )
    better = sum(b < a for a, b in zip(without, with_it, strict=True))
    page = (DOCS / "better-adapters.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if re.match(rf"\| (\*\*.*: )?{re.escape(row)} \|", line)]
    assert line.endswith(f"| {mean(without):+.2f} % | {mean(with_it):+.2f} % | {better} of 5 |")


def test_the_words_around_the_figures_hold():
    def changes(name: str, loss: str) -> list[float]:
        results = stored(name)
        return [mean(run[loss] for run in runs) / results["before"][loss] - 1 for runs in results["runs"].values()]

    without, with_it = changes("prior", "other acoustic")
    assert with_it / without == pytest.approx(1 / 2, abs=0.02)
    without, with_it = changes("prior", "held-out electronic")
    assert 1 - with_it / without == pytest.approx(1 / 30, abs=0.003)
    without, with_it = (mean(run["seconds"] for run in runs) for runs in stored("prior")["runs"].values())
    assert 2.7 < with_it / without < 3
    without, with_it = changes("captions", "songs trained on, new captions")
    assert with_it - without == pytest.approx(-0.001, abs=2e-4)


def test_every_percentage_of_the_page_of_benchmarks_stands_in_the_stored_tables():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    section = page.partition("## Other music, captions, kinds of adapter")[2].partition("\n## ")[0]
    tables = "".join((RESULTS / f"{name}.md").read_text(encoding="utf-8") for name in COMPARISONS)
    told = re.findall(r"[-+]\d+\.\d\d", section)
    assert len(told) > 12
    assert [figure for figure in told if figure not in tables] == []
