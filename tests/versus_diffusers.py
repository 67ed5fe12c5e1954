"""CIFAR10/main.py beside Hugging Face's diffusers: the same samples, and the time of a step.

    pip install diffusers && python tests/versus_diffusers.py

First `sample` against DDPMScheduler and DDIMScheduler, same net and noise, in float64: the largest
difference. Then one training step of our UNet and of UNet2DModel with the same channels, in turn;
the medians count. As trained: with the fused optimizer, and in bf16 where the processor has it.
"""
import copy
import statistics
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from loading import load

WIDTHS, BLOCKS, BATCH, ROUNDS = (32, 64, 64, 64), 2, 32, 7


def largest_difference(ours, steps, eta):
    """Between our images and theirs; eta None is DDPMScheduler, which is eta = 1."""
    def net(x, t, y=None):
        return torch.sin(3 * x) * 0.5 + x * (t.view(-1, 1, 1, 1) / 1000)
    alpha_bar = ours.noise_schedule("linear", 1000)
    generator, x_T = torch.Generator().manual_seed(1), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.int64)
    *_, (_, x_0, _) = ours.sample(net, x_T, y, alpha_bar, "eps", steps, 1.0 if eta is None else eta,
                                  0.0, generator=generator)
    options = dict(trained_betas=(1 - alpha_bar[1:] / alpha_bar[:-1]).numpy(), clip_sample=True,
                   timestep_spacing="trailing")         # T, ..., as ours
    scheduler = DDPMScheduler(**options) if eta is None else DDIMScheduler(**options)
    scheduler.betas = 1 - alpha_bar[1:] / alpha_bar[:-1]    # in float64, as ours
    scheduler.alphas_cumprod = alpha_bar[1:]
    scheduler.final_alpha_cumprod = scheduler.one = alpha_bar[0]
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(1), x_T
    for t in scheduler.timesteps:                       # theirs is one less than the papers'
        extra = {} if eta is None else {"eta": eta, "use_clipped_model_output": True}
        eps_hat = net(x, (t + 1).repeat(4))
        x = scheduler.step(eps_hat, t, x, generator=generator, **extra).prev_sample
    return (x - x_0).abs().max().item()


def stepper(net, fast, call, ours):
    """A function that makes one training step and returns its seconds."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=fast or None)
    x, eps = torch.randn(2, BATCH, 3, 32, 32)
    t, y = torch.randint(1000, (BATCH,)), torch.randint(10, (BATCH,))

    def step():
        started = time.perf_counter()
        with ours.autocast(x.device) if fast else torch.autocast("cpu", enabled=False):
            loss = (call(net, x, t, y).float() - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started
    return step


def main():
    ours = load("CIFAR10")
    for steps, eta in ((1000, None), (1000, 1.0), (50, 0.0), (20, 0.5), (10, 1.0)):
        name = "DDPM" if eta is None else f"DDIM, eta {eta:g}"
        print(f"{name}, {steps} steps: {largest_difference(ours, steps, eta):.1e}", flush=True)
    theirs = UNet2DModel(
        sample_size=32, block_out_channels=WIDTHS, layers_per_block=BLOCKS, norm_num_groups=8,
        num_class_embeds=10, attention_head_dim=64, down_block_types=(
            "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    nets = {"diffusers": (theirs, lambda net, *inputs: net(*inputs).sample),
            "ours": (ours.UNet(10, WIDTHS, BLOCKS, 0.0), lambda net, *inputs: net(*inputs))}
    steps = {f"{whose}, {'as trained' if fast else 'plain float32'}":
             stepper(copy.deepcopy(net), fast, call, ours)
             for fast in (False, True) for whose, (net, call) in nets.items()}
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(step())
    for name, taken in seconds.items():
        print(f"{name}: {BATCH / statistics.median(taken[2:]):.1f} images/s")


if __name__ == "__main__":
    main()
