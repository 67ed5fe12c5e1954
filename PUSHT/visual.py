"""Watch the diffusion policy of main.py at work: the tutorial's figures, drawn from a checkpoint.

    python visual.py                        plans out of noise: figures/reverse.png and .gif
    python visual.py fan drive              other figures by name; "all" draws every one
    python visual.py --export FILE.npz --n 5000    observations and plans as arrays

Takes the newest checkpoints in runs/, of the policy and of the regression, else those shipped.
"""
import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter

import world
from main import (DRIVEN, ETA, HERE, HORIZON, REACH, SAMPLE_STEPS, SIGHT, UserError, absolute,
                  compare, drive, load_checkpoint, load_data, noise_schedule, observe, run, sample,
                  to_path, walk, writing)

BLUE = "tab:blue"
ORANGE = "tab:orange"
RED = "tab:red"
LEFT, RIGHT, BOTTOM, TOP = world.BAR
OUTLINE = torch.tensor([(LEFT, TOP), (RIGHT, TOP), (RIGHT, BOTTOM), (world.STEM[1], BOTTOM),
                        (world.STEM[1], world.STEM[2]), (world.STEM[0], world.STEM[2]),
                        (world.STEM[0], BOTTOM), (LEFT, BOTTOM)])
plt.style.use("default")  # whatever matplotlibrc says
plt.rcParams.update({"font.size": 9, "figure.dpi": 150, "figure.constrained_layout.use": True})


class Model:
    """What a figure needs: a checkpoint's net, schedule and target, and the flags."""

    def __init__(self, path, args):
        self.checkpoint, self.net = load_checkpoint(path, args.device)
        self.config = self.checkpoint["config"]
        shipped = {"world": [1.7692, 0.5, 0.6]}  # which older checkpoints do not say
        compare(shipped | self.config, {"horizon": HORIZON, "reach": REACH, "sight": SIGHT,
                                        "world": world.SETTINGS})
        self.name = f"{Path(path).parent.name}/{Path(path).name}, step {self.checkpoint['step']}"
        alpha_bar = noise_schedule(self.config["schedule"], self.config["T"])
        self.alpha_bar = alpha_bar.float().to(args.device)
        self.target = self.config["target"]
        self.options = {"steps": args.steps, "eta": args.eta}
        if self.config["regression"]:
            self.options["steps"] = 1
        self.seed = args.seed
        self.device = args.device
        self.episodes = args.starts
        self.driven = args.driven

    def load(self):
        data = self.checkpoint.get("args", {}).get("data")
        return load_data(self.config["episodes"], data)[:2]

    def starts(self, n):
        """n unseen starts, poses and discs: with seed 0 those that main.py ends with."""
        return world.starts(n, torch.Generator().manual_seed(self.seed + 1))

    def walk(self, pose, disc):
        """main.walk for discs (B, 2) at rest: yields (t, x_t, x0_hat) as points (B, 16, 2)."""
        torch.manual_seed(self.seed)
        x_T = torch.randn(len(pose), 2, 1, HORIZON).to(self.device)
        y = observe(pose, disc, disc).to(self.device)
        for t, x_t, x0_hat in walk(self.net, x_T, y, self.alpha_bar, self.target, **self.options):
            yield t, to_path(x_t.cpu(), pose), to_path(x0_hat.cpu(), pose)

    def plans(self, pose, disc):
        """The end of that walk (B, 16, 2)."""
        *_, (_, plans, _) = self.walk(pose, disc)
        return plans

    def sample(self, x_T, y):
        """main.sample with this net and these flags."""
        return sample(self.net, x_T, y, self.alpha_bar, self.target, **self.options)

    def drive(self, pose, disc, **changes):
        """main.drive with the noise of --seed."""
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        options = {"driven": self.driven} | self.options | changes
        return drive(self.net, pose, disc, self.alpha_bar, self.target, generator=generator,
                     **options)


def drive_expert(pose, disc):
    """The closed loop of the expert that gave the demonstrations."""
    expert = world.Expert(len(pose), torch.Generator().manual_seed(0))
    for _ in range(world.STEPS):
        pose, disc = world.step(pose, disc, expert(pose, disc))
        yield pose, disc


