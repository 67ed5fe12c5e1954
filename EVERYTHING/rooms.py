"""Rooms: a scripted designer furnishes thousands, and diffusion learns how.

    python rooms.py             train for five minutes, measure, draw
    python rooms.py --draw      the last two, with the weights beside it

x_0: (B, 7, 1, 8), eight places, each with whether something stands there (above 0), its centre,
width and depth in metres, cos and sin of the way it looks. y: (B, 13), half the room's width and
depth, x of its door, which is below, x and y of its window, and what each place is for.
Measure: the share of rooms that keep `rules`, as in LEGO-Net (arXiv:2301.09629).
"""
import math
import random

import torch
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from molecules import HERE, learn, mlp, sines  # which finds MNIST's main.py, too
from torch import nn
from torch.nn import functional as F

from main import noise_schedule, run, walk, writing, zero_init

WIDTH = 128
PAIR = 64
GAP = 0.04    # metres from furniture to a wall
CLEAR = 0.1   # and from thing to thing

# what a room's places are for, and how many of the first must be filled
ROLES = [("bed bedside wardrobe bedside desk chair armchair shelf", 3),
         ("sofa television table rug armchair armchair shelf shelf", 4),
         ("desk chair shelf shelf shelf armchair armchair armchair", 3),
         ("dinner chair chair chair chair chair chair shelf", 5)]
NAMES = [name for names, _ in ROLES for name in names.split()]
NEEDED = torch.tensor([i < needed for _, needed in ROLES for i in range(8)])
# depth, then widths to choose from
SIZES = {"bed": (2, 1.6), "bedside": (0.4, 0.44), "wardrobe": (0.6, 1, 1.5), "desk": (0.7, 1.6),
         "chair": (0.48, 0.48), "armchair": (0.76, 0.76), "sofa": (0.9, 1.6, 2), "rug": (1.4, 2),
         "television": (0.4, 1.2), "table": (0.56, 1), "dinner": (0.9, 2),
         "shelf": (0.36, 0.8, 1.2)}
COLOURS = dict(zip(SIZES, colormaps["tab20"].colors))


# ---- The data: a designer ----
def design(rng):
    """One try: (8, 7) and y. Points and directions are complex numbers."""
    room = rng.choice([0, 0, 0, 1, 1, 2, 2, 3])  # the harder, the more tries
    half = [rng.uniform(1.5, 2.5), rng.uniform(1.5, 2.5)]
    roles = range(8 * room, 8 * room + 8)
    things = {kind: [] for kind in SIZES}
    width = {kind: rng.choice(widths) for kind, (_, *widths) in SIZES.items()}

    def wall(k, share, margin):
        look = 1j ** (k + 1)
        return -look * (half[1 - k % 2] + 1j * share * (half[k % 2] - margin)), look

    def put(kind, place, left=0, ahead=0, turn=1):
        point, look = place
        point += look * (ahead + 1j * left)
        look *= turn
        size = width[kind], SIZES[kind][0]
        things[kind].append([1.0, point.real, point.imag, *size, look.real, look.imag])
        return point, look

    def against(k, share, kind):
        return put(kind, wall(k, share, width[kind] / 2 + GAP), 0, SIZES[kind][0] / 2 + GAP)

    door = rng.uniform(-1, 1) * (half[0] - 0.5)
    window = rng.choice([1, 2, 3])
    light = rng.uniform(-1, 1)
    glass, _ = wall(window, light, 0.84)
    k = rng.randrange(4)
    share = rng.uniform(-1, 1)
    sides = rng.choice([[-1], [1], [-1, 1]])
    more = ["shelf"]
    if room == 0:
        bed = against(k, share, "bed")
        for side in sides:
            put("bedside", bed, 1.14 * side, -0.8)
        more = ["wardrobe"] + rng.choice([[], ["desk"], ["armchair"]])
    if room == 1:
        sofa = against(k, share, "sofa")
        put("television", sofa, 0, 2 * half[1 - k % 2] - 0.65 - 2 * GAP, -1)
        put("rug", sofa, 0, 1.1)
        table = put("table", sofa, 0, 1.1)
        for side in sides * rng.randrange(2):
            put("armchair", table, 1.18 * side, 0, -1j * side)
    if room == 2:
        more = ["desk", "shelf", "armchair", "shelf"][:rng.randrange(2, 5)]
    if room == 3:
        middle = complex(share * (half[0] - 1), rng.uniform(-1, 1) * (half[1] - 1))
        table = put("dinner", (middle, rng.choice([1, 1j])))
        for left in rng.choice([[-0.4, 0.4], [-0.66, 0, 0.66]]):
            for side in (-1, 1):
                put("chair", table, left, 0.82 * side, -side)

    # a desk may stand under the window, nothing else
    for kind in more:
        k = rng.choice([k for k in range(4) if k != window])
        place = k, rng.choice([-1, 1, rng.uniform(-1, 1)])
        if kind == "desk":
            desk = against(*rng.choice([place, (window, light)]), kind)
            put("chair", desk, 0, 0.7, -1)
        else:
            against(*place, kind)
    places = [(things[NAMES[role]] or [[-1.0, 0, 0, 0, 0, 0, 0]]).pop(0) for role in roles]
    return places, [*half, door, glass.real, glass.imag, *roles]


