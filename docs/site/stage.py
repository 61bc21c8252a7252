"""Copy the pages of the repository to a folder for mkdocs, at the same paths; write a reference page per package."""

import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/*.md", "packages/*/README.md", "packages/*/CHANGELOG.md", "benchmarks/**/*.md")
PACKAGES = ("tt-models", "tt-peft", "tt-data", "tt-ckpt", "tt-train")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"")


def stage(folder: Path) -> None:
    """Fill ``folder`` with the pages, what they link to, the site's style and script, and reference/."""
    shutil.rmtree(folder, ignore_errors=True)
    for page in sorted({page for pattern in PAGES for page in ROOT.glob(pattern)}):
        text = page.read_text(encoding="utf-8")
        _put(folder, page)
        for link in (one or other for one, other in LINK.findall(text)):
            target = (page.parent / link).resolve()
            if "://" not in link and target.is_file() and target.is_relative_to(ROOT) and target.suffix != ".md":
                _put(folder, target)
    for name in ("site.css", "site.js"):
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    (folder / "reference").mkdir()
    for package in PACKAGES:
        name = package.replace("-", "_")
        lines = [f"# {name}", "", *(f"::: {place}" for place in public(package))]
        (folder / "reference" / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _put(folder: Path, file: Path) -> None:
    goal = folder / file.relative_to(ROOT)
    goal.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, goal)


def public(package: str) -> list[str]:
    """Where each name of ``__all__`` is defined, read from the source of ``__init__.py``."""
    name = package.replace("-", "_")
    tree = ast.parse((ROOT / "packages" / package / "src" / name / "__init__.py").read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    [names] = [
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]  # fmt: skip
    return [homes.get(one, f"{name}.{one}") for one in names]


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
