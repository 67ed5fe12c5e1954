"""MNIST/ as its users run it: both commands on real digits, then each error they can cause."""
import gzip
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import call, fails, run
from loading import ROOT, load

MAIN, VISUAL = "MNIST/main.py", "MNIST/visual.py"
FIGURES = ["reverse.png", "reverse.gif", "forward.png", "grid.png", "steps.png", "guidance.png",
           "neighbours.png", "loss.png"]
SMALL = ["--data", "embedded", "--batch-size", 8, "--device", "cpu"]


def train(out, *args, **options):
    return run(MAIN, *SMALL, "--out", out, *args, **options)


def trial(out, *args):
    return call(MAIN, *SMALL, "--out", out, *args)


def same(a, b):
    """Are two checkpoints equal in everything that the run computes?"""
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (a, b))
    return (all(torch.equal(a[net][key], b[net][key]) for net in ("model", "ema") for key in a[net])
            and [row[2:3] for row in a["history"]] == [row[2:3] for row in b["history"]])


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run, with a narrow net that draws its figures sooner."""
    out = tmp_path_factory.mktemp("dry")
    process = run(MAIN, "--dry-run", "--width", 8, "--out", out)
    assert process.returncode == 0, process.stderr
    return out


@pytest.fixture
def broken(dry, tmp_path):
    """A checkpoint to spoil: call it with a function that changes the dictionary."""
    def spoil(change):
        checkpoint = torch.load(dry / "checkpoint.pt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"
    return spoil


# ---- the two commands ----
def test_a_run_leaves_a_checkpoint_samples_and_the_next_command(dry):
    process = run(MAIN, "--dry-run", "--out", dry / "again")
    assert "5,000 embedded digits" in process.stdout
    assert [line.split(":")[0] for line in process.stdout.splitlines()[-4:]] == [
        "seconds", "loss", "checkpoint", "next"]
    checkpoint = torch.load(dry / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 5 and "embedded" in checkpoint["data"]
    assert (dry / "samples" / "000005.png").stat().st_size > 1000
    assert process.stdout.splitlines()[-1].startswith("next: python MNIST/visual.py")


def test_it_learns_and_outputs_land_beside_the_script(tmp_path):
    """A folder copied elsewhere and run from within: the loss falls well below its start."""
    shutil.copytree(ROOT / "MNIST", tmp_path / "copy", ignore=shutil.ignore_patterns(
        "data", "runs", "dry-run", "figures", "*.pt", "__pycache__"))
    process = subprocess.run([sys.executable, "main.py", "--data", "embedded", "--steps", "150"],
                             cwd=tmp_path / "copy", capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    history = torch.load(tmp_path / "copy/runs/checkpoint.pt", weights_only=True)["history"]
    assert history[-1][2] < 0.8 * history[0][2]
    process = subprocess.run([sys.executable, "visual.py", "grid", "--steps", "2"], text=True,
                             cwd=tmp_path / "copy", capture_output=True)
    assert process.returncode == 0, process.stderr
    assert "runs/checkpoint.pt" in process.stdout and (tmp_path / "copy/figures/grid.png").exists()


def test_every_figure_from_a_dry_run(dry, tmp_path):
    process = run(VISUAL, "all", "--checkpoint", dry / "checkpoint.pt", "--out", tmp_path,
                  "--steps", 3, "--data", "embedded")
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FIGURES)
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_export_writes_what_a_judge_reads(dry, tmp_path):
    for name, options in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--label", 7])):
        process = call(VISUAL, "--export", tmp_path / f"{name}.npz", "--n", 12, "--steps", 2,
                       "--checkpoint", dry / "checkpoint.pt", *options)
        assert process.returncode == 0, process.stderr
    a, b, c, d = (np.load(tmp_path / f"{name}.npz") for name in "abcd")
    assert a["images"].shape == (12, 28, 28) and a["images"].dtype == np.uint8
    assert a["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert d["labels"].tolist() == [7] * 12
    assert (a["images"] == b["images"]).all() and (a["images"] != c["images"]).any()


def test_shipped_weights_draw_the_digit_asked_for(tmp_path):
    """pretrained.pt: the nearest mean of real digits is mostly that of the class asked for."""
    process = run(VISUAL, "--checkpoint", "MNIST/pretrained.pt", "--export", tmp_path / "x.npz",
                  "--n", 50)
    assert process.returncode == 0, process.stderr
    made = np.load(tmp_path / "x.npz")
    images, labels, *_ = load("MNIST").load_data("embedded")
    means = torch.stack([images[labels == y].float().mean(0).flatten() for y in range(10)])
    guess = torch.cdist(torch.from_numpy(made["images"]).float().flatten(1), means).argmin(1)
    assert (guess.numpy() == made["labels"]).mean() > 0.6  # real digits: 0.81
    assert (ROOT / "MNIST/pretrained.pt").stat().st_size <= 3e6


# ---- the same seed, the same run; interrupted or not ----
def test_a_seed_fixes_the_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert trial(tmp_path / name, "--steps", 8, "--seed", seed).returncode == 0
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


def start(out, *args, script=MAIN):
    """A training run in the background, returned once its first step is done."""
    command = [sys.executable, script, *SMALL, "--out", out, *args]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
    seen = b""
    while not re.search(rb"\d( images/s|s/ images)", seen):  # tqdm below 1/s: s/ images
        byte = process.stderr.read(1)
        assert byte, seen
        seen += byte
    return process


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(tmp_path):
    process = start(tmp_path / "a", "--steps", 80)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["step"]
    assert 0 < stopped < 80
    resumed = call(MAIN, "--resume", "--out", tmp_path / "a")
    assert resumed.returncode == 0 and f"at step {stopped}" in resumed.stdout
    assert trial(tmp_path / "b", "--steps", 80).returncode == 0
    assert same(tmp_path / "a", tmp_path / "b")


def test_resume_after_a_machine_that_laid_memory_out_otherwise(tmp_path):
    assert trial(tmp_path / "a", "--steps", 4).returncode == 0
    checkpoint = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    for state in checkpoint["optimizer"]["state"].values():
        for key in [key for key in state if state[key].ndim == 4]:
            last = state[key].is_contiguous(memory_format=torch.channels_last)
            state[key] = state[key].contiguous(
                memory_format=torch.contiguous_format if last else torch.channels_last)
    checkpoint["optimizer"]["param_groups"][0]["fused"] = False
    (tmp_path / "b").mkdir()
    torch.save(checkpoint, tmp_path / "b/checkpoint.pt")
    for name in "ab":
        assert call(MAIN, "--resume", "--steps", 8, "--out", tmp_path / name).returncode == 0
    assert same(tmp_path / "a", tmp_path / "b")


def test_kill_leaves_a_whole_checkpoint(tmp_path):
    code = (ROOT / MAIN).read_text().replace("SAVE_SECONDS = 30 ", "SAVE_SECONDS = 1 ")
    (tmp_path / "main.py").write_text(code)             # the same, in more of a hurry
    shutil.copy(ROOT / "MNIST/digits.png", tmp_path)
    process = start(tmp_path / "out", "--steps", 20000, "--batch-size", 1,
                    script=tmp_path / "main.py")
    while not list((tmp_path / "out/samples").glob("*.png")):
        assert process.stderr.read(1)
    process.kill()
    process.communicate()
    step = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["step"]
    assert call(MAIN, "--resume", "--steps", step + 5, "--out", tmp_path / "out").returncode == 0


def test_minutes_are_kept_and_an_old_checkpoint_too(tmp_path):
    process = train(tmp_path, "--minutes", 0.05)
    assert process.returncode == 0, process.stderr
    assert 3 <= torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"][-1][1] < 10
    again = call(MAIN, "--resume", "--out", tmp_path)   # a finished run has nothing left to do
    assert again.returncode == 0, again.stderr
    assert trial(tmp_path, "--steps", 2).returncode == 0
    assert len(list(tmp_path.glob("checkpoint*.pt"))) == 2
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["000002.png"]
    assert [*next(tmp_path.glob("samples-*")).iterdir()]
    assert fails(trial(tmp_path, "--steps", 2, "--data", tmp_path / "nowhere"), "nowhere")
    assert len(list(tmp_path.glob("checkpoint*.pt"))) == 2  # a mistake moves nothing


def test_resume_and_init_keep_the_net(dry):
    assert fails(call(MAIN, "--resume", "--width", 8, "--out", dry), "--width")
    assert fails(trial(dry / "out", "--init", dry / "checkpoint.pt", "--width", 8), "--width")
    assert fails(trial(dry / "out", "--init", dry / "nowhere.pt"), "nowhere.pt")


def test_init_begins_with_the_weights_but_a_new_run(tmp_path):
    weights = torch.load(ROOT / "MNIST/pretrained.pt", weights_only=True)
    process = trial(tmp_path, "--init", "MNIST/pretrained.pt", "--steps", 1, "--lr", 1e-8)
    assert process.returncode == 0, process.stderr
    run = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert run["step"] == 1 and run["config"]["net"] == weights["config"]["net"]
    for key, value in weights["ema"].items():
        torch.testing.assert_close(run["model"][key], value.float(), rtol=0, atol=1e-7)


# ---- data ----
def write_idx(folder, images, labels, name="train"):
    folder.mkdir(parents=True, exist_ok=True)
    n, h, w = images.shape
    for kind, header, array in (("images-idx3", (0x803, n, h, w), images),
                                ("labels-idx1", (0x801, len(labels)), labels)):
        (folder / f"{name}-{kind}-ubyte").write_bytes(
            struct.pack(f">{len(header)}I", *header) + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    """A small folder in MNIST's layout, of real digits."""
    images, labels, *_ = load("MNIST").load_data("embedded")
    for name in ("train", "t10k"):
        write_idx(tmp_path / "MNIST/raw", images[::50, 0].numpy(), labels[::50].byte().numpy(),
                  name)
    return tmp_path