def designed(n, seed):
    """x_0 and y of n rooms that keep all rules."""
    rng = random.Random(seed)
    x_0 = torch.zeros(0, 7, 1, 8)
    y = torch.zeros(0, 13)
    while len(y) < n:
        places, plans = map(torch.tensor, zip(*(design(rng) for _ in range(4000))))
        places = places.mT[:, :, None]
        good = rules(places, plans, -CLEAR)["all five"]
        x_0 = torch.cat([x_0, places[good]])
        y = torch.cat([y, plans[good]])
    return x_0[:n], y[:n]


# ---- The measure ----
def lie(x_t):
    """Objects (B, 8, 7), unit vectors to their left and ahead (B, 8, 2, 2), extents (B, 8, 2)."""
    x = x_t[:, :, 0].mT
    cos, sin = F.normalize(x[..., 5:], dim=-1).unbind(-1)
    axes = torch.stack([-sin, cos, cos, sin], dim=-1).unflatten(-1, (2, 2))
    return x, axes, (axes.abs() * x[..., 3:5, None]).sum(-2) / 2


def rules(x_0, y, slack=0.05):
    """Which rooms keep which rule, to slack metres: a dict of bool (B,). Turns are rounded."""
    look = F.normalize(x_0[:, 5:], dim=1).round()
    x, axes, reach = lie(torch.cat([x_0[:, :5], look], dim=1))
    point = x[..., 1:3]
    wall = y[:, None, :2]
    roles = y[:, 5:].long()
    there = x[..., 0] > 0

    def only(kinds):
        return there & torch.tensor([name in kinds for name in NAMES])[roles]

    solid = there & ~only(["rug"])
    i, j = torch.triu_indices(8, 8, 1)
    gap = (point[:, i] - point[:, j]).abs() - reach[:, i] - reach[:, j]
    door = torch.stack([y[:, 2], 0.45 - y[:, 1]], dim=1)[:, None]  # 90 cm by 90
    way = (point - door).abs() - reach - 0.45
    ahead = axes[:, :, 1]
    back = (ahead.abs() * wall + ahead * point).sum(-1) - x[..., 4] / 2
    odd = (only(["chair"]).sum(1) - only(["desk"]).sum(1)) % 2 > 0
    walled = only(["bed", "wardrobe", "desk", "sofa", "television", "shelf"])
    kept = {"nothing overlaps": (gap.amax(-1) > -slack) | ~(solid[:, i] & solid[:, j]),
            "all inside": ((point.abs() + reach - wall).amax(-1) < max(slack, 0)) | ~there,
            "the door free": (way.amax(-1) > -slack) | ~solid,
            "all parts there": (there | ~NEEDED[roles]) & ~odd[:, None],
            "at the wall": (back < 0.1) | ~walled}
    kept = {rule: held.all(1) for rule, held in kept.items()}
    return kept | {"all five": torch.stack(list(kept.values())).all(0)}


# ---- The net ----
def waves(*lengths):
    """Metres as sines and cosines, so that centimetres count."""
    return sines(torch.cat(lengths, dim=-1), 2.0 ** torch.arange(6))


