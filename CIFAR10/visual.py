"""Watch the diffusion model of main.py at work: the tutorial's figures, drawn from a checkpoint.

    python visual.py                        noise to pictures: figures/reverse.png and .gif
    python visual.py grid steps             other figures by name; "all" draws every one
    python visual.py --label horse          one class
    python visual.py --export FILE.npz --n 5000    images and labels as arrays

Takes the newest checkpoint in runs/, else pretrained.pt. Net, schedule and sampler are main.py's.
"""
import argparse
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from main import (ETA, GUIDANCE, HERE, SAMPLE_STEPS, UserError, absolute, load_checkpoint,
                  load_data, noise_schedule, q_sample, run, sample, to_target, walk, writing)

load_data = cache(load_data)
TILE = 0.7              # inches a side of an image
THING = "an image"
plt.style.use("default")  # whatever matplotlibrc says
plt.rcParams.update({"font.size": 9, "figure.dpi": 150, "figure.constrained_layout.use": True,
                     "text.parse_math": False})  # a class may be called $1


class Model:
    """What a figure needs: a checkpoint's net, schedule and classes, and the flags."""

    def __init__(self, path, args):
        self.checkpoint, self.net = load_checkpoint(path, args.device)
        config = self.checkpoint["config"]
        self.target = config["target"]
        self.classes = config["classes"]
        self.alpha_bar = noise_schedule(config["schedule"], config["T"])
        self.shape = (self.net.stem.in_channels, config["size"], config["size"])
        self.data = args.data or self.checkpoint.get("args", {}).get("data")
        self.name = f"{Path(path).parent.name}/{Path(path).name}, step {self.checkpoint['step']}"

        self.options = {"steps": min(args.steps, config["T"]), "eta": args.eta,
                        "guidance": args.guidance}
        self.seed = args.seed
        self.device = args.device
        self.label = args.label and unicodedata.normalize("NFC", args.label)
        if self.label and self.label not in self.classes:
            raise UserError(f"--label {self.label}: the classes are {', '.join(self.classes)}")

    def labels(self, n):
        """n labels, int64 (n,): the classes in rotation, or --label alone."""
        if self.label:
            return torch.full((n,), self.classes.index(self.label))
        return torch.arange(n) % len(self.classes)

    def generators(self):
        """By --seed: of x_T, on the CPU, and of the sampler's fresh noise."""
        later = torch.Generator(self.device).manual_seed(self.seed + 1)
        return torch.Generator().manual_seed(self.seed), later

    def settings(self, y, generators=None, **changes):
        """Arguments and options of walk and sample for the classes y (B,)."""
        first, later = generators or self.generators()
        x_T = torch.randn(len(y), *self.shape, generator=first).to(self.device)
        arguments = (self.net, x_T, y.to(self.device), self.alpha_bar, self.target)
        return arguments, {"generator": later} | self.options | changes

    def walk(self, y):
        """Yields (t, x_t, x0_hat) on the CPU."""
        arguments, options = self.settings(y)
        for t, x_t, x0_hat in walk(*arguments, **options):
            yield t, x_t.cpu(), x0_hat.cpu()

    def images(self, y, generators=None, **changes):
        """Generated images (B, C, H, W) in [-1, 1] of the classes y (B,)."""
        arguments, options = self.settings(y, generators, **changes)
        return sample(*arguments, **options).cpu()

    def load(self):
        images, labels, classes, _ = load_data(self.data, self.shape[1])
        if classes != self.classes:
            raise UserError(f"the data have other classes: {', '.join(classes)}")
        if images.shape[1:] != self.shape:
            raise UserError(f"the data are images {tuple(images.shape[1:])}, not {self.shape}")
        return images, labels

    def real(self, y):
        """Real images (B, C, H, W) in [-1, 1] of the classes y (B,)."""
        images, labels = self.load()
        found = []
        for k, name in enumerate(y):
            of_class = images[labels == name]
            found.append(of_class[k % len(of_class)])
        return torch.stack(found).float() / 127.5 - 1


def tiled(model, title, images, rows, columns=None, varied=None):
    """A figure of images (rows * columns, C, H, W), row by row."""
    used = model.options | {"seed": model.seed}
    caption = ", ".join(f"{name} {value:g}" for name, value in used.items() if name != varied)
    columns = columns or [model.classes[y] for y in model.labels(10)]

    figure, axis = plt.subplots(figsize=(TILE * len(columns) + 1, TILE * len(rows) + 1))
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.supxlabel(f"{caption}; {model.name}", fontsize=6.5, color="0.4", wrap=True)
    draw(axis, images, rows, columns)
    return figure


def draw(axis, images, row_titles, column_titles):
    """The tiles and their titles on one axis."""
    pad = 2
    H, W = images.shape[2:]
    page = make_grid(images, nrow=len(images) // len(row_titles), padding=pad, normalize=True,
                     value_range=(-1, 1), pad_value=1)
    axis.imshow(page.permute(1, 2, 0).numpy(), interpolation="nearest")

    turned = max(map(len, column_titles), default=0) > 8
    axis.set_yticks([pad + H / 2 + i * (H + pad) for i in range(len(row_titles))], row_titles)
    axis.set_xticks([pad + W / 2 + i * (W + pad) for i in range(len(column_titles))], column_titles,
                    rotation=30 if turned else 0)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)


