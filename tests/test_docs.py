"""The guides' links lead somewhere, and what they name is there."""

import ast
import functools
import inspect
import pathlib
import re

import numpy as np
import optax
import pytest

import steelyard.examples
import steelyard.formats
import steelyard.losses
import steelyard.models
import steelyard.optim
import steelyard.reparam
from steelyard import sparsity

DOCS = pathlib.Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "losses.md").read_text()
SPARSITY = (DOCS / "sparsity.md").read_text()


def anchors(page: str) -> set[str]:
    """Those written out, and those that headings make."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    made = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)"></a>', page))


@pytest.mark.parametrize(("guide", "least"), [("losses.md", 30), ("sparsity.md", 2)])
def test_every_link_of_a_guide_leads_somewhere(guide, least):
    links = re.findall(r"\]\(([^)]+)\)", (DOCS / guide).read_text())
    assert len(links) >= least
    for link in links:
        page, _, anchor = link.partition("#")
        page = DOCS / (page or guide)
        assert page.exists(), link
        assert not anchor or anchor in anchors(page.read_text()), link


@pytest.mark.parametrize(
    "name",
    sorted({name for row in GUIDE.splitlines() if row.startswith("| ") for name in re.findall(r"`([a-z_.]+)`", row)}),
)
def test_every_function_that_the_guide_names_exists(name):
    home = steelyard.examples if name.startswith("examples.") else steelyard.losses
    assert hasattr(home, name.removeprefix("examples."))


# Of the guide to sparsity: what stands in backticks, but in the first column of tables, and whole blocks of code.
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPANS = sorted(set(re.findall(r"`([^`]+)`", re.sub(r"^\|[^|]*\|", "", BLOCK.sub("", SPARSITY), flags=re.MULTILINE))))


def name_of(node: ast.expr) -> str:
    """The dotted name that an expression is; empty where it is none."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def meaning(name: str):
    first, *rest = name.split(".")
    if first == "optax":
        return functools.reduce(getattr, rest, optax)
    home = steelyard if first in ("formats", "models", "optim", "reparam", "steelyard") else sparsity
    return functools.reduce(getattr, rest if first == "steelyard" else [first, *rest], home)


@pytest.mark.parametrize("span", SPANS)
def test_every_name_and_argument_of_the_guide_to_sparsity_exists(span):
    for node in ast.walk(ast.parse(span)):
        if isinstance(node, ast.Attribute):
            meaning(name_of(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            options = {option.arg: option for option in node.keywords}
            inspect.signature(meaning(name_of(node.func))).bind_partial(*node.args, **options)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            sparsity.patterns.parse(node.value.value)


def test_the_code_of_the_guide_to_sparsity_runs():
    names = {name: getattr(sparsity, name) for name in sparsity.__all__}
    names |= {"optax": optax, "params": {"dense": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}}
    for block in BLOCK.findall(SPARSITY):
        exec(block, names)
    assert np.count_nonzero(names["params"]["dense"]["kernel"]) == 16
