"""The example of README.md runs as it stands, and every file tells the same version (`test_docs` holds the rest)."""

import re
import subprocess
import sys
from pathlib import Path

import chela

ROOT = Path(__file__).parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path):
    script = tmp_path / "readme.py"
    blocks = re.findall(r"^```python\n(.*?)^```$", text("README.md"), re.MULTILINE | re.DOTALL)
    assert blocks
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_changelog_has_a_heading_for_this_version():
    assert re.search(rf"^## \[?v?{re.escape(chela.__version__)}\b", text("CHANGELOG.md"), re.MULTILINE)


def test_the_citation_has_this_version():
    assert re.search(rf'^version: "?{re.escape(chela.__version__)}"?$', text("CITATION.cff"), re.MULTILINE)
