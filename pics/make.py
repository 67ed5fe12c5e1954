"""Draw the pictures of the READMEs anew, from the shipped weights.

    python pics/make.py --mnist FOLDER --cifar10 FOLDER --runs FOLDER

--mnist and --cifar10 say where the real images are, as --data of the scripts does. --runs holds
the experiments of the page, each a run of `python MNIST/main.py --steps 1000` with one change:
v, linear, flow, x0, eps, and lr1 with 600 steps. chain.svg and unet.svg are drawn by hand.
"""
import argparse
import importlib
import io
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from PIL import Image
from torchvision.utils import make_grid

SHARES = {"v": 90, "linear": 87, "flow": 93, "x0": 88, "eps": 67, "eps, no clamp": 12}
PICS = Path(__file__).resolve().parent
ROOT = PICS.parent
SHOWN = {"MNIST": ("grid", "reverse", "forward", "neighbours", "complete", "loss"),
         "CIFAR10": ("grid", "reverse", "guidance"), "PUSHT": ("fan",)}


def visual_of(folder):
    """The visual.py of a folder, with the main.py beside it."""
    for path in ROOT.glob("*/*.py"):  # another folder's
        sys.modules.pop(path.stem, None)
    sys.path.insert(0, str(ROOT / folder))
    visual = importlib.import_module("visual")
    sys.path.pop(0)
    return visual


def model_of(visual, data, path=None, **changes):
    """A Model with the settings that visual.py has by default, but for the changes."""
    settings = dict(device="cpu", label=None, steps=visual.SAMPLE_STEPS, eta=visual.ETA,
                    guidance=visual.GUIDANCE, seed=0, data=data)
    settings.update(changes)
    return visual.Model(path or visual.HERE / "pretrained.pt", SimpleNamespace(**settings))