# ---- Scenes: goal, block, disc and paths; in rows, or one after another ----
def scene(axis, pose, disc, title, plans, colours, size=6.5, goal=True):
    """Draws pose (3,), disc (2,) and plans (B, K, 2), each in its colour, on one axis."""
    if goal:
        axis.add_patch(plt.Polygon(OUTLINE, color="#b7e1b0"))
    block = world.to_world(OUTLINE[None], pose[None])[0]
    axis.add_patch(plt.Polygon(block, fc="0.72"))
    axis.add_patch(plt.Polygon(block, fill=False, ec="0.3", zorder=3))
    axis.add_patch(plt.Circle(disc, world.RADIUS, facecolor="#7fa8d9", edgecolor="0.3", zorder=2))
    for plan, colour in zip(plans, colours):
        axis.plot(*plan.T, color=colour, lw=2 if colour == RED else 1, marker=".", ms=3)
    axis.set(xlim=(-size, size), ylim=(-size, size), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    axis.spines[:].set_color("0.8")


def strip(model, title, frames):
    """One column a frame, one row a scene of it."""
    rows, columns = len(frames[0]), len(frames)
    figure, axes = plt.subplots(rows, columns, figsize=(1.8 * columns, 2 * rows + 0.3))
    figure.suptitle(title)
    figure.supxlabel(f"seed {model.seed}; {model.name}", fontsize=6.5, color="0.4")
    scenes = [what for row in zip(*frames) for what in row]
    for axis, what in zip(axes.flat, scenes):
        scene(axis, *what)
    return figure


def animate(frames, path, fps):
    """A GIF: the scenes of a frame, two a row."""
    figure, axes = plt.subplots(len(frames[0]) // 2, 2, figsize=(4.2, 1.1 * len(frames[0])))
    writer = PillowWriter(fps=fps)
    writer.setup(figure, path, dpi=100)

    for frame in frames + fps * frames[-1:]:  # the last one stays for a second
        for axis, what in zip(axes.flat, frame):
            axis.clear()
            scene(axis, *what)
        writer.grab_frame()
        figure.set_layout_engine("none")  # keep the first frame's layout: twice as fast

    with writing(path) as writer.outfile:
        writer.finish()
    plt.close(figure)


def side(plans, pose):
    """+1 for plans (B, 16, 2) that lead round the block anticlockwise, -1 for clockwise: (B,)."""
    turn = world.angle(world.to_block(plans, pose)).diff(dim=1)
    return ((turn + torch.pi) % (2 * torch.pi) - torch.pi).sum(1).sign()


def divided(model, k, n=100, plans=16):
    """Poses and discs of the k starts, of n unseen ones, at which the plans divide the most."""
    pose, disc = (x.repeat_interleave(plans, 0) for x in model.starts(n))
    points = world.to_block(model.plans(pose, disc), pose).view(n, plans, -1, 2)

    # by how much the average plan leads nearer to the block's centre than the plans do
    nearer = points.norm(dim=-1).mean(dim=1) - points.mean(dim=1).norm(dim=-1)
    i = nearer.mean(dim=1).topk(k).indices * plans
    return pose[i], disc[i]


def bundle(model, k, n=1):
    """k plans from each of the n most divided starts: pose, disc, walk from noise, colours."""
    pose, disc = (x.repeat_interleave(k, 0) for x in divided(model, n))
    frames = list(model.walk(pose, disc))
    _, plans, _ = frames[-1]
    return pose, disc, frames, [BLUE if way > 0 else ORANGE for way in side(plans, pose)]


# ---- The figures: each a function of a Model and of the regression's ----
def denoising(model, _):
    """Plans from one start, level by level: a scene of x_t, one of the guess x0_hat."""
    pose, disc, frames, colours = bundle(model, 16)
    return [[(pose[0], disc[0], f"{name}, t = {t}", plans, colours)
             for name, plans in (("xₜ", x_t), ("x̂₀", x0_hat))] for t, x_t, x0_hat in frames]


def driving(model, regression, n=2, every=4):
    """The n most divided starts: scenes of the diffusion policy, then of the regression."""
    start = divided(model, n)
    films = []
    for policy, name, colour in ((model, "diffusion", BLUE), (regression, "regression", RED)):
        scenes = []
        best = torch.zeros(n)
        for k, (pose, disc, plan) in enumerate(policy.drive(*start)):
            best = torch.maximum(best, world.coverage(pose))
            scenes.append([(pose[i], disc[i], f"{name}, step {k}: {best[i]:.0%}", plan[i:i + 1],
                            [colour]) for i in range(n)])
        films.append(scenes)
    return [above + below for above, below in zip(*films)][::every]


def reverse(model, regression):
    """From noise to motion: x_t, and below it the guess x0_hat."""
    frames = denoising(model, regression)
    every = max(len(frames) // 5, 1)
    shown = frames[:-1:every] + frames[-1:]
    return strip(model, "The reverse process: 16 plans from one start", shown)


def fan(model, regression, k=30):
    """Plans from four starts, and the one plan of the regression."""
    pose, disc, walked, colours = bundle(model, k, 4)
    _, plans, _ = walked[-1]
    average = regression.plans(pose[::k], disc[::k])
    frames = []
    for i in range(4):
        part = slice(i * k, (i + 1) * k)
        frames.append([(pose[i * k], disc[i * k], "", [*plans[part], average[i]],
                        colours[part] + [RED])])
    return strip(model, f"{k} plans from each start, the one plan of the regression (red)", frames)


def film(model, regression):
    """A filmstrip of the closed loop: the diffusion policy above the regression."""
    frames = driving(model, regression, 1, 20)[:5]
    return strip(model, "The plans and the best coverage so far", frames)


def bars(runs):
    """Drives each policy: a table of how often it succeeds, and bars with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    for i, (name, frames) in enumerate(runs.items()):
        began = time.perf_counter()
        best = world.best_coverage(frames)
        n = len(best)
        line = f"{name}: "

        for place, level, colour in ((-0.2, 0.9, "#9ec5ea"), (0.2, 0.95, BLUE)):
            reached = (best >= level).float().mean().item()
            middle = (reached + 1.92 / n) / (1 + 3.84 / n)  # Wilson 1927
            half = 1.96 * (reached * (1 - reached) / n + 0.96 / n ** 2) ** 0.5 / (1 + 3.84 / n)
            line += f"{reached:.1%} ({middle - half:.0%} to {middle + half:.0%}) >= {level:.2f}, "
            axis.bar(i + place, reached, 0.38, color=colour)
            axis.errorbar(i + place, middle, half, color="0.2", capsize=3)
        print(f"{line}mean best {best.mean():.3f}, {time.perf_counter() - began:.1f} s")

    axis.set_xticks(range(len(runs)), [name.replace(" ", "\n", 1) for name in runs])
    axis.set(ylim=(0, 1.05), title="Share that reaches 0.90 (light), 0.95 (dark)")
    return figure


def success(model, regression):
    """How often each policy brings the block to the goal."""
    start = model.starts(model.episodes)
    demonstrated, seen = model.load()
    torch.manual_seed(model.seed)

    # three in the place of a net
    def shoved(x_t, t, y):  # the regression's plan, moved by 0.15 units or so aside
        return regression.sample(x_t, y) + 0.15 / REACH * torch.randn(len(y), 2, 1, 1).to(x_t)

    def mean(x_t, t, y):  # of 16 plans
        x_T = torch.randn(16, *x_t.shape).flatten(0, 1).to(x_t)
        return model.sample(x_T, y.repeat(16, 1)).unflatten(0, (16, -1)).mean(0)

    def look_up(x_t, t, y):  # the plan of the most similar y
        return demonstrated[torch.cdist(y.cpu(), seen).argmin(1)].to(x_t)

    runs = {"expert": drive_expert(*start), "regression": regression.drive(*start)}
    for name, net in (("regression, shoved", shoved), ("mean of 16 plans", mean),
                      ("look-up", look_up)):
        runs[name] = drive(net, *start, model.alpha_bar, "x0", model.driven, steps=1)
    return bars(runs | {"diffusion": model.drive(*start)})


def steps(model, _):
    """Success against the number of sampling steps a plan."""
    start = model.starts(model.episodes)
    return bars({f"{n} steps": model.drive(*start, steps=n) for n in (1, 2, 5, 10, 20)})


def copying(model, _):
    """Is it copying? Plans, and those of the demonstrations nearest to them."""
    known, _ = model.load()
    known = to_path(known, torch.zeros(len(known), 3))
    pose, disc = model.starts(5)
    drawn = world.to_block(model.plans(pose, disc), pose)
    disc = world.to_block(disc[:, None], pose)[:, 0]
    distance = torch.cdist(drawn.flatten(1), known.flatten(1)) / HORIZON ** 0.5

    figure, axes = plt.subplots(1, 5, figsize=(11, 2.9))
    figure.suptitle("Is it copying? Plans (blue), the nearest demonstrations (grey)", fontsize=10)
    for axis, plan, row, point in zip(axes, drawn, distance, disc):
        near, i = row.topk(3, largest=False)
        scene(axis, torch.zeros(3), point, f"{near[0]:.2f} units apart", [*known[i], plan],
              3 * ["0.35"] + [BLUE], size=5, goal=False)
    return figure


FIGURES = {"reverse": reverse, "fan": fan, "drive": film, "success": success, "steps": steps,
           "copying": copying}
GIFS = {"reverse": (denoising, 2), "drive": (driving, 12)}     # frames a second


def export(model, path, n):
    """n unseen starts: observations float32 (n, 8), plans (n, 16, 2) in the block's frame."""
    pose, disc = model.starts(n)
    plans = world.to_block(model.plans(pose, disc), pose)
    with writing(path) as file:
        np.savez_compressed(file, observations=observe(pose, disc, disc).numpy(),
                            plans=plans.numpy())
    print(path)


def newest(regression):
    """The newest run of that kind, as its checkpoint says, else the shipped one."""
    runs = (HERE / "runs").glob("*/checkpoint.pt")
    for path in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoint, _ = load_checkpoint(path)
        except UserError:  # damaged, or of another net: left out
            continue
        if checkpoint["config"]["regression"] == regression:
            return path
    return HERE / ("regression.pt" if regression else "pretrained.pt")


def main():
    parser = argparse.ArgumentParser(description="Draw what a policy plans, and drive it.")
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} or all [reverse]")
    add("--steps", type=int, default=SAMPLE_STEPS, help="sampler steps [%(default)s]")
    add("--eta", type=float, default=ETA, help="1 is DDPM, 0 is DDIM [%(default)s]")
    add("--driven", type=int, default=DRIVEN, help="steps before it looks again [%(default)s]")
    add("--starts", type=int, default=200, help="episodes of success and steps [%(default)s]")
    add("--seed", type=int, default=0, help="of starts and noise [%(default)s]")
    add("--device", choices=devices, default=devices[0], help="[%(default)s]")
    add("--checkpoint", type=absolute, help="[newest in runs/, else pretrained.pt]")
    add("--regression", type=absolute, help="[newest in runs/, else regression.pt]")
    add("--out", type=absolute, default=HERE / "figures", help="folder for them [figures/ here]")
    add("--show", action="store_true", help="open a window for each figure too")
    add("--export", type=absolute, metavar="FILE.npz", help="write plans as arrays instead")
    add("--n", type=int, default=1000, help="how many plans to export [%(default)s]")
    args = parser.parse_args()
    names = list(FIGURES) if "all" in args.figures else args.figures or ["reverse"]
    if not set(names) <= set(FIGURES):
        parser.error(f"no such figure: there are {', '.join(FIGURES)} and all")
    if not (min(args.n, args.starts, args.steps) > 0 and 0 <= args.eta <= 1
            and 1 <= args.driven <= HORIZON):
        parser.error("--steps, --starts and --n are above zero, --eta is 0 to 1, --driven 1 to 16")
    if not args.show:
        plt.switch_backend("Agg")  # files only: no window

    model = Model(args.checkpoint or newest(regression=False), args)
    print(f"checkpoint: {model.name}")
    if args.export:
        arrays = Path(args.export.removesuffix(".npz") + ".npz")
        if arrays.exists():
            parser.error(f"--export: {arrays} exists")
        return export(model, arrays, args.n)
    regression = Model(args.regression or newest(regression=True), args)
    print(f"regression: {regression.name}")

    for name in names:
        picture = Path(args.out, f"{name}.png")
        figure = FIGURES[name](model, regression)
        with writing(picture) as file:
            figure.savefig(file, bbox_inches="tight")
        print(picture)
        if name in GIFS:
            frames, fps = GIFS[name]
            animate(frames(model, regression), picture.with_suffix(".gif"), fps)
            print(picture.with_suffix(".gif"))
    if args.show:
        plt.show()


if __name__ == "__main__":
    run(main)
