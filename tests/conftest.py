"""What the tests share: each main.py, imported, and both scripts as a user runs them."""
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch; two that wait for a third are slow
import pytest
import torch
from loading import ROOT, forget, load

FOLDERS = [path.parent.name for path in sorted(ROOT.glob("*/main.py"))]
FIGURES = ["reverse.png", "reverse.gif", "forward.png", "grid.png", "steps.png", "guidance.png",
           "neighbours.png", "complete.png", "loss.png"]
NARROW = "CHANNELS = (16, 32, 64)", "CHANNELS = (8, 16, 16)"
SMALL_T = "T = 1000 ", "T = 20 "


@pytest.fixture(scope="session", params=FOLDERS)
def main(request):
    """main.py of each folder, imported."""
    return load(request.param)


def read(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    return all(torch.equal(a[net][key], b[net][key]) for net in ("model", "ema") for key in a[net])


def copied(folder, *changes, source="MNIST"):
    """A reader's own copy, without the weights, its constants changed."""
    shutil.copytree(ROOT / source, folder, ignore=shutil.ignore_patterns(
        "data", "runs", "figures", "*.pt", "__pycache__"))
    code = (folder / "main.py").read_text()
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    (folder / "main.py").write_text(code)
    return folder


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """MNIST/main.py in a copy, its net narrow, its T 20: trains in seconds."""
    return copied(tmp_path_factory.mktemp("quick") / "MNIST", SMALL_T, NARROW) / "main.py"


def start(*args, env=(), **options):
    """A script with its arguments, running, as on a machine that does not set PYTHONUNBUFFERED."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:   # the tests run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *map(str, args)], text=True, env=clean | dict(env),
                            errors="replace", **options)


def run(script, *args, **options):
    """The same to its end: (exit code, stdout, stderr). A script without options runs in this
    process, which saves the seconds that importing torch takes."""
    if options or script == "-m":
        process = start(script, *args, **options)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(script), *map(str, args)])
        patch.syspath_prepend(str((ROOT / script).parent))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    forget()
    signal.signal(signal.SIGINT, handler)
    message = f"{code}\n" if isinstance(code, str) else ""
    return code, out.getvalue(), err.getvalue() + message


def works(*args, **options):
    """Runs; asserts that it ended well, and returns what it printed."""
    code, out, err = run(*args, **options)
    assert not code, err
    return out


def fails(*args, words=(), **options):
    """The contract for a user's error: one line at the end that says it, no traceback."""
    code, _, err = run(*args, **options)
    last = err.splitlines()[-1]
    assert code and "error: " in last and "Traceback" not in err, err
    for word in words:
        assert word in last, last


def first_step(process):
    """Wait until the training bar has moved."""
    seen = ""
    while "loss=" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
