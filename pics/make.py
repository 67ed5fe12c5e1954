"""Draw every picture of the README anew, from the shipped weights, else the newest checkpoints.

    python pics/make.py --mnist FOLDER --cifar10 FOLDER     where the real images are (--data)

Needs a default run of MNIST/main.py for mnist-emerging.png (its samples show how it learned).
chain.svg and unet.svg are drawn by hand.
"""
import argparse
import importlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

PICS = Path(__file__).resolve().parent
SHOWN = {"MNIST": ("grid", "reverse", "forward", "guidance", "steps", "neighbours", "loss"),
         "CIFAR10": ("grid", "reverse", "neighbours")}


def model_of(folder, data):
    """The visual.py of a folder, and its Model with the settings that visual.py has by default."""
    for name in ("main", "visual"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(PICS.parent / folder))
    visual = importlib.import_module("visual")
    sys.path.pop(0)
    path = PICS.parent / folder / "pretrained.pt"
    path = path if path.exists() else visual.newest_checkpoint()
    return visual, visual.Model(path, torch.device("cpu"), None, visual.SAMPLE_STEPS, visual.ETA,
                                visual.GUIDANCE, visual.GUIDED, 0, data)


def save(figure, name):
    """As a PNG: a grey one in 256 shades; in 256 colours too what would be over 500 kB."""
    figure.canvas.draw()
    page = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    page.save(PICS / name, optimize=True)
    if not name.startswith("cifar10") or (PICS / name).stat().st_size > 500_000:
        page.quantize(256, dither=Image.Dither.NONE).save(PICS / name, optimize=True)
    plt.close(figure)
    print(name, (PICS / name).stat().st_size)


def sculptor(model):
    """One digit, freed from its block: x_t at eight levels, and what the net sees in it."""
    walk = list(model.walk(torch.tensor([3])))
    figure, axes = plt.subplots(2, 8, figsize=(9, 2.6))
    for column, i in zip(axes.T, torch.linspace(0, len(walk) - 1, 8).round().int()):
        t, *images = walk[i]
        for axis, image in zip(column, images):
            axis.imshow(image[0, 0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        column[0].set_title(f"t = {t + 1}", fontsize=9)
    for axis, name in zip(axes[:, 0], ("the block $x_t$", r"the guess $\hat{x}_0$")):
        axis.set_ylabel(name, fontsize=9)
    return figure


def emerging(folder):
    """The samples of a training run after half a minute, one, two minutes, and at its end."""
    history = torch.load(folder / "checkpoint.pt", weights_only=True)["history"]
    step, seconds = np.array([row[:2] for row in history]).T
    files = sorted((folder / "samples").glob("*.png"))
    times = np.interp([int(file.stem) for file in files], step, seconds)
    picks = [np.abs(times - wanted).argmin() for wanted in (30, 60, 120, times[-1])]
    figure, axes = plt.subplots(2, 2, figsize=(8, 2.3))
    for axis, k in zip(axes.flat, picks):
        axis.imshow(Image.open(files[k]), interpolation="nearest")
        axis.set_title(f"{times[k]:.0f} s, {int(files[k].stem):,} steps", fontsize=9)
        axis.axis("off")
    return figure


def demo(models, rows=2):
    """Digits above colour pictures, frame by frame."""
    walks = [list(model.walk(model.labels(10 * rows))) for model in models]
    count, frames = len(walks[0]), []
    for i in range(count):
        pages = []
        for walk in walks:
            x_t = walk[round(i * (len(walk) - 1) / (count - 1))][1]
            page = make_grid(x_t, nrow=10, normalize=True, value_range=(-1, 1), pad_value=1)
            page = Image.fromarray((page.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
            pages.append(page.resize((684, round(684 * page.height / page.width)),
                                     Image.Resampling.NEAREST))
        frame = Image.new("RGB", (684, sum(page.height for page in pages)), "white")
        for k, page in enumerate(pages):
            frame.paste(page, (0, k * pages[0].height))
        frames.append(frame.quantize(128, dither=Image.Dither.NONE))
    frames[0].save(PICS / "demo.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[120] * (count - 1) + [2500], optimize=True)
    print("demo.gif", (PICS / "demo.gif").stat().st_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="as --data of MNIST/visual.py")
    parser.add_argument("--cifar10", help="as --data of CIFAR10/visual.py")
    args = parser.parse_args()
    models = []
    for folder, data in (("MNIST", args.mnist), ("CIFAR10", args.cifar10)):
        visual, model = model_of(folder, data)
        models.append(model)
        for name in SHOWN[folder]:
            save(visual.FIGURES[name](model), f"{folder.lower()}-{name}.png")
    save(sculptor(models[0]), "sculptor.png")
    if (PICS.parent / "MNIST/runs/checkpoint.pt").exists():
        save(emerging(PICS.parent / "MNIST/runs"), "mnist-emerging.png")
    demo(models)


if __name__ == "__main__":
    main()