def save(figure, name):
    """As a PNG; a grey one, and what would be over 500 kB, in 256 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight")
    page = Image.open(buffer).convert("RGB")
    page.save(PICS / name, optimize=True)
    if not name.startswith("cifar10") or (PICS / name).stat().st_size > 500_000:
        page.quantize(256, dither=Image.Dither.NONE).save(PICS / name, optimize=True)
    plt.close(figure)
    print(name, (PICS / name).stat().st_size, flush=True)


def sculptor(model):
    """One digit, freed from its block: x_t at eight levels, and what the net sees in it."""
    walk = list(model.walk(torch.tensor([3])))
    figure, axes = plt.subplots(2, 8, figsize=(9, 2.6))
    for column, i in zip(axes.T, torch.linspace(0, len(walk) - 1, 8).round().int()):
        t, *images = walk[i]
        for axis, image in zip(column, images):
            axis.imshow(image[0, 0].clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        column[0].set_title(f"t = {t}", fontsize=9)
    for axis, name in zip(axes[:, 0], ("the block, xₜ", "the guess, x̂₀")):
        axis.set_ylabel(name, fontsize=9)
    return figure


def exact(alpha_bar):
    """The best guess in the world of two images of one pixel, as a net."""
    def guess(x_t, t, y=None):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return torch.tanh(a.sqrt() * x_t / (1 - a))
    return guess


def pixel(main, paths=30):
    """The world of two images of one pixel: `sample`, with the exact guess as its net."""
    T = main.T
    alpha_bar = main.noise_schedule("cosine", T)
    guess = exact(alpha_bar)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    levels = torch.arange(1, T + 1)
    grid = guess(x.repeat(T, 1)[:, None, None], levels)[:, 0, 0]         # (T, 301)
    for axis, eta in zip(axes, (1.0, 0.0)):
        generator = torch.Generator().manual_seed(2)
        x_T = torch.randn(paths, 1, 1, 1, generator=generator, dtype=torch.float64)
        frames = list(main.walk(guess, x_T, torch.zeros(paths), alpha_bar, "x0", T, eta, 0.0,
                                generator=generator))
        t = [t for t, _, _ in frames]
        x_t = torch.stack([x_t.flatten() for _, x_t, _ in frames])
        axis.imshow(grid.T, extent=(1, T, -3, 3), aspect="auto", origin="lower", cmap="gray",
                    vmin=-1.6, vmax=1.6)
        for path in x_t.T:
            axis.plot(t, path, lw=0.8, color="tab:orange" if path[-1] > 0 else "tab:blue")
        axis.set(xlim=(T, 0), ylim=(-3, 3), xlabel="t", yticks=(-1, 0, 1),
                 title="fresh noise in each step, eta = 1" if eta else "no fresh noise, eta = 0")
    axes[0].set_ylabel("xₜ")
    return figure


def step(main, t=500, x_t=0.2):
    """One step down in that world, small and large: Bayes' factors and products, and the truth."""
    alpha_bar = main.noise_schedule("cosine", main.T).tolist()
    x = torch.linspace(-2, 2, 801)

    def normal(mean, variance):
        return torch.exp(-(x - mean) ** 2 / (2 * variance)) / (2 * torch.pi * variance) ** 0.5

    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    a = alpha_bar[t]
    white = 1 / (1 + np.exp(-2 * a ** 0.5 * x_t / (1 - a)))  # how probable +1 is
    guess = 2 * white - 1
    for axis, s in zip(axes, (480, 200)):
        a_s = alpha_bar[s]
        alpha = a / a_s

        def product(x_0, a_s=a_s, alpha=alpha):
            mean = a_s ** 0.5 * (1 - alpha) * x_0 + alpha ** 0.5 * (1 - a_s) * x_t
            return normal(mean / (1 - a), (1 - a_s) / (1 - a) * (1 - alpha))

        axis.fill_between(x, white * product(1) + (1 - white) * product(-1), color="0.85",
                          label="the truth, q(xₛ | xₜ)")
        axis.plot(x, normal(x_t / alpha ** 0.5, (1 - alpha) / alpha), ":", color="0.3",
                  label="first factor")
        axis.plot(x, normal(a_s ** 0.5, 1 - a_s), "--", color="tab:orange", lw=1,
                  label="second factor, x₀ = 1")
        for x_0, colour in ((1, "tab:orange"), (-1, "tab:blue")):
            axis.plot(x, product(x_0), color=colour, label=f"product, x₀ = {x_0}")
        axis.plot(x, product(guess), color="black", lw=1,
                  label=f"product, x̂₀ = {guess:.2f}")
        axis.set(xlabel="xₛ", yticks=[], title=f"from t = {t} to s = {s}", xlim=(-2, 2), ylim=0)
    axes[1].legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def straight(main, paths=16):
    """The flow in that world: straight lines to learn from, curved paths to walk."""
    T = main.T
    alpha_bar = main.noise_schedule("flow", T)
    s = torch.arange(T + 1) / T
    scale = ((1 - s) ** 2 + s ** 2) ** 0.5  # the schedule's mix has variance 1
    x_T = torch.linspace(-2, 2, paths, dtype=torch.float64).view(-1, 1, 1, 1)
    walked = main.walk(exact(alpha_bar), x_T, torch.zeros(paths), alpha_bar, "x0", T, 0.0, 0.0)
    walked = torch.stack([scale[t] * x_t.flatten() for t, x_t, _ in walked])

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for x_0, colour in ((1, "tab:orange"), (-1, "tab:blue")):
        for noise in x_T.flatten():
            axes[0].plot((T, 0), (noise, x_0), lw=0.8, color=colour)
        axes[1].plot(range(T, -1, -1), walked[:, walked[-1] * x_0 > 0], lw=0.8, color=colour)
    axes[0].set(title="what it learns from: any noise, any image", ylabel="(1 - t/T) x₀ + (t/T) ε")
    axes[1].set(title="where it walks, eta = 0")
    for axis in axes:
        axis.set(xlim=(T, 0), xlabel="t", yticks=(-1, 0, 1))
    return figure


