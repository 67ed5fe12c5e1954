"""Denoising diffusion on drums, from scratch: noise schedule, UNet, sampler, training loop.

    python main.py                  train for 5 minutes (two CPU cores are enough)
    python main.py --data FOLDER    your own sounds, one sub-folder of .wav files a class
    python visual.py                watch and hear drums come out of noise

This is MNIST/main.py: a hit is a picture too, its spectrogram. Turning one into the other is
sound.py's work.

Method: DDPM (arXiv:2006.11239) with the cosine schedule (arXiv:2102.09672), the DDIM sampler
(arXiv:2010.02502), the v target (arXiv:2202.00512) and classifier-free guidance (arXiv:2207.12598).
Symbols are the papers': x_0 an image in [-1, 1], t = 1..T the noise level, x_t the image at that
level, eps the noise in it, y the class, a hat for what the net believes.
"""
import argparse
import copy
import math
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from sound import augment, read_hits, to_picture

# ---- Config: what a reader would play with ----
T = 1000                # noise levels
SCHEDULE = "cosine"     # or "linear", as in DDPM, or "flow"
TARGET = "v"            # what the net predicts: "v", "eps", "x0" or "flow"
CHANNELS = (16, 32, 48, 64)     # at 64 x 64, 32 x 32, 16 x 16, 8 x 8
LABEL_DROPOUT = 0.1     # share of training images whose class is hidden
WARMUP = 100            # steps up to the peak learning rate; then a cosine down to zero
SAMPLE_STEPS = 20       # how many of the T levels are visited
ETA = 1.0               # 1 is DDPM, 0 is DDIM
GUIDANCE = 1.0          # w of classifier-free guidance; 0 is off
GUIDED = (0.4, 0.9)     # the shares of T between which it acts
LOG_EVERY = 100         # steps between two points of the loss curve
SAVE_SECONDS = 30       # between two checkpoints with a grid of samples

HERE = Path(__file__).resolve().parent
PICTURES = 6000         # a hit is varied until there are about so many
NULL = -1               # the label of any class


# ---- Data: the whole set as one uint8 tensor ----
def load_data(data=None):
    """Images uint8 (N, 1, 64, 64), labels int64 (N,), the classes' names, a description.

    data: a folder with a sub-folder of .wav files per class; None for hits/ here. The images
    begin with the hits as they are; then come variations of them, always the same.
    """
    hits, names = read_hits(Path(data or HERE / "hits"))
    generator = torch.Generator().manual_seed(0)
    images = [to_picture(hits)]
    for _ in range(PICTURES // len(hits)):
        images.append(to_picture([augment(hit, generator) for hit in hits]))
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names]).repeat(len(images))
    source = ", ".join(f"{name} {names.count(name):,}" for name in classes)
    return torch.cat(images), labels, classes, f"{len(hits):,} hits: {source}"


# ---- The idea: noise can be added in one step ----
def noise_schedule(name, T):
    """alpha_bar, float64 (T + 1,): the share of x_0's variance left at t = 0..T.

    linear: DDPM, Section 4. cosine: improved DDPM, Eq. 17. flow: the straight line
    (1 - t/T) x_0 + (t/T) eps, scaled to variance 1. beta is clipped at 0.999.
    """
    s = torch.arange(T + 1, dtype=torch.float64) / T
    if name == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        left = {"cosine": torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2,
                "flow": (1 - s) ** 2 / ((1 - s) ** 2 + s ** 2)}[name]
        beta = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return F.pad(torch.cumprod(1 - beta, dim=0), (1, 0), value=1.0)  # DDPM, text above Eq. 4


def q_sample(x_0, t, eps, alpha_bar):
    """x_t drawn from q(x_t | x_0), DDPM Eq. 4. x_0, eps: (B, C, H, W); t: int64 (B,)."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a ** 0.5 * x_0 + (1 - a) ** 0.5 * eps


def to_target(x_0, t, eps, alpha_bar, target):
    """What the net is to predict; arguments as in q_sample. v: Salimans & Ho 2022, Section 4."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return {"x0": x_0,
            "eps": eps,
            "v": a ** 0.5 * eps - (1 - a) ** 0.5 * x_0,
            "flow": eps - x_0}[target]


