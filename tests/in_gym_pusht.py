"""The shipped policies in another simulator, which they never saw: pip install gym-pusht first.
There the disc is pulled by a damped spring, and the block is harder to turn."""
import math
import sys

import torch
from loading import ROOT, load

try:
    import gym_pusht  # registers PushT-v0
    import gymnasium
except ImportError:
    sys.exit("skipped: needs pip install gym-pusht")
main = load("PUSHT")
world = main.world
LEAD = 2                # the disc's damped spring lags by k_v / k_p = 0.2 seconds: two steps
UNIT, MIDDLE, TURN = 30, 256, math.pi / 4       # pixels a unit; the goal's x and y, and its angle
TOP = torch.tensor([[0.0, world.BAR[3]]])       # its origin: the middle of the bar's top


def ours(pixels):
    """Points (B, 2) in pixels, y down, in units of the goal's frame, y up."""
    points = (pixels - MIDDLE) / UNIT
    points = world.rotate(points[:, None], torch.full((len(points),), -TURN))[:, 0]
    return points * torch.tensor([1.0, -1.0]) + TOP


def pixels(points):
    points = (points - TOP) * torch.tensor([1.0, -1.0])
    return world.rotate(points[:, None], torch.full((len(points),), TURN))[:, 0] * UNIT + MIDDLE


def see(states):
    """pose (B, 3) and disc (B, 2) in our frame, of states (B, 5)."""
    angle = TURN - states[:, 4]
    centre = ours(states[:, 2:4]) - world.rotate(TOP.expand(len(states), 1, 2), angle)[:, 0]
    return torch.cat([centre, angle[:, None]], dim=1), ours(states[:, :2])


def drive(checkpoint, net, n):
    """The best coverage (n,) of n episodes of 300 steps, as the simulator measures it."""
    config, generator = checkpoint["config"], torch.Generator().manual_seed(0)
    alpha_bar = main.noise_schedule(config["schedule"], config["T"])
    environments = [gymnasium.make("gym_pusht/PushT-v0", obs_type="state") for _ in range(n)]
    states = [environment.reset(seed=i)[0] for i, environment in enumerate(environments)]
    best, before = torch.zeros(n), None
    for k in range(300):
        pose, disc = see(torch.stack([torch.from_numpy(state).float() for state in states]))
        if k % main.DRIVEN == 0:
            y = main.observe(pose, disc, disc if before is None else before)
            noise = torch.randn(n, 2, 1, main.HORIZON, generator=generator)
            *_, (_, x_0, _) = main.sample(net, noise, y, alpha_bar, config["target"],
                                          steps=1 if config["regression"] else main.SAMPLE_STEPS)
            plan = main.to_path(x_0, pose)
        before = disc
        for i, action in enumerate(pixels(plan[:, k % main.DRIVEN + LEAD]).clamp(0, 512).numpy()):
            if best[i] <= 0.95:         # the simulator's own threshold, at which it ends
                states[i], _, _, _, info = environments[i].step(action)
                best[i] = max(best[i], info["coverage"])
    return best


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for name in ("pretrained", "regression"):
        best = drive(*main.load_checkpoint(ROOT / "PUSHT" / f"{name}.pt"), n)
        print(f"{name}: {(best > 0.95).float().mean():.1%} of {n} above 95 % coverage, "
              f"mean best coverage {best.mean():.3f}", flush=True)
