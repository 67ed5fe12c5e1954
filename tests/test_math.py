"""The mathematics of main.py against formulas written out here, in float64."""
import math

import pytest
import torch
from loading import load

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
        return {"x0": x, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x}[target]
    return net


def image():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1


def noise():
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def walk(main, net, alpha_bar, **options):
    options = ({} if main.HERE.name == "PUSHT" else {"guidance": 0.0}) | options
    return list(main.sample(net, noise(), torch.arange(3), alpha_bar, **options))


def test_schedules_at_both_ends(main):
    linear, cosine = main.noise_schedule("linear", 1000), main.noise_schedule("cosine", 1000)
    assert linear.dtype == cosine.dtype == torch.float64
    assert linear[0] == cosine[0] == 1
    assert linear[1].item() == pytest.approx(0.9999, abs=1e-15)
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert cosine[1].item() == pytest.approx((F[1] / F[0]).item(), rel=1e-12)
    assert cosine[500].item() == pytest.approx((F[500] / F[0]).item(), rel=1e-9)
    assert 0 < cosine[-1] < 1e-8
    for alpha_bar in (linear, cosine):
        assert len(alpha_bar) == 1001 and (alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_small_steps_add_up_to_the_closed_form(main, name):
    """q(x_t | x_{t-1}) applied t times has the mean and the variance of q(x_t | x_0)."""
    alpha_bar, mean, variance = main.noise_schedule(name, 1000), 1.0, 0.0
    for t, beta in enumerate(BETAS[name].tolist(), start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        ts = torch.tensor([t])
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1)
        assert main.q_sample(one, ts, zero, alpha_bar).item() == pytest.approx(mean, rel=1e-9)
        noise_std = main.q_sample(zero, ts, one, alpha_bar).item()
        assert noise_std ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_to_x0_is_the_way_back_from_to_target(main, target):
    alpha_bar, x_0, eps, t = main.noise_schedule("cosine", 1000), image(), noise(), [4, 400, 900]
    x_t = main.q_sample(x_0, torch.tensor(t), eps, alpha_bar)
    output = main.to_target(x_0, torch.tensor(t), eps, alpha_bar, target)
    torch.testing.assert_close(main.to_x0(output, x_t, column(alpha_bar[t]), target), x_0)


def test_unknown_words_raise(main):
    alpha_bar, x, t = main.noise_schedule("linear", 10), image(), torch.tensor([1, 2, 3])
    for wrong in (lambda: main.noise_schedule("square", 10),
                  lambda: main.to_target(x, t, x, alpha_bar, "velocity"),
                  lambda: main.to_x0(x, x, alpha_bar[3], "velocity")):
        with pytest.raises(KeyError):
            wrong()


@pytest.mark.parametrize("target", ["eps", "v"])
def test_ddpm_step_is_the_posterior_by_bayes(main, target):
    """steps = T, eta = 1: each step draws from q(x_{t-1} | x_t, x0_hat), found here as a product
    of N(x_t; sqrt(alpha) x_{t-1}, beta) and N(x_{t-1}; sqrt(a_prev) x0_hat, 1 - a_prev)."""
    beta = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
    net = perfect(image(), alpha_bar, target)
    frames = walk(main, net, alpha_bar, target=target, steps=20, eta=1.0,
                  generator=torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    for (t, x_t, x0_hat), (_, x_prev, _) in zip(frames, frames[1:]):
        if t == 1:
            assert torch.equal(x_prev, x0_hat)  # no noise on the last step
            break
        a_prev, b = alpha_bar[t - 1], beta[t - 1]   # beta begins at t = 1
        precision = (1 - b) / b + 1 / (1 - a_prev)
        mean = ((1 - b).sqrt() / b * x_t
                + a_prev.sqrt() / (1 - a_prev) * x0_hat) / precision
        z = torch.randn(x_t.shape, generator=draws, dtype=torch.float64)
        torch.testing.assert_close(x_prev, mean + precision ** -0.5 * z)
    assert [t for t, _, _ in frames] == list(range(20, -1, -1))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_skipping_levels_is_ddim_s_equations_12_and_16(main, eta):
    alpha_bar = main.noise_schedule("linear", 1000)

    def net(x_t, t, y):
        return 0.01 * x_t + 0.001 * column(t)
    frames = walk(main, net, alpha_bar, target="eps", steps=10, eta=eta,
                  generator=torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    assert [t for t, _, _ in frames] == list(range(1000, -1, -100))
    for (t, x_t, _), (t_prev, x_prev, _) in zip(frames, frames[1:]):
        a, a_prev = alpha_bar[t], alpha_bar[t_prev]
        eps = net(x_t, torch.full((3,), t), None)
        x0_hat = ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        eps_hat = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        expected = a_prev.sqrt() * x0_hat + (1 - a_prev - sigma ** 2).sqrt() * eps_hat
        if sigma > 0:
            z = torch.randn(x_t.shape, generator=draws, dtype=torch.float64)
            expected = expected + sigma * z
        torch.testing.assert_close(x_prev, expected)


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
@pytest.mark.parametrize("steps, eta", [(1, 0.0), (7, 0.0), (7, 1.0), (1000, 1.0)])
def test_a_perfect_predictor_returns_the_image(main, target, steps, eta):
    alpha_bar, x_0 = main.noise_schedule("cosine", 1000), image()
    net = perfect(x_0, alpha_bar, target)
    frames = walk(main, net, alpha_bar, target=target, steps=steps, eta=eta)
    assert len(frames) == steps + 1
    torch.testing.assert_close(frames[-1][1], x_0, rtol=0, atol=1e-9)


def test_more_steps_than_levels_are_all_levels(main):
    alpha_bar = main.noise_schedule("cosine", 10)
    frames = walk(main, lambda x_t, t, y: x_t, alpha_bar, steps=20)
    assert [t for t, _, _ in frames] == list(range(10, -1, -1)) and frames[-1][1].isfinite().all()


@pytest.mark.parametrize("folder", ["MNIST", "CIFAR10"])
def test_guidance_is_one_plus_w_of_y_minus_w_of_null(folder):
    main = load(folder)
    alpha_bar, calls = main.noise_schedule("cosine", 1000), []

    def net(x_t, t, y):
        calls.append(y.tolist())
        return x_t * 0 + column(torch.where(y == main.NULL, 0.3, 0.1 * y))
    (t, x_t, x0_hat), *_ = walk(main, net, alpha_bar, target="v", steps=1, guidance=2.0)
    a = alpha_bar[t]
    v = 3.0 * 0.1 * column(torch.arange(3)) - 2.0 * 0.3
    torch.testing.assert_close(x0_hat, (a.sqrt() * x_t - (1 - a).sqrt() * v).clamp(-1, 1))
    walk(main, net, alpha_bar, steps=1, guidance=0.0)
    assert calls == [[0, 1, 2], [main.NULL] * 3, [0, 1, 2]]     # without guidance: asked once


def test_unet_starts_at_zero_and_listens_to_x_t_and_y(main):
    torch.manual_seed(0)
    net = {"MNIST": lambda: main.UNet(10, (8, 16, 16)),
           "CIFAR10": lambda: main.UNet(10, (8, 16), 1, 0.0),
           "PUSHT": lambda: main.UNet((8, 16, 16))}[main.HERE.name]().eval()
    x, t, labels = torch.randn(2, net.stem.in_channels, 28, 28), *torch.tensor([[10, 900], [1, 2]])
    hidden = torch.full_like(labels, getattr(main, "NULL", 0))
    if main.HERE.name == "PUSHT":
        x, labels, hidden = x[:, :, :1, :16], torch.randn(2, 8), torch.zeros(2, 8)
    assert net(x, t, labels).shape == x.shape and (net(x, t, labels) == 0).all()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    base = net(x, t, labels)
    for other in (net(x + 0.1, t, labels), net(x, t + 50, labels), net(x, t, labels + 1),
                  net(x, t, hidden)):
        assert (base - other).abs().max() > 1e-4
