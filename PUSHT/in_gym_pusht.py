"""The shipped policies in another simulator, which they never saw: pip install gym-pusht first.

    python PUSHT/in_gym_pusht.py                200 episodes of each
    python PUSHT/in_gym_pusht.py --camera       the policy, from the simulator's own pictures

There the disc is pulled by a damped spring, and the block is harder to turn.
"""
import argparse
import importlib
import math

import numpy as np
import torch
from torch.nn import functional as F

import world
from camera import PIXELS, SIZE, Eye, to_pose
from main import (DRIVEN, HERE, HORIZON, SAMPLE_STEPS, UserError, load_checkpoint, noise_schedule,
                  observe, run, sample, to_path)

LEAD = 2                # the disc's damped spring lags by k_v / k_p = 0.2 seconds: two steps
UNIT, MIDDLE, TURN = 30, 256, math.pi / 4       # pixels a unit; the goal's x and y, and its angle
TOP = torch.tensor([[0.0, world.BAR[3]]])       # its origin: the middle of the bar's top


def ours(pixels):
    """Points (B, 2) in pixels, y down, in units of the goal's frame, y up."""
    points = (pixels - MIDDLE) / UNIT
    points = world.rotate(points[:, None], torch.full((len(points),), -TURN))[:, 0]
    return points * torch.tensor([1.0, -1.0]) + TOP


def to_pixels(points):
    """The way back from ours."""
    points = (points - TOP) * torch.tensor([1.0, -1.0])
    return world.rotate(points[:, None], torch.full((len(points),), TURN))[:, 0] * UNIT + MIDDLE


def told(states):
    """pose (B, 3) and disc (B, 2) in our frame, of states (B, 5)."""
    states = torch.from_numpy(np.stack(states)).float()
    angle = TURN - states[:, 4]
    centre = ours(states[:, 2:4]) - world.rotate(TOP.expand(len(states), 1, 2), angle)[:, 0]
    return torch.cat([centre, angle[:, None]], dim=1), ours(states[:, :2])


@torch.no_grad()
def seen(states, eye):
    """The same by an eye, from pictures of 96 x 96 pixels, turned into our camera's frame."""
    pictures = torch.from_numpy(np.stack([state["pixels"] for state in states]))
    pictures = pictures.permute(0, 3, 1, 2).float() / 255
    places = to_pixels(PIXELS) / MIDDLE - 1  # in [-1, 1], as grid_sample counts
    grid = places.view(1, SIZE, SIZE, 2).expand(len(pictures), -1, -1, -1)
    pictures = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)  # white beyond the edge
    disc = torch.from_numpy(np.stack([state["agent_pos"] for state in states])).float()
    return to_pose(eye(pictures)), ours(disc)


def drive(gymnasium, checkpoint, net, n, steps, eye=None):
    """The best coverage (n,) of n episodes, as the simulator measures it."""
    config = checkpoint["config"]
    generator = torch.Generator().manual_seed(0)
    alpha_bar = noise_schedule(config["schedule"], config["T"]).float()
    kind = "pixels_agent_pos" if eye else "state"
    environments = [gymnasium.make("gym_pusht/PushT-v0", obs_type=kind) for _ in range(n)]
    states = [environment.reset(seed=i)[0] for i, environment in enumerate(environments)]
    best = torch.zeros(n)
    before = None

    for k in range(steps):
        pose, disc = seen(states, eye) if eye else told(states)
        if k % DRIVEN == 0:
            y = observe(pose, disc, disc if before is None else before)
            x_T = torch.randn(n, 2, 1, HORIZON, generator=generator)
            x_0 = sample(net, x_T, y, alpha_bar, config["target"],
                         steps=1 if config["regression"] else SAMPLE_STEPS)
            plan = to_path(x_0, pose)
        before = disc

        actions = to_pixels(plan[:, k % DRIVEN + LEAD]).clamp(0, 512).numpy()
        for i, action in enumerate(actions):
            if best[i] <= 0.95:         # the simulator's own threshold, at which it ends
                states[i], _, _, _, info = environments[i].step(action)
                best[i] = max(best[i], info["coverage"])
    return best


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=200, help="[200]")
    parser.add_argument("--steps", type=int, default=300, help="of an episode [300]")
    parser.add_argument("--camera", nargs="?", const=HERE / "eye.pt", help="an eye [eye.pt]")
    args = parser.parse_args()
    try:
        importlib.import_module("gym_pusht")    # registers PushT-v0
        gymnasium = importlib.import_module("gymnasium")
    except ImportError as error:
        raise UserError("it needs pip install gym-pusht") from error

    names = ["pretrained", "regression"]
    eye = None
    if args.camera:
        names = ["pretrained"]
        eye = Eye()
        eye.load_state_dict(torch.load(args.camera, weights_only=True))
    for name in names:
        checkpoint, net = load_checkpoint(HERE / f"{name}.pt")
        best = drive(gymnasium, checkpoint, net, args.episodes, args.steps, eye)
        print(f"{name}: {(best > 0.95).float().mean():.1%} of {args.episodes} above 95 % coverage, "
              f"mean best coverage {best.mean():.3f}")


if __name__ == "__main__":
    run(main)
