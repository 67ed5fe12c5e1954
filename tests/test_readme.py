"""README and repository agree."""
import re

import pytest
import torch
from conftest import FOLDERS
from loading import ROOT, load

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
RUN = "pip install -r requirements.txt && python MNIST/main.py"
TEST = "pip install -r requirements.txt pytest && pytest"


def test_the_two_commands_are_in_the_readme_and_ci_runs_the_second():
    assert RUN in README and TEST in README
    assert TEST in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere_and_pictures_are_described(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (page.parent / target.split("#")[0]).exists(), target
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        assert len(alt) > 20, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_flags_exist(page):
    for script, command in re.findall(r"(\w+/\w+\.py)([^\n`|]*)", page.read_text()):
        for flag in set(re.findall(r"--[a-z][a-z0-9-]*", command)):
            assert f'"{flag}"' in (ROOT / script).read_text(), (script, flag)


def test_the_map_of_the_code_is_right():
    """Every function that the table names is in each folder."""
    section = README.split("## Read the code")[1].split("\n## ")[0]
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
    main, T, y = load("MNIST"), 20, torch.arange(3)
    torch.set_default_dtype(torch.float64)
    try:
        net = main.UNet(10, (8, 16))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        names = vars(main) | {"T": T, "net": net, "y": y, "x_0": torch.rand(3, 1, 28, 28) * 2 - 1}
        exec(training, names)
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
        torch.manual_seed(1)
        exec(sampling, names)
        torch.manual_seed(1)
        x_0 = main.sample(net, torch.randn(3, 1, 28, 28), y, names["alpha_bar"], "v", steps=T,
                          eta=1.0, guidance=0.0)
        torch.testing.assert_close(names["x_t"], x_0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_transformer_in_the_folder_s_readme_takes_the_unet_s_place():
    names = vars(load("MNIST")).copy()
    page = (ROOT / "MNIST/README.md").read_text()
    exec(re.search(r"```python\n(class UNet.*?)```", page, re.S)[1], names)
    net = names["UNet"](10, None).eval()
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([10, 900]), torch.tensor([1, 2])
    assert (net(x, t, y) == 0).all()
    assert 450_000 < sum(parameter.numel() for parameter in net.parameters()) < 500_000
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for other in ((x + 1, t, y), (x, t + 50, y), (x, t, y + 1)):
        assert net(*other).shape == x.shape and (net(*other) - net(x, t, y)).abs().max() > 1e-3
