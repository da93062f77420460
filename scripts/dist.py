"""Build the wheel and the source distribution of the files that git tracks, as PyPI shows them.

    python -m scripts.dist --repository https://example.org/owner/layerfed     # or: make dist

PyPI does not serve the files that README.md links to. So links become absolute, to the repository's file
of this version, and pictures to its raw content. The address is also in the metadata.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[1]
RELATIVE = re.compile(r"(!?\[[^\]]*\])\((?!https?://|mailto:|#)([^)\s]+)\)")


def absolute_links(text: str, repository: str, version: str) -> str:
    """Return Markdown whose links to files of a repository work outside of it."""

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found[1].startswith("!") else "blob"
        return f"{found[1]}({repository}/{kind}/v{version}/{found[2]})"

    return RELATIVE.sub(absolute, text)


def tracked() -> list[str]:
    """Return the paths of the files that git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.rstrip("\0").split("\0")


def build(repository: str, out: Path) -> None:
    """Build both distributions into a folder."""
    with tempfile.TemporaryDirectory(prefix="layerfed-dist-") as folder:
        source = Path(folder, "source")
        for name in tracked():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
        readme, project = source / "README.md", source / "pyproject.toml"
        text = project.read_text(encoding="utf-8")
        version = tomllib.loads(text)["project"]["version"]
        readme.write_text(
            absolute_links(readme.read_text(encoding="utf-8"), repository, version),
            encoding="utf-8",
        )
        addresses = "".join(
            f'{name} = "{repository}{path}"\n'
            for name, path in {
                "Repository": "",
                "Documentation": f"/blob/v{version}/README.md",
                "Changelog": f"/blob/v{version}/CHANGELOG.md",
                "Issues": "/issues",
            }.items()
        )
        head = "[project.urls]\n"
        project.write_text(text.replace(head, head + addresses), encoding="utf-8")
        subprocess.run([find_uv_bin(), "build", "--out-dir", out, source], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", required=True, help="https://… of the repository")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    build(given.repository.rstrip("/"), given.out.resolve())
