"""What the guides show runs as it stands and prints what they say; no option or column is left out or made up."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from typer.main import get_command

from fastcalib import cli

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "diagnose.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_sessions_of_the_pages_print_what_they_say(page):
    blocks = re.findall(r"```pycon\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    if page == "diagnose.md":
        assert len(blocks) >= 4
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, page, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


def test_options_of_the_guide_exist():
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(cli.app).commands.items()
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE)) - {"--no-deps", "--help"}
    assert named <= known["diagnose"] | known["score"], named - known["diagnose"] - known["score"]
    for command in re.findall(r"^fastcalib ([a-z]+) (.*?)(?: #.*)?$", GUIDE, flags=re.M):
        assert set(re.findall(r"--[a-z-]+", command[1])) <= known[command[0]]


def test_columns_of_the_guide_are_those_of_the_tables():
    pytest.importorskip("pyarrow")
    from fastcalib.runner.tables import SCHEMAS

    described = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", GUIDE, flags=re.M))
    assert set(described) == set(SCHEMAS)
    for name, text in described.items():
        missing = set(SCHEMAS[name].names) - set(re.findall(r"`(\w+)`", text))
        assert not missing, f"{name}: {missing}"
