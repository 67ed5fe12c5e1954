"""The mathematics of main.py against formulas written out here, in float64."""
import ast
import math

import pytest
import torch
from loading import ROOT, load

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
        v = a.sqrt() * eps - (1 - a).sqrt() * x
        return {"x0": x, "eps": eps, "v": v, "flow": eps - x}[target]
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
    names = "linear", "cosine", "flow"
    linear, cosine, flow = (main.noise_schedule(name, 1000) for name in names)
    assert linear.dtype == cosine.dtype == torch.float64
    assert linear[0] == cosine[0] == 1
    assert linear[1].item() == pytest.approx(0.9999, abs=1e-15)
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert cosine[1].item() == pytest.approx((F[1] / F[0]).item(), rel=1e-12)
    assert cosine[500].item() == pytest.approx((F[500] / F[0]).item(), rel=1e-9)
    assert 0 < cosine[-1] < 1e-8
    assert flow[250].item() == pytest.approx(0.75 ** 2 / (0.75 ** 2 + 0.25 ** 2), rel=1e-12)
    for alpha_bar in (linear, cosine, flow):
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


@pytest.mark.parametrize("target", ["x0", "eps", "v", "flow"])
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


@pytest.mark.parametrize("target", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("steps, eta", [(1, 0.0), (7, 0.0), (7, 1.0), (1000, 1.0)])
def test_a_perfect_predictor_returns_the_image(main, target, steps, eta):
    alpha_bar, x_0 = main.noise_schedule("cosine", 1000), image()
    net = perfect(x_0, alpha_bar, target)
    frames = walk(main, net, alpha_bar, target=target, steps=steps, eta=eta)
    assert len(frames) == steps + 1
    torch.testing.assert_close(frames[-1][1], x_0, rtol=0, atol=1e-9)


def test_flow_matching_is_ddim_on_another_schedule(main):
    """x = (1 - s) x_0 + s eps, s = t/T, followed along the net's u by Euler's steps of 1/20, is
    what eta = 0 draws, where x_t is x divided by sqrt((1 - s)^2 + s^2)."""
    s = torch.arange(1001, dtype=torch.float64) / 1000
    alpha_bar = (1 - s) ** 2 / ((1 - s) ** 2 + s ** 2)
    ours = main.noise_schedule("flow", 1000)
    torch.testing.assert_close(ours[:-1], alpha_bar[:-1])       # the last beta is clipped at 0.999

    def net(x_t, t, y):                 # its x0_hat is 0.9 sin(x_t), so that nothing is clamped
        a = column(alpha_bar[t])
        return (x_t - (a.sqrt() + (1 - a).sqrt()) * 0.9 * x_t.sin()) / (1 - a).sqrt()
    frames = walk(main, net, alpha_bar, target="flow", steps=20, eta=0.0)
    x = noise()
    for t, x_t, _ in frames[:-1]:
        scale = ((1 - s[t]) ** 2 + s[t] ** 2).sqrt()
        torch.testing.assert_close(x_t, x / scale, rtol=0, atol=1e-12)
        x = x - net(x / scale, torch.tensor([t]), None) / 20
    torch.testing.assert_close(frames[-1][1], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("white", [0.5, 0.8])
def test_the_world_of_two_images(white):
    """The page's toy, one pixel that is +1 or -1: with the exact guess as the net every walk ends
    at an image, each image as often as it occurs, and five DDIM steps are too few."""
    main = load("MNIST")
    alpha_bar = main.noise_schedule("cosine", 1000)

    def net(x_t, t, y):
        a = column(alpha_bar[t])
        return torch.tanh(a.sqrt() * x_t / (1 - a) + math.log(white / (1 - white)) / 2)
    for steps, eta in ((1000, 1.0), (1000, 0.0), (20, 0.0), (5, 0.0)):
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(2000, 1, 1, 1, generator=generator, dtype=torch.float64)
        *_, (_, x_0, _) = main.sample(net, x_T, x_T, alpha_bar, "x0", steps, eta, 0.0,
                                      generator=generator)
        assert (x_0 > 0).double().mean().item() == pytest.approx(white, abs=0.04)
        off = ((x_0.abs() - 1).abs() > 0.01).double().mean()
        assert off > 0.05 if steps == 5 else off == 0


def test_what_is_known_stays(main):
    alpha_bar, x_0 = main.noise_schedule("cosine", 1000), image()
    mask = torch.zeros_like(x_0, dtype=torch.bool)
    mask[:, :, :2] = True
    frames = walk(main, lambda x_t, t, y: 0.1 * x_t, alpha_bar, target="v", known=(mask, x_0))
    free = walk(main, lambda x_t, t, y: 0.1 * x_t, alpha_bar, target="v")
    for _, _, x0_hat in frames[:-1]:
        assert torch.equal(x0_hat[mask], x_0[mask])
    torch.testing.assert_close(frames[-1][1][mask], x_0[mask])
    assert not torch.equal(free[-1][1][mask], x_0[mask])


@pytest.mark.parametrize("folder", ["MNIST", "CIFAR10"])
def test_guidance_is_one_plus_w_of_y_minus_w_of_null(folder, monkeypatch):
    main = load(folder)
    monkeypatch.setattr(main, "GUIDED", (0.4, 0.8))
    alpha_bar = main.noise_schedule("cosine", 1000)
    calls = []

    def net(x_t, t, y):
        calls.append((t[0].item(), y.tolist()))
        return x_t * 0 + column(torch.where(y == main.NULL, 0.3, 0.1 * y))
    frames = walk(main, net, alpha_bar, target="v", steps=5, guidance=2.0)
    for t, x_t, x0_hat in frames[:-1]:
        a = alpha_bar[t]
        v = 0.1 * column(torch.arange(3))
        if t in (600, 800):                                     # 0.4 T < t <= 0.8 T
            v = 3.0 * v - 2.0 * 0.3
        torch.testing.assert_close(x0_hat, (a.sqrt() * x_t - (1 - a).sqrt() * v).clamp(-1, 1))
    asked_twice = [t for t, y in calls if y == [main.NULL] * 3]
    assert asked_twice == [800, 600] and len(calls) == 7
    walk(main, net, alpha_bar, steps=5, guidance=0.0)
    assert len(calls) == 12                                     # without guidance: asked once


def test_unet_starts_at_zero_and_listens_to_x_t_and_y(main):
    torch.manual_seed(0)
    net = {"MNIST": lambda: main.UNet(10, (8, 16, 16)),
           "DRUMS": lambda: main.UNet(5, (8, 16, 16)),
           "CIFAR10": lambda: main.UNet(10, (8, 16), 1, 0.0),
           "PUSHT": lambda: main.UNet((8, 16, 16), 2, 8)}[main.HERE.name]().eval()
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


TWINS = {
    ("MNIST/main.py", "CIFAR10/main.py"): """noise_schedule q_sample to_target to_x0 group_norm
        zero_init Attention Block autocast sample draw_samples progress catch_signals
        save_checkpoint load_checkpoint absolute Output run""",
    ("MNIST/main.py", "DRUMS/main.py"): """noise_schedule q_sample to_target to_x0 group_norm
        zero_init Attention Block autocast sample draw_samples train progress catch_signals
        save_checkpoint load_checkpoint absolute Output run""",
    ("MNIST/main.py", "PUSHT/main.py"): """noise_schedule q_sample to_target to_x0 group_norm
        zero_init Attention autocast progress catch_signals save_checkpoint load_checkpoint
        absolute Output run""",
    ("MNIST/visual.py", "CIFAR10/visual.py"): """tiled draw reverse animate forward grid steps
        guidance complete export""",
    ("MNIST/visual.py", "DRUMS/visual.py"): """tiled draw reverse animate grid steps guidance loss
        export"""}


@pytest.mark.parametrize("pair", TWINS, ids=" ".join)
def test_what_is_written_twice_is_the_same_to_the_letter(pair):
    """Each folder stands alone, so they share text on purpose; here is what may not drift."""
    first, second = ({part.name: ast.get_source_segment(code, part)
                      for part in ast.parse(code).body if hasattr(part, "name")}
                     for code in ((ROOT / name).read_text() for name in pair))
    for name in TWINS[pair].split():
        assert first[name] == second[name], name
