"""Where the repository is, and each main.py as a module; without pytest, for the commands."""
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(folder):
    sys.path.insert(0, str(ROOT / folder))      # PUSHT/main.py imports the world.py beside it
    spec = importlib.util.spec_from_file_location(f"{folder}_main", ROOT / folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    sys.modules.pop("world", None)              # a copy that a test runs has its own
    return module
