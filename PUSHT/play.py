"""Tease the robot or teach it: ten control steps a second.

    python play.py                      the policy drives; drag its block
    python play.py --record FILE.npz    you drive, for main.py --data
"""
import argparse
import os
import sys
import tempfile
import time

import numpy as np
import torch

import world
from main import DRIVEN, ETA, HORIZON, SAMPLE_STEPS, absolute, observe, run, to_path
from visual import BLUE, RED, Model, newest, plt, scene

KEYS = """drag block or disc   space: new start   r: regression   s: shove   q: quit
1 2 4 8: points driven   left, right: sampling steps   Enter: keep (--record)"""
NAMES = "poses", "discs", "commands", "ends"


def play(figure, drivers, file=None):
    """main.drive in a window: drivers[0] (name, colour, Model) or, with a file, you."""
    events = []
    for kind in ("button_press", "button_release", "motion_notify", "key_press"):
        figure.canvas.mpl_connect(f"{kind}_event", events.append)
    figure.supxlabel(KEYS, fontsize=6)
    axis = figure.add_subplot()
    shove = False
    driven = DRIVEN
    key = " "

    while key != "q":
        # keys
        if key == " ":
            pose, disc = world.starts(1, None)
            before = disc
            held = None
            best = 0.0
            rows = []  # pose, disc, command
        if key == "r":
            drivers.reverse()
        if key == "s":
            shove = not shove
        if key in list("1248"):
            driven = int(key)
        name, colour, model = drivers[0]
        if name == "diffusion":
            steps = model.options["steps"] + (key == "right") - (key == "left")
            model.options["steps"] = max(steps, 1)

        # look
        if key or k == driven:
            x_T = torch.randn(1, 2, 1, HORIZON)
            *_, (_, x_0, _) = model.sample(x_T, observe(pose, disc, before))
            plan = to_path(x_0, pose) + 0.3 * shove * torch.randn(2)
            k = 0

        # move
        command = disc if file else plan[:, k]
        if held == "disc":
            command = hand
        after = world.step(pose, disc, command)
        if held == "disc":
            rows.append((pose, disc, after[1]))
        before = disc
        pose, disc = after
        k += 1

        # draw
        now = world.coverage(pose).item()
        best = max(best, now)
        title = (f"coverage {now:.0%}, best {best:.0%}   {name}{', shoved' * shove}   "
                 f"{driven} driven   {model.options['steps']} sampling steps")
        plans = plan[:, k:]
        if file:
            title = f"coverage {now:.0%}   you, step {len(rows)}"
            plans = []
        axis.clear()
        scene(axis, pose[0], disc[0], title, plans, [colour])
        figure.canvas.draw_idle()
        yield pose, disc, plan

        # mouse
        key = None
        while events and not key:
            event = events.pop(0)
            if event.name == "key_press_event":
                key = event.key
            elif event.name == "button_release_event":
                held = None
            elif event.inaxes:
                place = torch.tensor([[event.xdata, event.ydata]]).float()
                if held == "block":
                    pose[:, :2] += place - hand
                    best = 0.0
                    rows = []
                hand = place
                if event.name == "button_press_event":
                    held = "disc" if (hand - disc).norm() < 1 else "block"

        # record
        if file and (key == "enter" or best >= 0.95):
            keep(file, rows, (pose, disc, disc))
            key = " "
        if len(rows) == world.STEPS:  # too long: begin again
            key = " "


def keep(path, rows, rest):
    """Adds an episode and rest after it, so that stopping is learned."""
    if len(rows) < HORIZON:
        return print("not kept: shorter than a plan")
    n = min(len(rows) + world.HOLD, world.STEPS)
    rows = (rows + world.STEPS * [rest])[:world.STEPS]
    arrays = [torch.stack(column, 1) for column in zip(*rows)] + [torch.tensor([n])]
    if os.path.exists(path):
        arrays = [torch.cat(pair) for pair in zip(world.read_episodes(path, HORIZON), arrays)]
    with open(f"{path}.part", "wb") as part:
        np.savez(part, **dict(zip(NAMES, arrays)))
    os.replace(f"{path}.part", path)
    print(f"{path}: {len(arrays[3])} episodes")


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--record", type=absolute, metavar="FILE.npz", help="you drive")
    add("--checkpoint", type=absolute, help="[newest run, else pretrained.pt]")
    add("--regression", type=absolute, help="[newest run, else regression.pt]")
    parser.set_defaults(steps=SAMPLE_STEPS, eta=ETA, driven=DRIVEN, starts=1, seed=0, device="cpu")
    args = parser.parse_args()
    if args.record:
        if os.path.exists(args.record):
            world.read_episodes(args.record, HORIZON)
        tempfile.TemporaryFile(dir=os.path.dirname(args.record)).close()
    for backend in ("macosx", "TkAgg", "QtAgg"):
        try:
            plt.switch_backend(backend)
            break
        except ImportError:
            pass
    else:
        sys.exit("error: no window: it takes a display, and apt's python3-tk or pip install PyQt6")
    drivers = [("diffusion", BLUE, Model(args.checkpoint or newest(False), args)),
               ("regression", RED, Model(args.regression or newest(True), args))]
    plt.rcParams["toolbar"] = "None"  # its keys are ours
    figure = plt.figure(figsize=(4.5, 5))
    plt.show(block=False)
    due = 0
    for _ in play(figure, drivers, args.record):
        due = max(due + 0.1, time.monotonic())
        figure.canvas.start_event_loop(max(due - time.monotonic(), 0.01))
        if not plt.get_fignums():
            break


if __name__ == "__main__":
    run(main)
