"""What the README tells people to type works, and what the pages point to exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert len(lines) >= 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "fedgc-priv"
        done = subprocess.run(
            [sys.executable, "-m", "fedgc.cli", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "runs/report/report.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), (
            f"{page.name} points to {target}, which does not exist"
        )


def test_the_documented_keys_are_the_keys() -> None:
    from fedgc.config import known_keys

    table = (ROOT / "docs/commands.md").read_text()
    for key in known_keys():
        assert f"`{key.rpartition('.')[2]}`" in table, f"docs/commands.md does not name {key}"
