"""A robot that sees: an eye finds the block in a picture, and main.py's policy drives by it.

    python camera.py            train the eye for 4 minutes, then drive 200 unseen starts by it
    python camera.py --draw     figures/camera.gif, from the shipped eye, eye.pt

In training the eye is told the block's pose, which a simulator knows. Then the policy gets the
eye's guess in the place of the truth; where its disc is, a robot knows. The eye looks at points:
the spatial softmax of Levine et al. 2016 (arXiv:1504.00702).
"""
import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import PillowWriter
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import world
from main import (HERE, absolute, catch_ctrl_c, drive, load_checkpoint, noise_schedule, run,
                  writing)
from visual import BLUE, newest

SIZE = 64       # pixels a side
WIDTH = 17.0    # world units a side
MAPS = 32       # of the eye; each looks at one point
LR = 4e-3
BATCH = 32
COLOURS = torch.tensor([(1, 1, 1), (0.57, 0.93, 0.57), (0.48, 0.53, 0.6), (0.25, 0.41, 0.88)])
GRID = WIDTH * ((torch.arange(SIZE) + 0.5) / SIZE - 0.5)
PIXELS = torch.stack(torch.meshgrid(GRID, -GRID, indexing="xy"), dim=-1).view(-1, 2)    # y up


# ---- The camera: from a scene to a picture ----
def cover(points):
    """How much of each pixel the block covers, (B, K); points: pixels in the block's frame."""
    x, y = points.unbind(-1)
    inside = []
    for left, right, bottom, top in (world.BAR, world.STEM):
        from_x = torch.minimum(x - left, right - x)
        from_y = torch.minimum(y - bottom, top - y)
        inside.append(torch.minimum(from_x, from_y))
    return (torch.maximum(*inside) * SIZE / WIDTH + 0.5).clamp(0, 1)


def photograph(pose, disc, vary=False):
    """Pictures (B, 3, 64, 64) in [0, 1] of poses (B, 3) and discs (B, 2) on the goal's table.

    vary: other colours, light, blur and noise each time.
    """
    B = len(pose)
    points = PIXELS.expand(B, -1, -1)
    near = (points - disc[:, None]).norm(dim=2)
    goal = cover(PIXELS[None])
    block = cover(world.to_block(points, pose))
    robot = ((world.RADIUS - near) * SIZE / WIDTH + 0.5).clamp(0, 1)

    colours = COLOURS.repeat(B, 1, 1)[..., None]  # of table, goal, block, disc (B, 4, 3, 1)
    if vary:
        colours = (colours + 0.08 * torch.randn(B, 4, 3, 1)).clamp(0, 1)
    picture = colours[:, 0]
    for k, layer in enumerate((goal, block, robot), start=1):
        picture = torch.lerp(picture, colours[:, k], layer[:, None])  # (B, 3, K)
    picture = picture.unflatten(2, (SIZE, SIZE))

    if vary:
        blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        picture = torch.lerp(picture, blurred, torch.rand(B, 1, 1, 1))
        light = 1 + 0.15 * torch.randn(B, 1, 1, 1)
        grain = 0.04 * torch.rand(B, 1, 1, 1)
        picture = light * picture + grain * torch.randn(picture.shape)
    return picture.clamp(0, 1)


# ---- The eye: from a picture to a pose ----
class Eye(nn.Module):
    """forward(picture (B, 3, 64, 64)): x, y, cos and sin of the block, (B, 4)."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(32, MAPS, 3, padding=1))
        self.pose = nn.Sequential(nn.Linear(2 * MAPS, 256), nn.SiLU(), nn.Linear(256, 4))

    def look(self, picture):
        """Where each map looks, (B, 32, 2) in [-1, 1]: the mean place under its softmax."""
        maps = self.maps(2 * picture - 1)
        side = maps.shape[-1]
        share = (10 * maps).flatten(2).softmax(-1).unflatten(2, (side, side))
        place = (torch.arange(side) + 0.5) / side * 2 - 1
        return torch.stack([share.sum(2) @ place, -(share.sum(3) @ place)], dim=2)  # y up

    def forward(self, picture):
        return self.pose(10 * self.look(picture).flatten(1))

    @torch.no_grad()
    def see(self, pose, disc):
        """What the robot takes for the pose: drive's argument of this name."""
        return to_pose(self(photograph(pose, disc)))


def to_pose(answer):
    """x, y, angle (B, 3) of x, y, cos, sin (B, 4)."""
    return torch.cat([answer[:, :2], torch.atan2(answer[:, 3:], answer[:, 2:3])], dim=1)


