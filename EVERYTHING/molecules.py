"""Molecules: nine atoms come out of noise with the method of MNIST/main.py.

    python molecules.py             train for five minutes, measure, draw
    python molecules.py --draw      the last two, with molecules.pt

Data: QM9 without hydrogen (Ramakrishnan et al. 2014). x_0: (B, 6, 1, 9), angstroms and a channel
each for C, N, O; y: rings. Net: message passing (Satorras et al. 2021). Measure: bonds by
length (Hoogeboom et al. 2022); valid is one piece, no atoms nearer than 1.1 angstrom, at C, N, O
at most 4, 3, 2 bonds, a double one counts twice.
"""
import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "MNIST"))
from main import (NULL, catch_ctrl_c, noise_schedule, run, training_step, walk, writing,
                  zero_init)

WIDTH = 64
KIND = 0.25  # a kind beside angstroms

# picometres below which C, N, O bond with C, N, O: single, double, triple
LONGEST = torch.tensor([[[164, 157, 153], [157, 155, 150], [153, 150, 158]],
                        [[139, 134, 125], [134, 130, 126], [125, 126, 126]],
                        [[123, 119, 116], [119, 113, 0], [116, 0, 0]]])
VALENCE = torch.tensor([4, 3, 2])
COLOURS = np.array(["grey", "royalblue", "red"])

# sums and differences over 36 pairs, as (36, 9)
ONE = torch.eye(9)
i, j = torch.triu_indices(9, 9, 1)
PLUS = ONE[j] + ONE[i]
MINUS = ONE[j] - ONE[i]


def load_data():
    """x_0 (N, 6, 1, 9), rings int64 (N,)."""
    data = np.load(HERE / "qm9.npz")
    x_0 = np.concatenate([data["coordinates"] / 100, KIND * np.eye(3)[data["kinds"]]], axis=2)
    return torch.tensor(x_0).float().mT[:, :, None], torch.tensor(data["rings"]).long()


def sines(x, waves):
    x = (x[..., None] * waves).flatten(-2)
    return torch.cat([x.sin(), x.cos()], -1)


def mlp(c_in, c, c_out):
    return nn.Sequential(nn.Linear(c_in, c), nn.SiLU(), nn.Linear(c, c_out))


class Layer(nn.Module):
    """Each pair of atoms makes a message, which moves the two along their line and tells both."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(WIDTH, 2 * WIDTH)
        self.end = nn.Linear(WIDTH, WIDTH)
        self.distance = nn.Linear(12, WIDTH)
        self.message = nn.Linear(WIDTH, WIDTH)
        self.pull = zero_init(nn.Linear(WIDTH, 1))
        self.hear = mlp(2 * WIDTH, WIDTH, WIDTH)
        zero_init(self.hear[2])

    def forward(self, h, x, pairs, emb):
        # a pair knows its atoms, their distance and what it knew
        scale, shift = self.emb(emb).chunk(2, dim=2)
        told = (1 + scale) * F.layer_norm(h, [WIDTH]) + shift
        between = MINUS @ x  # (B, 36, 3)
        distance = between.norm(dim=2, keepdim=True)
        waves = math.pi / 8 * 2 ** torch.arange(6)  # 16 to 0.5 angstrom
        pairs = pairs + PLUS @ self.end(told) + self.distance(sines(distance, waves))
        pairs = F.silu(self.message(F.silu(pairs)))  # (B, 36, WIDTH)

        # opposite moves; an atom hears all its messages
        x = x + MINUS.T @ (self.pull(pairs) * between / (distance + 1)) / 4
        return h + self.hear(torch.cat([told, PLUS.T @ pairs / 4], 2)), x, pairs


class Net(nn.Module):
    """Predicts v, as MNIST's UNet; a molecule turned gives its v turned."""

    def __init__(self):
        super().__init__()
        self.time = mlp(32, WIDTH, WIDTH)
        self.label = nn.Embedding(6, WIDTH)  # row 0 is NULL
        self.stem = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.skip = zero_init(nn.Linear(WIDTH, 1))
        self.kinds = zero_init(nn.Linear(WIDTH, 3))

    @torch.autocast("cpu", enabled=False)  # bfloat16 steps by 0.016 at 3 angstrom
    def forward(self, x_t, t, y):
        emb = self.time(sines(t[:, None], 1e-4 ** (torch.arange(16) / 16)))
        emb = F.silu(emb + self.label(y + 1))[:, None]  # (B, 1, WIDTH)

        # where the whole is means nothing
        x_t = x_t[:, :, 0].mT  # (B, 9, 6)
        start = x_t[..., :3] - x_t[..., :3].mean(1, keepdim=True)
        h = self.stem(x_t[..., 3:]) + emb
        x = start
        pairs = 0
        for layer in self.layers:
            h, x, pairs = layer(h, x, pairs, emb)
        moved = x - start + self.skip(emb) * start
        return torch.cat([moved, self.kinds(h)], 2).mT[:, :, None]


