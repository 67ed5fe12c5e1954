"""A diffusion policy for Push-T, from scratch: noise schedule, UNet, sampler, training loop, robot.

    python main.py                  an expert's demonstrations, training, 200 unseen starts
    python main.py --regression     the same net learns the average plan instead
    python main.py --minutes 30     longer; Ctrl-C saves and stops; --resume FILE goes on
    python visual.py                watch a plan come out of noise

Method: Diffusion Policy (Chi et al. 2023, arXiv:2303.04137); DDPM (Ho et al. 2020,
arXiv:2006.11239), the cosine schedule (arXiv:2102.09672), the DDIM sampler (arXiv:2010.02502) and
the v target (arXiv:2202.00512), all as in MNIST/main.py, from which this file differs only where
x_0 is no picture. Symbols are the papers': x_0 a plan in [-1, 1], the disc's next positions,
t = 1..T the noise level, x_t the plan at that level, eps the noise in it, y what the robot sees.
"""
import argparse
import copy
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import world

# ---- Config: what a reader would play with ---------------------------------------------------
T = 1000                # noise levels
SCHEDULE = "cosine"     # or "linear", whose last third is almost pure noise
TARGET = "v"            # what the net predicts: "v", "eps" as in the DDPM paper, or "x0"
CHANNELS = 32, 64, 64   # one number per resolution: 16, 8, 4 points of a plan
HORIZON = 16            # points of a plan, one a control step
DRIVEN = 4              # how many of them are driven before the robot looks again
WARMUP = 100            # steps up to the peak learning rate; then half a cosine down to zero
SAMPLE_STEPS = 5        # sampler: how many of the T levels it visits
ETA = 0.0               # sampler: 1 is DDPM (exactly so if SAMPLE_STEPS = T), 0 is DDIM
LOG_EVERY = 100         # steps between two points of the loss curve
SAVE_SECONDS = 30       # between two checkpoints

HERE = Path(__file__).resolve().parent
REACH = 5.0             # a plan's 1 in the world's units


# ---- Data: every 16 commands in a row of an expert, and what it saw before ---------------------
def load_data(episodes):
    """Plans float32 (N, 2, 1, 16), observations float32 (N, 8), a line that describes them.

    The expert of world.py drives the episodes once. They stay in data/, with the text of the
    world.py that made them, and are made anew when it has changed.
    """
    path, text = HERE / "data" / f"{episodes}.pt", (HERE / "world.py").read_text()
    made = {}
    try:
        made = torch.load(path, weights_only=True)
    except Exception:                   # whatever a missing or damaged file makes torch raise
        pass
    if made.get("world") != text:
        print(f"an expert drives {episodes:,} episodes", flush=True)
        made = {"world": text, "episodes": world.demonstrations(episodes)}
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{os.getpid()}.pt")          # two runs may begin together
        save_checkpoint(part, made)
        part.replace(path)
    poses, discs, commands, ends = made["episodes"]
    e, k = ((ends[:, None] - HORIZON) >= torch.arange(poses.shape[1])).nonzero(as_tuple=True)
    after = k[:, None] + torch.arange(HORIZON)                      # (N, 16)
    plans = world.to_block(commands[e[:, None], after], poses[e, k]) / REACH
    y = observe(poses[e, k], discs[e, k], discs[e, (k - 1).clamp(min=0)])
    source = f"{episodes:,} demonstrations, {len(y):,} plans"
    return plans.transpose(1, 2)[:, :, None].contiguous(), y, source


def observe(pose, disc, before):
    """y (B, 8): disc now, disc a step ago, goal (x, y, cos, sin), all in the block's frame; / 4.

    pose (B, 3), disc (B, 2), before (B, 2) in the world's frame, in which the goal is (0, 0, 0).
    """
    points = world.to_block(torch.stack([disc, before, torch.zeros_like(disc)], dim=1), pose) / 4
    return torch.cat([points.flatten(1), pose[:, 2:].cos(), -pose[:, 2:].sin()], dim=1)


# ---- The idea: noise can be added in one step ------------------------------------------------
def noise_schedule(name, T):
    """alpha_bar, float64 (T + 1,): the share of the plan's variance left at t = 0..T; at 0 all.

    linear: DDPM, Section 4. cosine: improved DDPM, Eq. 17, beta clipped at 0.999.
    """
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = {"linear": torch.linspace(1e-4, 0.02, T, dtype=torch.float64),
            "cosine": (1 - f[1:] / f[:-1]).clamp(max=0.999)}[name]
    return F.pad(torch.cumprod(1 - beta, dim=0), (1, 0), value=1.0)     # DDPM, text above Eq. 4


