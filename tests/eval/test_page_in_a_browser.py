"""The page in a real Chromium, where one is installed: nothing sticks out, nothing is fetched, everything can be read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_runs import both_algorithms

from eval.report import build

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
SECONDS = 120
FLAGS = ("--headless=new", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--no-first-run",
         "--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0")  # fmt: skip
PROBE = r"""
const ends = (node) => node.getBoundingClientRect().right;
const parts = (text) => text.match(/[\d.]+/g).map(Number);
const light = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((x) => ((x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (let n = node; n; n = n.parentElement) {
    const colour = parts(getComputedStyle(n).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const faint = [...document.querySelectorAll("main *, header *")].filter((node) => {
  if (node.closest("svg") || ![...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) return false;
  const pair = [parts(getComputedStyle(node).color), behind(node)].map(light).sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05) < 4.5;
});
const table = document.querySelector("table.headline");
const aucs = () => [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[3].innerText));
const button = [...table.tHead.querySelectorAll("button")].find((b) => b.textContent.trim() === "AUC");
const before = aucs();
button.click();
const up = aucs(), sorted = button.parentElement.getAttribute("aria-sort");
button.click();
const found = {
  width: innerWidth,
  page: document.documentElement.scrollWidth,
  out: [...document.querySelectorAll("p, h1, h2, h3, dl, ul, nav, pre, figcaption")]
    .filter((n) => ends(n) > innerWidth + 1).length,
  boxes: [...document.querySelectorAll("*")].filter((n) => n.scrollWidth > n.clientWidth + 1
    && ["auto", "scroll"].includes(getComputedStyle(n).overflowX) && n.tabIndex < 0).map((n) => n.className || n.tagName),
  images: document.images.length,
  broken: [...document.images].filter((i) => !i.alt || !i.naturalWidth).length,
  plots: [...document.querySelectorAll("[role=img]")].map((p) => (p.getAttribute("aria-label") || "").length),
  fetched: performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:")),
  faint: [...new Set(faint.map((n) => `${n.tagName}.${n.className} ${n.textContent.slice(0, 20)}`))].slice(0, 5),
  levels: [...document.querySelectorAll("h1, h2, h3, h4")].map((h) => Number(h.tagName[1])),
  heads: [...document.querySelectorAll("thead th")].filter((h) => !h.scope).length,
  captions: [...document.querySelectorAll("table")].filter((t) => !t.caption).length,
  landmarks: ["header", "nav", "main"].map((n) => document.querySelectorAll(n).length),
  before, up, sorted, down: aucs(),
};
const said = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
parent.postMessage(said, "*");
"""

FRAME = """<!DOCTYPE html><html lang="en"><title>frame</title><body style="margin:0">
<iframe style="border:0" width="{width}" height="900" src="{page}"></iframe>
<script>addEventListener("message", (e) => {{ const p = document.createElement("pre"); p.id = "probe"; p.append(e.data);
document.body.append(p); }});</script></body></html>"""  # a window of its own would be 500 pixels wide at least

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium refuses root a sandbox
    command = [str(CHROMIUM), *FLAGS, *sandbox, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        pytest.skip(f"Chromium does not start here: {done.stderr.strip().splitlines()[-1:]}")
    return done


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser")
    build(both_algorithms(), out)
    return out / "report.html"


def framed(page: Path, width: int) -> str:
    """The address of a page that shows another one as wide as a phone is."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(width=width, page=page.name), encoding="utf-8")
    return frame.as_uri()


def probed(page: Path, width: int) -> dict[str, Any]:
    """What a script finds in the page at a window of that width; the page's own policy has to let the script in."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    source = page.read_text(encoding="utf-8")
    assert "script-src 'sha256-" in source
    source = source.replace("script-src ", f"script-src 'sha256-{digest}' ")
    copy = page.with_name(f"probed-{width}.html")
    copy.write_text(source.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    done = chromium(page.parent / f"profile-{width}", "--window-size=1400,900", "--dump-dom", framed(copy, width))
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'<pre id="probe">([A-Za-z0-9+/=]+)</pre>', done.stdout)
    assert match is not None
    return dict(json.loads(base64.b64decode(match.group(1))))


@pytest.mark.parametrize("width", [390, 1200])
def test_page_can_be_read_at_any_width(page: Path, width: int) -> None:
    found = probed(page, width)
    assert found["width"] == width
    assert found["page"] <= width
    assert found["out"] == 0
    assert found["boxes"] == []  # what scrolls can be reached by keyboard
    assert (found["images"], found["broken"]) == (25, 0)
    assert len(found["plots"]) == 3
    assert min(found["plots"]) > 40
    assert found["fetched"] == []
    assert found["faint"] == []
    levels = found["levels"]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert (found["heads"], found["captions"], found["landmarks"]) == (0, 0, [1, 1, 1])
    assert found["up"] == sorted(found["before"])
    assert found["down"] == found["up"][::-1] or found["down"] == sorted(found["before"], reverse=True)
    assert found["sorted"] == "ascending"


@pytest.mark.slow
def test_page_logs_nothing_and_prints(page: Path) -> None:
    printed = page.with_name("page.pdf")
    done = chromium(page.parent / "profile-print", f"--print-to-pdf={printed}", page.as_uri())
    assert "CONSOLE" not in done.stderr
    assert printed.read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_screenshot_is_not_blank(page: Path) -> None:
    from PIL import Image

    shot = page.with_name("shot.png")
    chromium(page.parent / "profile-shot", "--window-size=500,900", f"--screenshot={shot}", framed(page, 390))
    with Image.open(shot) as image:
        colours = image.convert("L").crop((0, 0, 390, 900)).getcolors() or []
        assert len(colours) > 16
