"""The mathematics of main.py against formulas written out here, in float64."""
import math

import pytest
import torch

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
F = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
BETAS = {"linear": LINEAR, "cosine": (1 - F[1:] / F[:-1]).clamp(max=0.999)}


def column(values):
    return values.view(-1, 1, 1, 1)


def perfect(x_0, alpha_bar, target):
    """A net that knows the image: its output is exact for any x_t."""
    def net(x_t, t, y):
        a = column(alpha_bar[t])
        x = x_0.repeat(len(x_t) // len(x_0), 1, 1, 1)
        eps = (x_t - a.sqrt() * x) / (1 - a).sqrt()
        return eps if target == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x
    return net


def image(seed=0, n=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1


def noise(seed=1, n=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)


def walk(main, net, alpha_bar, **options):
    labels = torch.arange(3)
    return list(main.sample(net, noise(), labels, alpha_bar, **{"guidance": 0.0, **options}))


def test_schedules_at_both_ends(main):
    linear, cosine = main.noise_schedule("linear", 1000), main.noise_schedule("cosine", 1000)
    assert linear.dtype == cosine.dtype == torch.float64
    assert linear[0].item() == pytest.approx(0.9999, abs=1e-15)
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert cosine[0].item() == pytest.approx((F[1] / F[0]).item(), rel=1e-12)
    assert cosine[500].item() == pytest.approx((F[501] / F[0]).item(), rel=1e-9)
    assert 0 < cosine[-1] < 1e-8
    for alpha_bar in (linear, cosine):
        assert len(alpha_bar) == 1000 and (alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_small_steps_add_up_to_the_closed_form(main, name):
    """q(x_t | x_{t-1}) applied t times has the mean and the variance of q(x_t | x_0)."""
    alpha_bar, mean, variance = main.noise_schedule(name, 1000), 1.0, 0.0
    for t, beta in enumerate(BETAS[name].tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        ts = torch.tensor([t])
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1)
        assert main.q_sample(one, ts, zero, alpha_bar).item() == pytest.approx(mean, rel=1e-9)
        noise_std = main.q_sample(zero, ts, one, alpha_bar).item()
        assert noise_std ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_conversions_invert_each_other(main, target):
    alpha_bar, x_0, eps = main.noise_schedule("cosine", 1000), image(), noise()
    t = torch.tensor([3, 400, 900])
    x_t = main.q_sample(x_0, t, eps, alpha_bar)
    output = eps if target == "eps" else main.velocity(x_0, eps, t, alpha_bar)
    x0_hat, eps_hat = main.to_x0_eps(output, x_t, column(alpha_bar[t]), target)
    torch.testing.assert_close(x0_hat, x_0)
    torch.testing.assert_close(eps_hat, eps)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_ddpm_step_is_the_posterior_by_bayes(main, target):
    """steps = T, eta = 1: each step draws from q(x_{t-1} | x_t, x0_hat), found here as a product
    of N(x_t; sqrt(alpha) x_{t-1}, beta) and N(x_{t-1}; sqrt(a_prev) x0_hat, 1 - a_prev)."""
    beta = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    net = perfect(image(), alpha_bar, target)
    frames = walk(main, net, alpha_bar, target=target, steps=20, eta=1.0,
                  generator=torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    for (t, x_t, x0_hat), (_, x_prev, _) in zip(frames, frames[1:]):
        if t == 0:
            assert torch.equal(x_prev, x0_hat)  # no noise on the last step
            break
        a_prev = alpha_bar[t - 1]
        precision = (1 - beta[t]) / beta[t] + 1 / (1 - a_prev)
        mean = ((1 - beta[t]).sqrt() / beta[t] * x_t
                + a_prev.sqrt() / (1 - a_prev) * x0_hat) / precision
        z = torch.randn(x_t.shape, generator=draws, dtype=torch.float64)
        torch.testing.assert_close(x_prev, mean + precision ** -0.5 * z)
    assert [t for t, _, _ in frames] == list(range(19, -2, -1))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_skipping_levels_is_ddim_s_equations_12_and_16(main, eta):
    alpha_bar = main.noise_schedule("linear", 1000)

    def net(x_t, t, y):
        return 0.01 * x_t + 0.001 * column(t)
    frames = walk(main, net, alpha_bar, target="eps", steps=10, eta=eta,
                  generator=torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    assert [t for t, _, _ in frames] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    for (t, x_t, _), (t_prev, x_prev, _) in zip(frames, frames[1:]):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else torch.tensor(1.0)
        eps = net(x_t, torch.full((3,), t), None)
        x0_hat = ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        eps_hat = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        expected = a_prev.sqrt() * x0_hat + (1 - a_prev - sigma ** 2).sqrt() * eps_hat
        if sigma > 0:
            z = torch.randn(x_t.shape, generator=draws, dtype=torch.float64)
            expected = expected + sigma * z
        torch.testing.assert_close(x_prev, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("steps, eta", [(1, 0.0), (7, 0.0), (7, 1.0), (1000, 1.0)])
def test_a_perfect_predictor_returns_the_image(main, schedule, target, steps, eta):
    alpha_bar, x_0 = main.noise_schedule(schedule, 1000), image()
    net = perfect(x_0, alpha_bar, target)
    frames = walk(main, net, alpha_bar, target=target, steps=steps, eta=eta)
    assert len(frames) == steps + 1
    torch.testing.assert_close(frames[-1][1], x_0, rtol=0, atol=1e-9)


def test_guidance_is_one_plus_w_of_y_minus_w_of_null(main):
    alpha_bar, calls = main.noise_schedule("cosine", 1000), []

    def net(x_t, t, y):
        calls.append(y.tolist())
        return x_t * 0 + column(torch.where(y == main.NULL, 0.3, 0.1 * y))
    (t, x_t, x0_hat), *_ = walk(main, net, alpha_bar, target="v", steps=1, guidance=2.0,
                                 guided=(0, 1))
    a = alpha_bar[t]
    v = 3.0 * 0.1 * column(torch.arange(3)) - 2.0 * 0.3
    torch.testing.assert_close(x0_hat, (a.sqrt() * x_t - (1 - a).sqrt() * v).clamp(-1, 1))
    walk(main, net, alpha_bar, steps=1, guidance=0.0)
    both = [0, 1, 2, main.NULL, main.NULL, main.NULL]
    assert calls == [both, [0, 1, 2]]
    calls.clear()
    walk(main, net, alpha_bar, steps=4, guidance=2.0, guided=(0.499, 0.749))
    assert calls == [[0, 1, 2], [0, 1, 2], both, [0, 1, 2]]     # t = 999, 749, 499, 249


def test_guess_is_clamped_before_the_mean(main):
    frames = walk(main, lambda x_t, t, y: 5 * x_t, main.noise_schedule("linear", 1000), steps=4)
    assert max(x0_hat.abs().max() for _, _, x0_hat in frames) == 1


def test_same_generator_same_images(main):
    def midway(seed):
        frames = walk(main, lambda x_t, t, y: x_t, main.noise_schedule("cosine", 1000), steps=5,
                      eta=1.0, generator=torch.Generator().manual_seed(seed))
        return frames[2][1]
    assert torch.equal(midway(3), midway(3)) and not torch.equal(midway(3), midway(4))


def small_net(main, **changes):
    options = {"image_channels": 1, "size": 28, "classes": 10, "channels": (8, 16), "blocks": 1,
               "attention": (14,), "dropout": 0.0} | changes
    torch.manual_seed(0)
    return main.UNet(**options).eval()


def test_unet_starts_at_zero_and_listens_to_x_t_and_y(main):
    net, labels = small_net(main), torch.tensor([1, 2])
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([10, 900])
    assert net(x, t, labels).shape == x.shape and (net(x, t, labels) == 0).all()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    base = net(x, t, labels)
    for other in (net(x + 0.1, t, labels), net(x, t + 50, labels), net(x, t, labels + 1),
                  net(x, t, torch.full_like(labels, main.NULL))):
        assert (base - other).abs().max() > 1e-4


def test_adaptive_norm_scales_and_shifts_each_image_on_its_own(main):
    torch.manual_seed(0)
    h, scale, shift = torch.randn(3, 24, 5, 5) * 2 + 1, torch.randn(3, 24), torch.randn(3, 24)
    groups = h.view(3, main.groups(24), -1)
    variance = groups.var(2, correction=0, keepdim=True)
    normed = (groups - groups.mean(2, keepdim=True)) / (variance + 1e-5).sqrt()
    expected = normed.view(h.shape) * scale[:, :, None, None] + shift[:, :, None, None]
    torch.testing.assert_close(main.adaptive_norm(h, scale, shift), expected, rtol=1e-4, atol=1e-5)


def test_attention_is_where_the_config_says(main):
    net = small_net(main)
    sizes = []
    for module in net.modules():
        if isinstance(module, main.Attention):
            module.register_forward_hook(lambda _, x, output: sizes.append(x[0].shape[-1]))
    net(torch.randn(1, 1, 28, 28), torch.tensor([5]), torch.tensor([0]))
    assert sizes == [14] * (3 if main.BLOCKS == 1 else 4)  # down, middle, up (CIFAR10: twice)


def test_attention_is_softmax_of_scaled_products(main):
    torch.manual_seed(0)
    layer = main.Attention(8)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, H*W)
    weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8)).softmax(-1)
    h = torch.einsum("bij,bcj->bci", weights, v).view(2, 8, 3, 3)
    torch.testing.assert_close(layer(x), x + layer.out(h), rtol=1e-4, atol=1e-5)
