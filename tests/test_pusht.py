"""PUSHT/: its world against what physics says, its expert, and both commands as users run them."""
import math
import signal

import numpy as np
import pytest
import torch
from conftest import copied, fails, first_step, read, same, start, works
from loading import ROOT, load
from PIL import Image

MAIN, VISUAL = "PUSHT/main.py", "PUSHT/visual.py"
SMALL = ["--batch-size", 32, "--episodes", 30, "--device", "cpu"]


@pytest.fixture(scope="module")
def main():
    return load("PUSHT")


@pytest.fixture(scope="module")
def world(main):
    return main.world


def random(world, n, seed=0):
    return world.starts(n, torch.Generator().manual_seed(seed))


def test_a_push_through_the_centre_only_moves(world):
    pose = torch.tensor([[0.3, -0.2, 0.7]])
    ends = torch.tensor([[[0.0, world.BAR[3] + world.RADIUS], [0.0, world.BAR[3]]]])
    disc, command = world.to_world(ends, pose).unbind(1)
    after, _ = world.step(pose, disc, command)
    torch.testing.assert_close(after[:, :2] - pose[:, :2], command - disc, atol=1e-4, rtol=0)
    assert abs(after[0, 2] - 0.7) < 1e-5


def test_coverage_and_frames(main, world):
    poses = torch.tensor([[0.0, 0, 0], [0, 0, 2 * math.pi], [9, 0, 0], [0.03, 0, 0], [0, 0.03, 0]])
    stem_and_bar = torch.tensor([1, 1, 0, 1 - 0.03 * 4 / 7, 1 - 0.03 * 4 / 7])  # what sticks out
    torch.testing.assert_close(world.coverage(poses), stem_and_bar, atol=1e-4, rtol=0)
    assert world.C2 == pytest.approx(1.770, abs=2e-3) and world.GRID.mean(0).abs().max() < 1e-6
    pose, disc = random(world, 50)
    points = torch.randn(50, 7, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(world.to_world(world.to_block(points, pose), pose), points)
    y = main.observe(pose, disc, disc)
    back = world.to_world(4 * torch.stack([y[:, :2], y[:, 4:6]], 1), pose)
    torch.testing.assert_close(back, torch.stack([disc, 0 * disc], 1), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A copy with 30 levels, a narrow net and short episodes, after 150 steps of each kind."""
    folder = copied(tmp_path_factory.mktemp("a reader") / "my PUSHT", ("T = 1000 ", "T = 30 "),
                    ("32, 64, 64", "8, 16, 16"), ("starts(200", "starts(9"), source="PUSHT")
    path = folder / "world.py"
    path.write_text(path.read_text().replace("STEPS = 300", "STEPS = 32"))
    return folder, [works(folder / "main.py", *SMALL, "--steps", 150, *kind)
                    for kind in ([], ["--regression"])]


def test_it_learns_says_its_success_and_draws_every_figure(trained, tmp_path):
    folder, outs = trained
    runs = sorted((folder / "runs").iterdir())
    for out, run in zip(outs, runs):
        history = read(run)["history"]
        assert "unseen starts" in out and history[-1][2] < 0.9 * history[0][2]
    out = works(folder / "visual.py", "all", "--out", tmp_path, "--steps", 3, "--starts", 4)
    for kind, path in zip(("checkpoint", "regression"), runs):
        assert f"{kind}: {path.name}/checkpoint.pt, step 150" in out
    assert len([*tmp_path.iterdir()]) == 6 + 2                          # figures and gifs
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 10, path
    works(folder / "visual.py", "--export", tmp_path / "x.npz", "--n", 5, "--steps", 2)
    made = np.load(tmp_path / "x.npz")
    assert made["observations"].shape == (5, 8) and made["plans"].shape == (5, 16, 2)


def test_stopped_and_resumed_is_the_same_run_and_broken_files_are_one_line(trained, tmp_path):
    script, small = trained[0] / "main.py", [*SMALL, "--steps", 80]
    process = start(script, *small, "--out", tmp_path / "a")
    first_step(process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "unseen" not in out and "next" in out
    works(script, "--resume", tmp_path / "a/checkpoint.pt")
    works(script, *small, "--out", tmp_path / "b")
    assert same(*(torch.load(tmp_path / name / "checkpoint.pt") for name in "ab"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a/checkpoint.pt").read_bytes()[:-5000])
    fails(VISUAL, "--checkpoint", tmp_path / "cut.pt", words=["cut.pt"])
    fails(MAIN, "--resume", "PUSHT/pretrained.pt", words=["not a run"])
    fails(MAIN, "--episodes", 0)
    fails(VISUAL, "--driven", 17)


def test_recorded_episodes_are_read(trained, tmp_path):
    script, file = trained[0] / "main.py", tmp_path / "mine.npz"
    parts = load("PUSHT", "world").demonstrations(3)
    parts = [part[:, :32] for part in parts[:3]] + [torch.tensor([32, 20, 16])]
    names = "poses", "discs", "commands", "ends"
    np.savez(file, **dict(zip(names, parts)))
    small = ["--data", file, "--batch-size", 8, "--device", "cpu"]
    out = works(script, *small, "--steps", 4, "--out", tmp_path / "a")
    assert "3 demonstrations, 23 plans, 0.0% beyond REACH" in out
    works(script, "--resume", tmp_path / "a/checkpoint.pt", "--steps", 6)
    assert read(tmp_path / "a")["step"] == 6
    out = works(script, *small, "--steps", 1, "--episodes", 2, "--out", tmp_path / "b",
                "--init", tmp_path / "a/checkpoint.pt")
    assert "5 demonstrations" in out
    works(trained[0] / "visual.py", "copying", "--checkpoint", tmp_path / "a/checkpoint.pt")
    fails(script, *small, "--init", "PUSHT/pretrained.pt", words=["with T 1000, here it is 30"])
    for wrong in ([parts[1], *parts[1:]], [*parts[:3], torch.tensor([32, 20, 15])],
                  [parts[0] / 0, *parts[1:]]):
        np.savez(file, **dict(zip(names, wrong)))
        fails(script, *small, words=["mine.npz holds no episodes of 16 steps"])
    fails(script, "--data", tmp_path / "nowhere", words=["nowhere"])


def test_another_horizon_or_reach_is_never_used_unsaid(trained, tmp_path):
    run = min((trained[0] / "runs").iterdir()) / "checkpoint.pt"
    for old, new in (("HORIZON = 16", "HORIZON = 8"), ("REACH = 5.0", "REACH = 4.0")):
        folder = copied(tmp_path / new, ("T = 1000 ", "T = 30 "), ("32, 64, 64", "8, 16, 16"),
                        (old, new), source="PUSHT")
        fails(folder / "main.py", "--resume", run, "--steps", 300, "--device", "cpu",
              words=["trained with " + old.split()[0].lower()])
        fails(folder / "visual.py", "--checkpoint", run, words=[old.split()[0].lower()])


def test_a_policy_of_another_block_is_refused(trained, tmp_path):
    run = min((trained[0] / "runs").iterdir()) / "checkpoint.pt"
    folder = copied(tmp_path / "L", ("T = 1000 ", "T = 30 "), ("32, 64, 64", "8, 16, 16"),
                    source="PUSHT")
    code = (folder / "world.py").read_text()
    (folder / "world.py").write_text(code.replace("STEM = (-0.5, 0.5,", "STEM = (-2.0, -1.0,"))
    fails(folder / "visual.py", "--checkpoint", run, words=["trained with world"])
    fails(folder / "main.py", "--init", run, *SMALL, words=["trained with world"])


def test_shipped_weights_push_and_the_average_does_not(main, world):
    shares = []
    for name in ("pretrained", "regression"):
        _, net = main.load_checkpoint(ROOT / "PUSHT" / f"{name}.pt")
        frames = main.drive(net, *random(world, 16, seed=5), main.noise_schedule("cosine", 1000),
                            generator=torch.Generator(), steps=5 if name == "pretrained" else 1)
        best = torch.stack([world.coverage(pose) for (pose, *_), _ in zip(frames, range(160))])
        shares.append((best.amax(0) >= 0.9).float().mean().item())
    assert shares[0] >= 0.6 and shares[0] >= shares[1] + 0.2
