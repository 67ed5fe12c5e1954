"""Push-T: a disc pushes a T-shaped block over a table to a goal; its physics and an expert.

The task is that of Florence et al. 2021 (arXiv:2109.00137) and Chi et al. 2023 (arXiv:2303.04137).
The world is quasi-static: nothing keeps moving by itself. Friction under the block is an
ellipsoidal limit surface (Lynch, Maekawa & Tanie 1992), the disc has no friction.

Lengths are in units of the bar's thickness. The goal is the pose (0, 0, 0), the world's frame is
the goal's. Everything is batched: pose (B, 3) is x, y and angle of the block, disc (B, 2) the
disc's centre. In the block's frame its centre is the origin, and the axes turn with it.
"""
import math

import numpy as np
import torch

BAR = (-2.0, 2.0, 5 / 14, 19 / 14)      # left, right, bottom, top of the bar
STEM = (-0.5, 0.5, -37 / 14, 5 / 14)    # the origin is the centre of area of both
RADIUS = 0.5            # of the disc
SPEED = 0.6             # the disc's longest way in a control step
SUBSTEPS = 10           # physics steps a control step
STEPS = 300             # control steps an episode
CELL = 0.125            # side of the squares that coverage counts
TRAVEL = 0.5            # the expert's way in a step without contact
PUSH = 0.3              # and while it pushes
CIRCLE = 3.4            # radius of its way round the block, clear of corners
ENOUGH = 0.96           # coverage at which the expert stops
HOLD = 16               # steps that it then stays
BESIDE = 0.5            # a contact this near needs no way round
GRID = torch.cat([torch.cartesian_prod(torch.arange(left + CELL / 2, right, CELL),
                                       torch.arange(bottom + CELL / 2, top, CELL))
                  for left, right, bottom, top in (BAR, STEM)])  # the squares' centres (K, 2)
NAMES = ("poses", "discs", "commands", "ends")     # of recorded arrays
C2 = GRID.norm(dim=1).mean().item() ** 2    # c^2: how hard the block is to turn
SETTINGS = [round(C2, 4), RADIUS, SPEED]    # what a plan means; C2 is the block's shape


class UserError(ValueError):
    """What a user can put right: `run` prints it as one line."""


# ---- The world ----
def rotate(points, angle):
    """points (B, K, 2) turned about the origin by angle (B,)."""
    cos = angle.cos()[:, None]
    sin = angle.sin()[:, None]
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def to_block(points, pose):
    """Points (B, K, 2) of the world's frame in the block's."""
    return rotate(points - pose[:, None, :2], -pose[:, 2])


def to_world(points, pose):
    """The way back from to_block."""
    return rotate(points, pose[:, 2]) + pose[:, None, :2]


def nearest(point):
    """The point of the block (B, 2) that is nearest to a point (B, 2), both in its frame."""
    x, y = point.unbind(-1)
    bar, stem = (torch.stack([x.clamp(left, right), y.clamp(bottom, top)], dim=-1)
                 for left, right, bottom, top in (BAR, STEM))
    nearer = (point - bar).norm(dim=-1) < (point - stem).norm(dim=-1)
    return torch.where(nearer[:, None], bar, stem)


def twist(r, n):
    """How the block moves for a unit of push at its point r against the normal n: (B, 3).

    The longer its arm m = r x n, the more a push turns the block; c^2 weighs turn against shift.
    """
    m = r[:, 0] * n[:, 1] - r[:, 1] * n[:, 0]
    share = 1 / (1 + m ** 2 / C2)
    return -share[:, None] * torch.cat([n, m[:, None] / C2], dim=1)


def step(pose, disc, command):
    """One control step: the disc moves towards command (B, 2), the block gives way."""
    way = command - disc
    way = way * (SPEED / way.norm(dim=1, keepdim=True).clamp(min=SPEED))
    for _ in range(SUBSTEPS):
        disc = disc + way / SUBSTEPS
        p = to_block(disc[:, None], pose)[:, 0]
        r = nearest(p)
        distance = (p - r).norm(dim=1, keepdim=True)
        depth = (RADIUS - distance).clamp(min=0)
        motion = depth * twist(r, (p - r) / distance.clamp(min=1e-6))
        shift = rotate(motion[:, None, :2], pose[:, 2])[:, 0]
        pose = pose + torch.cat([shift, motion[:, 2:]], dim=1)
    return pose, disc


def coverage(pose):
    """The share of the goal's area under the block, (B,). A square on an edge counts in part."""
    x, y = to_block(GRID.expand(len(pose), -1, -1), pose).unbind(-1)
    inside = 0
    for left, right, bottom, top in (BAR, STEM):
        from_x = torch.minimum(x - left, right - x)
        from_y = torch.minimum(y - bottom, top - y)
        inside = inside + (from_x / CELL + 0.5).clamp(0, 1) * (from_y / CELL + 0.5).clamp(0, 1)
    return inside.mean(dim=1)


