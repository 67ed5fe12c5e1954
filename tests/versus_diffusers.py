"""Our UNet beside diffusers' UNet2DModel of the same channels: one training step of each, timed.

    pip install diffusers && python tests/versus_diffusers.py

Rounds alternate, so that all meet the same moods of the machine; the medians count. The first two
run in the same plain loop in float32, the last two as our main.py trains: fused AdamW, and bf16
where the processor has it. So the last against the first is out of the box. Memory is what autograd
keeps between forward and backward. Does nothing where diffusers is not installed.
"""
import copy
import statistics
import time

import torch
from conftest import load

WIDTHS, BLOCKS, BATCH, ROUNDS = (32, 64, 64, 64), 2, 32, 7


def stepper(net, fast, call, main):
    """A function that makes one training step and returns (seconds, bytes kept)."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=fast or None)
    x, eps = torch.randn(2, BATCH, 3, 32, 32)
    t, y = torch.randint(1000, (BATCH,)), torch.randint(10, (BATCH,))
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


def main():
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return print("diffusers is not installed: nothing to compare with")
    ours = load("CIFAR10")

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


if __name__ == "__main__":
    main()
