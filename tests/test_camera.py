"""PUSHT/camera.py: its pictures, its eye, and driving by it."""
import importlib.util

import numpy as np
import pytest
import torch
from conftest import copied, works
from loading import ROOT, load
from PIL import Image


@pytest.fixture(scope="module")
def camera():
    return load("PUSHT", "camera")


def scenes(camera, n, seed=0):
    return camera.world.starts(n, torch.Generator().manual_seed(seed))


def test_a_picture_has_what_is_there_where_it_is(camera):
    """Areas of block, goal and disc, in square units; a moved block moves in the picture."""
    pose = torch.tensor([[5.0, 4.0, 0.7], [3.0, 5.0, 0.7]])
    picture = camera.photograph(pose, torch.tensor([[-6.0, -6.0]]).expand(2, 2))
    assert picture.shape == (2, 3, 64, 64)
    pixel = (camera.WIDTH / camera.SIZE) ** 2
    table, goal, block, disc = camera.COLOURS
    for colour, area in ((goal, 7.0), (block, 7.0), (disc, 0.785)):
        near = (picture - colour.view(3, 1, 1)).abs().amax(1) < 0.15
        assert near[0].sum() * pixel == pytest.approx(area, rel=0.2)
    near = ((picture - block.view(3, 1, 1)).abs().amax(1) < 0.15).flatten(1).float()
    centre = near @ camera.PIXELS / near.sum(1, keepdim=True)
    torch.testing.assert_close(centre, pose[:, :2], atol=0.1, rtol=0)


def test_the_shipped_eye_finds_the_block_and_follows_it(camera):
    eye = camera.Eye()
    eye.load_state_dict(torch.load(ROOT / "PUSHT/eye.pt", weights_only=True))
    pose, disc = scenes(camera, 100)
    seen = eye.see(pose, disc)
    assert (seen - pose)[:, :2].norm(dim=1).median() < 0.1
    moved = pose + torch.tensor([0.5, 0.0, 0.0])
    step = (eye.see(moved, disc + torch.tensor([0.5, 0.0])) - seen)[:, :2].median(dim=0).values
    torch.testing.assert_close(step, torch.tensor([0.5, 0.0]), atol=0.1, rtol=0)
    start = scenes(camera, 20, seed=5)
    _, net = load("PUSHT").load_checkpoint(ROOT / "PUSHT/pretrained.pt")
    frames = camera.drive(net, *start, camera.noise_schedule("cosine", 1000), see=eye.see)
    assert (camera.world.best_coverage(frames) >= 0.9).float().mean() >= 0.7


def test_it_trains_drives_and_films(tmp_path):
    folder = copied(tmp_path / "PUSHT", source="PUSHT")
    for name in ("pretrained.pt", "eye.pt"):
        (folder / name).write_bytes((ROOT / "PUSHT" / name).read_bytes())
    code = (folder / "world.py").read_text()
    (folder / "world.py").write_text(code.replace("STEPS = 300", "STEPS = 32"))
    out = works(folder / "camera.py", "--minutes", 0.02, "--starts", 3, "--out", tmp_path / "a")
    assert "the eye is off by" in out and "3 unseen starts" in out
    assert (tmp_path / "a/eye.pt").exists()
    works(folder / "camera.py", "--draw", "--out", tmp_path / "b")
    with Image.open(tmp_path / "b/camera.gif") as film:
        assert film.n_frames > 8 and np.asarray(film.convert("L")).std() > 10


@pytest.mark.skipif(not importlib.util.find_spec("gym_pusht"), reason="needs gym_pusht")
def test_it_drives_from_another_simulator_s_pictures():
    out = works("PUSHT/in_gym_pusht.py", "--camera", "--episodes", 2, "--steps", 6)
    assert "pretrained: 0.0% of 2" in out
