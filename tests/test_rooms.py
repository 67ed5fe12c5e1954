"""EVERYTHING/rooms.py: its net, its measure on hand-made rooms, the script."""
import re
import sys

import pytest
import torch
from loading import load


@pytest.fixture(scope="module")
def rooms():
    return load("EVERYTHING", "rooms")


def bedroom():
    """(x_0, y): a good room of 4 by 4 metres, the bed's head at the upper wall."""
    y = torch.tensor([[2.0, 2, -1.4, -2, 0, *range(8)]])
    x = torch.zeros(8, 7)
    x[:, 0] = -1
    x[0] = torch.tensor([1, 1.0, 0.96, 1.6, 2, 0, -1])
    x[1] = torch.tensor([1, -0.07, 1.76, 0.44, 0.4, 0, -1])     # 5 cm beside it
    x[2] = torch.tensor([1, -1.66, 0.5, 1, 0.6, 1, 0])
    x[4] = torch.tensor([1, 1.1, -1.61, 1.6, 0.7, 0, 1])
    x[5] = torch.tensor([1, 1.1, -0.91, 0.48, 0.48, 0, -1])
    return x.T[None, :, None], y


@pytest.mark.parametrize("place, dx, dy, rule", [
    (1, 0.09, 0, None), (1, 0.11, 0, "nothing overlaps"),       # overlaps of 4 and 6 cm
    (0, 0, -0.05, None), (0, 0, -0.07, "at the wall"),
    (2, -0.08, 0, None), (2, -0.1, 0, "all inside"),
    (5, -2.3, -0.2, "the door free")])
def test_measure(rooms, place, dx, dy, rule):
    x_0, y = bedroom()
    x_0[0, 1:3, 0, place] += torch.tensor([dx, dy])
    assert [name for name, held in rooms.rules(x_0, y).items() if not held] == (
        [rule, "all five"] if rule else [])


@pytest.mark.parametrize("place", [0, 1, 2, 5])
def test_missing(rooms, place):
    x_0, y = bedroom()
    x_0[0, 0, 0, place] = -1    # a desk without its chair is not whole either
    assert not rooms.rules(x_0, y)["all parts there"]


def test_turned(rooms):
    x_0, y = bedroom()
    x_0[0, 6, 0, 0] = 1         # the bed's foot at the wall
    held = rooms.rules(x_0, y)
    assert not held["at the wall"] and held["nothing overlaps"]


def test_designer(rooms):
    x_0, y = rooms.designed(200, 3)
    assert x_0.shape == (200, 7, 1, 8) and y.shape == (200, 13)
    assert rooms.rules(x_0, y)["all five"].all()
    assert torch.equal(rooms.designed(100, 3)[0], x_0[:100])


def test_order_does_not_matter(rooms):
    torch.manual_seed(0)
    net = rooms.Net()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    x_t = torch.randn(3, 7, 1, 8)
    t = torch.tensor([1, 500, 1000])
    _, y = rooms.designed(3, 0)
    order = torch.randperm(8)
    y_moved = torch.cat([y[:, :5], y[:, 5:][:, order]], dim=1)
    output = net(x_t, t, y)
    assert output.std() > 0.01
    torch.testing.assert_close(net(x_t[..., order], t, y_moved), output[..., order],
                               atol=1e-5, rtol=1e-4)


def start(rooms, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["rooms.py", *map(str, flags)])
    designed = rooms.designed
    monkeypatch.setattr(rooms, "designed", lambda n, seed: designed(min(n, 400), seed))
    rooms.main()


def test_script(rooms, monkeypatch, tmp_path, capsys):
    start(rooms, monkeypatch, "--minutes", 0.05, "--out", tmp_path / "a")
    assert capsys.readouterr().out.count("nearest training room") == 3
    assert (tmp_path / "a" / "rooms.png").stat().st_size > 10_000
    rooms.Net().load_state_dict(torch.load(tmp_path / "a" / "rooms.pt", weights_only=True))


def test_shipped_weights(rooms, monkeypatch, tmp_path, capsys):
    start(rooms, monkeypatch, "--draw", "--out", tmp_path / "b")
    shares = re.findall(r"([\d.]+)% all five", capsys.readouterr().out)
    designer, drawn, regression = map(float, shares)
    assert designer == 100 and drawn > 60 and regression < 10
