"""mkdocs' hooks: the site's first page is README.md, and pages may link to files of the repository outside docs/."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Where a file of the repository stands in the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
} | {
    f"benchmarks/results/{file.name}": f"results/{file.name}" for file in (ROOT / "benchmarks" / "results").glob("*.*")
}


def on_files(files: Files, config: object) -> Files:
    """Add the files outside docs/ that pages link to."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: object, config: object, files: Files) -> str:
    """Turn links that hold in the repository into links that hold in the site."""
    from_root = page.file.src_uri in OUTSIDE.values()

    def moved(match: re.Match) -> str:
        path, anchor = match[1], match[2] or ""
        path = path.removeprefix("docs/") if from_root else path
        return f"]({OUTSIDE.get(path.removeprefix('../'), path)}{anchor})"

    return re.sub(r"\]\(([\w./-]+?)(#[\w-]+)?\)", moved, markdown)