def best_coverage(frames):
    """The best coverage (B,) over frames (pose, ...) of B episodes."""
    return torch.stack([coverage(pose) for pose, *_ in frames]).amax(dim=0)


def starts(n, generator):
    """n random beginnings: the block up to 3 units from the goal, the disc 3.2 to 4.5 from that."""
    u = torch.rand(n, 5, generator=generator)
    angle = 2 * math.pi * u[:, :3]
    ways = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (n, 3, 2)
    centre = 3 * u[:, 3:4].sqrt() * ways[:, 0]  # sqrt: even over the area
    disc = centre + (3.2 + 1.3 * u[:, 4:]) * ways[:, 1]
    return torch.cat([centre, angle[:, 2:]], dim=1), disc


# ---- The expert, which a reader of the policy may skip ----
def angle(points):
    return torch.atan2(points[..., 1], points[..., 0])


def leave(point, n):
    """Where the ray from a point (B, 2) along n (B, 2) meets the circle round the block."""
    along = (point * n).sum(1)
    ahead = (along ** 2 + CIRCLE ** 2 - point.norm(dim=1) ** 2).clamp(min=0).sqrt() - along
    return point + (ahead.clamp(min=0) * (point.norm(dim=1) < CIRCLE))[:, None] * n


def miss(distance, turn):
    """How far a pose is from the goal, a turn measured by how far it moves the block's points."""
    return (distance ** 2 + 2 * (1 - turn.cos()) * C2) ** 0.5


def contacts(spacing=0.36, edge=0.1, gap=RADIUS):
    """Points of the edges and their outward normals (K, 2), clear of outer and inner corners."""
    left, right, bottom, top = BAR
    s_left, s_right, s_bottom, _ = STEM
    lines = [((left + edge, top), (right - edge, top), (0.0, 1.0)),
             ((left, bottom + edge), (left, top - edge), (-1.0, 0.0)),
             ((right, bottom + edge), (right, top - edge), (1.0, 0.0)),
             ((left + edge, bottom), (s_left - gap, bottom), (0.0, -1.0)),
             ((s_right + gap, bottom), (right - edge, bottom), (0.0, -1.0)),
             ((s_left, s_bottom + edge), (s_left, bottom - gap), (-1.0, 0.0)),
             ((s_right, s_bottom + edge), (s_right, bottom - gap), (1.0, 0.0)),
             ((s_left + edge, s_bottom), (s_right - edge, s_bottom), (0.0, -1.0))]
    r = []
    n = []
    for start, end, normal in torch.tensor(lines):
        share = torch.linspace(0, 1, round((end - start).norm().item() / spacing) + 1)
        r.append(start + share[:, None] * (end - start))
        n.append(normal.expand(len(share), 2))
    return torch.cat(r), torch.cat(n)


