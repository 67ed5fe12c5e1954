"""The scripts beside the commands, for a few steps each."""
import importlib.util

import pytest
from conftest import fails, works
from loading import ROOT, load


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")


@needs("gym_pusht")
def test_the_policy_drives_in_gym_pusht():
    out = works("PUSHT/in_gym_pusht.py", "--episodes", 2, "--steps", 6)
    assert "pretrained: 0.0% of 2" in out and "regression" in out


@needs("metaworld")
def test_the_arm_learns():
    out = works("EVERYTHING/arm.py", "--steps", 2, "--episodes", 2, "--unseen", 1)
    assert "2 demonstrations" in out and "regression: 0 of 1" in out


def test_without_its_package_a_bridge_says_what_it_needs():
    for script, package in (("PUSHT/in_gym_pusht.py", "gym_pusht"),
                            ("EVERYTHING/arm.py", "metaworld")):
        if not importlib.util.find_spec(package):
            fails(script, words=["pip install"])


def test_the_judge_knows_digits_from_colours(tmp_path):
    works("MNIST/visual.py", "--checkpoint", "MNIST/pretrained.pt", "--export", tmp_path / "x.npz",
          "--n", 20, "--steps", 2)
    out = works("MNIST/judge.py", tmp_path / "x.npz", "--data", "embedded")
    share = float(out.split("(real: ")[1].split(")")[0])
    assert "20 images" in out and share > 0.7
    fails("MNIST/judge.py", tmp_path / "x.npz", "--folder", "DRUMS", words=["(1, 28, 28)"])


def test_pictures_are_drawn_anew(tmp_path, monkeypatch):
    """One kind of each, without the real images of the pages."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "pics/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "PICS", tmp_path)
    visual = make.visual_of("MNIST")
    model = make.model_of(visual, "embedded", steps=8)
    make.save(make.sculptor(model), "sculptor.png")
    make.save(make.pixel(load("MNIST"), paths=3), "pixel.png")
    assert (tmp_path / "sculptor.png").stat().st_size > 5000
    assert (tmp_path / "pixel.png").stat().st_size > 5000
