"""Molecules: nine atoms come out of noise with the method of MNIST/main.py.

    python molecules.py             train for five minutes, measure, draw
    python molecules.py --draw      the last two, with the weights beside it

Data: 36,000 of QM9 (Ramakrishnan et al. 2014) without hydrogen. x_0: (B, 6, 1, 9), coordinates
in angstrom and three channels for C, N, O; y: the number of rings.
Net: equivariant message passing (Satorras et al. 2021).
Measure: bonds by length, with the table and margins of Hoogeboom et al. 2022. Valid is one piece,
no two atoms nearer than 1.1 angstrom, at C, N, O at most 4, 3, 2 bonds, a double bond being two.
"""
import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.animation import PillowWriter
from matplotlib.collections import LineCollection
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "MNIST"))
from main import (NULL, absolute, catch_ctrl_c, noise_schedule, run,  # noqa: E402
                  training_step, walk, writing, zero_init)

KIND = 0.25  # scale of the kinds beside angstroms
SHIFT = 4    # noise as for data that many times as large
CONFIG = dict(width=64, layers=5)
BATCH = 64
LR = 7e-3

# picometres below which C, N, O have a bond with C, N, O: single, double, triple
LONGEST = torch.tensor([[[164, 157, 153], [157, 155, 150], [153, 150, 158]],
                        [[139, 134, 125], [134, 130, 126], [125, 126, 126]],
                        [[123, 119, 116], [119, 113, 0], [116, 0, 0]]])
VALENCE = torch.tensor([4, 3, 2])
COLOURS = np.array(["grey", "royalblue", "red"])

# sums and differences over the 36 pairs of atoms, as matrices (36, 9)
ONE = torch.eye(9)
PAIRS = ONE[torch.triu_indices(9, 9, 1)]  # (2, 36, 9)
PLUS = PAIRS.sum(dim=0)
MINUS = PAIRS.diff(dim=0)[0]


def load_data():
    """x_0 (N, 6, 1, 9), rings int64 (N,)."""
    data = np.load(HERE / "qm9.npz")
    kinds = KIND * np.eye(3)[data["kinds"]]
    x_0 = torch.tensor(np.concatenate([data["coordinates"] / 100, kinds], axis=2))
    return x_0.float().mT[:, :, None], torch.tensor(data["rings"]).long()


def atoms(x):
    """Positions (B, 9, 3) and kinds int64 (B, 9)."""
    x = x[:, :, 0].mT
    return x[..., :3], x[..., 3:].argmax(dim=2)


def sines(x, waves):
    return torch.cat([(x * waves).sin(), (x * waves).cos()], dim=-1)


class Layer(nn.Module):
    """Each pair of atoms makes a message, which moves the two along their line and tells both."""

    def __init__(self, width):
        super().__init__()
        self.emb = nn.Linear(width, 2 * width)
        self.end = nn.Linear(width, width)
        self.distance = nn.Linear(12, width, bias=False)
        self.message = nn.Linear(width, width)
        self.pull = zero_init(nn.Linear(width, 1))
        self.hear = nn.Linear(2 * width, width)
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, h, x, pairs, emb):
        # a pair knows its two atoms, their distance and what it knew before
        scale, shift = self.emb(emb).chunk(2, dim=2)
        told = (1 + scale) * F.layer_norm(h, h.shape[2:]) + shift
        between = MINUS @ x  # (B, 36, 3)
        distance = (between.square().sum(dim=2, keepdim=True) + 1e-6).sqrt()
        waves = math.pi / 8 * 2 ** torch.arange(6)  # 16 to 0.5 angstrom
        pairs = pairs + PLUS @ self.end(told) + self.distance(sines(distance, waves))
        pairs = F.silu(self.message(F.silu(pairs)))  # (B, 36, width)

        # opposite moves, and to each atom the sum of its messages
        x = x + MINUS.T @ (self.pull(pairs) * between / (distance + 1)) / 4
        heard = torch.cat([told, PLUS.T @ pairs / 4], dim=2)  # (B, 9, 2 width)
        return h + self.out(F.silu(self.hear(heard))), x, pairs


class Net(nn.Module):
    """Predicts v, as MNIST's UNet; a molecule turned gives its v turned."""

    def __init__(self, width, layers):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(6, width)  # row 0 is NULL
        self.stem = nn.Linear(3, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.skip = zero_init(nn.Linear(width, 1))
        self.kinds = zero_init(nn.Linear(width, 3))

    @torch.autocast("cpu", enabled=False)  # bfloat16 steps by 0.016 at 3 angstrom
    def forward(self, x_t, t, y):
        emb = self.time(sines(t[:, None], 1e-4 ** (torch.arange(16) / 16)))
        emb = F.silu(emb + self.label(y + 1))[:, None]  # (B, 1, width)

        # where the whole is means nothing
        x_t = x_t[:, :, 0].mT  # (B, 9, 6)
        start = x_t[..., :3] - x_t[..., :3].mean(dim=1, keepdim=True)
        h = self.stem(x_t[..., 3:]) + emb
        x = start
        pairs = 0
        for layer in self.layers:
            h, x, pairs = layer(h, x, pairs, emb)
        moved = x - start + self.skip(emb) * start
        return torch.cat([moved, self.kinds(h)], dim=2).mT[:, :, None]


def train(x_0, rings, alpha_bar, minutes):
    """The average net."""
    net = Net(**CONFIG)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)
    step = 0
    share = 0.0
    stop = catch_ctrl_c()
    bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
    while share < 1 and not stop:
        i = torch.randint(len(x_0), (BATCH,))
        y = torch.where(torch.rand(BATCH) < 0.1, NULL, rings[i])
        lr = LR * min((step + 1) / 200, 1) * (1 + math.cos(math.pi * share)) / 2
        decay = (1 + step) / (30 + step)
        loss = training_step(net, ema, optimizer, x_0[i], y, alpha_bar, lr, decay, "v")
        step += 1
        share = min(bar.format_dict["elapsed"] / 60 / minutes, 1)
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
        bar.update(share - bar.n)
    bar.close()
    return ema