def to_x0(output, x_t, a, target):
    """x0_hat from the net's output. a: alpha_bar at t, one number: all images share t."""
    return {"x0": output,
            "eps": (x_t - (1 - a) ** 0.5 * output) / a ** 0.5,
            "v": a ** 0.5 * x_t - (1 - a) ** 0.5 * output,
            "flow": (x_t - (1 - a) ** 0.5 * output) / (a ** 0.5 + (1 - a) ** 0.5)}[target]


# ---- The network: image in, image out, told t and y ----
def group_norm(channels, affine=True):
    return nn.GroupNorm(min(32, channels // 4), channels, affine=affine)


def zero_init(layer):
    """A layer that starts at zero leaves the path around it as it is."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the places of a feature map, one head, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).unbind(1)
        weights = (q.transpose(1, 2) @ k / C ** 0.5).softmax(-1)  # (B, H*W, H*W)
        h = v @ weights.transpose(1, 2)  # (B, C, H*W)
        return x + self.out(h.reshape(B, C, H, W))


class Block(nn.Module):
    """Two convolutions beside a shortcut; t and y enter as scale and shift between them."""

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

    forward(x_t, t, y): x_t (B, 1, 64, 64); t int64 (B,) in 1..T; y int64 (B,), a class or NULL.
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
def sample(net, x_T, y, alpha_bar, target=TARGET, steps=SAMPLE_STEPS, eta=ETA, guidance=GUIDANCE,
           known=None, generator=None):
    """Walk from noise x_T (B, C, H, W) to images of the classes y (B,): yields (t, x_t, x0_hat).

    steps: how many of the levels T..1 are visited.
    eta = 1 with steps = T is DDPM (Algorithm 2, variance beta_tilde); eta = 0 is DDIM (Eq. 12).
    guidance: w in eps_hat = (1 + w) eps(y) - w eps(NULL), and so for any target.
    known: (mask, x_0), each like x_T: where the mask is true, x_0 is held fixed.
    """
    T = len(alpha_bar) - 1
    steps = min(steps, T)
    levels = [round(T * i / steps) for i in range(steps, -1, -1)]  # T, ..., 0
    x_t = x_T
    for t, t_prev in zip(levels, levels[1:]):
        a = alpha_bar[t].item()
        a_prev = alpha_bar[t_prev].item()
        ts = torch.full((len(x_t),), t, device=x_t.device)

        # the net's guess
        with autocast(x_t.device):
            output = net(x_t, ts, y)
            if guidance and GUIDED[0] * T < t <= GUIDED[1] * T:
                any_class = net(x_t, ts, torch.full_like(y, NULL))
                output = (1 + guidance) * output - guidance * any_class
        x0_hat = to_x0(output.to(x_t.dtype), x_t, a, target).clamp(-1, 1)
        if known:
            x0_hat = torch.where(*known, x0_hat)
        eps_hat = (x_t - a ** 0.5 * x0_hat) / (1 - a) ** 0.5  # what x0_hat leaves of x_t
        yield t, x_t, x0_hat

        # mix image and noise for t_prev: DDIM Eq. 12 and 16
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5  # 0 on the last step
        z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
        x_t = a_prev ** 0.5 * x0_hat + (1 - a_prev - sigma ** 2) ** 0.5 * eps_hat + sigma * z
    yield 0, x_t, x_t


def draw_samples(net, shape, alpha_bar, path):
    """A picture of two images of each class, from the same noise each time."""
    device = alpha_bar.device
    y = torch.arange(net.label.num_embeddings - 1, device=device)[:10].repeat(2)
    x_T = torch.randn(len(y), *shape, generator=torch.Generator().manual_seed(0)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for _, x_0, _ in sample(net, x_T, y, alpha_bar, generator=generator):
        pass  # the last one is x_0
    path.parent.mkdir(exist_ok=True)
    torchvision.utils.save_image(x_0, path, nrow=len(y) // 2, normalize=True, value_range=(-1, 1))


# ---- Training ----
def train(args, checkpoint, path, device):
    """Algorithm 1 of DDPM; saves to path, and draws grids into samples/ beside it."""
    # data
    images, labels, classes, source = load_data(args.data)
    images = images.to(device)
    labels = labels.to(device)

    # net, average, optimizer
    torch.manual_seed(args.seed)
    config = dict(T=T, schedule=SCHEDULE, target=TARGET, size=images.shape[2], classes=classes,
                  net=dict(classes=len(classes), channels=CHANNELS))
    alpha_bar = noise_schedule(SCHEDULE, T).float().to(device)
    net = UNet(**config["net"]).to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
    step = 0
    seconds = 0.0
    history = []

    # go on from a checkpoint
    if checkpoint:
        if checkpoint["config"] != config:
            sys.exit(f"error: {args.resume} was trained with {checkpoint['config']}, not {config}")
        net.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        seconds = checkpoint["seconds"]
        history = checkpoint["history"]
        torch.manual_seed(args.seed + step)  # GPU: new numbers
        torch.set_rng_state(checkpoint["rng"])  # CPU: the next numbers

    # the run's folder, refused now if it can't be written
    path.parent.mkdir(parents=True, exist_ok=path.exists())
    tempfile.TemporaryFile(dir=path.parent).close()
    print(f"data: {source}\nnet: {sum(p.numel() for p in net.parameters()):,} parameters, {device}")

    # Ctrl-C
    stop = catch_signals()

    B = args.batch_size
    losses = []
    started = time.monotonic() - seconds
    saved = seconds
    share = progress(args, step, seconds)
    bar = tqdm(initial=B * step, unit=" images", unit_scale=True)
    while share < 1:
        # Algorithm 1: draw images, noise levels and noise
        i = torch.randint(len(images), (B,), device=device)
        x_0 = images[i].float() / 127.5 - 1
        hidden = torch.rand(B, device=device) < LABEL_DROPOUT
        y = torch.where(hidden, NULL, labels[i])  # guidance needs both kinds
        t = torch.randint(1, T + 1, (B,), device=device)
        eps = torch.randn_like(x_0)
        x_t = q_sample(x_0, t, eps, alpha_bar)
        goal = to_target(x_0, t, eps, alpha_bar, TARGET)

        # descend on the squared error: for eps, DDPM Eq. 14
        optimizer.zero_grad()
        with autocast(device):
            output = net(x_t, t, y)
        loss = F.mse_loss(output.float(), goal)
        loss.backward()
        losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr = args.lr * min((step + 1) / WARMUP, 1) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        # average the weights over about the last thirtieth of the run
        decay = (1 + step) / (30 + step)
        for p_ema, p in zip(ema.parameters(), net.parameters()):
            p_ema.lerp_(p.detach(), 1 - decay)

        # log
        step += 1
        seconds = time.monotonic() - started
        share = 1 if stop.is_set() else progress(args, step, seconds)
        save = share == 1 or seconds - saved > SAVE_SECONDS
        if save or step % LOG_EVERY == 0:
            mean_loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(mean_loss + norm.item()):
                sys.exit(f"\nerror: the loss is not finite at step {step}: lower --lr")
            history.append([step, seconds, mean_loss])
            bar.total = int(B * step / share)
            bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)

        # save
        if save:
            saved = seconds
            save_checkpoint(path, dict(
                config=config, data=source, args=vars(args), torch=str(torch.__version__),
                step=step, seconds=seconds, history=history, rng=torch.get_rng_state(),
                model=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict()))
            if not stop.is_set():
                grid = path.parent / "samples" / f"{path.stem}-{step:06d}.png"
                draw_samples(ema, x_0.shape[1:], alpha_bar, grid)

        bar.update(B)
    bar.close()
    print(f"{step} steps, {seconds:.0f} seconds, loss {mean_loss:.4f}")
    stopped = progress(args, step, seconds) < 1
    script, flag = ("main.py", "--resume") if stopped else ("visual.py", "--checkpoint")
    print(f'next: python "{HERE / script}" {flag} "{path}"')


# ---- Files and flags: nothing about diffusion ----
def progress(args, step, seconds):
    """The share of the run that is done. --steps is an int, --minutes a float."""
    done = step if isinstance(args.length, int) else seconds / 60
    return min(done / args.length, 1)


def catch_signals():
    """An event that Ctrl-C, SIGTERM or a closed terminal sets. A second Ctrl-C kills."""
    stop = threading.Event()

    def handler(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nstopping after this step; Ctrl-C again to stop at once")

    for kind in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if kind == signal.SIGINT or signal.getsignal(kind) != signal.SIG_IGN:  # nohup
            signal.signal(kind, handler)
    return stop


def save_checkpoint(path, checkpoint):
    """Atomic: at any moment path holds the old file or the new one, whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(checkpoint, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"cannot save {path}, is the disk full? {error}")


def load_checkpoint(path, device="cpu"):
    """(checkpoint, its EMA net). weights_only: tensors and plain types; code is never run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        net = UNet(**checkpoint["config"]["net"])
        net.load_state_dict(checkpoint["ema"])
    except Exception as error:  # missing, damaged or foreign
        sys.exit(f"error: {path} is no checkpoint of {HERE.name}/main.py: "
                 + " ".join(f"{type(error).__name__}: {error}".split())[:1000])
    return checkpoint, net.to(device).eval()


def absolute(path):
    if not path:
        raise argparse.ArgumentTypeError("empty")
    return os.path.abspath(os.path.expanduser(path))


def main():
    parser = argparse.ArgumentParser()
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    add = parser.add_argument
    add("--minutes", dest="length", type=float, default=5.0, help="how long to train [5]")
    add("--steps", dest="length", type=int, help="or how many steps; repeatable on a CPU")
    add("--batch-size", type=int, default=16, help="images a step [16]")
    add("--lr", type=float, default=4e-3, help="peak learning rate [4e-3]")
    add("--seed", type=int, default=0, help="[0]")
    add("--data", type=absolute, help="folder of .wav files, one sub-folder per class")
    add("--out", type=absolute, help="a new folder for the run [runs/TIME here]")
    add("--resume", type=absolute, metavar="FILE", help="go on in it, with its settings")
    add("--device", choices=devices, default=devices[0])
    args = parser.parse_args()
    checkpoint = None
    path = Path(args.out or HERE / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    if path.exists():
        parser.error(f"--out: {path} exists")
    path = path / "checkpoint.pt"
    if args.resume:
        checkpoint, _ = load_checkpoint(args.resume)
        if "optimizer" not in checkpoint:
            parser.error(f"--resume: {args.resume} holds weights only, not a run")
        if not args.out:
            path = Path(args.resume)
        checkpoint["args"]["device"] = args.device
        parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args()  # what is not given anew stays
    if not all(0 < x < math.inf for x in (args.length, args.batch_size, args.lr)):
        parser.error("--minutes, --steps, --batch-size and --lr must be above 0 and finite")
    if checkpoint and progress(args, checkpoint["step"], checkpoint["seconds"]) == 1:
        print(f"nothing left to do: {args.resume} is finished")
        return
    train(args, checkpoint, path, torch.device(args.device))


class Output:
    """A stream that ends no run: odd letters are escaped, what can't be written is dropped."""

    def __init__(self, stream):
        self.inner = stream

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def write(self, text):
        try:
            code = self.inner.encoding or "utf-8"
            self.inner.write(text.encode(code, "backslashreplace").decode(code))
            self.inner.flush()
        except Exception:  # closed, or its reader is gone
            pass

    def flush(self):
        pass


def run(main):
    """Runs a script; errors that users meet are one line."""
    sys.stdout = Output(sys.stdout)
    sys.stderr = Output(sys.stderr)
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    run(main)
