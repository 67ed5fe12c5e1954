"""Where the repository is, and each script as a module; without pytest, for the commands."""
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load(folder, name="main"):
    sys.path.insert(0, str(ROOT / folder))      # PUSHT/main.py imports the world.py beside it
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    for name in ("world", "sound", "main", "visual"):    # a copy that a test runs has its own
        sys.modules.pop(name, None)
    return module
