"""Denoising diffusion on MNIST, from scratch: noise schedule, UNet, sampler, training.

    python main.py                  train for 5.5 minutes (two CPU cores are enough)
    python main.py --minutes 30     longer; Ctrl-C saves and stops; --resume FILE goes on
    python visual.py                watch digits come out of noise

Method: DDPM (arXiv:2006.11239), the cosine schedule (2102.09672), the DDIM sampler (2010.02502),
the v target (2202.00512), classifier-free guidance (2207.12598). Symbols are the papers': x_0 an
image in [-1, 1], t = 1..T the noise level, x_t the image at t, eps the noise in it, y the class,
a hat for what the net believes.
"""
import argparse
import contextlib
import copy
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# ---- Config: what a reader would play with ----
T = 1000            # noise levels
SCHEDULE = "cosine"  # or "linear", as in DDPM, or "flow"
TARGET = "v"        # what the net predicts: "v", "eps", "x0" or "flow"
CHANNELS = (16, 32, 64)     # at 28 x 28, 14 x 14, 7 x 7
LABEL_DROPOUT = 0.1  # share of images whose class is hidden
MINUTES = 5.5       # of training
WARMUP = 100        # steps to the peak learning rate
SAMPLE_STEPS = 20   # how many of the T levels are visited
ETA = 1.0           # 1 is DDPM, 0 is DDIM
GUIDANCE = 0.3      # w of classifier-free guidance; 0 is off
GUIDED = (0.4, 0.9)  # the shares of T between which it acts
LOG_EVERY = 100     # steps between two losses
SAVE_SECONDS = 30   # between two saves

HERE = Path(__file__).resolve().parent
CLASSES = list("0123456789")
NULL = -1               # the label of any class


# ---- Data: the whole set as one uint8 tensor ----
def load_data(data=None):
    """Images uint8 (N, 1, 28, 28), labels int64 (N,), the classes' names, a description.

    data: a folder with MNIST/raw in it; None: data/ here, downloaded once; "embedded": digits.png.
    """
    if data != "embedded":
        socket.setdefaulttimeout(20)  # seconds of silence
        try:
            mnist = torchvision.datasets.MNIST(data or HERE / "data", download=not data)
            return mnist.data[:, None], mnist.targets, CLASSES, f"MNIST, {len(mnist.data):,} digits"
        except Exception as error:
            if data:
                raise UserError(f"no MNIST in {data}/MNIST/raw, unpacked: {error}") from error
            print(f"no MNIST ({error}): training on the 5,000 embedded digits instead")

    page = torchvision.transforms.functional.pil_to_tensor(Image.open(HERE / "digits.png"))
    images = page.unfold(1, 28, 28).unfold(2, 28, 28).reshape(-1, 1, 28, 28)
    labels = torch.arange(10).repeat_interleave(500)
    return images, labels, CLASSES, "MNIST's 5,000 embedded digits"


# ---- The idea: noise can be added in one step ----
def noise_schedule(name, T):
    """alpha_bar, float64 (T + 1,): the share of x_0's variance left at t = 0..T.

    linear: DDPM, Section 4. cosine: improved DDPM, Eq. 17. flow: the straight line
    (1 - t/T) x_0 + (t/T) eps, scaled to variance 1. beta is at most 0.999.
    """
    s = torch.arange(T + 1, dtype=torch.float64) / T
    if name == "linear":
        beta = torch.linspace(0.02, 1e-4, T, dtype=torch.float64).flip(0) * (1000 / T)
    else:
        left = {"cosine": torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2,
                "flow": (1 - s) ** 2 / ((1 - s) ** 2 + s ** 2)}[name]
        beta = 1 - left[1:] / left[:-1]
    alpha = 1 - beta.clamp(max=0.999)
    return F.pad(torch.cumprod(alpha, dim=0), (1, 0), value=1.0)  # DDPM, text above Eq. 4


def cos_sin(alpha_bar, t, x):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t, an int or (B,), as factors of x."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return (a ** 0.5).to(x), ((1 - a) ** 0.5).to(x)


def q_sample(x_0, t, eps, alpha_bar):
    """x_t drawn from q(x_t | x_0), DDPM Eq. 4. x_0, eps: (B, C, H, W); t: int64 (B,)."""
    cos, sin = cos_sin(alpha_bar, t, x_0)
    return cos * x_0 + sin * eps


