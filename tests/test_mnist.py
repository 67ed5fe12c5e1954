"""MNIST/ as its users run it: both commands on real digits, then the mistakes they make."""
import math
import resource
import shlex
import shutil
import signal
import socket
import struct

import numpy as np
import pytest
import torch
from conftest import (FIGURES, NARROW, copied, fails, first_step, read, run, same, start,
                      works)
from loading import load
from PIL import Image

VISUAL = "MNIST/visual.py"
SMALL = ["--data", "embedded", "--batch-size", 8, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A narrow net of ten levels after 150 steps, in a folder with a space in its name."""
    folder = copied(tmp_path_factory.mktemp("my") / "my MNIST", NARROW, ("T = 1000 ", "T = 10 "))
    out = works(folder / "main.py", "--data", "embedded", "--steps", 150)
    assert "5,000 embedded digits" in out
    return folder, out.splitlines()[-1]


# ---- the two commands ----
def test_it_learns_and_says_what_comes_next(trained):
    folder, last = trained
    out, = (folder / "runs").iterdir()
    history = read(out)["history"]
    assert history[-1][2] < 0.8 * history[0][2]
    assert last.startswith("next: ")
    python, script, *args = shlex.split(last.removeprefix("next: "))
    works(script, *args, "grid", "--steps", 2)
    assert python == "python" and (folder / "figures/grid.png").exists()
    said = works(folder / "visual.py", "grid", "--steps", 1)
    assert f"{out.name}/checkpoint.pt, step 150" in said        # the newest by itself


def test_every_figure(trained, tmp_path):
    ours = [part for name in ("__main__", "main") for part in
            ("-W", f"error::DeprecationWarning:{name}")]
    works(*ours, trained[0] / "visual.py", "all", "--out", tmp_path, "--steps", 3, "--data",
          "embedded", env={"MPLBACKEND": "module://nowhere"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FIGURES)
    for name in FIGURES:
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10, name
    with Image.open(tmp_path / "reverse.gif") as gif:   # a whole number of pixels: not sheared
        assert gif.size == (540, 540)
        assert (np.asarray(gif.convert("L"))[20:, 266:280] > 250).mean() > 0.8      # the gap


def test_export_writes_what_a_judge_reads(trained, tmp_path):
    visual = trained[0] / "visual.py"
    for name, seed in (("w1.5", 0), ("w1.0", 50)):
        out = works(visual, "--export", tmp_path / name, "--n", 60, "--steps", 1, "--seed", seed)
        assert str(tmp_path / f"{name}.npz") in out
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("w1.5", "w1.0"))
    assert a["images"].shape == (60, 28, 28) and a["images"].dtype == np.uint8
    assert a["labels"].tolist() == 6 * [*range(10)]
    both = np.concatenate([a["images"], b["images"]])           # drawn in chunks of 50
    assert len(np.unique(both.reshape(120, -1), axis=0)) == 120
    fails(visual, "--export", tmp_path / "w1.0", "--n", 2, words=["w1.0.npz exists"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w1.0.npz", "w1.5.npz"]


def test_shipped_weights_draw_the_digit_asked_for(tmp_path):
    works(VISUAL, "--checkpoint", "MNIST/pretrained.pt", "--export", tmp_path / "x.npz", "--n", 50)
    made = np.load(tmp_path / "x.npz")
    images, labels, *_ = load("MNIST").load_data("embedded")
    means = torch.stack([images[labels == y].float().mean(0).flatten() for y in range(10)])
    # the nearest mean of real digits is mostly that of the class asked for; of real digits: 0.81
    guess = torch.cdist(torch.from_numpy(made["images"]).float().flatten(1), means).argmin(1)
    assert (guess.numpy() == made["labels"]).mean() > 0.6


# ---- runs: the same seed, the same run; interrupted or not; nothing overwritten ----
def test_a_seed_fixes_the_run_and_a_used_folder_stays_as_it_is(quick, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        works(quick, *SMALL, "--steps", 4, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    fails(quick, *SMALL, "--steps", 2, "--out", tmp_path / "a", words=["exists"])
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(quick, tmp_path):
    process = start(quick, *SMALL, "--steps", 200, "--out", tmp_path / "a")
    first_step(process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.splitlines()[-1].startswith("next: ")
    assert 0 < read(tmp_path / "a")["step"] < 200
    shutil.move(tmp_path / "a", tmp_path / "moved")
    works(quick, "--resume", tmp_path / "moved/checkpoint.pt")
    works(quick, *SMALL, "--steps", 200, "--out", tmp_path / "b")
    assert same(read(tmp_path / "moved"), read(tmp_path / "b"))
    works(quick, "--resume", tmp_path / "b/checkpoint.pt")      # nothing left to do
    assert read(tmp_path / "b")["step"] == 200
    longer = read(tmp_path / "b")["seconds"] / 60 + 0.01
    works(quick, "--resume", tmp_path / "b/checkpoint.pt", "--minutes", longer)
    assert read(tmp_path / "b")["args"]["steps"] == math.inf


def test_ctrl_c_saves_when_nobody_reads_any_more(quick, tmp_path):
    """`main.py 2>&1 | tee log` and Ctrl-C, which ends tee too."""
    process = start(quick, *SMALL, "--steps", 100000, "--out", tmp_path / "a")
    first_step(process)
    before = read(tmp_path / "a")["step"]
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    process.stderr.close()
    process.wait(timeout=60)
    assert read(tmp_path / "a")["step"] > before


def test_a_kill_leaves_a_whole_checkpoint_and_a_pipe_shows_each_line(quick, tmp_path):
    process = start(quick, *SMALL, "--steps", 200000, "--out", tmp_path / "a")
    assert "5,000" in process.stdout.readline()
    first_step(process)
    process.kill()
    process.communicate()
    assert read(tmp_path / "a")["step"] == 1            # a new run saves at once


def test_time_and_steps_exclude_each_other(tmp_path):
    fails("MNIST/main.py", "--minutes", 1, "--steps", 1, words=["not allowed with"])
    folder = copied(tmp_path / "mine", NARROW, ("MINUTES = 5.5 ", "MINUTES = 1 / 60 "))
    works(folder / "main.py", *SMALL, "--out", tmp_path / "a")      # a whole number would do too
    assert read(tmp_path / "a")["seconds"] > 1


def test_a_reader_s_own_mistake_keeps_its_traceback(tmp_path):
    for number, mistake in enumerate(("open('gone.txt')", "raise ValueError('mine')")):
        folder = copied(tmp_path / str(number), ("    B = args", f"    {mistake}\n    B = args"))
        code, _, err = run(folder / "main.py", *SMALL, env={})
        assert code and "Traceback" in err and err.splitlines()[-1].endswith(
            ("'gone.txt'", "mine"))


# ---- data ----
@pytest.fixture
def mnist(tmp_path):
    """A small folder in MNIST's layout, of real digits."""
    images, labels, *_ = load("MNIST").load_data("embedded")
    images, labels = images[::50, 0].numpy(), labels[::50].byte().numpy()
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        for kind, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return tmp_path / "data"


def test_a_folder_in_mnist_s_layout_below_home(quick, mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = works(quick, "--data=~/data", "--steps", 2, "--batch-size", 4, "--out=~/out")
    assert "100 digits" in out and (tmp_path / "out/checkpoint.pt").exists()
    images = mnist / "MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1000])
    fails(quick, "--data", mnist, words=[f"no MNIST in {mnist}/MNIST/raw", "unpacked"])
    fails(quick, "--data", tmp_path / "nowhere", words=["nowhere"])


def test_without_a_network_it_trains_on_the_embedded_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    folder = copied(tmp_path / "copy", NARROW, ("setdefaulttimeout(20)", "setdefaulttimeout(2)"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for k, port in enumerate((silent.getsockname()[1], 9)):     # nobody listens at 9
            for kind in ("http_proxy", "https_proxy"):
                monkeypatch.setenv(kind, f"http://127.0.0.1:{port}")
            out = works(folder / "main.py", "--steps", 1, "--batch-size", 4, "--out",
                        tmp_path / f"run{k}")       # both may begin in one second
            assert "training on the 5,000 embedded digits" in out
            assert (tmp_path / f"run{k}/checkpoint.pt").exists()


def test_bad_checkpoints(quick, trained, tmp_path):
    good = next((trained[0] / "runs").glob("*/checkpoint.pt"))
    checkpoint = torch.load(good, weights_only=True)
    bad = {name: tmp_path / f"{name}.pt" for name in ("missing", "cut", "weights", "nets")}
    bad["cut"].write_bytes(good.read_bytes()[:-5000])
    torch.save({"ema": checkpoint["ema"]}, bad["weights"])
    checkpoint["config"]["net"]["channels"] = 8, 16, 32
    torch.save(checkpoint, bad["nets"])
    for name, reason in (("missing", "No such file"), ("cut", "RuntimeError"),
                         ("weights", "KeyError('config')"), ("nets", "size mismatch")):
        fails(trained[0] / "visual.py", "--checkpoint", bad[name], words=[str(bad[name]), reason])
    fails(quick, "--resume", bad["nets"], words=["size mismatch"])
    fails(quick, "--resume", "MNIST/pretrained.pt", words=["not a run"])
    fails(quick, "--resume", good, "--steps", 200, words=["trained with T 10, here it is 20"])


def test_a_loss_that_is_not_finite_or_a_full_disk_spare_the_checkpoint(quick, tmp_path):
    works(quick, *SMALL, "--steps", 2, "--out", tmp_path / "run")
    path = tmp_path / "run/checkpoint.pt"
    before = path.read_bytes()
    limit = resource.RLIMIT_FSIZE, (100_000, 100_000)   # writing more fails as on a full disk
    fails(quick, "--resume", path, "--steps", 4, words=[path.name],
          preexec_fn=lambda: resource.setrlimit(*limit))
    fails(quick, "--resume", path, "--steps", 60, "--lr", "1e30", words=["not finite"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("args", [
    "--steps 0", "--minutes nan", "--minutes inf", "--batch-size 0", "--lr -1", "--lr nan",
    "--data=", "--resume=", "--device abacus", "--out /dev/null/x"])
def test_flags_out_of_range(quick, args):
    fails(quick, *SMALL, *args.split())


@pytest.mark.parametrize("args", [
    "--steps 0", "--label 11", "--guidance nan", "--eta 2", "nonsense",
    "--export /dev/null/x --n 2 --steps 1"])
def test_figure_flags_out_of_range(args):
    fails(VISUAL, *args.split())
