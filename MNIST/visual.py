"""Watch the diffusion model of main.py at work: the tutorial's figures, drawn from a checkpoint.

    python visual.py                        noise turning into digits: figures/reverse.png and .gif
    python visual.py grid steps             other figures by name; `all` draws every one
    python visual.py --label 7 --steps 50   one class only, more sampler steps
    python visual.py --export FILE.npz --n 5000    images and labels as arrays, for a judge

Takes the newest checkpoint in runs/, else pretrained.pt. The net, the noise schedule and the
sampler are main.py's own.
"""
import math
import os
import sys
import time
from pathlib import Path

os.environ.pop("MPLBACKEND", None)      # it may not work here; matplotlib finds one that does
if "--show" not in sys.argv:            # files only: no window
    os.environ["MPLBACKEND"] = "Agg"
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from main import (BINS, ETA, GUIDANCE, GUIDED, HERE, SAMPLE_STEPS, Parser, UserError,
                  load_checkpoint, load_data, noise_schedule, number, pick_device, q_sample, run,
                  sample)

TILE = 0.61             # inches a side of an image in a figure
plt.rcParams.update({"font.size": 9, "figure.dpi": 150, "figure.constrained_layout.use": True})


class Model:
    """A checkpoint with the sampler settings of the command line: all that a figure needs."""

    def __init__(self, path, device, label, steps, eta, guidance, guided, seed, data):
        self.checkpoint, self.net = load_checkpoint(path, device)
        config, self.classes = self.checkpoint["config"], self.checkpoint["classes"]
        if label is not None and label not in self.classes:
            raise UserError(f"--label {label}: the classes are {', '.join(self.classes)}")
        if steps > config["T"]:
            raise UserError(f"--steps {steps}: this checkpoint has {config['T']} noise levels")
        self.device, self.label, self.seed = device, label, seed
        self.data = data or self.checkpoint.get("settings", {}).get("data")
        self.steps, self.eta, self.guidance, self.guided = steps, eta, guidance, guided
        self.alpha_bar = noise_schedule(config["schedule"], config["T"])
        self.target = config["target"]
        self.shape = (config["net"]["image_channels"], config["net"]["size"], config["net"]["size"])
        self.names = [plain(name) for name in self.classes]
        self.caption = f"{path.parent.name}/{path.name}, trained on {self.checkpoint['data']}"

    def labels(self, n):
        """n labels, int64 (n,): the classes in rotation, or --label alone."""
        if self.label is not None:
            return torch.full((n,), self.classes.index(self.label))
        return torch.arange(n) % len(self.classes)

    def walk(self, y, **changes):
        """main.sample from the noise of --seed: yields (t, x_t, x0_hat) on the CPU."""
        options = {"steps": self.steps, "eta": self.eta, "guidance": self.guidance,
                   "guided": self.guided} | changes
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(len(y), *self.shape, generator=generator).to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        walk = sample(self.net, noise, y.to(self.device), self.alpha_bar, self.target,
                      generator=generator, **options)
        for t, x_t, x0_hat in tqdm(walk, total=options["steps"] + 1, desc="sampling", delay=2,
                                   leave=False):
            yield t, x_t.cpu(), x0_hat.cpu()

    def images(self, y, **changes):
        """Generated images (B, C, H, W) in [-1, 1] of the classes y (B,)."""
        *_, (_, x_0, _) = self.walk(y, **changes)
        return x_0

    def sampler(self):
        return (f"{self.steps} steps, eta = {self.eta:g}, guidance w = {self.guidance:g} at "
                f"{self.interval()}, seed {self.seed}")

    def interval(self):
        """Where guidance acts, in the papers' t: one more than the code's."""
        low, high = (math.ceil(share * len(self.alpha_bar)) for share in self.guided)
        return f"t = {low + 1} to {high}"


