"""What the tests share: the two main.py, imported, and both scripts as a user runs them."""
import io
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from loading import ROOT, load

FOLDERS = [path.parent.name for path in sorted(ROOT.glob("*/main.py"))]


@pytest.fixture(scope="session", params=FOLDERS)
def main(request):
    """main.py of each folder, imported."""
    return load(request.param)


def run(script, *args, **options):
    """Run a script of the repository; returns the finished process with its output as text."""
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, timeout=240, **options)


def call(script, *args):
    """The same within this process, which saves the seconds that importing torch takes."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(script), *map(str, args)])
        patch.syspath_prepend(str((ROOT / script).parent))
        patch.delitem(sys.modules, "main", raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    sys.modules.pop("main", None)
    signal.signal(signal.SIGINT, handler)
    return subprocess.CompletedProcess(args, stop.value.code or 0, out.getvalue(), err.getvalue())


def fails(process, *words):
    """The contract for a user's error: exit code 2, one line on stderr, no traceback."""
    bars = ("images/s", "sampling:", "exporting:", "reading pictures:")
    lines = [line for line in process.stderr.splitlines()
             if line.strip() and not any(bar in line.split("error: ")[0] for bar in bars)]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return True
