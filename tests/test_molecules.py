"""EVERYTHING/molecules.py: symmetries, the measure on molecules made by hand, the script."""
import re
import subprocess
import sys

import pytest
import torch
from loading import ROOT, load

SCRIPT = ROOT / "EVERYTHING/molecules.py"


@pytest.fixture(scope="module")
def molecules():
    return load("EVERYTHING", "molecules")


@pytest.fixture(scope="module")
def net(molecules):
    torch.manual_seed(0)
    net = molecules.Net()
    for p in net.parameters():
        p.data = 0.1 * torch.randn_like(p)  # the last layers start at zero
    return net


@pytest.fixture
def x_t():
    torch.manual_seed(1)
    return torch.randn(4, 6, 1, 9)


def predict(net, x_t):
    with torch.no_grad():
        return net(x_t, torch.tensor([1, 100, 500, 1000]), torch.tensor([-1, 0, 2, 4]))


@pytest.mark.parametrize("mirrored", [False, True])
def test_turning_turns(net, x_t, mirrored):
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    if (turn.det() < 0) != mirrored:
        turn[:, 0] *= -1
    turned = torch.cat([torch.einsum("ij,bjhn->bihn", turn, x_t[:, :3]), x_t[:, 3:]], dim=1)
    before = predict(net, x_t)
    after = predict(net, turned)
    assert before[:, :3].std() > 0.01
    before[:, :3] = torch.einsum("ij,bjhn->bihn", turn, before[:, :3])
    assert torch.allclose(before, after, atol=1e-4)


def test_order_of_atoms(net, x_t):
    order = torch.randperm(9)
    assert torch.allclose(predict(net, x_t[..., order]), predict(net, x_t)[..., order], atol=1e-4)


def chain(n=9, length=1.48):
    """Carbons in a zigzag."""
    angle = 0.615
    x = torch.arange(n) * length * torch.cos(torch.tensor(angle))
    y = torch.arange(n) % 2 * length * torch.sin(torch.tensor(angle))
    return torch.stack([x, y, 0 * x], dim=1)[None], torch.zeros(1, n, dtype=torch.long)


def test_measure_by_hand(molecules):
    def judge(positions, kinds):
        channels = torch.eye(3)[kinds]
        _, valid, rings, _ = molecules.judge(torch.cat([positions, channels], 2).mT[:, :, None])
        return valid.item(), rings.item()

    positions, carbon = chain()
    assert judge(positions, carbon) == (True, 0)

    # oxygen with three bonds, nitrogen too: a branch at the second atom
    branched = positions.clone()
    branched[0, 8] = positions[0, 1] + torch.tensor([0, 1.3, 0.5])
    for kind, good in (0, True), (1, True), (2, False):
        kinds = carbon.clone()
        kinds[0, 1] = kind
        assert judge(branched, kinds) == (good, 0)

    # five bonds at a carbon: two double, and a single one to the branch
    double = branched.clone()
    double[0, 0] += (positions[0, 1] - positions[0, 0]) * 0.14
    double[0, 2:8] += (positions[0, 1] - positions[0, 2]) * 0.14
    assert not judge(double, carbon)[0]

    # two pieces, an overlap, a ring of six with a tail
    pieces = positions.clone()
    pieces[0, 5:, 0] += 1
    assert not judge(pieces, carbon)[0]
    near = positions.clone()
    near[0, 8] = near[0, 7] + torch.tensor([1.04, 0, 0])  # 6 pm too near
    assert not judge(near, carbon)[0]
    ring = positions.clone()
    angles = torch.arange(6) * torch.pi / 3
    ring[0, :6] = 1.54 * torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    ring[0, 6:, 0] = torch.tensor([3.08, 4.62, 6.16])
    ring[0, 6:, 1] = 0
    assert judge(ring, carbon) == (True, 1)


def test_graph_is_of_the_molecule(molecules):
    x_0, rings = molecules.load_data()
    _, valid, found, graph = molecules.judge(x_0)
    order = torch.randperm(9)
    assert valid.all() and (found == rings).all() and len(set(graph.tolist())) > 0.99 * len(x_0)
    assert torch.equal(graph, molecules.judge(x_0[..., order])[3])


@pytest.mark.parametrize("flags, floor", [(["--draw"], 90), (["--minutes", "0.05"], 0)])
def test_script(tmp_path, flags, floor):
    made = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path, *flags], text=True,
                          capture_output=True, check=True)
    assert float(re.search(r"drawn: ([\d.]+)%", made.stdout)[1]) >= floor
    assert (tmp_path / "molecules.png").stat().st_size > 10_000
    assert (tmp_path / "molecules.pt").exists() == (floor == 0)
