"""docs/guarantees.md promises nothing without a test of that name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]


@pytest.mark.parametrize("row", ROWS, ids=[row[2:50] for row in ROWS])
def test_every_promise_names_tests_that_exist(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`(?: (\*slow\*))?", row)
    assert named
    for file, name, slow in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions
        marks = [ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)]
        marks += map(ast.unparse, functions[name].decorator_list)
        is_slow = any("pytest.mark.slow" in mark and "pytest.param(" not in mark for mark in marks)  # as a whole
        assert is_slow == bool(slow), f"{file}::{name}"


CLAIM = re.compile(r"bit for bit|\bexactly\b|\bunbiased\b|\bnever (lost|overwritten)\b", re.IGNORECASE)
FOR_USERS = ("better-adapters", "dataset", "first-adapter", "install", "interop", "judging", "language-model", "memory")


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", *(f"docs/{name}.md" for name in FOR_USERS)])
def test_what_a_page_claims_strictly_links_to_what_proves_it(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for claim in CLAIM.finditer(text):
        line = text[text.rfind("\n", 0, claim.start()) + 1 : text.find("\n", claim.end())]
        assert re.search(r"\[[^\]]*" + re.escape(claim[0]) + r"[^\]]*\]\(\S*(guarantees|benchmarks)", line), line


def test_the_readme_promises_no_more():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Nothing is ever lost" not in text
    assert "docs/guarantees.md" in text