class Layer(nn.Module):
    """Attention whose messages and scores know how two objects lie to each other, then an MLP."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(WIDTH, 2 * WIDTH)
        self.me = nn.Linear(WIDTH, PAIR)
        self.other = nn.Linear(WIDTH, PAIR)
        self.pair = nn.Linear(98, PAIR)
        self.score = nn.Linear(PAIR, 4)  # heads
        self.mix = zero_init(nn.Linear(PAIR, WIDTH))
        self.mlp = mlp(WIDTH, 2 * WIDTH, WIDTH)
        zero_init(self.mlp[2])

    def forward(self, h, pairs, emb):
        scale, shift = self.emb(emb).chunk(2, dim=-1)
        g = (1 + scale) * F.layer_norm(h, [WIDTH]) + shift
        m = F.silu(self.me(g)[:, :, None] + self.other(g)[:, None] + self.pair(pairs))
        weights = self.score(m).softmax(2)[..., None]  # m: (B, 8, 8, PAIR)
        h = h + self.mix((weights * m.unflatten(-1, (4, -1))).sum(2).flatten(2))
        return h + self.mlp(F.layer_norm(h, [WIDTH]))


class Net(nn.Module):
    """Predicts v from x_t, t (B,) and y, the places in any order."""

    def __init__(self):
        super().__init__()
        self.time = mlp(32, WIDTH, WIDTH)
        self.room = mlp(60, WIDTH, WIDTH)
        self.role = nn.Embedding(len(NAMES), 32)
        self.one = mlp(159, 2 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.out = zero_init(nn.Linear(WIDTH, 7))

    @torch.autocast("cpu", enabled=False)  # bfloat16 has no centimetres
    def forward(self, x_t, t, y):
        emb = self.time(sines(t[:, None], 1e-4 ** (torch.arange(16) / 16)))
        emb = F.silu(emb + self.room(waves(y[:, :5])))[:, None]

        # each object: its centre, its edges to the walls, where door and window are
        x, axes, reach = lie(x_t)
        point = x[..., 1:3]
        wall = y[:, None, :2]
        door = torch.stack([y[:, 2], -y[:, 1]], dim=1)[:, None] - point
        window = y[:, None, 3:5] - point
        lengths = waves(point, point + reach - wall, point - reach + wall, door, window)
        h = self.one(torch.cat([x, self.role(y[:, 5:].long()), lengths], dim=-1))

        # each pair: the other's centre and edges as I see them, me as it sees me
        gap = (point[:, None] - point[:, :, None])[..., None, :]  # (B, 8, 8, 1, 2)
        seen = (axes[:, :, None] * gap).sum(-1)
        turn = axes[:, :, None] @ axes[:, None].mT  # (B, 8, 8, 2, 2)
        reach = ((turn.abs() * x[:, None, :, None, 3:5]).sum(-1) + x[:, :, None, 3:5]) / 2
        lengths = waves(seen, seen - reach, seen + reach, (axes[:, None] * gap).sum(-1))
        pairs = torch.cat([turn[..., 0], lengths], dim=-1)
        for layer in self.layers:
            h = layer(h, pairs, emb)
        return self.out(F.layer_norm(h, [WIDTH])).mT[:, :, None]


# ---- The picture ----
def show(axis, x, y, title):
    """The plan of a room, its window a cross. In each thing a line leads to its front."""
    w, d, door, *window = y[:5].tolist()
    axis.add_patch(Rectangle((-w, -d), 2 * w, 2 * d, fill=False, lw=2))
    axis.plot([door - 0.45, door + 0.45], [-d, -d], "w", lw=4)
    axis.plot(*window, "cP", ms=10)
    for role, (there, px, py, w, d, cos, sin) in zip(y[5:].int(), x[:, 0].T.tolist()):
        if there > 0:
            angle = math.degrees(math.atan2(-cos, sin))
            axis.add_patch(Rectangle((px - w / 2, py - d / 2), w, d, angle=angle, ec="black",
                                     rotation_point="center", fc=COLOURS[NAMES[role]],
                                     zorder=NAMES[role] != "rug"))
            axis.plot([px, px + cos * d / 2], [py, py + sin * d / 2], "k", lw=1)
    axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", title=title)
    axis.set_axis_off()


def main():
    x_0, y = designed(20_000, 0)
    alpha_bar = noise_schedule("cosine", 1000)
    alpha_bar = 1 / (1 + (1 / alpha_bar - 1) / 3 ** 2)  # noise as for data three times as large
    net, out = learn(Net, HERE / "rooms.pt", x_0, y, alpha_bar, 2e-3)

    def furnish(y, steps, known=None):
        x_T = torch.randn(len(y), 7, 1, 8)
        return list(walk(net, x_T, y, alpha_bar, "v", steps, guidance=0, clamp=None, known=known))

    real, plans = designed(500, 1)
    path = furnish(plans, 50)
    _, _, mean = furnish(plans, 1)[0]  # one step from noise: the best guess
    rows = {"the designer": real, "diffusion": path[-1][1], "a regression": mean}
    for name, rooms in rows.items():
        held = [f"{held.float().mean():.1%} {rule}" for rule, held in rules(rooms, plans).items()]
        far = torch.cdist(rooms.flatten(1), x_0.flatten(1)).amin(1).median()
        print(f"{name}: {', '.join(held)}; the nearest training room is {far:.2f} away")

    # two of each kind, and a bedroom of which the bed stays
    n = torch.cat([(plans[:, 5] == 8 * room).nonzero()[:2, 0] for room in range(4)])
    bed = torch.zeros(8, 7, 1, 8, dtype=torch.bool)
    bed[..., 0] = True
    y_bed = plans[n[[0] * 8]]
    _, others, _ = furnish(y_bed, 50, (bed, real[n[0]]))[-1]
    shown = [(path[k][1][n[3]], plans[n[3]], f"t = {path[k][0]}")
             for k in (0, 20, 30, 35, 40, 44, 47, 50)]
    for name, rooms in rows.items():
        shown += zip(rooms[n], plans[n], [name] * 8)
    shown += zip(others, y_bed, ["the bed stays"] * 8)
    figure, axes = plt.subplots(5, 8, figsize=(14, 9.5), layout="constrained")
    for axis, room in zip(axes.flat, shown):
        show(axis, *room)
    figure.legend([Rectangle((0, 0), 1, 1, fc=colour) for colour in COLOURS.values()], COLOURS,
                  loc="outside lower center", ncols=6)
    with writing(out / "rooms.png") as file:
        figure.savefig(file, dpi=80)


if __name__ == "__main__":
    run(main)