def train(net, x_0, y, alpha_bar, lr, minutes):
    """The average of net in training."""
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    stop = catch_ctrl_c()
    share = 0
    bar = tqdm()
    while share < 1 and not stop:
        i = torch.randint(len(x_0), (64,))
        rate = lr * min((bar.n + 1) / 200, 1) * (1 + math.cos(math.pi * share)) / 2
        decay = (1 + bar.n) / (30 + bar.n)
        loss = training_step(net, ema, optimizer, x_0[i], y[i], alpha_bar, rate, decay, "v")
        bar.update()
        share = bar.format_dict["elapsed"] / 60 / minutes
        bar.total = int(bar.n / share)
        bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
    bar.close()
    return ema


def learn(Net, path, x_0, y, alpha_bar, lr):
    """A net, with the weights at path or trained, and a folder."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--minutes", type=float, default=5)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=HERE / "figures")
    add("--draw", action="store_true")
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes is out of range")
    torch.manual_seed(args.seed)
    net = Net()
    if args.draw:
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        net = train(net, x_0, y, alpha_bar, lr, args.minutes)
        with writing(args.out / path.name) as file:
            torch.save(net.half().state_dict(), file)
    return net.float(), args.out


def judge(x):
    """Bonds (B, 9, 9); valid, rings, graph (B,), a number whatever the atoms' order."""
    kinds = x[:, 3:, 0].argmax(1)
    positions = 100 * x[:, :3, 0].mT
    distances = torch.cdist(positions, positions) + 1000 * ONE
    bonds = (distances < LONGEST[:, kinds[:, :, None], kinds[:, None]]).sum(0)
    bonded = (bonds > 0) + ONE
    whole = torch.linalg.matrix_power(bonded, 8) > 0  # all are joined
    few = bonds.sum(2, keepdim=True) <= VALENCE[kinds][:, :, None]
    valid = (whole & few & (distances >= 110)).flatten(1).all(1)
    graph = torch.linalg.det(bonds + torch.diag_embed(kinds + math.e).double())
    return bonds, valid, bonded.sum(dim=(1, 2)) / 2 - 12.5, (1e6 * graph).round()


def sticks(axis, x_0, turn):
    """One molecule (6, 1, 9) by way of turn (3, 2)."""
    bonds, *_ = judge(x_0[None])
    positions = (x_0[:3, 0].T - x_0[:3, 0].mean(1)) @ turn
    axis.add_collection(LineCollection(positions[bonds[0].nonzero()], colors="silver", lw=3))
    axis.scatter(*positions.T, 25, COLOURS[x_0[3:, 0].argmax(0)], zorder=2)
    axis.set(xlim=(-5.4, 5.4), ylim=(-3.6, 3.6), aspect="equal")
    axis.set_axis_off()


def draw(walked, y, out):
    """A row for each number of rings: one on its way, four others."""
    x = walked[0][:, :3, 0]
    turns = torch.linalg.svd(x - x.mean(2, keepdim=True))[0]  # widest first
    figure, axes = plt.subplots(5, 10, figsize=(14, 6), layout="constrained")
    for k, axis in enumerate(axes.flat):
        rings = k // 10
        n = (y == rings).nonzero()[max(k % 10 - 5, 0), 0]
        t = max(1000 - k % 10 * 200, 0)
        sticks(axis, walked[t][n], turns[n, :, :2])
        axis.set_title(f"rings: {rings}, t = {t}", size=8)
    with writing(out / "molecules.png") as file:
        figure.savefig(file)


def main():
    x_0, rings = load_data()
    seen = x_0[:-500]  # the rest to compare
    y = rings[:-500].clone()
    y[::10] = NULL  # guidance needs both kinds
    alpha_bar = noise_schedule("cosine", 1000)
    alpha_bar = 1 / (1 + (1 / alpha_bar - 1) / 4 ** 2)  # as for data four times as large
    net, out = learn(Net, HERE / "molecules.pt", seen, y, alpha_bar, 7e-3)

    y = rings[-500:]
    path = walk(net, torch.randn(500, 6, 1, 9), y, alpha_bar, "v", 100, guidance=1,
                guided=(0.2, 0.9), clamp=None)
    walked = {t: x_t for t, x_t, _ in path}
    known = set(judge(seen)[3].tolist())
    for name, x in ("drawn", walked[0]), ("real", x_0[-500:]):
        _, valid, found, graph = judge(x)
        n = max(valid.sum(), 1)
        graphs = set(graph[valid].tolist())
        print(f"{name}: {valid.float().mean():.1%} valid; of these {len(graphs) / n:.1%} unique, "
              f"{len(graphs - known) / n:.1%} new, {(found == y)[valid].sum() / n:.1%} rings right")
    draw(walked, y, out)


if __name__ == "__main__":
    run(main)