def draw(axis, images, row_titles, column_titles):
    """Tile images (rows * columns, C, H, W), row by row, into one picture with titles around it."""
    pad, (H, W) = 2, images.shape[2:]
    page = make_grid(images, nrow=len(images) // len(row_titles), padding=pad, normalize=True,
                     value_range=(-1, 1), pad_value=1)
    axis.imshow(page.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_yticks([pad + H / 2 + i * (H + pad) for i in range(len(row_titles))], row_titles)
    longest = max(map(len, column_titles), default=0)
    style = ({} if longest < 9 else {"fontsize": 7} if longest < 11 else
             {"rotation": 30, "ha": "left"})
    axis.set_xticks([pad + W / 2 + i * (W + pad) for i in range(len(column_titles))],
                    column_titles, **style)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)


def canvas(title, caption, columns, rows, extra=0.0):
    """A figure whose size fits a tiling of rows x columns; returns (figure, axes or axis)."""
    figure, axes = plt.subplots(2 if extra else 1,
                                figsize=(TILE * columns + 1, TILE * rows + 1 + extra),
                                height_ratios=[TILE * rows, extra] if extra else None)
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.supxlabel(plain(caption), fontsize=6.5, color="0.4", wrap=True)
    return figure, axes


def plain(text):
    """Text in which matplotlib sees no formulas, and no half characters of odd file names."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def paper_t(t):
    """Code t = T-1..0, -1 is the paper's t = T..1, 0."""
    return f"t = {t + 1}"


# ---- The figures: each a function of a Model ------------------------------------------------
def reverse(model):
    """One row a class, from noise to image: x_t, and below it the guess x0_hat made from it."""
    y = model.labels(10)
    walk = list(model.walk(y))
    shown = sorted({round(i * (len(walk) - 1) / 10) for i in range(11)})
    tiles = torch.stack([torch.stack([walk[i][k] for i in shown], 1) for k in (1, 2)], 1)
    rows = [title for name in y
            for title in (f"{model.names[name]}   $x_t$", r"$\hat{x}_0$")]
    figure, axis = canvas("The reverse process: from noise to an image",
                          f"{model.caption}; {model.sampler()}", len(shown), len(rows))
    draw(axis, tiles.flatten(0, 2), rows, [paper_t(walk[i][0]) for i in shown])
    return figure