def to_target(x_0, t, eps, alpha_bar, target):
    """What the net is to predict; arguments as in q_sample. v: Salimans & Ho 2022, Section 4."""
    cos, sin = cos_sin(alpha_bar, t, x_0)
    if target == "x0":
        return x_0
    if target == "eps":
        return eps
    if target == "v":
        return cos * eps - sin * x_0
    if target == "flow":
        return eps - x_0
    raise ValueError(f"no target {target}")


def to_x0(x_t, t, output, alpha_bar, target):
    """The way back: x0_hat from x_t and the net's output, both (B, C, H, W)."""
    cos, sin = cos_sin(alpha_bar, t, x_t)
    if target == "x0":
        return output
    if target == "eps":
        return (x_t - sin * output) / cos
    if target == "v":
        return cos * x_t - sin * output
    if target == "flow":
        return (x_t - sin * output) / (cos + sin)
    raise ValueError(f"no target {target}")


# ---- The network: image in, image out, told t and y ----
def group_norm(channels, affine=True):
    return nn.GroupNorm(min(32, channels // 4), channels, affine=affine)


def zero_init(layer):
    """A layer that starts at zero leaves the path around it as it is."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the places of a feature map, one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, H*W)
        weights = (q.transpose(1, 2) @ k / k.shape[1] ** 0.5).softmax(-1)  # (B, H*W, H*W)
        h = v @ weights.transpose(1, 2)
        return x + self.out(h.view_as(x))


class Block(nn.Module):
    """Two convolutions beside a shortcut; between them t and y scale and shift."""

    def __init__(self, c_in, c_out, c_emb, attention=False):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = group_norm(c_out, affine=False)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
        h = (1 + scale) * self.norm2(h) + shift  # Dhariwal & Nichol 2021, Section 3.1
        h = self.conv2(F.silu(h))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """Predicts TARGET from x_t: down to coarse, then up, beside what the way down gave.

    forward(x_t, t, y): x_t (B, C, H, W); t int64 (B,) in 1..T; y int64 (B,), a class or NULL.
    """

    def __init__(self, classes, channels):
        super().__init__()
        width = channels[0]
        c = channels[-1]
        c_emb = 4 * width
        pairs = list(zip(channels, channels[1:]))  # (finer, coarser)
        self.time = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb)  # row 0 is NULL
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, c_emb) for a, b in [(width, width)] + pairs)
        self.middle = nn.ModuleList([Block(c, c, c_emb, attention=True), Block(c, c, c_emb)])
        self.up = nn.ModuleList(Block(a, a, c_emb) for a in reversed(channels))
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, 1, 3, padding=1)))

    def forward(self, x_t, t, y):
        # t as sines and cosines (DDPM, Appendix B), then one vector for t and y
        waves = self.time[0].in_features // 2
        angles = t[:, None] * 1e-4 ** (torch.arange(waves, device=t.device) / waves)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        emb = F.silu(emb + self.label(y + 1))

        # down
        h = self.stem(x_t)
        skips = []
        for i, block in enumerate(self.down):
            if i > 0:
                h = F.avg_pool2d(h, 2)
            h = block(h, emb)
            skips.append(h)

        for block in self.middle:
            h = block(h, emb)

        # up
        for i, block in enumerate(self.up):
            if i > 0:
                h = F.interpolate(self.narrow[i - 1](h), scale_factor=2)
            h = block(h + skips.pop(), emb)
        return self.out(h)


# ---- Sampling: the reverse process ----
def autocast(device):
    """bfloat16 where the processor computes in it, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def walk(net, x_T, y, alpha_bar, target=TARGET, steps=SAMPLE_STEPS, eta=ETA, guidance=GUIDANCE,
         guided=GUIDED, clamp=1.0, known=None, generator=None):
    """From noise x_T (B, C, H, W) to images of the classes y (B,): yields (t, x_t, x0_hat).

    steps: how many of the levels T..1 are visited.
    eta = 1 with steps = T is DDPM (Algorithm 2, variance beta_tilde); eta = 0 is DDIM (Eq. 12).
    guidance: w in eps_hat = (1 + w) eps(y) - w eps(NULL), and so for any target;
    guided: it acts between these shares of T.
    clamp: x0_hat is cut to [-clamp, clamp]; None leaves it.
    known: (mask, x_0), each like x_T: where the mask is true, x_0 is held fixed.
    """
    alpha_bar = alpha_bar.double().cpu()
    T = len(alpha_bar) - 1
    steps = min(steps, T)
    levels = [round(T * i / steps) for i in range(steps, -1, -1)]
    x_t = x_T
    for t, t_prev in zip(levels, levels[1:]):
        a = alpha_bar[t].item()
        a_prev = alpha_bar[t_prev].item()
        ts = torch.full((len(x_t),), t, device=x_t.device)

        # the net's guess
        with autocast(x_t.device):
            output = net(x_t, ts, y)
            if guidance and guided[0] * T < t <= guided[1] * T:
                any_class = net(x_t, ts, torch.full_like(y, NULL))
                output = (1 + guidance) * output - guidance * any_class
        x0_hat = to_x0(x_t, t, output.to(x_t.dtype), alpha_bar, target)
        if clamp:
            x0_hat = x0_hat.clamp(-clamp, clamp)
        if known:
            x0_hat = torch.where(*known, x0_hat)
        eps_hat = (x_t - a ** 0.5 * x0_hat) / (1 - a) ** 0.5  # what x0_hat leaves of x_t
        yield t, x_t, x0_hat

        # mix image and noise for t_prev: DDIM Eq. 12 and 16
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5  # 0 on the last step
        z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
        x_t = a_prev ** 0.5 * x0_hat + (1 - a_prev - sigma ** 2) ** 0.5 * eps_hat + sigma * z
    yield 0, x_t, x_t


def sample(net, x_T, y, alpha_bar, target=TARGET, **options):
    """x_0 (B, C, H, W), where the walk ends; arguments as in walk."""
    for _, x_t, _ in walk(net, x_T, y, alpha_bar, target, **options):
        x_0 = x_t
    return x_0


# ---- Training ----
def training_step(net, ema, optimizer, x_0, y, alpha_bar, lr, decay, target=TARGET):
    """Algorithm 1 of DDPM, once, with the learning rate lr. Returns the loss, a tensor.

    x_0: (B, C, H, W); y: what the net is told; ema: the average net, which keeps the share decay.
    """
    # noise levels and noise
    t = torch.randint(1, len(alpha_bar), (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    x_t = q_sample(x_0, t, eps, alpha_bar)

    # descend on the squared error: for eps, DDPM Eq. 14
    optimizer.zero_grad()
    with autocast(x_0.device):
        output = net(x_t, t, y)
    loss = F.mse_loss(output.float(), to_target(x_0, t, eps, alpha_bar, target))
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()

    # average
    for p_ema, p in zip(ema.parameters(), net.parameters()):
        p_ema.lerp_(p.detach(), 1 - decay)
    return loss.detach()


def train(args, checkpoint, path):
    device = args.device
    images, labels, classes, source = load_data(args.data)
    images = images.to(device)
    labels = labels.to(device)

    # net, average, optimizer
    before = checkpoint or dict(step=0, seconds=0.0, history=[])
    step = before["step"]
    seconds = before["seconds"]
    history = before["history"]
    torch.manual_seed(args.seed + step)
    config = dict(T=T, schedule=SCHEDULE, target=TARGET, size=images.shape[2], classes=classes,
                  net=dict(classes=len(classes), channels=CHANNELS))
    net, ema, optimizer = build(config, checkpoint, device)
    alpha_bar = noise_schedule(SCHEDULE, T).float().to(device)
    print(f"data: {source}")

    B = args.batch_size
    losses = []
    started = time.monotonic() - seconds
    saved = seconds or -math.inf
    share = max(step / args.steps, seconds / 60 / args.minutes)
    stop = catch_ctrl_c()
    bar = tqdm(initial=B * step, unit=" images", unit_scale=True)
    while share < 1:
        # images, and their classes or NULL: guidance needs both kinds
        i = torch.randint(len(images), (B,), device=device)
        x_0 = images[i].float() / 127.5 - 1
        hidden = torch.rand(B, device=device) < LABEL_DROPOUT
        y = torch.where(hidden, NULL, labels[i])

        # a rate that rises, then falls to 0; an average over the last thirtieth of the run
        lr = args.lr * min((step + 1) / WARMUP, 1) * (1 + math.cos(math.pi * share)) / 2
        decay = (1 + step) / (30 + step)
        losses.append(training_step(net, ema, optimizer, x_0, y, alpha_bar, lr, decay))

        # log
        step += 1
        seconds = time.monotonic() - started
        share = max(step / args.steps, seconds / 60 / args.minutes)
        if stop:
            share = 1.0
        save = share >= 1 or seconds - saved > SAVE_SECONDS
        if save or step % LOG_EVERY == 0:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise UserError(f"the loss is not finite at step {step}: lower --lr")
            history.append([step, seconds, loss])
            bar.total = int(B * step / min(share, 1))
            bar.set_postfix(loss=loss, refresh=False)

        # save
        if save:
            saved = seconds
            state = dict(config=config, args=vars(args), data=source, torch=str(torch.__version__),
                         step=step, seconds=seconds, history=history, rng=torch.get_rng_state(),
                         model=net.state_dict(), ema=ema.state_dict(),
                         optimizer=optimizer.state_dict())
            with writing(path) as file:
                torch.save(state, file)
        bar.update(B)
    bar.close()
    print(f'next: python "{HERE / "visual.py"}" --checkpoint "{path}"')


# ---- Files and flags ----
class UserError(ValueError):
    """What a user can put right: `run` prints it as one line."""


def build(config, checkpoint, device):
    """(net, its average, optimizer), new or as a checkpoint has them."""
    net = UNet(**config["net"]).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)
    if checkpoint:
        compare(checkpoint["config"], config)
        net.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
    return net, ema, optimizer


def compare(there, here):
    for key, value in here.items():
        if there.get(key, value) != value:
            raise UserError(f"trained with {key} {there[key]}, here it is {value}")


def load_checkpoint(path, device="cpu"):
    """(checkpoint, its EMA net). weights_only: no code in it is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        net = UNet(**checkpoint["config"]["net"])
        net.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of {HERE.name}: {error!r:.400}") from error
    return checkpoint, net.to(device).eval()


@contextlib.contextmanager
def writing(path):
    """An open file that takes path's place when it is whole."""
    part = path.with_name(f"part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch's, on a full disk
        raise UserError(f"cannot write {path}: {error}") from error


def catch_ctrl_c():
    """A list that Ctrl-C fills; a second one kills."""
    stop = []

    def handler(*_):
        stop.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handler)
    return stop


def absolute(path):
    return path if path == "embedded" else os.path.abspath(os.path.expanduser(path))


def main():
    parser = argparse.ArgumentParser()
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    length = parser.add_mutually_exclusive_group().add_argument
    length("--minutes", type=float, default=math.inf, help=f"[{MINUTES}]")
    length("--steps", type=int, default=math.inf, help="repeatable on a CPU")
    add = parser.add_argument
    add("--batch-size", type=int, default=16, help="[16]")
    add("--lr", type=float, default=4e-3, help="peak learning rate [4e-3]")
    add("--seed", type=int, default=0)
    add("--data", type=absolute, help='folder with MNIST/raw in it, or "embedded"')
    add("--out", type=absolute, help="new folder [runs/TIME here]")
    add("--resume", type=absolute, help="go on in it, with its settings")
    add("--device", choices=devices, default=devices[0])
    args = parser.parse_args()

    # a new run, or one to go on with
    out = Path(args.out or HERE / "runs" / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}"))
    if out.exists():
        parser.error(f"--out: {out} exists")
    path = out / "checkpoint.pt"
    checkpoint = None
    settings = {"minutes": MINUTES}
    if args.resume:
        checkpoint, _ = load_checkpoint(args.resume)
        if "optimizer" not in checkpoint:
            parser.error(f"{args.resume} holds weights only, not a run")
        if not args.out:
            path = Path(args.resume)
        settings = checkpoint["args"] | {"device": args.device}

    # what is not given anew stays
    if min(args.minutes, args.steps) < math.inf:
        settings = settings | {"minutes": math.inf, "steps": math.inf}
    parser.set_defaults(**settings)
    args = parser.parse_args()
    if not (0 < min(args.minutes, args.steps) < math.inf and args.batch_size > 0 < args.lr):
        parser.error("numbers must be above 0 and finite")
    train(args, checkpoint, path)


def run(main):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except UserError as error:
        for bar in list(tqdm._instances):
            bar.close()
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run(main)
