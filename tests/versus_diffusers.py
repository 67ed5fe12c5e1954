"""`sample` beside Hugging Face's schedulers: pip install diffusers first.

The same net and noise, in float64: the largest difference between the pictures of `sample` and
those of DDPMScheduler and DDIMScheduler.
"""
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from loading import load


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


if __name__ == "__main__":
    for steps, eta in ((1000, None), (1000, 1.0), (50, 0.0), (20, 0.5), (10, 1.0)):
        name = "DDPM" if eta is None else f"DDIM, eta {eta:g}"
        print(f"{name}, {steps} steps: {largest_difference(load('CIFAR10'), steps, eta):.1e}")
