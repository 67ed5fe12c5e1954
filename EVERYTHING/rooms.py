"""Rooms: a scripted designer furnishes them by the thousand, diffusion learns to.

    python EVERYTHING/rooms.py          train for 5 minutes, measure, draw
    python EVERYTHING/rooms.py --draw   measure and draw what rooms.pt has learned

x_0 (B, 7, 1, N): N places, each with whether something stands there (above 0), its centre, width
and depth in metres, cos and sin of the way it looks. y (B, 5 + N): half the room's width and depth,
x of its door, which is below, x and y of its window, and what each place is for.
Measure: the share of rooms that keep `rules`. LEGO-Net (arXiv:2301.09629), which moves given
tables and chairs, reports 91 to 97 % of its own such measure, and 16 to 24 % for a regression.
"""
import argparse
import copy
import math
import random
import sys
import time
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "MNIST"))
from main import (T, absolute, catch_ctrl_c, noise_schedule, run, training_step, walk, writing,
                  zero_init)

NET = dict(c=128, c_pair=64, layers=4)
BATCH = 64
LR = 2e-3           # peak learning rate
STEPS = 50          # of sampling
WAVES = 6           # frequencies of a length
N = 10              # places
ROOMS = 20_000      # to learn from
TESTED = 500        # to measure
GAP = 0.04          # metres between furniture and wall

# how many of a room's places must be filled, and what each is for
ROLES = [(3, "bed bedside wardrobe bedside desk chair armchair shelf plant plant"),
         (4, "sofa television table rug armchair armchair shelf shelf plant plant"),
         (3, "desk chair shelf shelf shelf armchair plant plant plant plant"),
         (6, "dinner shelf chair chair chair chair chair chair plant plant")]
NAMES = [name for _, names in ROLES for name in names.split()]
NEEDED = torch.tensor([i < needed for needed, _ in ROLES for i in range(N)])
# depth, then widths to choose from
SIZES = {"bed": (2, 1, 1.6), "bedside": (0.4, 0.44), "wardrobe": (0.6, 1, 1.5, 2),
         "desk": (0.7, 1.6), "chair": (0.48, 0.48), "armchair": (0.76, 0.76),
         "sofa": (0.9, 1.6, 2), "television": (0.4, 1.2), "table": (0.56, 1), "rug": (1.4, 2),
         "dinner": (0.9, 1.4, 2), "shelf": (0.36, 0.8, 1.2), "plant": (0.4, 0.4)}
COLOURS = dict(zip(SIZES, colormaps["tab20"].colors))


# ---- The data: a designer ----
def design(rng):
    """One try: (N, 7) and y. Points and directions are complex numbers."""
    room = rng.choice([0, 0, 0, 1, 1, 2, 2, 3])  # the harder, the more tries
    roles = range(N * room, N * room + N)
    free = [NAMES[role] for role in roles]
    places = [[-1.0] + [0.0] * 6 for _ in roles]
    half = [rng.uniform(1.5, 2.5), rng.uniform(1.5, 2.5)]
    width = {kind: rng.choice(widths) for kind, (_, *widths) in SIZES.items()}

    def put(kind, point, look):
        i = free.index(kind)
        free[i] = None
        places[i] = [1.0, point.real, point.imag, width[kind], SIZES[kind][0], look.real, look.imag]
        return point, look

    def at(wall, share, margin, inward):
        look = 1j ** (wall + 1)
        along = share * (half[wall % 2] - margin)
        return look * (inward - half[1 - wall % 2] - 1j * along), look

    def against(wall, share, kind):
        return put(kind, *at(wall, share, width[kind] / 2 + GAP, SIZES[kind][0] / 2 + GAP))

    def beside(place, kind, left, ahead, turn=1):
        point, look = place
        return put(kind, point + look * (ahead + 1j * left), look * turn)

    door = rng.uniform(-1, 1) * (half[0] - 0.5)
    window = rng.choice([1, 2, 3])
    light = rng.uniform(-1, 1)
    glass, _ = at(window, light, 0.83, 0)
    wall = rng.randrange(4)
    share = rng.uniform(-1, 1)
    sides = rng.choice([[-1], [1], [-1, 1]])
    if room == 0:
        bed = against(wall, share, "bed")
        for side in sides:
            beside(bed, "bedside", side * (width["bed"] / 2 + 0.27), -0.8)
        more = ["wardrobe"] + rng.choice([[], ["desk"], ["armchair"], ["shelf"]])
    if room == 1:
        sofa = against(wall, share, "sofa")
        beside(sofa, "television", 0, 2 * half[1 - wall % 2] - 0.65 - 2 * GAP, -1)
        beside(sofa, "rug", 0, 1.1)
        table = beside(sofa, "table", 0, 1.1)
        for side in sides * rng.randrange(2):
            beside(table, "armchair", 1.18 * side, 0, -1j * side)
        more = ["shelf"] * rng.randrange(3)
    if room == 2:
        more = ["desk"] + ["shelf"] * rng.randrange(1, 4) + ["armchair"] * rng.randrange(2)
    if room == 3:
        middle = complex(share * (half[0] - 1), rng.uniform(-1, 1) * (half[1] - 1))
        table = put("dinner", middle, rng.choice([1, 1j]))
        for left in [-0.33, 0.33] if width["dinner"] < 2 else [-0.62, 0, 0.62]:
            for side in (-1, 1):
                beside(table, "chair", left, 0.75 * side, -side)
        more = ["shelf"]

    # a desk may stand under the window, nothing else
    for kind in more + ["plant"] * rng.randrange(2):
        wall = rng.choice([k for k in range(4) if k != window])
        place = wall, rng.choice([-1, 1, rng.uniform(-1, 1)])
        if kind == "desk":
            place = rng.choice([place, (window, light)])
        place = against(*place, kind)
        if kind == "desk":
            beside(place, "chair", 0, 0.7, -1)
    return places, [*half, door, glass.real, glass.imag, *roles]


