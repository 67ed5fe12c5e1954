"""README and repository agree."""
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RUN = "pip install -r requirements.txt && python MNIST/main.py"
TEST = "pip install -r requirements.txt pytest && pytest"


def test_the_two_commands_are_in_the_readme_and_ci_runs_the_second():
    assert RUN in README and TEST in README
    assert TEST in (ROOT / ".ci/run").read_text()


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_pictures_are_described_and_fit_a_page():
    for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README):
        assert len(text) > 20, target
        assert (ROOT / target).stat().st_size < (2e6 if target.endswith("gif") else 5e5), target


@pytest.mark.parametrize("script", ["MNIST/main.py", "MNIST/visual.py", "CIFAR10/main.py",
                                    "CIFAR10/visual.py"])
def test_flags_exist(script):
    code = (ROOT / script).read_text()
    commands = re.findall(rf"{script}([^\n`|]*)", README)
    assert commands
    for command in commands:
        for flag in set(re.findall(r"--[a-z][a-z0-9-]*", command)) - {"--help"}:
            assert f'"{flag}"' in code, (script, flag)


def test_every_flag_is_one_of_some_script():
    code = "".join(path.read_text() for path in ROOT.glob("*/*.py"))
    others = {"--help", "--index-url", "--nproc-per-node"}  # argparse's, pip's, torchrun's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README)) - others:
        assert f'"{flag}"' in code, flag


def test_the_map_of_the_code_is_right():
    """Every function that section 6 names is in both folders."""
    section = README.split("## 6. Read the code")[1].split("\n## ")[0]
    names = {name for row in re.findall(r"^\|.*\|$", section, re.M)
             for name in re.findall(r"`(\w+)`", row)}
    assert {"noise_schedule", "q_sample", "UNet", "sample", "train", "neighbours"} <= names
    for folder in ("MNIST", "CIFAR10"):
        code = "".join((ROOT / folder / file).read_text() for file in ("main.py", "visual.py"))
        for name in names:
            assert re.search(rf"^(def|class) {name}\b", code, re.M), name