# ---- The figures: each a function of a Model ----
def reverse(model):
    """Five classes, a pair of rows each, from noise to image: x_t, and below it x0_hat."""
    y = model.labels(5)
    last = model.options["steps"]
    shown = {round(i * last / 10) for i in range(11)}
    frames = [frame for i, frame in enumerate(model.walk(y)) if i in shown]

    levels, x_t, x0_hat = zip(*frames)
    tiles = torch.stack([torch.stack(x_t, 1), torch.stack(x0_hat, 1)], 1)  # (5, 2, 11, C, H, W)
    rows = []
    for name in y:
        rows += [f"{model.classes[name]}   xₜ", "x̂₀"]
    return tiled(model, f"The reverse process: from noise to {THING}", tiles.flatten(0, 2), rows,
                 [f"t = {t}" for t in levels])


def animate(model, path):
    """The same as a GIF."""
    y = model.labels(10).repeat_interleave(5)
    rows = [model.classes[name] for name in y[::5]]
    figure, axes = plt.subplots(1, 2, figsize=(6, 6))
    level = figure.suptitle("", fontsize=10)
    writer = PillowWriter(fps=8)
    writer.setup(figure, path, dpi=90)

    for t, *pair in model.walk(y):
        for axis, images, title in zip(axes, pair, ("xₜ", "x̂₀, the net's guess")):
            axis.clear()
            draw(axis, images, rows, [])
            axis.set_title(title, fontsize=10)
        level.set_text(f"t = {t}")
        writer.grab_frame()
        figure.set_layout_engine("none")  # keep the first: fast

    for _ in range(12):  # the last one stays for a while
        writer.grab_frame()
    with writing(path) as writer.outfile:
        writer.finish()
    plt.close(figure)


def forward(model):
    """A real image in more and more noise, under each schedule."""
    T = len(model.alpha_bar) - 1
    levels = [round(T * i / 9) for i in range(10)]
    own = model.checkpoint["config"]["schedule"]
    names = list(dict.fromkeys(("linear", "cosine", "flow", own)))

    eps = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(model.seed))
    x_0 = model.real(model.labels(1))
    tiles = []
    for name in names:
        alpha_bar = noise_schedule(name, T)
        tiles += [q_sample(x_0, torch.tensor([t]), eps, alpha_bar) for t in levels]

    figure, (top, bottom) = plt.subplots(2, figsize=(7, 4.5))
    figure.suptitle("The forward process: the same noise under each schedule", fontsize=10)
    draw(top, torch.cat(tiles), names, [f"t = {t}" for t in levels])
    for name in names:
        bottom.plot(range(T + 1), noise_schedule(name, T), label=name)
    bottom.set(xlabel="t", ylabel="ᾱ", xlim=(0, T), ylim=(0, 1))
    bottom.legend(frameon=False)
    return figure


def grid(model):
    """Ten images of each class, or of the first ten."""
    return tiled(model, "100 samples", model.images(model.labels(10).repeat(10)),
                 [""] * 10)


def steps(model):
    """The same noise, walked down in few steps and in many."""
    T = len(model.alpha_bar) - 1
    counts = [n for n in (5, 10, 25, 50, 250) if n < T] + [T]
    tiles = [model.images(model.labels(10), steps=n) for n in tqdm(counts)]
    return tiled(model, "The same noise, more steps", torch.cat(tiles),
                 [f"{n} steps" for n in counts], varied="steps")


def guidance(model):
    """The same noise under more and more guidance."""
    weights = (0, 1, 2, 4, 8)
    tiles = torch.cat([model.images(model.labels(10), guidance=w) for w in tqdm(weights)])
    return tiled(model, "The same noise, more guidance", tiles, [f"w = {w:g}" for w in weights],
                 varied="guidance")