def test_embedded_digits_are_the_real_ones_in_order():
    images, labels, _, source = load("MNIST").load_data("embedded")
    assert images.shape == (5000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [500] * 10 and "5,000" in source
    means = torch.stack([images[labels == y].float().mean(0).flatten() for y in range(10)])
    guess = torch.cdist(images.float().flatten(1), means).argmin(1)
    assert (guess == labels).float().mean() > 0.8


def test_a_folder_in_mnist_layout(mnist, tmp_path):
    process = run(MAIN, "--data", mnist, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "out")
    assert process.returncode == 0 and "100 training digits" in process.stdout, process.stderr


def cut(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1000])


def foreign(raw):
    (raw / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"not a digit" * 1000))


def wrong_size(raw):
    write_idx(raw, np.zeros((9, 32, 32), np.uint8), np.zeros(9, np.uint8))


def wrong_labels(raw):
    write_idx(raw, np.zeros((9, 28, 28), np.uint8), np.full(9, 77, np.uint8))


@pytest.mark.parametrize("spoil", [cut, foreign, wrong_size, wrong_labels])
def test_damaged_data(mnist, tmp_path, spoil):
    spoil(mnist / "MNIST/raw")
    assert fails(call(MAIN, "--data", mnist, "--steps", 2, "--out", tmp_path / "out"), "MNIST/raw")


