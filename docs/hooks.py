"""Pages link to files beside docs/ (configs, examples, CONTRIBUTING.md), as they do on GitHub. The site gets copies of those."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def outside(page: str, target: str) -> str | None:
    """The path, from the repository's root, of a link that leaves docs/; None of one that does not."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    wanted = {"CONTRIBUTING.md"}
    for page in files.documentation_pages():
        found = (outside(page.src_uri, m[1]) for m in LINK.finditer(page.content_string))
        wanted |= {path for path in found if path is not None and (root / path).is_file()}
    for path in sorted(wanted):
        files.append(File.generated(config, path, content=(root / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def inside(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')}{match[2] or ''})"

    return LINK.sub(inside, markdown)