def complete(model):
    """Real images, their upper halves, and four lower halves that fit."""
    y = model.labels(10)
    x_0 = model.real(y)
    mask = torch.zeros_like(x_0, dtype=torch.bool)
    mask[:, :, :x_0.shape[2] // 2] = True

    known = [x.repeat(4, 1, 1, 1).to(model.device) for x in (mask, x_0)]
    made = model.images(y.repeat(4), known=known)
    tiles = torch.cat([x_0, torch.where(mask, x_0, 0), made])
    return tiled(model, "The upper half is given, the lower half is drawn", tiles,
                 ["real", "given"] + 4 * ["drawn"])


def neighbours(model):
    """Is it copying? Generated images above the training images nearest to them."""
    images, _ = model.load()
    images = torch.cat([images, images.flip(3)])
    made = model.images(model.labels(10))
    distance = torch.cat([torch.cdist(made.flatten(1), part.flatten(1).float() / 127.5 - 1)
                          for part in images.split(5000)], dim=1)  # (10, N)
    nearest = distance.topk(min(3, len(images)), largest=False).indices

    tiles = [made] + [images[column].float() / 127.5 - 1 for column in nearest.T]
    return tiled(model, "Is it copying? Generated images and the nearest training images",
                 torch.cat(tiles), ["generated", "nearest", "second", "third"][:len(tiles)])


@torch.no_grad()
def loss(model):
    """Why the curve looks flat: each level has a floor, below which no net can predict."""
    images, labels = model.load()
    T = len(model.alpha_bar) - 1
    bins = min(20, T)

    # the error of 100 images at levels of each bin
    errors = []
    generator = torch.Generator().manual_seed(model.seed)
    for k in range(bins):
        t = torch.randint(k * T // bins + 1, (k + 1) * T // bins + 1, (100,), generator=generator)
        i = torch.randint(len(images), t.shape, generator=generator)
        x_0 = images[i].float() / 127.5 - 1
        eps = torch.randn(x_0.shape, generator=generator)
        x_t = q_sample(x_0, t, eps, model.alpha_bar)
        inputs = [x.to(model.device) for x in (x_t, t, labels[i])]
        output = model.net(*inputs).cpu()
        wanted = to_target(x_0, t, eps, model.alpha_bar, model.target)
        errors.append((output - wanted).square().mean().item())

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    step, _, value = np.array(model.checkpoint["history"]).T
    left.plot(step / 1000, value)
    left.set(xlabel="thousand steps", ylabel=f"loss ({model.target})", ylim=0, title="In training")
    right.bar(np.arange(bins) * T / bins, errors, width=0.9 * T / bins, align="edge")
    right.set(xlabel="t", ylabel="loss", title="The trained net, by noise level")
    return figure


FIGURES = {f.__name__: f for f in
           (reverse, grid, steps, guidance, loss, forward, neighbours, complete)}


def export(model, path, n, batch=50):
    """n generated images as arrays: images uint8 (n, H, W[, C]), labels int64 (n,)."""
    y = model.labels(n)
    generators = model.generators()
    chunks = [model.images(labels, generators=generators)
              for labels in tqdm(y.split(batch), "exporting")]
    pixels = ((torch.cat(chunks) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    with writing(path) as file:
        np.savez_compressed(file, labels=y.numpy(),
                            images=pixels.permute(0, 2, 3, 1).squeeze(3).numpy())
    print(path)


def main():
    parser = argparse.ArgumentParser()
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    newest = max((HERE / "runs").glob("*/checkpoint.pt"), default=HERE / "pretrained.pt",
                 key=lambda path: path.stat().st_mtime)
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} or all [reverse]")
    add("--label", help="this class only")
    add("--steps", type=int, default=SAMPLE_STEPS, help="sampler steps [%(default)s]")
    add("--eta", type=float, default=ETA, help="1 is DDPM, 0 is DDIM [%(default)s]")
    add("--guidance", type=float, default=GUIDANCE, help="w, 0 is off [%(default)s]")
    add("--seed", type=int, default=0, help="of the noise [%(default)s]")
    add("--device", choices=devices, default=devices[0], help="[%(default)s]")
    add("--checkpoint", type=absolute, default=newest, help="[newest in runs/, else pretrained.pt]")
    add("--data", type=absolute, help="as main.py's [what the net was trained on]")
    add("--out", type=absolute, default=HERE / "figures", help="folder for them [figures/ here]")
    add("--show", action="store_true", help="open a window for each figure too")
    add("--export", type=absolute, metavar="FILE.npz", help="write images as arrays instead")
    add("--n", type=int, default=1000, help="how many images to export [%(default)s]")
    args = parser.parse_args()
    names = list(FIGURES) if "all" in args.figures else args.figures or ["reverse"]
    if not set(names) <= set(FIGURES):
        parser.error(f"no such figure: there are {', '.join(FIGURES)} and all")
    if not (args.steps > 0 and 0 <= args.eta <= 1 and 0 <= args.guidance < 1e6 and args.n > 0):
        parser.error("--steps, --n, --eta or --guidance is out of range")
    if not args.show:
        plt.switch_backend("Agg")  # files only: no window

    model = Model(args.checkpoint, args)
    print(f"checkpoint: {model.name}")
    if args.export:
        arrays = Path(args.export.removesuffix(".npz") + ".npz")
        if arrays.exists():
            parser.error(f"--export: {arrays} exists")
        return export(model, arrays, args.n)

    for name in names:
        picture = Path(args.out, f"{name}.png")
        figure = FIGURES[name](model)
        with writing(picture) as file:
            figure.savefig(file, bbox_inches="tight")
        print(picture)
        if name == "reverse":
            moving = picture.with_suffix(".gif")
            animate(model, moving)
            print(moving)
    if args.show:
        plt.show()


if __name__ == "__main__":
    run(main)
