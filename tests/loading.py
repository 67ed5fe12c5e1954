"""Where the repository is, and each script as a module."""
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def forget():
    """Each folder has its own main.py: what one has loaded is not for the next."""
    for path in ROOT.glob("*/*.py"):
        sys.modules.pop(path.stem, None)


def load(folder, name="main"):
    forget()
    sys.path.insert(0, str(ROOT / folder))      # PUSHT/main.py imports the world.py beside it
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    forget()
    return module