def q_sample(x_0, t, eps, alpha_bar):
    """x_t drawn from q(x_t | x_0), DDPM Eq. 4. x_0, eps: (B, C, H, W); t: int64 (B,)."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a ** 0.5 * x_0 + (1 - a) ** 0.5 * eps


def to_target(x_0, t, eps, alpha_bar, target):
    """What the net shall say about x_t. v: Salimans & Ho 2022, Section 4."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return {"x0": x_0, "eps": eps, "v": a ** 0.5 * eps - (1 - a) ** 0.5 * x_0}[target]


def to_x0(output, x_t, a, target):
    """x0_hat from what the net says about x_t: Eq. 4 and v, solved for x_0. a: alpha_bar at t."""
    return {"x0": output,
            "eps": (x_t - (1 - a) ** 0.5 * output) / a ** 0.5,
            "v": a ** 0.5 * x_t - (1 - a) ** 0.5 * output}[target]


# ---- The network: plan in, plan out, told t and y --------------------------------------------
def group_norm(channels, affine=True):
    return nn.GroupNorm(min(32, channels // 4), channels, affine=affine)    # four or more a group


def zero_init(layer):
    """A layer that starts at zero leaves the residual path as it is at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the points of a feature map, one head, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).unbind(1)
        weights = (q.transpose(1, 2) @ k / C ** 0.5).softmax(-1)    # (B, H*W, H*W)
        h = v @ weights.transpose(1, 2)                     # (B, C, H*W)
        return x + self.out(h.reshape(B, C, H, W))


class Block(nn.Module):
    """Two convolutions beside a shortcut; time and y enter as scale and shift between them."""

    def __init__(self, c_in, c_out, c_emb, attention=False, dropout=0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, (1, 3), padding=(0, 1))
        self.emb, self.norm2 = nn.Linear(c_emb, 2 * c_out), group_norm(c_out, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, (1, 3), padding=(0, 1)))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)      # (B, c_out, 1, 1)
        h = (1 + scale) * self.norm2(h) + shift             # Dhariwal & Nichol 2021, Section 3.1
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """Predicts TARGET from x_t: down to coarse, then up, adding what each block down gave.

    forward(x_t, t, y): x_t (B, 2, 1, 16); t int64 (B,) in 1..T; y float32 (B, 8).
    """

    def __init__(self, channels):
        super().__init__()
        width, c, c_emb = channels[0], channels[-1], 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Sequential(nn.Linear(80, 4 * c_emb), nn.SiLU(), nn.Linear(4 * c_emb, c_emb))
        self.stem = nn.Conv2d(2, width, (1, 3), padding=(0, 1))
        self.down = nn.ModuleList(Block(a, b, c_emb) for a, b in zip((width, *channels), channels))
        self.middle = nn.ModuleList([Block(c, c, c_emb, attention=True), Block(c, c, c_emb)])
        self.up = nn.ModuleList(Block(c, c, c_emb) for c in channels[::-1])
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1)      # before each doubling
                                    for a, b in zip(channels[-2::-1], channels[:0:-1]))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, 2, (1, 3), padding=(0, 1))))

    def forward(self, x_t, t, y):
        waves = self.time[0].in_features // 2               # sines and cosines: DDPM, Appendix B
        angles = t[:, None] * 1e-4 ** (torch.arange(waves, device=t.device) / waves)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        angles = (y[:, :, None] * 2.0 ** torch.arange(5, device=y.device)).flatten(1)   # (B, 40)
        y = torch.cat([angles.sin(), angles.cos()], dim=1)  # so small differences in y are seen
        emb = F.silu(emb + self.label(y))
        h, skips = self.stem(x_t), []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, (1, 2)) if i > 0 else h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for i, block in enumerate(self.up):
            if i > 0:
                h = F.interpolate(self.narrow[i - 1](h), scale_factor=(1, 2))
            h = block(h + skips.pop(), emb)
        return self.out(h)


# ---- Sampling: the reverse process -----------------------------------------------------------
def autocast(device):
    """bfloat16 where the processor computes in it, else float32."""
    fast = (torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def sample(net, x_T, y, alpha_bar, target=TARGET, steps=SAMPLE_STEPS, eta=ETA,
           generator=None):
    """Walk from noise x_T (B, C, H, W) to plans for y (B, 8): yields (t, x_t, x0_hat).

    steps: how many of the levels T..1 are visited, evenly spaced; the last yield is t = 0.
    eta = 1 with steps = T is DDPM (Algorithm 2, variance beta_tilde); eta = 0 is DDIM (Eq. 12).
    """
    T, x_t = len(alpha_bar) - 1, x_T
    levels = sorted({round(T * i / steps) for i in range(steps + 1)}, reverse=True)   # T, ..., 0
    for t, s in zip(levels, levels[1:]):
        a, a_s, ts = alpha_bar[t].item(), alpha_bar[s].item(), y.new_full((len(y),), t).long()
        with autocast(x_t.device):
            output = net(x_t, ts, y)
        x0_hat = to_x0(output.to(x_t.dtype), x_t, a, target).clamp(-1, 1)
        eps_hat = (x_t - a ** 0.5 * x0_hat) / (1 - a) ** 0.5    # what the clamped x0_hat leaves
        yield t, x_t, x0_hat
        # DDIM Eq. 12 and 16; eta = 1 is DDPM's Algorithm 2: the mean of Eq. 7, sigma^2 beta_tilde
        sigma = eta * ((1 - a_s) / (1 - a) * (1 - a / a_s)) ** 0.5      # 0 on the last step
        z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
        x_t = a_s ** 0.5 * x0_hat + (1 - a_s - sigma ** 2) ** 0.5 * eps_hat + sigma * z
    yield 0, x_t, x_t


# ---- Driving: plan, push, look again ---------------------------------------------------------
def drive(net, pose, disc, alpha_bar, target=TARGET, driven=DRIVEN, generator=None, **options):
    """A closed loop, B episodes at once: yields (pose, disc, path) before each control step.

    pose (B, 3) and disc (B, 2) in the world's frame; path (B, 16, 2) the plan that is driven;
    options are the sampler's.
    """
    before = disc
    for k in range(world.STEPS):
        if k % driven == 0:                                 # what is left of the old plan goes
            noise = torch.randn(len(pose), 2, 1, HORIZON, generator=generator).to(alpha_bar.device)
            y = observe(pose, disc, before).to(alpha_bar.device)
            *_, (_, x_0, _) = sample(net, noise, y, alpha_bar, target, **options)
            path = world.to_world(REACH * x_0.cpu().squeeze(2).transpose(1, 2), pose)
        yield pose, disc, path
        before = disc
        pose, disc = world.step(pose, disc, path[:, k % driven])
    yield pose, disc, path


def best_coverage(frames):
    """The best coverage (B,) of each episode that drive yields."""
    return torch.stack([world.coverage(pose) for pose, *_ in frames]).amax(dim=0)


# ---- Training --------------------------------------------------------------------------------
def train(args, checkpoint, device):
    """Algorithm 1 of DDPM; writes checkpoint.pt into the new folder args.out."""
    plans, observations, source = load_data(args.episodes)
    plans, observations = plans.to(device), observations.to(device)
    torch.manual_seed(args.seed)
    config = {"T": T, "schedule": SCHEDULE, "target": TARGET, "net": {"channels": CHANNELS},
              "episodes": args.episodes, "regression": args.regression}
    alpha_bar = noise_schedule(SCHEDULE, T).float().to(device)
    net = UNet(**config["net"]).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)   # the average of the weights
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
    step, seconds, history, losses = 0, 0.0, [], []
    if checkpoint:
        if checkpoint["config"] != config:
            sys.exit(f"error: {args.resume} was trained with {checkpoint['config']}, not {config}")
        net.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, seconds, history = (checkpoint[key] for key in ("step", "seconds", "history"))
        torch.manual_seed(args.seed + step)                 # a GPU draws anew
        torch.set_rng_state(checkpoint["rng"])              # a CPU goes on as if never stopped
    out, N = Path(args.out), args.batch_size                # N: plans a step
    out.mkdir(parents=True, exist_ok=checkpoint is not None)
    print(f"data: {source}\nnet: {sum(p.numel() for p in net.parameters()):,} parameters, {device}",
          flush=True)
    stop = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stop_soon(stop))
    started, saved = time.monotonic() - seconds, seconds
    done = progress(args, step, seconds)
    with tqdm(initial=N * step, unit=" plans", unit_scale=True) as bar:
        while done < 1:
            # Algorithm 1: draw plans with what was seen, noise levels and noise
            i = torch.randint(len(plans), (N,), device=device)
            x_0, y = plans[i], observations[i]
            t = torch.randint(T if args.regression else 1, T + 1, (len(i),), device=device)
            eps = torch.randn_like(x_0)
            x_t = q_sample(x_0, t, eps, alpha_bar)
            goal = to_target(x_0, t, eps, alpha_bar, TARGET)
            # predict, and take a gradient step on the squared error (for eps, DDPM Eq. 14)
            optimizer.zero_grad()
            with autocast(device):
                output = net(x_t, t, y)
            loss = F.mse_loss(output.float(), goal)
            loss.backward()
            losses.append(loss.detach())
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            lr = args.lr * min((step + 1) / WARMUP, 1) * math.cos(math.pi / 2 * done) ** 2
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            # average the weights over about the last thirtieth of the run
            decay = (1 + step) / (30 + step)
            for p_ema, p in zip(ema.parameters(), net.parameters()):
                p_ema.lerp_(p.detach(), 1 - decay)

            step += 1
            seconds = time.monotonic() - started
            done = 1 if stop else progress(args, step, seconds)
            bar.update(N)
            save = done == 1 or seconds - saved > SAVE_SECONDS
            if save or step % LOG_EVERY == 0:
                history.append([step, seconds, torch.stack(losses).mean().item()])
                losses.clear()
                if not math.isfinite(history[-1][2] + norm.item()):
                    sys.exit(f"error: the loss is not finite at step {step}: lower --lr")
                bar.total = int(N * step / done)
                bar.set_postfix(loss=f"{history[-1][2]:.4f}")
            if save:
                saved = seconds
                save_checkpoint(out / "checkpoint.pt", {
                    "config": config, "data": source, "args": vars(args), "step": step,
                    "seconds": seconds, "history": history, "rng": torch.get_rng_state(),
                    "model": net.state_dict(), "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(), "torch": str(torch.__version__)})
    path = os.path.relpath(out / "checkpoint.pt")
    print(f"{step} steps, {seconds:.0f} seconds, loss {history[-1][2]:.4f}: {path}")
    if not stop:
        generator = torch.Generator().manual_seed(1)        # the demonstrations' is 0
        steps = 1 if args.regression else SAMPLE_STEPS
        best = best_coverage(drive(ema, *world.starts(200, generator), alpha_bar, steps=steps))
        print("200 unseen starts, coverage is the share of the goal under the block: "
              + ", ".join(f"{(best >= c).float().mean():.1%} reach {c:.2f}" for c in (0.9, 0.95)))
    script, flag = ("main.py", "--resume") if stop else ("visual.py", "--checkpoint")
    print(f'next: python "{os.path.relpath(HERE / script)}" {flag} "{path}"')


# ---- Files and flags: nothing about diffusion ------------------------------------------------
def progress(args, step, seconds):
    """The share of the run that is done, 0..1. --steps is an int, --minutes a float."""
    return min((step if isinstance(args.length, int) else seconds / 60) / args.length, 1)


def stop_soon(stop):
    """Ctrl-C or SIGTERM: the loop ends after this step and saves. A second Ctrl-C kills."""
    print("\nstopping after this step; Ctrl-C again to stop at once", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stop.append(True)


def save_checkpoint(path, checkpoint):
    """Atomic: at any moment path holds the old file or the new one, whole."""
    part = path.with_suffix(".part")
    try:
        torch.save(checkpoint, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:                # torch's kind for a full disk
        part.unlink(missing_ok=True)
        sys.exit(f"error: cannot save {path}, is the disk full? {error}")


def load_checkpoint(path, device="cpu"):
    """(checkpoint, its EMA net). weights_only: tensors and plain types; code is never run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        net = UNet(**checkpoint["config"]["net"])
        net.load_state_dict(checkpoint["ema"])
    except Exception as error:      # whatever a missing, damaged or foreign file makes torch raise
        sys.exit(f"error: {path} is no checkpoint of {HERE.name}/main.py as it is now: "
                 + " ".join(f"{type(error).__name__}: {error}".split())[:1000])
    return checkpoint, net.to(device).eval()


def main():
    parser = argparse.ArgumentParser(description="Train a diffusion policy for Push-T.")
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    add = parser.add_argument
    add("--minutes", dest="length", type=float, default=4.5, help="how long to train [4.5]")
    add("--steps", dest="length", type=int, help="or how many optimizer steps: repeatable on a CPU")
    add("--batch-size", type=int, default=256, help="plans a step [%(default)s]")
    add("--lr", type=float, default=4e-3, help="peak learning rate [%(default)s]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add("--episodes", type=int, default=1000, help="demonstrations [%(default)s]")
    add("--regression", action="store_true", help="train at t = T only: learns the average plan")
    add("--out", type=os.path.expanduser, help="a new folder for the run [runs/TIME here]")
    add("--resume", metavar="FILE", help="go on from this checkpoint, with its settings")
    add("--device", choices=devices, default=devices[0], help="[%(default)s]")
    args, checkpoint = parser.parse_args(), None
    if args.resume:
        checkpoint, _ = load_checkpoint(args.resume)
        if "optimizer" not in checkpoint:
            parser.error(f"--resume: {args.resume} holds weights only, not a run")
        here = {"device": args.device, "out": str(Path(args.resume).parent)}
        parser.set_defaults(**checkpoint["args"] | here)    # what is not given anew stays
        args = parser.parse_args()
    if not min(args.length, args.batch_size, args.lr, args.episodes) > 0:
        parser.error("--minutes, --steps, --batch-size, --lr and --episodes must be above zero")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}" + "-regression" * args.regression
    args.out = args.out or str(HERE / "runs" / name)
    train(args, checkpoint, torch.device(args.device))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