class Expert:
    """Drives B episodes: expert(pose, disc) is the next command (B, 2).

    A plan is a way in the block's frame: out along the normal, round the block on a circle, in
    along the normal of a contact, then a push of some length. A push through one contact is a
    constant twist in the block's frame, so where it ends is known without simulating it.
    """
    LENGTHS = 3 * (torch.arange(1, 41) / 40) ** 2  # of pushes; the short ones close together

    def __init__(self, n, generator):
        self.generator = generator
        self.r, self.n = contacts()
        self.rest = self.r + RADIUS * self.n  # the disc where it touches
        self.entry = leave(self.rest, self.n)  # where the way in begins

        x, y, self.turn = (twist(self.r, self.n)[:, None] * self.LENGTHS[:, None]).unbind(-1)
        ahead = torch.sinc(self.turn / 2 / math.pi)  # the block runs on an arc: its chord
        chord = torch.stack([ahead * x, ahead * y], dim=-1)  # (K, L, 2)
        self.shift = rotate(chord.flatten(0, 1)[:, None], self.turn.flatten() / 2).view_as(chord)

        self.points = torch.zeros(n, 4, 2)  # begin, end of the way out, entry, contact
        self.arc = torch.zeros(n)
        self.normal = torch.zeros(n, 2)
        self.parts = torch.zeros(n, 4)  # lengths: out, round, in, push
        self.gone = torch.zeros(n)  # how much of the four is behind us
        self.stays = torch.zeros(n, dtype=torch.bool)

    def choose(self, pose, disc):
        """New plans: (points, arc, normal, parts). Each contact, side and length is an option."""
        begin = to_block(disc[:, None], pose)[:, 0]
        normal = begin - nearest(begin)
        out = leave(begin, normal / normal.norm(dim=1, keepdim=True))
        goal = to_block(torch.zeros(len(pose), 1, 2), pose)  # (B, 1, 2)
        distance = (goal[:, None] - self.shift).norm(dim=-1)
        error = miss(distance, pose[:, 2, None, None] + self.turn)  # (B, K, L)

        # the way to each contact, anticlockwise or clockwise; a contact beside us has a short way
        left = (angle(self.entry) - angle(out)[:, None]) % (2 * math.pi)  # (B, K)
        arc = torch.stack([left, left - 2 * math.pi], dim=-1)  # (B, K, 2)
        radius = (out.norm(dim=1)[:, None, None] + CIRCLE) / 2
        direct = (self.rest - begin[:, None]).norm(dim=-1)[..., None]
        beside = direct < BESIDE
        parts = [(out - begin).norm(dim=1)[:, None, None] * ~beside, arc.abs() * radius * ~beside,
                 torch.where(beside, direct, (self.entry - self.rest).norm(dim=1)[:, None])]
        way = sum(parts)[..., None] + self.LENGTHS  # (B, K, 2, L)

        # the less is missing, the colder the choice; among good plans it stays open
        now = miss(goal.norm(dim=-1), pose[:, 2:])[..., None, None]
        logits = -(error[:, :, None] + 0.007 * way) / (0.08 * now.clamp(max=1))
        pick = torch.multinomial(logits.flatten(1).softmax(1), 1, generator=self.generator)[:, 0]
        i = torch.arange(len(pose))
        k, side, length = torch.unravel_index(pick, way.shape[1:])

        parts = [part.expand(arc.shape)[i, k, side] for part in parts] + [self.LENGTHS[length]]
        beside = beside[i, k]
        points = [begin, torch.where(beside, begin, out),
                  torch.where(beside, begin, self.entry[k]), self.rest[k]]
        return torch.stack(points, 1), arc[i, k, side], self.n[k], torch.stack(parts, 1)

    def __call__(self, pose, disc):
        self.stays |= coverage(pose) >= ENOUGH
        new = (self.gone > self.parts.sum(1) - 1e-3) & ~self.stays
        if new.any():
            plan = self.choose(pose[new], disc[new])
            self.points[new], self.arc[new], self.normal[new], self.parts[new] = plan
            self.gone[new] = 0

        begin, out, entry, rest = self.points.unbind(1)
        ends = self.parts.cumsum(1)
        before = self.gone
        pushes = before > ends[:, 2] - 1e-3
        self.gone = torch.where(pushes, torch.minimum(before + PUSH, ends[:, 3]),
                                torch.minimum(before + TRAVEL, ends[:, 2]))

        # where that is: the share of each part that is done
        share = (1 - (ends - self.gone[:, None]) / self.parts.clamp(min=1e-6)).clamp(0, 1)
        turned = angle(out) + share[:, 1] * self.arc
        radius = torch.lerp(out.norm(dim=1), entry.norm(dim=1), share[:, 1])
        round_it = radius[:, None] * torch.stack([turned.cos(), turned.sin()], dim=1)

        target = torch.lerp(begin, out, share[:, :1])
        target = torch.where(share[:, 1:2] > 0, round_it, target)
        target = torch.where(share[:, 2:3] > 0, torch.lerp(entry, rest, share[:, 2:3]), target)
        target = target - torch.where(pushes, self.gone - before, 0)[:, None] * self.normal

        target = to_world(target[:, None], pose)[:, 0]
        return torch.where(self.stays[:, None], disc, target)


def demonstrations(n, seed=0):
    """n episodes: poses (n, S, 3), discs (n, S, 2), the expert's commands (n, S, 2), ends (n,).

    The disc is pushed aside by a noise that lasts a few steps, with a standard deviation of up to
    0.2 units, and what is recorded is the expert's answer (DART, arXiv:1703.09327).
    ends: how many of the S steps count.
    """
    generator = torch.Generator().manual_seed(seed)
    pose, disc = starts(n, generator)
    expert = Expert(n, generator)
    sigma = 0.2 * torch.rand(n, 1, generator=generator)
    noise = torch.zeros(n, 2)
    ends = torch.full((n,), STEPS)
    rows = []
    for k in range(STEPS):
        command = expert(pose, disc)
        ends = torch.where(expert.stays, ends.clamp(max=k + HOLD), ends)
        rows.append((pose, disc, command))
        fresh = (1 - 0.7 ** 2) ** 0.5 * sigma * torch.randn(n, 2, generator=generator)
        noise = 0.7 * noise + fresh  # its variance stays sigma^2
        pose, disc = step(pose, disc, command + noise * ~expert.stays[:, None])
    poses, discs, commands = (torch.stack(column, 1) for column in zip(*rows))
    return poses, discs, commands, ends


def read_episodes(path, shortest):
    """What play.py recorded, in the form of demonstrations."""
    try:
        with np.load(path) as file:
            arrays = [torch.from_numpy(file[name]).float() for name in NAMES]
        n = len(arrays[-1])
        shapes = [(n, STEPS, 3), (n, STEPS, 2), (n, STEPS, 2), (n,)]
        assert [array.shape for array in arrays] == shapes, "other shapes"
        assert all(array.isfinite().all() for array in arrays), "numbers that are not finite"
        assert shortest <= arrays[-1].min() and arrays[-1].max() <= STEPS, "other lengths"
    except Exception as error:
        raise UserError(f"{path} holds no episodes of {shortest} steps: {error!r}") from error
    return arrays
