"""Where the repository is, and its two main.py as modules; without pytest, for the commands."""
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(folder):
    spec = importlib.util.spec_from_file_location(f"{folder}_main", ROOT / folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
