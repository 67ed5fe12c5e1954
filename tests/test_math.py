"""The mathematics of main.py against formulas written out here, in float64."""
import ast
import copy
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
    return list(main.walk(net, noise(), torch.arange(3), alpha_bar, **options))


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
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        assert main.q_sample(one, ts, 0 * one, alpha_bar).item() == pytest.approx(mean, rel=1e-9)
        noise_std = main.q_sample(0 * one, ts, one, alpha_bar).item()
        assert noise_std ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "flow"])
def test_to_x0_is_the_way_back_from_to_target(main, target):
    alpha_bar, x_0, eps, t = main.noise_schedule("cosine", 1000), image(), noise(), [4, 400, 900]
    x_t = main.q_sample(x_0, torch.tensor(t), eps, alpha_bar)
    output = main.to_target(x_0, torch.tensor(t), eps, alpha_bar, target)
    x0_hat = main.to_x0(x_t, torch.tensor(t), output, alpha_bar, target)
    torch.testing.assert_close(x0_hat, x_0)
    torch.testing.assert_close(main.to_x0(x_t[:1], t[0], output[:1], alpha_bar, target), x_0[:1])


def test_unknown_words_raise(main):
    alpha_bar, x, t = main.noise_schedule("linear", 10), image(), torch.tensor([1, 2, 3])
    with pytest.raises(KeyError):
        main.noise_schedule("square", 10)
    for function in (main.to_target, main.to_x0):
        with pytest.raises(ValueError, match="velocity"):
            function(x, t, x, alpha_bar, "velocity")


@pytest.mark.parametrize("T", [1, 7, 100, 5000])
def test_x_T_is_noise_with_any_number_of_levels(main, T):
    for name in ("linear", "cosine", "flow"):
        alpha_bar = main.noise_schedule(name, T)
        assert len(alpha_bar) == T + 1 and alpha_bar[-1] < 0.0011


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
        x_0 = main.sample(net, x_T, x_T, alpha_bar, "x0", steps=steps, eta=eta, guidance=0.0,
                          generator=generator)
        assert (x_0 > 0).double().mean().item() == pytest.approx(white, abs=0.04)
        off = ((x_0.abs() - 1).abs() > 0.01).double().mean()
        assert off > 0.05 if steps == 5 else off == 0


@pytest.mark.parametrize("folder", ["MNIST", "CIFAR10", "DRUMS"])
def test_what_is_known_stays(folder):
    main = load(folder)
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
def test_guidance_is_one_plus_w_of_y_minus_w_of_null(folder):
    main = load(folder)
    alpha_bar = main.noise_schedule("cosine", 1000)
    calls = []

    def net(x_t, t, y):
        calls.append((t[0].item(), y.tolist()))
        return x_t * 0 + column(torch.where(y == main.NULL, 0.3, 0.1 * y))
    frames = walk(main, net, alpha_bar, target="v", steps=5, guidance=2.0,
                  guided=(0.4, 0.8))
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


def test_the_clamp_is_as_wide_as_one_says(main):
    alpha_bar = main.noise_schedule("cosine", 1000)
    for clamp, most in ((0.5, 0.5), (None, 3.0)):
        frames = walk(main, lambda x_t, t, y: 3 + 0 * x_t, alpha_bar, target="x0", clamp=clamp)
        assert all((x0_hat == most).all() for _, _, x0_hat in frames)


def test_a_training_step_is_algorithm_1(main):
    """Adam's first step moves each weight by lr against its gradient, here worked out by hand."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x_t, t, y):
            return self.w * x_t + y

    net = Net()
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters())
    alpha_bar = main.noise_schedule("cosine", 1000).float()
    x_0 = image().float()
    y = torch.full((3, 1, 1, 1), 0.1)
    torch.manual_seed(3)
    loss = main.training_step(net, ema, optimizer, x_0, y, alpha_bar, 0.02, 0.75, "eps")

    torch.manual_seed(3)
    t = torch.randint(1, 1001, (3,))
    eps = torch.randn_like(x_0)
    a = column(alpha_bar[t])
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    error = 0.3 * x_t + y - eps
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=0.02)     # bf16
    moved = 0.3 - 0.02 * (error * x_t).mean().sign()
    torch.testing.assert_close(net.w.detach(), moved, rtol=0, atol=1e-4)
    torch.testing.assert_close(ema.w, 0.75 * 0.3 + 0.25 * net.w.detach())


# What a folder needs otherwise than another; all else of one name is one text.
DIFFERENT = {
    "main.py": """load_data main train build training_step walk absolute UNet UNet.__init__
        UNet.forward Block.__init__ Block.forward""",
    "visual.py": """Model Model.__init__ Model.load Model.walk animate export main
        neighbours reverse steps"""}


def definitions(path):
    """The text of each definition of a file, by name; methods by Class.name, classes bare."""
    found = {}
    code = path.read_text()
    for part in ast.parse(code).body:
        if isinstance(part, ast.ClassDef):
            for method in part.body:
                if hasattr(method, "name"):
                    found[f"{part.name}.{method.name}"] = ast.get_source_segment(code, method)
            found[part.name] = ast.get_docstring(part)
        elif hasattr(part, "name"):
            found[part.name] = ast.get_source_segment(code, part)
    return found


@pytest.mark.parametrize("file", DIFFERENT)
def test_what_is_written_twice_is_the_same_to_the_letter(file):
    """Each folder stands alone, so they share text on purpose; here is what may not drift."""
    texts = {}
    for path in ROOT.glob(f"*/{file}"):
        for name, text in definitions(path).items():
            texts.setdefault(name, set()).add(text)
    drifted = {name for name, of_name in texts.items() if len(of_name) > 1}
    assert drifted == set(DIFFERENT[file].split())