def experiments(visual, data, runs):
    """Two strips of digits: what the experiments of the page give, and what goes wrong."""
    def digits(name, **changes):
        model = model_of(visual, data, runs / name / "checkpoint.pt", **changes)
        return model, model.images(model.labels(10))
    rows = {name: digits(name)[1] for name in ("v", "linear", "flow", "x0", "eps")}
    model, _ = digits("eps")
    rows["eps, no clamp"] = model.images(model.labels(10), clamp=None).nan_to_num()
    wrong = {"--lr 1": digits("lr1")[1], "--guidance 100": digits("v", guidance=100)[1]}
    model.target = "v"                                  # but it was trained with eps
    wrong["eps read as v"] = model.images(model.labels(10))
    titles = {name: f"{name}: {SHARES[name]} %" for name in rows}
    for name, strips in (("targets", rows), ("wrong", wrong)):
        figure = visual.tiled(model, "", torch.cat([*strips.values()]),
                              [titles.get(row, row) for row in strips])
        figure.supxlabel("")
        save(figure, f"mnist-{name}.png")


def robot(pushed, width, starts=5, plans=8):
    """Plans out of noise, a scene for each of the most divided starts: frame by frame."""
    visual, policy = pushed
    pose, disc, walk, colours = visual.bundle(policy, plans, starts)
    for _, paths, _ in walk:
        figure, axes = plt.subplots(1, starts, figsize=(width / 100, width / 100 / starts), dpi=100)
        for i, axis in zip(range(0, len(pose), plans), axes):
            part = slice(i, i + plans)
            visual.scene(axis, pose[i], disc[i], "", paths[part], colours[part])
        figure.canvas.draw()
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        plt.close(figure)


def drums(visual):
    """A walk of each class as a strip; one as sounds, and hits of each class: 8 bits, and cut."""
    model = model_of(visual, None)
    walk = list(model.walk(model.labels(5)))
    shown = walk[::4]
    tiles = torch.stack([x_t for _, x_t, _ in shown], dim=1).flatten(0, 1)
    figure = visual.tiled(model, "", tiles, model.classes, [f"t = {t}" for t, _, _ in shown])
    figure.supxlabel("")
    save(figure, "drums-reverse.png")

    count = len(model.classes)
    hits = visual.hits(model)
    files = {label: hits[k::count] for k, label in enumerate(model.classes)}
    files["reverse"] = torch.stack([x_t[2] for _, x_t, _ in walk[::2]])
    for name, images in files.items():
        track = []
        end = 16_000 if name == "cymbal" else 4400  # a second, or a quarter
        for sound in visual.to_sound((images.clamp(-1, 1) + 1) * 127.5):
            sound = sound[400:end] / sound.abs().max().clamp(min=1)
            track += [sound * torch.linspace(1, 0, len(sound)) ** 0.3, torch.zeros(750)]
        numbers = (torch.cat(track) * 127 + 128).round().to(torch.uint8)
        with wave.open(str(PICS / f"drums-{name}.wav"), "wb") as file:
            file.setparams((1, 1, 16000, 0, "NONE", ""))
            file.writeframes(numbers.numpy().tobytes())


