"""A robot arm, with PUSHT's net and method: pip install metaworld first.

    python EVERYTHING/arm.py            300 demonstrations, two trainings, 50 unseen episodes each

It is to grasp a puck and to carry it to a goal in the air, each time at other places: Meta-World's
pick-place-v3 (arXiv:1910.10897). x_0 is a plan: x, y, z and gripper at 16 steps. y is all that the
simulator tells, 39 numbers. The measure is the share of unseen episodes that succeed, beside a
regression: the same net, with one noise level.
"""
import argparse
import copy
import math
import sys
import warnings
from pathlib import Path

import torch
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "PUSHT"))
from main import (CHANNELS, DRIVEN, HORIZON, SCHEDULE, WARMUP, T, UNet, UserError, noise_schedule,
                  run, sample, training_step)

LENGTH = 200            # control steps; the expert needs 55
NOISE = 0.25            # the disturbance's standard deviation, at most
LR = 1e-3
BATCH = 256


# ---- Data: an expert's demonstrations ----
def begin(arm, seed):
    """What is seen (39,) of the seed's places."""
    arm.seed(seed)
    return torch.from_numpy(arm.reset()[0]).float()


def act(arm, action):
    """What is seen next, and whether the puck is at the goal."""
    seen, _, _, _, info = arm.step(action.numpy())
    return torch.from_numpy(seen).float(), info["success"] > 0


def demonstrate(arm, expert, seen):
    """Plans (N, 4, 1, 16), observations (N, 39), disturbed as in PUSHT/world.py."""
    sigma = NOISE * torch.rand(1)
    noise = torch.zeros(4)
    rows = []
    end = LENGTH
    while len(rows) < end:
        command = torch.from_numpy(expert.get_action(seen.numpy())).float().clamp(-1, 1)
        rows.append((command, seen))
        noise = 0.7 * noise + (1 - 0.7 ** 2) ** 0.5 * sigma * torch.randn(4)
        seen, success = act(arm, (command + noise).clamp(-1, 1))
        if success:
            end = min(end, len(rows) + HORIZON)
    commands, y = map(torch.stack, zip(*rows))
    plans = commands.unfold(0, HORIZON, 1)  # (N, 4, 16)
    return plans[:, :, None], y[:len(plans)]


# ---- Training and driving ----
def train(plans, y, alpha_bar, steps):
    """The average net after so many steps."""
    net = UNet(CHANNELS, coordinates=4, observations=y.shape[1])
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in trange(steps):
        i = torch.randint(len(plans), (BATCH,))
        lr = LR * min((step + 1) / WARMUP, 1) * (1 + math.cos(math.pi * step / steps)) / 2
        decay = (1 + step) / (30 + step)
        training_step(net, ema, optimizer, plans[i], y[i], alpha_bar, lr, decay)
    return ema


def drive(arm, seen, net, scale, alpha_bar):
    """Whether an episode succeeds."""
    for k in range(LENGTH):
        if k % DRIVEN == 0:
            x_0 = sample(net, torch.randn(1, 4, 1, HORIZON), scale(seen[None]), alpha_bar)
        seen, success = act(arm, x_0[0, :, 0, k % DRIVEN])
        if success:
            return True
    return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of training [2000]")
    parser.add_argument("--episodes", type=int, default=300, help="demonstrations [300]")
    parser.add_argument("--unseen", type=int, default=50, help="episodes to drive [50]")
    args = parser.parse_args()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as tasks
        from metaworld.policies import SawyerPickPlaceV3Policy as Expert
    except ImportError as error:
        raise UserError("it needs pip install metaworld") from error
    warnings.simplefilter("ignore")     # the expert asks for more than 1
    torch.manual_seed(args.seed)
    arm = tasks["pick-place-v3-goal-observable"]()
    arm._freeze_rand_vec = False        # other places at each reset,
    arm.seeded_rand_vec = True          # by its own seed

    # what varies is scaled to [-1, 1]
    rows = [demonstrate(arm, Expert(), begin(arm, 1000 * args.seed + i))
            for i in range(args.episodes)]
    plans, y = map(torch.cat, zip(*rows))
    low = y.amin(dim=0)
    high = y.amax(dim=0)

    def scale(y):
        return (2 * (y - low) / (high - low) - 1)[:, high > low]

    print(f"{args.episodes} demonstrations, {len(plans):,} plans, {scale(y).shape[1]} numbers seen")
    for name, levels in (("diffusion", T), ("regression", 1)):
        alpha_bar = noise_schedule(SCHEDULE, levels).float()
        net = train(plans, scale(y), alpha_bar, args.steps)
        won = sum(drive(arm, begin(arm, 10 ** 6 + i), net, scale, alpha_bar)
                  for i in range(args.unseen))
        print(f"{name}: {won} of {args.unseen} unseen episodes succeed")


if __name__ == "__main__":
    run(main)
