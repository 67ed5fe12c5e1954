"""Our UNet beside diffusers' UNet2DModel of the same channels: one training step of each, timed.

    pip install diffusers && python tests/versus_diffusers.py

Rounds alternate, so that all meet the same moods of the machine; the medians count. The first two
run in the same plain loop in float32, the last two with what our main.py trains with (but for its
clipping and EMA): fused AdamW, and bf16 where the processor has it. So the last against the first
is out of the box. Memory is what autograd keeps between forward and backward. Left out where
diffusers is not installed.

Then, for three widths, the arithmetic of our training step as a share of what a large product of
matrices, in the same number format, does at the same time.
"""
import copy
import statistics
import time

import torch
from loading import load
from torch.utils.flop_counter import FlopCounterMode

WIDTHS, BLOCKS, BATCH, ROUNDS = (32, 64, 64, 64), 2, 32, 7


def stepper(net, fast, call, main, batch=BATCH):
    """A function that makes one training step and returns (seconds, bytes kept)."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=fast or None)
    x, eps = torch.randn(2, batch, 3, 32, 32)
    t, y = torch.randint(1000, (batch,)), torch.randint(10, (batch,))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step():
        kept.clear()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with main.autocast(x.device) if fast else torch.autocast("cpu", enabled=False):
                loss = (call(net, x, t, y).float() - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started, sum(kept.values())
    return step


def share_of_matmul(main, width, batch):
    """Prints it. The net is CIFAR-10's default but for the width."""
    net = main.UNet(3, 32, 10, [width * m for m in (1, 2, 2, 2)], 2, (16,), 0.0)
    step = stepper(net, True, lambda net, *inputs: net(*inputs), main, batch)
    with FlopCounterMode(display=False) as counter:
        step()
    with main.autocast(torch.device("cpu")):
        dtype = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    rates = []
    for _ in range(ROUNDS + 2):
        started = time.perf_counter()
        for _ in range(8):
            a @ b
        product = 8 * 2 * 2048 ** 3 / (time.perf_counter() - started)
        rates.append((counter.get_total_flops() / step()[0], product))
    ours, product = (statistics.median(column) / 1e9 for column in zip(*rates[2:]))
    print(f"width {width}, batch {batch}: {ours:.0f} GFLOP/s, a matrix product {product:.0f}: "
          f"{ours / product:.2f}")


def versus_diffusers(ours):
    """Prints speed and memory of both. Raises ImportError without diffusers."""
    from diffusers import UNet2DModel

    def our_net():
        return ours.UNet(3, 32, 10, WIDTHS, BLOCKS, (16,), 0.0)
    theirs = UNet2DModel(
        sample_size=32, block_out_channels=WIDTHS, layers_per_block=BLOCKS, norm_num_groups=8,
        num_class_embeds=10, attention_head_dim=64, down_block_types=(
            "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))

    def call_ours(net, x, t, y):
        return net(x, t, y)

    def call_theirs(net, x, t, y):
        return net(x, t, y).sample
    steps = {f"{whose}, {how}": stepper(net, fast, call, ours)
             for how, fast in (("plain", False), ("as trained", True))
             for whose, net, call in (("diffusers", copy.deepcopy(theirs), call_theirs),
                                      ("ours", our_net(), call_ours))}
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS + 2):
        for name, step in steps.items():
            taken, kept = step()
            seconds[name].append((taken, kept))
    base = statistics.median(taken for taken, _ in seconds["diffusers, plain"][2:])
    for name, rows in seconds.items():
        median = statistics.median(taken for taken, _ in rows[2:])
        print(f"{name}: {BATCH / median:.1f} images/s, {base / median:.2f} x diffusers, plain; "
              f"{rows[-1][1] / 2**20:.0f} MiB kept")
    for name, net in (("diffusers", theirs), ("ours", our_net())):
        print(f"{name}: {sum(p.numel() for p in net.parameters()):,} parameters")


def main():
    ours = load("CIFAR10")
    try:
        versus_diffusers(ours)
    except ImportError:
        print("diffusers is not installed: nothing to compare with")
    for width, batch in ((32, 32), (64, 32), (128, 16)):
        share_of_matmul(ours, width, batch)


if __name__ == "__main__":
    main()