def turning():
    """molecules.gif: of drawn molecules, the first valid one of each number of rings turns."""
    sys.path[:0] = [str(ROOT / "EVERYTHING"), str(ROOT / "MNIST")]
    for name in ("main", "molecules"):
        sys.modules.pop(name, None)
    molecules = importlib.import_module("molecules")
    net = molecules.Net()
    net.load_state_dict(torch.load(ROOT / "EVERYTHING/molecules.pt", weights_only=True))
    alpha_bar = molecules.noise_schedule("cosine", 1000)
    alpha_bar = 1 / (1 + (1 / alpha_bar - 1) / 4 ** 2)
    torch.manual_seed(0)
    y = torch.arange(5).repeat(8)
    *_, (_, x_0, _) = molecules.walk(net.float(), torch.randn(40, 6, 1, 9), y, alpha_bar, "v", 100,
                                     guidance=1, guided=(0.2, 0.9), clamp=None)
    _, valid, rings, _ = molecules.judge(x_0)
    shown = [x_0[valid & (y == n) & (rings == n)][0] for n in range(5)]
    turns = [torch.linalg.svd(x[:3, 0] - x[:3, 0].mean(dim=1, keepdim=True))[0] for x in shown]

    def frame(k):
        angle = k * np.pi / 18
        front = torch.tensor([[np.cos(angle), 0], [0, 1], [np.sin(angle), 0]]).float()
        for axis, x, turn in zip(axes, shown, turns):
            axis.clear()
            molecules.sticks(axis, x, turn @ front)

    figure, axes = plt.subplots(1, 5, figsize=(7, 1.1))
    FuncAnimation(figure, frame, 36).save(PICS / "molecules.gif", "pillow", fps=12, dpi=100)


def demo(models, pushed, rows=2, width=600):
    """Digits above colour pictures above plans, frame by frame."""
    walks = [list(model.walk(model.labels(10 * rows))) for model in models]
    count, frames, plans = len(walks[0]), [], list(robot(pushed, width))
    for i in range(count):
        pages = []
        for walk in walks:
            x_t = walk[round(i * (len(walk) - 1) / (count - 1))][1]
            page = make_grid(x_t, nrow=10, normalize=True, value_range=(-1, 1), pad_value=1)
            page = Image.fromarray((page.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
            pages.append(page.resize((width, round(width * page.height / page.width)),
                                     Image.Resampling.NEAREST))
        pages.append(plans[i])
        frame = Image.new("RGB", (width, sum(page.height for page in pages)), "white")
        for k, page in enumerate(pages):
            frame.paste(page, (0, sum(above.height for above in pages[:k])))
        frames.append(frame.quantize(96, dither=Image.Dither.NONE))
    frames[0].save(PICS / "demo.gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[120] * (count - 1) + [2500], optimize=True)
    print("demo.gif", (PICS / "demo.gif").stat().st_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="as --data of MNIST/visual.py")
    parser.add_argument("--cifar10", help="as --data of CIFAR10/visual.py")
    parser.add_argument("--runs", type=Path, help="folder of the experiments")
    args = parser.parse_args()
    models = []
    # the second seed: noise whose first pictures of CIFAR-10 can be recognised
    for folder, data, seed in (("MNIST", args.mnist, 0), ("CIFAR10", args.cifar10, 2)):
        visual = visual_of(folder)
        models.append(model_of(visual, data, seed=seed))
        for name in SHOWN[folder]:
            save(visual.FIGURES[name](models[-1]), f"{folder.lower()}-{name}.png")
        if folder == "MNIST":
            save(sculptor(models[0]), "sculptor.png")
            for draw in (pixel, step, straight):
                save(draw(sys.modules["main"]), f"{draw.__name__}.png")
            if args.runs:
                experiments(visual, data, args.runs)
    visual = visual_of("PUSHT")
    settings = SimpleNamespace(device="cpu", steps=visual.SAMPLE_STEPS, eta=visual.ETA, seed=0,
                               starts=200, driven=visual.DRIVEN)
    policy = visual.Model(visual.HERE / "pretrained.pt", settings)
    regression = visual.Model(visual.HERE / "regression.pt", settings)
    settings.steps = 20
    finer = visual.Model(visual.HERE / "pretrained.pt", settings)
    for name in SHOWN["PUSHT"]:
        save(visual.FIGURES[name](policy, regression), f"pusht-{name}.png")
    for name, (frames, fps) in visual.GIFS.items():
        visual.animate(frames(policy, regression), PICS / f"pusht-{name}.gif", fps)
    demo(models, (visual, finer))
    drums(visual_of("DRUMS"))
    turning()


if __name__ == "__main__":
    main()