def designed(n, seed):
    """x_0 and y of n rooms that keep all rules."""
    rng = random.Random(seed)
    x_0 = torch.zeros(0, 7, 1, N)
    y = torch.zeros(0, 5 + N)
    while len(y) < n:
        places, plans = map(torch.tensor, zip(*(design(rng) for _ in range(4000))))
        places = places.transpose(1, 2)[:, :, None]
        good = rules(places, plans, 0.005 - GAP)["all five"]
        x_0 = torch.cat([x_0, places[good]])
        y = torch.cat([y, plans[good]])
    return x_0[:n], y[:n]


# ---- The measure ----
def frame(x):
    """Where left and ahead are for objects (..., 7): unit vectors (..., 2, 2)."""
    cos, sin = F.normalize(x[..., 5:], dim=-1).unbind(-1)
    return torch.stack([-sin, cos, cos, sin], dim=-1).unflatten(-1, (2, 2))


def extent(x, axes):
    """How far they reach from their centres along the room's axes (..., 2)."""
    return (axes.abs() * x[..., 3:5, None]).sum(-2) / 2


def rules(x_0, y, slack=0.05):
    """Which rooms keep which rule, to slack metres: a dict of bool (B,). Turns are rounded."""
    x = x_0[:, :, 0].transpose(1, 2)
    there = x[..., 0] > 0
    point = x[..., 1:3]
    axes = frame(x).round()
    ahead = axes[:, :, 1]
    reach = extent(x, axes)
    wall = y[:, None, :2]
    roles = y[:, 5:].long()

    def only(kinds):
        return there & torch.tensor([name in kinds.split() for name in NAMES])[roles]

    solid = there & ~only("rug")
    i, j = torch.triu_indices(N, N, 1)
    gap = (point[:, i] - point[:, j]).abs() - reach[:, i] - reach[:, j]
    door = torch.stack([y[:, 2], 0.45 - y[:, 1]], dim=1)[:, None]  # 90 cm by 90
    way = (point - door).abs() - reach - 0.45
    back = (ahead.abs() * wall + ahead * point).sum(-1) - x[..., 4] / 2
    odd = (only("chair").sum(1) - only("desk").sum(1)) % 2 > 0
    kept = {"nothing overlaps": (gap.amax(-1) > -slack) | ~(solid[:, i] & solid[:, j]),
            "all inside": ((point.abs() + reach - wall).amax(-1) < slack) | ~there,
            "the door free": (way.amax(-1) > -slack) | ~solid,
            "all parts there": (there | ~NEEDED[roles]) & ~odd[:, None],
            "at the wall": (back < 0.1) | ~only("bed wardrobe desk sofa television shelf")}
    kept = {rule: held.all(1) for rule, held in kept.items()}
    return kept | {"all five": torch.stack(list(kept.values())).all(0)}


