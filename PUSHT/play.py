"""Tease the robot or teach it: ten control steps a second.

    python play.py                      the policy drives; drag its block
    python play.py --record FILE.npz    you drive the disc, for main.py --data
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

import world
from main import (DRIVEN, ETA, HORIZON, SAMPLE_STEPS, UserError, absolute, observe, run, to_path,
                  writing)
from visual import BLUE, RED, Model, newest, plt, scene

KEYS = """drag block or disc    space: new start    r: regression
1 2 4 8: points driven    left, right: sampling steps    q: quit"""
RECORD_KEYS = """drag the disc: time runs while you hold it
Enter: keep    space: drop    q: keep and quit"""


class Game:
    """drivers[0], a (name, colour, Model), drives or, with a file, you."""

    def __init__(self, figure, drivers, file=None):
        self.axis = figure.add_subplot()
        self.drivers = drivers
        self.file = file
        self.driven = DRIVEN
        self.key = None
        self.note = ""
        self.begin()
        figure.supxlabel(RECORD_KEYS if file else KEYS, fontsize=7)
        for kind in ("button_press", "button_release", "motion_notify"):
            figure.canvas.mpl_connect(f"{kind}_event", self.mouse)
        figure.canvas.mpl_connect("key_press_event", self.press)

    def begin(self):
        self.pose, self.disc = world.starts(1, None)
        self.before = self.disc
        self.held = None
        self.plan = None
        self.rows = []

    def mouse(self, event):
        if event.name == "button_release_event":
            self.held = None
        if not event.inaxes:
            return
        self.hand = torch.tensor([[event.xdata, event.ydata]]).float()
        if event.name == "button_press_event":
            self.held = "disc" if (self.hand - self.disc).norm() < 1 else "block"
            self.grip = self.pose[:, :2] - self.hand
        if self.held == "block" and not self.file:
            pose = self.pose.clone()
            pose[:, :2] = (self.hand + self.grip).clamp(-3, 3)
            disc = world.to_block(self.disc[:, None], pose)[:, 0]
            if (disc - world.nearest(disc)).norm() > world.RADIUS:
                self.pose = pose

    def press(self, event):
        self.key = (event.key or "").lower().removeprefix("shift+")  # the last one counts

    def obey(self, key):
        self.key = None
        self.plan = None
        name, _, model = self.drivers[0]
        if key == " ":
            self.begin()
        if key == "enter" and self.file:
            self.keep()
        if key == "r":
            self.drivers.reverse()
        if key in ("1", "2", "4", "8"):
            self.driven = min(int(key), HORIZON)
        if key in ("left", "right") and name == "diffusion":
            steps = model.options["steps"] + (key == "right") - (key == "left")
            model.options["steps"] = max(steps, 1)

    def step(self):
        if self.key:
            self.obey(self.key)

        # look
        _, _, model = self.drivers[0]
        if self.plan is None or self.k == self.driven:
            y = observe(self.pose, self.disc, self.before)
            x_0 = model.sample(torch.randn(1, 2, 1, HORIZON), y)
            self.plan = to_path(x_0, self.pose)
            self.k = 0

        # move
        command = self.disc if self.file else self.plan[:, self.k]
        if self.held == "disc":
            command = self.hand
        full = len(self.rows) == world.STEPS
        if full:
            command = self.disc
        pose, disc = world.step(self.pose, self.disc, command)
        if self.file and self.held == "disc" and not full:
            self.rows.append((self.pose, self.disc, disc))
            full = len(self.rows) == world.STEPS
            self.note = "no more time: Enter keeps it, space drops it" * full
        self.before = self.disc
        self.pose = pose
        self.disc = disc
        self.k += 1

    def draw(self):
        name, colour, model = self.drivers[0]
        plans = self.plan[:, self.k:]
        title = f"{name}\n{self.driven} driven, {model.options['steps']} sampling steps"
        if self.file:
            plans = []
            title = f"step {len(self.rows)}\n{self.note}"
        title = f"{world.coverage(self.pose).item():.0%} covered, {title}"
        self.axis.clear()
        scene(self.axis, self.pose[0], self.disc[0], title, plans, [colour], size=7)
        self.axis.figure.canvas.draw_idle()

    def keep(self):
        """Adds the episode and rest after it, so that stopping is learned."""
        if len(self.rows) < HORIZON:
            self.note = "not kept: no whole plan"
            return
        end = min(len(self.rows) + world.HOLD, world.STEPS)
        rest = (self.pose, self.disc, self.disc)
        rows = (self.rows + world.STEPS * [rest])[:world.STEPS]
        arrays = [torch.stack(column, 1) for column in zip(*rows)] + [torch.tensor([end])]
        try:
            if os.path.exists(self.file):
                known = world.read_episodes(self.file, HORIZON)
                arrays = [torch.cat(pair) for pair in zip(known, arrays)]
            with writing(Path(self.file)) as file:
                np.savez(file, **dict(zip(world.NAMES, arrays)))
            self.note = f"kept {len(self.rows)} steps, episode {len(arrays[3])} of {self.file}"
            self.begin()
        except UserError as error:  # what you drove stays
            self.note = str(error)
        print(self.note)


def window():
    plt.rcParams["toolbar"] = "None"
    for backend in ("macosx", "TkAgg", "QtAgg"):
        try:
            plt.switch_backend(backend)
            return plt.figure(figsize=(5, 5.8), dpi=100)
        except Exception:
            plt.close("all")
    raise UserError("no window: it takes a display and python3-tk, or PyQt6 and libxcb-cursor0")


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--record", type=absolute, metavar="FILE.npz")
    add("--checkpoint", type=absolute)
    add("--regression", type=absolute)
    parser.set_defaults(steps=SAMPLE_STEPS, eta=ETA, driven=DRIVEN, starts=1, seed=0, device="cpu")
    args = parser.parse_args()
    if args.record and os.path.exists(args.record):
        world.read_episodes(args.record, HORIZON)
    figure = window()
    drivers = [("diffusion", BLUE, Model(args.checkpoint or newest(False), args)),
               ("regression", RED, Model(args.regression or newest(True), args))]
    game = Game(figure, drivers, args.record)
    figure.canvas.manager.set_window_title(f"Push-T: {drivers[0][2].name}")
    plt.show(block=False)

    due = 0
    while plt.get_fignums() and game.key != "q":
        game.step()
        game.draw()
        due = max(due + 0.1, time.monotonic())
        figure.canvas.start_event_loop(max(due - time.monotonic(), 0.01))
    if args.record and game.rows:
        game.keep()


if __name__ == "__main__":
    run(main)
