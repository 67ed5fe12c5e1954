"""README and repository agree."""
import re

import pytest
import torch
from loading import ROOT, load

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



def test_the_algorithms_on_the_page_are_those_of_the_code():
    """Algorithm 1 gives every weight a gradient; Algorithm 2 gives the images of `sample`."""
    training, sampling = re.findall(r"```python\n(.*?)```", README, re.S)[:2]
    main, T = load("MNIST"), 20
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        net = main.UNet(1, 28, 10, (8, 16), 1, (), 0.0)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        names = vars(main) | {"T": T, "net": net, "alpha_bar": main.noise_schedule("cosine", T),
                              "y": torch.arange(3), "x_0": torch.rand(3, 1, 28, 28) * 2 - 1}
        exec(training, names)
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
        torch.manual_seed(1)
        with torch.no_grad():
            exec(sampling, names)
        torch.manual_seed(1)
        *_, (_, x_0, _) = main.sample(net, torch.randn(3, 1, 28, 28), names["y"],
                                      names["alpha_bar"], "v", steps=T, eta=1.0, guidance=0.0)
        torch.testing.assert_close(names["x_t"], x_0)
    finally:
        torch.set_default_dtype(torch.float32)