def bonds(positions, kinds):
    """Distances in picometres and orders of bonds, 0 for none, both (B, 9, 9)."""
    distances = 100 * torch.cdist(positions, positions) + 1000 * ONE
    longest = LONGEST[:, kinds[:, :, None], kinds[:, None]]  # (3, B, 9, 9)
    return distances, (distances < longest).sum(dim=0)


def judge(positions, kinds):
    """(valid, rings, graph), each (B,): graph is a number, whatever the order of the atoms."""
    distances, orders = bonds(positions, kinds)
    bonded = (orders > 0).double()
    whole = torch.linalg.matrix_power(bonded + ONE, 8) > 0  # a way from each to each
    few = orders.sum(dim=2, keepdim=True) <= VALENCE[kinds][:, :, None]
    valid = (whole & few & (distances >= 110)).all(dim=2).all(dim=1)

    # atoms hear of their neighbours' neighbours (Weisfeiler & Leman 1968)
    code = kinds[:, :, None] + 1.0
    for _ in range(5):
        code = (7 * code + orders.double() @ code.double().cos()).sin()
    return valid, bonded.sum(dim=(1, 2)) / 2 - 8, (1e9 * code.sum(dim=(1, 2))).round()


def sticks(axis, x_0, turn):
    """One molecule (6, 1, 9) by way of turn (3, 2): half a bond has its atom's colour."""
    positions, kinds = atoms(x_0[None])
    i, j = bonds(positions, kinds)[1][0].nonzero().T
    ends = (positions[0] - positions[0].mean(dim=0)) @ turn
    halves = torch.stack([ends[i], (ends[i] + ends[j]) / 2], dim=1)
    colours = COLOURS[kinds[0]]
    axis.clear()
    axis.add_collection(LineCollection(halves, linewidths=4, colors=colours[i]))
    axis.scatter(*ends.T, 12, colours)
    axis.set(xlim=(-4.5, 4.5), ylim=(-3, 3), aspect="equal")
    axis.set_axis_off()


def draw(walked, y, out):
    """molecules.png, a row for each number of rings, and molecules.gif, where the first turn."""
    positions, _ = atoms(walked[0])
    turns = torch.linalg.svd(positions - positions.mean(dim=1, keepdim=True))[2].mT  # widest first
    shown = [(y == row).nonzero()[:5, 0] for row in range(5)]

    figure, axes = plt.subplots(5, 10, figsize=(14, 5), layout="constrained")
    for row, n in enumerate(shown):
        levels = (1000, 800, 600, 400, 200, 0, 0, 0, 0, 0)
        for axis, t, m in zip(axes[row], levels, [*n[[0] * 5], *n]):
            sticks(axis, walked[t][m], turns[m, :, :2])
            axis.set_title(f"$x_{{{t}}}$" if row == 0 else "")
        axes[row, 0].text(-7, 0, f"rings: {row}")
    with writing(out / "molecules.png") as file:
        figure.savefig(file)

    figure, axes = plt.subplots(1, 5, figsize=(7, 1.1), layout="constrained")
    writer = PillowWriter(fps=12)
    writer.setup(figure, out / "molecules.gif")
    for k in range(36):
        angle = k * math.pi / 18
        front = torch.tensor([[math.cos(angle), 0], [0, 1], [math.sin(angle), 0]])
        for axis, n in zip(axes, shown):
            sticks(axis, walked[0][n[0]], turns[n[0]] @ front)
        writer.grab_frame()
    with writing(out / "molecules.gif") as writer.outfile:
        writer.finish()


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--minutes", type=float, default=5)
    add("--seed", type=int, default=0)
    add("--out", type=absolute, default=HERE / "figures")
    add("--draw", action="store_true")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes must be above 0 and finite")
    torch.manual_seed(args.seed)
    out = Path(args.out)
    alpha_bar = noise_schedule("cosine", 1000)
    alpha_bar = 1 / (1 + (1 / alpha_bar - 1) / SHIFT ** 2)
    x_0, rings = load_data()
    seen = x_0[:-500]  # the others are kept to compare with

    if args.draw:
        state = torch.load(HERE / "molecules.pt", weights_only=True)
        net = Net(**state["config"])
        net.load_state_dict(state["ema"])
    else:
        net = train(seen, rings[:-500], alpha_bar, args.minutes)
        with writing(out / "molecules.pt") as file:
            torch.save(dict(config=CONFIG, ema=net.half().state_dict()), file)
        net.float()

    y = rings[-500:]
    noise = torch.randn(500, 6, 1, 9)
    path = walk(net, noise, y, alpha_bar, "v", 100, guidance=1, guided=(0.2, 0.9), clamp=None)
    walked = {t: x_t for t, x_t, _ in path}
    known = set(judge(*atoms(seen))[2].tolist())
    for name, x in ("drawn", walked[0]), ("real", x_0[-500:]):
        valid, found, graph = judge(*atoms(x))
        n = max(valid.sum(), 1)
        graphs = set(graph[valid].tolist())
        print(f"{name}: {valid.float().mean():.1%} valid; of these {len(graphs) / n:.1%} unique, "
              f"{len(graphs - known) / n:.1%} new, {(found == y)[valid].sum() / n:.1%} rings right")
    draw(walked, y, out)


if __name__ == "__main__":
    run(main)
