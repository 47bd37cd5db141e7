"""What the README tells people to type works, and what the pages point to exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TYPED = [page for page in PAGES[2:] if "```sh" in page.read_text()]


def commands(page: Path) -> list[str]:
    """Lines of a page that anybody can type as they are."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


def typed(lines: list[str], folder: Path) -> None:
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "fedgc-priv"
        done = subprocess.run(
            [sys.executable, "-m", "fedgc.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    lines = commands(ROOT / "README.md")
    assert len(lines) >= 5
    typed(lines, tmp_path)
    assert (tmp_path / "runs/report/report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", TYPED, ids=lambda p: p.stem)
def test_a_pages_commands_run(page: Path, tmp_path: Path) -> None:
    if page.stem == "foreign-update":  # the page has the reader run the example first
        example = [sys.executable, ROOT / "examples/plain_pytorch.py", tmp_path / "update.safetensors"]
        subprocess.run(example, check=True, cwd=ROOT)
    typed(commands(page), tmp_path)


def test_every_page_is_in_the_sites_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[2:]:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in site, f"mkdocs.yml has no place for {page.name}"


def test_the_code_on_a_page_is_the_examples() -> None:
    page, example = (
        (ROOT / "docs/how-to/foreign-update.md").read_text(),
        (ROOT / "examples/plain_pytorch.py").read_text(),
    )
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0].strip()
    assert shown.splitlines()[0].startswith("before")
    assert shown.replace('Path("update.safetensors")', "Path(sys.argv[1])") in example
    flower = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1].strip()
    assert flower in (ROOT / "examples/flower_client.py").read_text()


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