# ---- The net ----
def waves(*lengths):
    """Metres (..., K) as sines and cosines, so that centimetres count."""
    angles = (torch.cat(lengths, dim=-1)[..., None] * 2.0 ** torch.arange(WAVES)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def mlp(c_in, c, c_out):
    return nn.Sequential(nn.Linear(c_in, c), nn.SiLU(), nn.Linear(c, c_out))


class Layer(nn.Module):
    """Attention whose messages and scores know how two objects lie to each other, then an MLP."""

    def __init__(self, c, c_pair):
        super().__init__()
        self.emb = nn.Linear(c, 2 * c)
        self.me = nn.Linear(c, c_pair)
        self.other = nn.Linear(c, c_pair)
        self.score = nn.Linear(c_pair, 4)  # heads
        self.mix = zero_init(nn.Linear(c_pair, c))
        self.mlp = mlp(c, 2 * c, c)
        zero_init(self.mlp[2])

    def forward(self, h, pair, emb):
        scale, shift = self.emb(F.silu(emb))[:, None].chunk(2, dim=-1)
        g = (1 + scale) * F.layer_norm(h, h.shape[2:]) + shift
        m = F.silu(self.me(g)[:, :, None] + self.other(g)[:, None] + pair)  # (B, N, N, c_pair)
        weights = self.score(m).softmax(2)[..., None]
        h = h + self.mix((weights * m.unflatten(-1, (4, -1))).sum(2).flatten(2))
        return h + self.mlp(F.layer_norm(h, h.shape[2:]))


class Net(nn.Module):
    """Predicts v from x_t, t (B,) and y, the places in any order."""

    def __init__(self, c, c_pair, layers):
        super().__init__()
        self.time = mlp(32, c, c)
        self.plan = mlp(10 * WAVES, c, c)
        self.role = nn.Embedding(len(NAMES), 32)
        self.one = mlp(7 + 32 + 20 * WAVES, 2 * c, c)
        self.pair = nn.Linear(2 + 16 * WAVES, layers * c_pair)
        self.layers = nn.ModuleList(Layer(c, c_pair) for _ in range(layers))
        self.out = zero_init(nn.Linear(c, 7))

    @torch.autocast("cpu", enabled=False)  # bfloat16 has no centimetres
    def forward(self, x_t, t, y):
        angles = t[:, None] * 1e-4 ** (torch.arange(16) / 16)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.plan(waves(y[:, :5]))

        # each object: its centre, its edges to the walls, where door and window are
        x = x_t[:, :, 0].transpose(1, 2)
        point = x[..., 1:3]
        axes = frame(x)
        reach = extent(x, axes)
        wall = y[:, None, :2]
        door = torch.stack([y[:, 2], -y[:, 1]], dim=1)[:, None] - point
        window = y[:, None, 3:5] - point
        lengths = waves(point, point + reach - wall, point - reach + wall, door, window)
        h = self.one(torch.cat([x, self.role(y[:, 5:].long()), lengths], dim=-1))

        # each pair: the other's centre and edges as I see them, me as it sees me
        gap = (point[:, None] - point[:, :, None])[..., None, :]  # (B, N, N, 1, 2)
        seen = (axes[:, :, None] * gap).sum(-1)
        turn = (axes[:, :, None, :, None] * axes[:, None, :, None]).sum(-1)  # (B, N, N, 2, 2)
        reach = ((turn.abs() * x[:, None, :, None, 3:5]).sum(-1) + x[:, :, None, 3:5]) / 2
        lengths = waves(seen, seen - reach, seen + reach, (axes[:, None] * gap).sum(-1))
        pairs = self.pair(torch.cat([turn[..., 0], lengths], dim=-1))
        for layer, pair in zip(self.layers, pairs.chunk(len(self.layers), dim=-1)):
            h = layer(h, pair, emb)
        return self.out(F.layer_norm(h, h.shape[2:])).transpose(1, 2)[:, :, None]


# ---- Training, measure, picture ----
def train(x_0, y, minutes):
    """The average of a net in training."""
    net = Net(**NET)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    alpha_bar = noise_schedule("cosine", T).float()
    stop = catch_ctrl_c()
    bar = tqdm(unit=" steps")
    started = time.monotonic()
    share = 0
    while share < 1 and not stop:
        # a rate that rises, then falls to 0; an average over the last thirtieth of the run
        lr = LR * min((bar.n + 1) / 200, 1) * (1 + math.cos(math.pi * share)) / 2
        decay = (1 + bar.n) / (30 + bar.n)
        i = torch.randint(len(y), (BATCH,))
        loss = training_step(net, ema, optimizer, x_0[i], y[i], alpha_bar, lr, decay, "v")
        bar.update()
        share = (time.monotonic() - started) / 60 / minutes
        if bar.n % 100 == 0:
            bar.total = int(bar.n / share)
            bar.set_postfix(loss=f"{loss:.3f}")
    bar.close()
    return ema


def furnish(net, y, steps=STEPS, **options):
    """[(t, x_t, x0_hat), ...] on the way from noise to furniture."""
    x_T = torch.randn(len(y), 7, 1, N)
    alpha_bar = noise_schedule("cosine", T)
    return list(walk(net, x_T, y, alpha_bar, "v", steps, guidance=0, clamp=None, **options))


def show(ax, x, y, title):
    """The plan of a room. In each object a line leads to its front."""
    w, d, door, x_window, y_window = y[:5].tolist()
    dx = 0.5 * (abs(x_window) < w - 0.01)
    dy = 0.5 - dx
    ax.add_patch(Rectangle((-w, -d), 2 * w, 2 * d, fill=False, lw=2))
    ax.plot([door - 0.45, door + 0.45], [-d, -d], "w", lw=4)
    ax.plot([x_window - dx, x_window + dx], [y_window - dy, y_window + dy], "c", lw=5)
    for role, (there, px, py, w, d, cos, sin) in zip(y[5:].int(), x[:, 0].T.tolist()):
        if there > 0:
            name = NAMES[role]
            angle = math.degrees(math.atan2(-cos, sin))
            ax.add_patch(Rectangle((px - w / 2, py - d / 2), w, d, angle=angle, ec="black",
                                   rotation_point="center", fc=COLOURS[name],
                                   zorder=0 if name == "rug" else 1))
            ax.plot([px, px + cos * d / 2], [py, py + sin * d / 2], "k", lw=1)
    ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", title=title)
    ax.set_axis_off()


def report(net, x_0, y, path):
    """The measure of unseen plans, and a picture. x_0, y: the rooms learned from."""
    real, plans = designed(TESTED, 1)
    steps = furnish(net, plans)
    _, _, mean = furnish(net, plans, 1)[0]  # one step from noise: the best guess
    rows = {"the designer": real, "diffusion": steps[-1][1], "a regression": mean}
    for name, rooms in rows.items():
        held = [f"{held.float().mean():.1%} {rule}" for rule, held in rules(rooms, plans).items()]
        far = torch.cdist(torch.cat([rooms.flatten(1), plans], 1),
                          torch.cat([x_0.flatten(1), y], 1)).amin(1).median()
        print(f"{name}: {', '.join(held)}; the nearest training room is {far:.2f} away")

    # two rooms of each kind; a bedroom, of which the bed and the door stay
    pick = torch.cat([(plans[:, 5] == N * room).nonzero()[:2, 0] for room in range(4)])
    bed = torch.zeros(8, 7, 1, N, dtype=torch.bool)
    bed[..., 0] = True
    y_bed = plans[pick[:1]].repeat(8, 1)
    _, others, _ = furnish(net, y_bed, known=(bed, real[pick[0]]))[-1]
    others[0, 0, 0, 1:] = -1

    fig = Figure((14, 9.5))
    axes = fig.subplots(5, 8)
    fig.subplots_adjust(0.01, 0.08, 0.99, 0.97, wspace=0, hspace=0.1)
    for ax, k in zip(axes[0], (0, 20, 30, 35, 40, 44, 47, STEPS)):
        t, x_t, _ = steps[k]
        show(ax, x_t[pick[3]], plans[pick[3]], f"t = {t}")
    for line, (name, rooms) in zip(axes[1:], rows.items()):
        for ax, k in zip(line, pick):
            show(ax, rooms[k], plans[k], name)
    for ax, x in zip(axes[4], others):
        show(ax, x, y_bed[0], "the bed stays")
    fig.legend(handles=[Rectangle((0, 0), 1, 1, fc=c, label=name) for name, c in COLOURS.items()],
               loc="lower center", ncols=7)
    with writing(path) as file:
        fig.savefig(file, dpi=80)
    print(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0, help="[5]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=absolute, default=HERE / "figures")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    out = Path(args.out)
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes must be above 0 and finite")
    torch.manual_seed(args.seed)
    x_0, y = designed(ROOMS, 0)
    if args.draw:
        state = torch.load(HERE / "rooms.pt", weights_only=True)
        net = Net(**state["config"]).eval()
        net.load_state_dict(state["ema"])
    else:
        net = train(x_0, y, args.minutes)
        with writing(out / "rooms.pt") as file:
            torch.save({"config": NET, "ema": net.state_dict()}, file)
    report(net, x_0, y, out / "rooms.png")


if __name__ == "__main__":
    run(main)
