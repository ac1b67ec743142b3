"""The guide's links lead somewhere, and what it names is there."""

import pathlib
import re

import pytest

import steelyard.examples
import steelyard.losses

DOCS = pathlib.Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "losses.md").read_text()


def test_every_link_of_the_guide_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", GUIDE)
    assert len(links) > 30
    for link in links:
        page, _, anchor = link.partition("#")
        assert (DOCS / page).exists(), link
        assert not anchor or f'<a id="{anchor}"></a>' in (DOCS / page).read_text(), link


@pytest.mark.parametrize(
    "name",
    sorted({name for row in GUIDE.splitlines() if row.startswith("| ") for name in re.findall(r"`([a-z_.]+)`", row)}),
)
def test_every_function_that_the_guide_names_exists(name):
    home = steelyard.examples if name.startswith("examples.") else steelyard.losses
    assert hasattr(home, name.removeprefix("examples."))