def train(eye, seconds):
    """Learns from the demonstrations' scenes, until Ctrl-C."""
    poses, discs, _, ends = world.demonstrations(1000)
    counts = torch.arange(poses.shape[1]) < ends[:, None]
    poses = poses[counts]
    discs = discs[counts]
    optimizer = torch.optim.Adam(eye.parameters(), betas=(0.9, 0.99), fused=True)
    stop = catch_ctrl_c()
    began = time.monotonic()
    share = 0.0
    bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {remaining} left{postfix}")
    while share < 1 and not stop:
        i = torch.randint(len(poses), (BATCH,))
        pose = poses[i]
        wanted = torch.cat([pose[:, :2], pose[:, 2:].cos(), pose[:, 2:].sin()], dim=1)
        loss = F.mse_loss(eye(photograph(pose, discs[i], vary=True)), wanted)
        optimizer.zero_grad()
        loss.backward()
        lr = LR * min(share / 0.03 + 0.02, 1) * (1 + math.cos(math.pi * share)) / 2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        share = min((time.monotonic() - began) / seconds, 1)
        bar.set_postfix(loss=loss.item(), refresh=False)
        bar.update(share - bar.n)
    bar.close()


# ---- Driving by it ----
def measure(eye, policy, n):
    """Drives n unseen starts by the eye; prints its errors and how many get home."""
    errors = []

    def see(pose, disc):
        seen = eye.see(pose, disc)
        turn = (seen[:, 2] - pose[:, 2] + math.pi) % (2 * math.pi) - math.pi
        errors.append(torch.stack([(seen - pose)[:, :2].norm(dim=1), turn.abs()]))
        return seen

    best = world.best_coverage(policy(*world.starts(n, torch.Generator().manual_seed(1)), see=see))
    place, angle = torch.cat(errors, dim=1).median(dim=1).values
    shares = [f"{(best >= level).float().mean():.1%} reach {level:.2f}" for level in (0.9, 0.95)]
    print(f"the eye is off by {place:.3f} units and {math.degrees(angle):.2f} degrees, median")
    print(f"{n} unseen starts, coverage: {', '.join(shares)}")


@torch.no_grad()
def film(eye, policy, path, every=4):
    """One unseen start: what it sees, where its maps look, the plan, and its guess of the place."""
    edge = WIDTH / 2
    figure, axis = plt.subplots(figsize=(3.4, 3.7))
    writer = PillowWriter(fps=8)
    writer.setup(figure, path.name, dpi=80)
    start = world.starts(1, torch.Generator().manual_seed(3))
    for k, (pose, disc, plan) in enumerate(policy(*start, see=eye.see)):
        home = world.coverage(pose).item()
        if k % every and home < 0.95:
            continue
        picture = photograph(pose, disc)
        axis.clear()
        axis.imshow(picture[0].permute(1, 2, 0).numpy(), extent=(-edge, edge, -edge, edge))
        axis.plot(*(eye.look(picture)[0].T * edge), "x", color="tab:red", ms=4)
        axis.plot(*plan[0].T, color=BLUE, lw=1, marker=".", ms=3)
        axis.plot(*eye.see(pose, disc)[0, :2], "o", color="black", ms=4)
        axis.set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])
        axis.set_title(f"step {k}: {home:.0%} covered", fontsize=9)
        writer.grab_frame()
        if home >= 0.95:
            break
    for _ in range(8):  # a second
        writer.grab_frame()
    with writing(path) as writer.outfile:
        writer.finish()
    print(path)


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--minutes", type=float, default=4.0)
    add("--seed", type=int, default=0)
    add("--starts", type=int, default=200)
    add("--draw", action="store_true")
    add("--out", type=absolute, default=HERE / "figures")
    args = parser.parse_args()
    if not (0 < args.minutes < math.inf and args.starts > 0):
        parser.error("numbers must be above 0 and finite")
    plt.switch_backend("Agg")
    torch.manual_seed(args.seed)
    out = Path(args.out)
    path = newest(regression=False)
    checkpoint, net = load_checkpoint(path)
    config = checkpoint["config"]
    alpha_bar = noise_schedule(config["schedule"], config["T"]).float()
    print(f"policy: {path}")

    def policy(pose, disc, see):
        noise = torch.Generator().manual_seed(0)
        return drive(net, pose, disc, alpha_bar, config["target"], see=see, generator=noise)

    eye = Eye()
    if args.draw:
        eye.load_state_dict(torch.load(HERE / "eye.pt", weights_only=True))
    else:
        train(eye, 60 * args.minutes)
        with writing(out / "eye.pt") as file:
            torch.save(eye.state_dict(), file)
        measure(eye, policy, args.starts)
    film(eye, policy, out / "camera.gif")


if __name__ == "__main__":
    run(main)
