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
    """A game, and what happens next: a key, or a kind of mouse event and its place, and a step."""
    play = load("PUSHT", "play")
    torch.manual_seed(0)
    play.plt.close("all")
    canvas = play.plt.figure(figsize=(5, 5.8), dpi=100).canvas
    drivers = [(name, "b", play.Model(ROOT / f"PUSHT/{weights}.pt", FLAGS)) for name, weights in
               (("diffusion", "pretrained"), ("regression", "regression"))]
    game = play.Game(canvas.figure, drivers, file and str(file))
    game.step()
    game.draw()

    def then(kind="", place=()):
        event = KeyEvent("key_press_event", canvas, kind)
        if len(place):
            canvas.draw()
            event = MouseEvent(f"{kind}_event", canvas, *game.axis.transData.transform(place), 1)
        canvas.callbacks.process(event.name, event)
        game.step()
        game.draw()
        return game.axis.get_title()
    return game, then


def drive(game, then, steps):
    """You hold the disc and lead it round the block, to and fro."""
    then("button_press", game.disc[0])
    start = game.disc[0].clone()
    for k in range(steps - 1):
        then("motion_notify", start * (1 + 0.2 * (k % 2)))


def test_it_comes_after_a_dragged_block():
    game, then = opened()
    then("button_press", game.pose[0, :2])
    then("motion_notify", (3, -3))
    then("button_release", (3, -3))
    assert (game.pose[0, :2] - torch.tensor([3, -3])).norm() < 0.6
    for _ in range(65):
        then()
    assert game.pose[0, :2].norm() < 3.5 and game.disc.abs().max() < 7


def test_a_block_is_not_dropped_upon_the_disc_nor_out_of_reach():
    game, then = opened()
    world = load("PUSHT", "world")
    then("button_press", game.pose[0, :2])
    for place in (game.disc[0], (6.9, 6.9), (-6.9, -6.9), (6.9, 6.9)):
        then("motion_notify", place)
        point = world.to_block(game.disc[:, None], game.pose)[:, 0]
        assert (point - world.nearest(point)).norm() > 0.45
        assert game.pose[0, :2].abs().max() < 3.5


def test_keys_do_what_the_title_says():
    game, then = opened()
    for key, words in (("right", "6 samp"), ("shift+R", "regression"), ("8", "8 dri")):
        assert words in then(key), key
    plans = []
    for _ in range(9):
        then()
        plans.append(game.plan)
    assert all(plan is plans[0] for plan in plans[:7]) and plans[8] is not plans[0]
    for key in "1842":                                  # of four in a row the last one counts
        game.press(Namespace(key=key))
    game.step()
    game.step()
    assert game.driven == 2
    before = game.pose
    then(" ")
    assert (game.pose - before).norm() > 0.5


def test_what_you_drive_is_kept_by_your_word(tmp_path):
    file = tmp_path / "mine"
    for n in (1, 2):
        game, then = opened(file)
        drive(game, then, 20)
        then("button_release", (0, 0))
        rows = len(game.rows)
        then("button_press", (-6.5, 6.5))               # beside disc and block: nothing is lost
        then("motion_notify", game.pose[0, :2])
        assert len(game.rows) == rows >= 20
        then("enter")
        assert "kept" in game.note and f"episode {n} of" in game.note
        then("enter")
        assert "not kept" in game.note
        made = np.load(file)
        shapes = [made[name].shape for name in made]
        assert shapes == [(n, 300, 3), (n, 300, 2), (n, 300, 2), (n,)]
    assert (made["commands"][:, :-1] == made["discs"][:, 1:]).all()
    file.write_bytes(file.read_bytes()[:-99])
    fails("PUSHT/play.py", "--record", file, words=["no episodes"])


def test_a_long_episode_and_a_full_disk_lose_nothing(tmp_path):
    game, then = opened(tmp_path)                       # a folder: cannot be written
    drive(game, then, 303)
    assert len(game.rows) == 300 and "Enter keeps it" in then()
    then("enter")
    assert len(game.rows) == 300 and str(tmp_path) in game.note


@pytest.mark.skipif(sys.platform != "linux", reason="X11")
def test_no_display_is_one_line():
    fails("PUSHT/play.py", words=["tk", "PyQt6"], env={"DISPLAY": "", "WAYLAND_DISPLAY": ""})
