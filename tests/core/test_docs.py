"""Pages of docs/: the Python in the short ones is run as a reader would, and no link leads nowhere."""

from __future__ import annotations

import re

import pytest

from vlm4vla_core.folders import project_root

DOCS = project_root() / "docs"
RUN = ("adaptation", "adding-a-family", "adding-a-benchmark", "adding-a-probe")


@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_no_link_of_a_page_leads_nowhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
