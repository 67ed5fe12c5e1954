"""README and repository agree."""
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()
RUN = "pip install -r requirements.txt && python MNIST/main.py"
TEST = "pip install -r requirements.txt pytest && pytest"


def test_the_two_commands_are_in_the_readme_and_ci_runs_the_second():
    assert RUN in README and TEST in README
    assert TEST in (ROOT / ".ci/run").read_text()


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        target = link[0] or link[1]
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_flags_exist():
    scripts = "".join(path.read_text() for path in ROOT.glob("[A-Z]*/*.py"))
    for line in re.findall(r"python [A-Z0-9]+/\w+\.py[^\n`]*", README):
        for flag in set(re.findall(r"--[a-z-]+", line)) - {"--help"}:
            assert f'"{flag}"' in scripts, flag
