"""What the tests share: the two main.py as modules, and both scripts as a user runs them."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [path.parent.name for path in sorted(ROOT.glob("*/main.py"))]


def load(folder):
    spec = importlib.util.spec_from_file_location(f"{folder}_main", ROOT / folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=FOLDERS)
def main(request):
    """main.py of each folder, imported."""
    return load(request.param)


def run(script, *args, **options):
    """Run a script of the repository; returns the finished process with its output as text."""
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, timeout=240, **options)


def fails(process, *words):
    """The contract for a user's error: exit code 2, one line on stderr, no traceback."""
    lines = [line for line in process.stderr.splitlines()
             if line.strip() and "images/s]" not in line.split("error: ")[0]]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return True
