"""What PyPI shows of README.md: its relative links lead to the project's address, which pyproject.toml says once.

The address is ``Repository`` under ``[project.urls]``. Without one, links stay as they are.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_LINK = re.compile(r"(!?)(\[[^]]*\])\((?!https?:|#)([^)]+)\)")


def on_pypi(readme: str, address: str | None) -> str:
    """A README's text with absolute links, to pages and, of pictures, to the files themselves."""
    if address is None:
        return readme

    def absolute(link: re.Match[str]) -> str:
        shown = "raw" if link[1] else "blob"
        return f"{link[1]}{link[2]}({address.rstrip('/')}/{shown}/HEAD/{link[3]})"

    return _LINK.sub(absolute, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=on_pypi(
            (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
