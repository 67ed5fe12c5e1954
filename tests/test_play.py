"""PUSHT/play.py's window, with a mouse and keys that nobody touched."""
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import fails
from loading import ROOT, load
from matplotlib.backend_bases import KeyEvent, MouseEvent

FLAGS = Namespace(steps=5, eta=0, driven=4, starts=1, seed=0, device="cpu")


def opened(file=None):
    """A window's axis, and a step after an event: a key, or a kind and its place."""
    play = load("PUSHT", "play")
    torch.manual_seed(0)
    play.plt.close("all")
    canvas = play.plt.figure().canvas
    drivers = [(name, "b", play.Model(ROOT / f"PUSHT/{weights}.pt", FLAGS)) for name, weights in
               (("diffusion", "pretrained"), ("regression", "regression"))]
    game = play.play(canvas.figure, drivers, file)
    next(game)
    axis = canvas.figure.axes[0]

    def step(kind="", place=()):
        event = KeyEvent("key_press_event", canvas, kind)
        if len(place):
            canvas.draw()
            event = MouseEvent(f"{kind}_event", canvas, *axis.transData.transform(place), 1)
        canvas.callbacks.process(event.name, event)
        return next(game)
    return axis, step


def test_it_comes_after_a_dragged_block():
    _, step = opened()
    step("button_press", step()[0][0, :2])
    step("motion_notify", (-3, 3))
    pose = step("button_release", (-3, 3))[0]
    assert (pose[0, :2] - torch.tensor([-3, 3])).norm() < 0.5
    for _ in range(65):
        pose = step()[0]
    assert pose[0, :2].norm() < 3.5


def test_keys_do_what_the_title_says():
    axis, step = opened()
    for key, words in (("right", "6 samp"), ("r", "regression"), ("s", "shoved"), ("8", "8 dri")):
        pose, _, plan = step(key)
        assert words in axis.get_title(), key
    assert [step()[2] is plan for _ in range(8)] == 7 * [True] + [False]
    assert (step(" ")[0] - pose).norm() > 0.5
    with pytest.raises(StopIteration):
        step("q")


def test_what_you_drive_is_added(tmp_path, capsys):
    file = tmp_path / "mine"
    for n in (1, 2):
        _, step = opened(file)
        step("button_press", step()[1][0])
        for _ in range(20):
            step("motion_notify", (6, 6))
        step("enter")
        step("enter")
        assert "not kept" in capsys.readouterr().out
        made = np.load(file)
        shapes = [made[name].shape for name in made]
        assert shapes == [(n, 300, 3), (n, 300, 2), (n, 300, 2), (n,)]
    assert (made["commands"][:, :-1] == made["discs"][:, 1:]).all()
    file.write_bytes(file.read_bytes()[:-99])
    fails("PUSHT/play.py", "--record", file, words=["no episodes"])


@pytest.mark.skipif(sys.platform != "linux", reason="X11")
def test_no_display_is_one_line():
    fails("PUSHT/play.py", words=["tk", "PyQt6"], env={"DISPLAY": "", "WAYLAND_DISPLAY": ""})