def test_no_such_data_folder(tmp_path):
    assert fails(trial(tmp_path, "--data", tmp_path / "nowhere"), "nowhere")


def test_altered_digits_png(tmp_path):
    shutil.copy(ROOT / MAIN, tmp_path)
    data = bytearray((ROOT / "MNIST/digits.png").read_bytes())
    data[5000] ^= 1
    (tmp_path / "digits.png").write_bytes(data)
    assert fails(call(tmp_path / "main.py", "--dry-run"), "digits.png")


@pytest.fixture
def silent_host():
    """The address of a server that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def accept():
        try:
            while True:
                kept.append(server.accept())
        except OSError:
            pass
    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


def proxy(address):
    return {f"{name}_proxy": address for name in ("http", "https")} | {"no_proxy": ""}


def test_a_host_that_hangs_is_given_up(silent_host, tmp_path, monkeypatch):
    for name, value in proxy(silent_host).items():
        monkeypatch.setenv(name, value)
    assert load("MNIST").download(tmp_path / "data", patience=5) is False
    assert list((tmp_path / "data").iterdir()) == []  # nothing half-written is left


def test_a_dead_host_means_the_embedded_digits_and_says_so(tmp_path):
    shutil.copy(ROOT / MAIN, tmp_path)
    shutil.copy(ROOT / "MNIST/digits.png", tmp_path)
    process = run(tmp_path / "main.py", "--steps", 2, "--batch-size", 4,
                  env=os.environ | proxy("http://127.0.0.1:9"))
    assert process.returncode == 0, process.stderr
    assert "could not be downloaded" in process.stdout
    checkpoint = torch.load(tmp_path / "runs/checkpoint.pt", weights_only=True)
    assert "embedded" in checkpoint["data"] and checkpoint["settings"]["data"] == "embedded"


# ---- checkpoints ----
class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["missing", "truncated", "text", "pickle", "torch pickle", "no ema",
                                 "no classes", "few classes", "other history", "other shape",
                                 "other kind", "not finite",
                                 "not a dict"])
def test_bad_checkpoints(how, dry, broken, tmp_path):
    path, marker = tmp_path / "bad.pt", tmp_path / "marker"
    if how == "truncated":
        path.write_bytes((dry / "checkpoint.pt").read_bytes()[:-5000])
    elif how == "text":
        path.write_text("hello")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    elif how == "torch pickle":
        torch.save({"config": Payload(marker)}, path)
    elif how == "no ema":
        path = broken(lambda checkpoint: checkpoint.pop("ema"))
    elif how == "no classes":
        path = broken(lambda checkpoint: checkpoint.pop("classes"))
    elif how == "few classes":
        path = broken(lambda checkpoint: checkpoint["classes"].pop())
    elif how == "other history":
        path = broken(lambda checkpoint: checkpoint.update(history=[1, 2, 3]))
    elif how == "not finite":
        path = broken(lambda checkpoint: next(iter(checkpoint["ema"].values())).fill_(np.nan))
    elif how == "other shape":
        path = broken(lambda checkpoint: checkpoint["config"]["net"].update(channels=(8, 8, 8)))
    elif how == "other kind":
        path = broken(lambda checkpoint: checkpoint["config"].update(target="nonsense"))
    elif how == "not a dict":
        torch.save([1, 2, 3], path)
    assert fails(call(VISUAL, "--checkpoint", path, "--out", tmp_path / "figures"), path.name)
    if path.exists():
        before = path.rename(tmp_path / "checkpoint.pt").read_bytes()
        assert fails(call(MAIN, "--resume", "--out", tmp_path), "checkpoint.pt")
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not marker.exists()


def test_resuming_weights_without_a_run(broken):
    path = broken(lambda checkpoint: checkpoint.pop("optimizer"))
    assert fails(call(MAIN, "--resume", "--out", path.parent), "resume")


def test_resuming_a_run_with_a_damaged_part(broken):
    path = broken(lambda checkpoint: checkpoint.update(optimizer={}))
    before = path.read_bytes()
    assert fails(call(MAIN, "--resume", "--steps", 9, "--out", path.parent), "cannot be resumed")
    assert path.read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoint(broken):
    def poison(checkpoint):
        next(iter(checkpoint["model"].values())).fill_(float("nan"))
        checkpoint["settings"]["steps"] = 60
    path = broken(poison)
    before = path.read_bytes()
    assert fails(call(MAIN, "--resume", "--out", path.parent), "not finite")
    assert path.read_bytes() == before


def test_a_full_disk_spares_the_checkpoint(dry, tmp_path):
    shutil.copy(dry / "checkpoint.pt", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = resource.RLIMIT_FSIZE, (100_000, 100_000)  # writing more fails as on a full disk
    process = run(MAIN, "--resume", "--steps", 7, "--out", tmp_path,
                  preexec_fn=lambda: resource.setrlimit(*limit))
    assert fails(process, "checkpoint")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# ---- flags ----
@pytest.mark.parametrize("args", [
    ["--steps", "0"], ["--steps", "1.5"], ["--minutes", "-1"], ["--minutes", "nan"],
    ["--batch-size", "0"], ["--lr", "0"], ["--lr", "inf"], ["--seed", "-1"],
    ["--device", "abacus"], ["--nonsense"]])
def test_flags_of_main_out_of_range(args, tmp_path):
    assert fails(trial(tmp_path / "out", *args), args[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [
    ["--steps", "0"], ["--steps", "1001"], ["--label", "11"], ["--guidance", "-1"],
    ["--guidance", "nan"], ["--guided", "0", "2"], ["--guided", "0.6", "0.5"],
    ["--eta", "2"], ["--n", "0"], ["nonsense"],
    ["--export", "no/such/folder/x.npz"], ["--export", "MNIST/pretrained.pt"],
    ["all", "nonsense"]])
def test_flags_of_visual_out_of_range(args, dry, tmp_path):
    assert fails(call(VISUAL, "--checkpoint", dry / "checkpoint.pt", "--out", tmp_path / "out",
                     *args), args[-1])


def test_figures_do_not_need_the_backend_that_the_environment_names(dry, tmp_path):
    process = run(VISUAL, "loss", "--checkpoint", dry / "checkpoint.pt", "--out", tmp_path,
                  env=os.environ | {"MPLBACKEND": "nonsense"})
    assert process.returncode == 0 and (tmp_path / "loss.png").exists(), process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("script", [MAIN, VISUAL])
def test_cuda_where_there_is_none(script):
    assert fails(call(script, "--device", "cuda"), "cuda")


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert fails(trial(tmp_path / "file/out", "--steps", 2), "file/out")
    (tmp_path / "file").unlink()