def animate(model, path, n=50):
    """The same as a GIF: x_t on the left, x0_hat on the right, one row a class."""
    y = model.labels(10).repeat_interleave(n // 10)
    walk = list(model.walk(y))
    figure, axes = plt.subplots(1, 2, figsize=(5.6, 5.5), dpi=90)
    names = [model.names[name] for name in y[::n // 10]]
    level = figure.suptitle("", fontsize=10)
    writer = PillowWriter(fps=8)
    with writer.saving(figure, path, dpi=90):
        for t, *pair in walk:
            for axis, images, title in zip(axes, pair, ("$x_t$", r"$\hat{x}_0$, the net's guess")):
                axis.clear()
                draw(axis, images, names, [])
                axis.set_title(title, fontsize=10)
            level.set_text(paper_t(t))
            writer.grab_frame()
            figure.set_layout_engine("none")    # keep the first frame's layout: twice as fast
        for _ in range(12):
            writer.grab_frame()
    plt.close(figure)


def forward(model):
    """Real images drowning in noise, under both schedules, and how much of them is left."""
    images, labels, names, source = load_data(model.data)
    wanted = [model.classes[y] for y in model.labels(3)]
    if missing := set(wanted) - {names[y] for y in labels.unique()}:
        raise UserError(f"{source}: no image of class {missing.pop()} is in it")
    picks = []
    for k, name in enumerate(wanted):   # the first image of each class, the second if asked again
        found = (labels == names.index(name)).nonzero()
        picks.append(found[wanted[:k].count(name) % len(found)].item())
    T = len(model.alpha_bar)
    times = [-1] + [round(T * i / 9) - 1 for i in range(1, 10)]
    figure, (top, bottom) = canvas("The forward process: the same noise under two schedules",
                                   source, len(times), 2 * len(picks), extra=2)
    schedules = {name: noise_schedule(name, T) for name in ("linear", "cosine")}
    eps = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(model.seed))
    tiles = []
    for i in picks:
        x_0 = images[i:i + 1].float() / 127.5 - 1
        for a in schedules.values():
            tiles += [x_0 if t < 0 else q_sample(x_0, torch.tensor([t]), eps, a.float())
                      for t in times]
    draw(top, torch.cat(tiles), [*schedules] * len(picks), [paper_t(t) for t in times])
    for name, a in schedules.items():
        bottom.plot(range(T + 1), [1.0, *a], label=name)
    bottom.set(xlabel="t", ylabel=r"$\bar\alpha_t$", xlim=(0, T), ylim=(0, 1))
    bottom.legend(frameon=False)
    return figure


def grid(model):
    """Ten images of each class, or of the first ten."""
    y = model.labels(10).repeat(10)
    figure, axis = canvas("100 generated images", f"{model.caption}; {model.sampler()}", 10, 10)
    draw(axis, model.images(y), [""] * 10, [model.names[name] for name in y[:10]])
    return figure


def steps(model):
    """The same noise, walked down in few steps and in many."""
    y, tiles, rows = model.labels(10), [], []
    T = len(model.alpha_bar)
    for n in (*(n for n in (5, 10, 25, 50, 250) if n < T), T):
        started = time.perf_counter()
        tiles.append(model.images(y, steps=n))
        rows.append(f"{n} steps\n{time.perf_counter() - started:.1f} s")
    figure, axis = canvas("The same noise, more steps",
                          f"{model.caption}; seconds for 10 images on {model.device}; "
                          f"eta = {model.eta:g}, w = {model.guidance:g}", 10, len(rows))
    draw(axis, torch.cat(tiles), rows, [model.names[name] for name in y])
    return figure


def guidance(model):
    """The same noise under more and more guidance: clearer, and less varied."""
    weights = (0, 0.5, 1, 2, 4, 8)
    y = model.labels(10)
    figure, axis = canvas("The same noise, more guidance",
                          f"{model.caption}; {model.steps} steps, w at {model.interval()}", 10,
                          len(weights))
    draw(axis, torch.cat([model.images(y, guidance=w) for w in weights]),
         [f"w = {w:g}" for w in weights], [model.names[name] for name in y])
    return figure


def neighbours(model):
    """Is it copying? Generated images above the training images nearest to them, pixel by pixel."""
    images, _, _, source = load_data(model.data)
    y = model.labels(100)
    made = model.images(y)

    def nearest_of(x, k):  # (distance, index) of the k nearest training images, a part at a time
        return torch.cat([torch.cdist(x.flatten(1), part.flatten(1).float() / 127.5 - 1)
                          for part in images.split(5000)], dim=1).topk(k, largest=False)
    if len(images) < 3:
        raise UserError(f"neighbours needs three training images or more: {source}")
    distance, nearest = nearest_of(made, 3)
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(model.seed))[:100]
    among_real = nearest_of(images[some].float() / 127.5 - 1, 2).values[:, 1]
    tiles = [made[:10]] + [images[nearest[:10, k]].float() / 127.5 - 1 for k in range(3)]
    figure, axis = canvas(
        "Is it copying? Generated images and the nearest training images",
        f"{model.caption}; neighbours: {source}.\nMedian distance to the nearest: "
        f"{distance[:, 0].median():.1f} from 100 generated images, {among_real.median():.1f} from "
        f"100 training images to the others", 10, 4)
    draw(axis, torch.cat(tiles), ["generated", "nearest", "second", "third"],
         [model.names[name] for name in y[:10]])
    return figure


def loss(model):
    """Why the curve looks flat: most of the loss is made where nobody could predict better."""
    rows = model.checkpoint["history"]
    step, value = [row[0] for row in rows], [row[2] for row in rows]
    late = torch.tensor([row[3] for row in rows[-max(1, len(rows) // 5):]]).nanmean(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    left.plot(step, value, marker="." if len(step) < 3 else None)
    left.set(xlabel="step", ylabel=f"loss ({model.target} target)", ylim=(0, None),
             title="Loss while training")
    left.locator_params(axis="x", nbins=5)
    right.bar(np.arange(BINS), late, width=0.9, align="edge")
    right.set_xticks(np.arange(0, BINS + 1, 5), [f"{i * len(model.alpha_bar) // BINS}"
                                                for i in range(0, BINS + 1, 5)])
    right.set(xlabel="t", ylabel="loss", title="Loss by timestep, last fifth of the run")
    figure.supxlabel(plain(model.caption), fontsize=6.5, color="0.4", wrap=True)
    return figure


FIGURES = {f.__name__: f for f in (reverse, grid, steps, guidance, loss, forward, neighbours)}


def export(model, path, n, batch=50):
    """n generated images as arrays: images uint8 (n, H, W[, C]), labels int64 (n,)."""
    place = path if path.exists() else path.resolve().parent
    if path.suffix != ".npz" or path.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--export {path}: give an .npz file in a folder that can be written to")
    y, chunks, seed = model.labels(n), [], model.seed
    for i in tqdm(range(0, n, batch), unit="batch", desc="exporting"):
        model.seed = seed + i
        chunks.append(model.images(y[i:i + batch]))
    model.seed = seed
    pixels = ((torch.cat(chunks).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with open(path, "wb") as file:
        np.savez_compressed(file, images=pixels.permute(0, 2, 3, 1).squeeze(3).numpy(),
                            labels=y.numpy())
    print(f"{path}: {n} images, {model.sampler()}")


def newest_checkpoint():
    own = sorted((HERE / "runs").glob("checkpoint*.pt"), key=lambda path: path.stat().st_mtime)
    return own[-1] if own else HERE / "pretrained.pt"


def main():
    parser = Parser(description="Draw the reverse diffusion of a checkpoint, and more.")
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} or all [reverse]")
    add("--label", help="this class only")
    add("--steps", type=number(int, 1, 10**6), default=SAMPLE_STEPS,
        help=f"sampler steps [{SAMPLE_STEPS}]")
    add("--eta", type=number(float, 0, 1), default=ETA,
        help=f"share of fresh noise: 0 is DDIM, 1 with all steps is DDPM [{ETA:g}]")
    add("--guidance", type=number(float, 0, 100), default=GUIDANCE,
        help=f"w, 0 is off [{GUIDANCE:g}]")
    add("--guided", nargs=2, metavar=("LOW", "HIGH"), type=number(float, 0, 1), default=GUIDED,
        help=f"shares of the noise levels, from the least noise up, between which it acts "
             f"[{GUIDED[0]:g} {GUIDED[1]:g}]")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of the noise [0]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--checkpoint", type=Path, help="[the newest in runs/, else pretrained.pt]")
    add("--data", help="as main.py's, for forward and neighbours [what the net was trained on]")
    add("--out", type=Path, default=HERE / "figures", help="folder for the figures [figures/ here]")
    add("--show", action="store_true", help="open a window for each figure too")
    add("--export", type=Path, metavar="FILE.npz",
        help="write generated images as arrays instead of figures")
    add("--n", type=number(int, 1, 10**7), default=1000, help="how many images to export [1000]")
    args = parser.parse_args()
    names = args.figures or ["reverse"]
    if unknown := [name for name in names if name not in {*FIGURES, "all"}]:
        raise UserError(f"no figure {unknown[0]!r}: there are {', '.join(FIGURES)} and all")
    names = list(FIGURES) if "all" in names else names
    if args.guided[0] >= args.guided[1]:
        raise UserError("--guided: LOW {} is not below HIGH {}".format(*args.guided))
    device, path = pick_device(args.device), args.checkpoint or newest_checkpoint()
    model = Model(path.resolve(), device, args.label, args.steps, args.eta, args.guidance,
                  args.guided, args.seed, args.data)
    print(f"checkpoint: {path} ({model.checkpoint['step']} steps on {model.checkpoint['data']})")
    if args.export:
        return export(model, args.export, args.n)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        FIGURES[name](model).savefig(args.out / f"{name}.png")
        print(args.out / f"{name}.png")
        if name == "reverse":
            animate(model, args.out / "reverse.gif")
            print(args.out / "reverse.gif")
    if args.show and plt.get_backend().lower() == "agg":
        print("--show: there is no screen to open a window on")
    elif args.show:
        plt.show()


if __name__ == "__main__":
    run(main)
