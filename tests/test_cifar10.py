"""CIFAR10/ as its users run it, on pictures and archives made here: what differs from MNIST/."""
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from conftest import call, fails, run
from loading import ROOT, load
from PIL import Image

MAIN, VISUAL = "CIFAR10/main.py", "CIFAR10/visual.py"
FIGURES = ["reverse", "forward", "grid", "guidance", "neighbours", "loss"]  # steps: see MNIST's
TINY = ["--width", 8, "--blocks", 1, "--batch-size", 4, "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def digits(n):
    """n real pictures, uint8 (n, 28, 28)."""
    images, *_ = load("MNIST").load_data("embedded")
    return images[::5000 // n, 0].numpy()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two classes, in all the kinds that people have."""
    odd = "\udce9" if sys.platform == "linux" else ""   # a byte that is no character
    root = tmp_path_factory.mktemp("pictures") / f"of $x^${odd}"    # no formula
    for name, part in (("few", digits(20)[:10]), ("many", digits(20)[10:])):
        (root / name).mkdir(parents=True)
        for i, digit in enumerate(part):
            grey = Image.fromarray(digit).resize((40 + 7 * i, 60))
            kind, suffix = [("RGB", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png")][i % 4]
            grey.convert(kind).save(root / name / f"{i}.{suffix}")
    return root


@pytest.fixture(scope="module")
def dry(tmp_path_factory, pictures):
    """The folder of a dry run on these pictures."""
    out = tmp_path_factory.mktemp("dry") / "entra\u00eenement"
    process = run(MAIN, "--dry-run", "--data", pictures, "--out", out,
                  env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert "20 pictures in 2 classes" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("next: python CIFAR10/visual.py")
    return out


def trial(out, *args):
    return call(MAIN, *TINY, "--data", "made-up", "--out", out, *args)


def read(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b, **tolerance):
    for key in ("model", "ema"):
        torch.testing.assert_close(a[key], b[key], **{"rtol": 0, "atol": 0} | tolerance)


def same_gradients(a, b):
    """As far as bf16 tells: the optimizer's running mean of them."""
    a, b = (torch.cat([state["exp_avg"].flatten() for state in run["optimizer"]["state"].values()])
            for run in (a, b))
    assert (a - b).abs().max() < 0.02 * a.abs().max()


# ---- the two commands ----
def test_figures_from_a_dry_run(dry, pictures, tmp_path):
    process = run(VISUAL, *FIGURES, "--checkpoint", dry / "checkpoint.pt", "--out", tmp_path,
                  "--steps", 2, "--data", pictures)
    assert process.returncode == 0, process.stderr
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(["reverse.gif", *(f"{name}.png" for name in FIGURES)])
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_export_and_the_names_of_the_classes(dry, tmp_path):
    process = call(VISUAL, "--export", tmp_path / "x.npz", "--n", 5, "--steps", 2,
                   "--label", "many", "--checkpoint", dry / "checkpoint.pt")
    assert process.returncode == 0, process.stderr
    made = np.load(tmp_path / "x.npz")
    assert made["images"].shape == (5, 32, 32, 3) and made["labels"].tolist() == [1] * 5
    assert fails(call(VISUAL, "--label", "none", "--checkpoint", dry / "checkpoint.pt"),
                 "few, many")


def test_figures_of_data_with_other_classes_or_too_few_pictures(dry, pictures, tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few/one.png").write_bytes((pictures / "few/1.png").read_bytes())
    for figure, word in (("forward", "class many"), ("neighbours", "three")):
        assert fails(call(VISUAL, figure, "--checkpoint", dry / "checkpoint.pt", "--steps", 1,
                          "--data", tmp_path, "--out", tmp_path / "out"), word)


def test_shipped_weights_draw_pictures_not_noise(tmp_path):
    """pretrained.pt: neighbouring pixels are alike, as in pictures, and no two pictures are."""
    process = run(VISUAL, "--checkpoint", "CIFAR10/pretrained.pt", "--export", tmp_path / "x.npz",
                  "--n", 5)
    assert process.returncode == 0, process.stderr
    made = torch.from_numpy(np.load(tmp_path / "x.npz")["images"]).float()
    for a, b in ((made[:, 1:], made[:, :-1]), (made[:, :, 1:], made[:, :, :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.8  # noise: 0
    assert torch.pdist(made.flatten(1)).min() > 500  # two greys that differ by 9: 500
    assert (ROOT / "CIFAR10/pretrained.pt").stat().st_size <= 24e6


def test_without_a_network_a_dry_run_needs_no_data(tmp_path):
    process = trial(tmp_path, "--dry-run")
    assert process.returncode == 0, process.stderr
    assert "made-up" in read(tmp_path)["data"]


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(pictures, tmp_path):
    args = [*TINY, "--data", pictures, "--steps", 40]
    process = subprocess.Popen([sys.executable, MAIN, *map(str, args), "--out", tmp_path / "a"],
                               cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    seen = b""
    while not re.search(rb"\d( images/s|s/ images)", seen):  # tqdm below 1/s: s/ images
        byte = process.stderr.read(1)
        assert byte, seen
        seen += byte
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and 0 < read(tmp_path / "a")["step"] < 40
    assert call(MAIN, "--resume", "--out", tmp_path / "a").returncode == 0
    assert call(MAIN, *args, "--out", tmp_path / "b").returncode == 0
    same(read(tmp_path / "a"), read(tmp_path / "b"))


def test_it_says_what_the_whole_run_will_take(tmp_path):
    """DDPM's net on a CPU: days, and the flags that make it hours."""
    process = subprocess.Popen([sys.executable, MAIN, "--batch-size", "1", "--data", "made-up",
                                "--steps", "1000000", "--device", "cpu", "--out", tmp_path],
                               cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    lines = []
    while "days" not in "".join(lines):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    process.kill()
    process.communicate()
    said = "".join(lines)
    assert "35,201,155 parameters" in said and "images/s" in said and "--width 32" in said


# ---- the network and the step ----
def test_default_net_is_ddpms():
    main, sizes = load("CIFAR10"), []
    net = main.UNet(3, main.SIZE, 10, main.CHANNELS, main.BLOCKS, main.ATTENTION, main.DROPOUT)
    assert main.CHANNELS == (128, 256, 256, 256) and main.BLOCKS == 2
    parameters = f"{sum(p.numel() for p in net.parameters()):,}"
    assert parameters == "35,205,251" and parameters in (ROOT / "README.md").read_text()
    for module in net.modules():
        if isinstance(module, main.Attention):
            module.register_forward_hook(lambda _, x, output: sizes.append(x[0].shape[-1]))
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32), torch.tensor([5]), torch.tensor([0]))
    assert sizes == [16] * 2 + [4] + [16] * 3  # down, middle, up


def test_accumulation_equals_a_big_batch(tmp_path, capsys):
    main = load("CIFAR10")      # without dropout: its masks depend on the shape of the batch
    settings = {"steps": 4, "minutes": None, "width": 8, "multipliers": [1, 2], "blocks": 1,
                "size": 32, "dropout": 0.0, "lr": 1e-3, "seed": 3, "data": "made-up", "flip": True,
                "compile": False, "sample_steps": 1}
    for name, batch, accumulate in (("a", 8, 1), ("b", 2, 4)):
        (tmp_path / name / "samples").mkdir(parents=True)
        main.train(settings | {"batch_size": batch, "accumulate": accumulate}, None,
                   tmp_path / name, torch.device("cpu"))
        assert f"{batch} images x accumulate {accumulate} x 1 processes = 8" in capsys.readouterr(
            ).out
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    same(a, b, atol=1e-5)
    same_gradients(a, b)
    assert a["step"] == b["step"] == 4
    assert a["history"][-1][2] == pytest.approx(b["history"][-1][2], rel=1e-4)


# ---- several processes ----
def test_two_processes_have_the_gradient_of_the_joint_batch():
    process = subprocess.run([*TORCHRUN, "tests/two_ranks.py"], cwd=ROOT, capture_output=True,
                             text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    alone, together, norm = json.loads(process.stdout.splitlines()[-1])
    assert together == pytest.approx(0, abs=1e-5 * norm) and alone > 0.01 * norm


def test_two_processes_train_one_net_and_one_goes_on(tmp_path):
    for batch, accumulate in ("8", "1"), ("4", "2"):
        command = [*TORCHRUN, MAIN, *TINY, "--data", "made-up", "--out", tmp_path / accumulate,
                   "--steps", "3", "--dropout", "0", "--batch-size", batch,
                   "--accumulate", accumulate]
        process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True,
                                 timeout=240)
        assert process.returncode == 0, process.stderr
        assert (f"{batch} images x accumulate {accumulate} x 2 processes = 16 images"
                in process.stdout)
        assert process.stdout.count("seconds:") == 1 and read(tmp_path / accumulate)["step"] == 3
    same_gradients(read(tmp_path / "1"), read(tmp_path / "2"))
    assert call(MAIN, "--resume", "--steps", 5, "--out", tmp_path / "2").returncode == 0
    assert read(tmp_path / "2")["step"] == 5


def test_a_killed_process_ends_the_others_and_spares_the_checkpoint(tmp_path):
    assert trial(tmp_path, "--steps", 2).returncode == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    process = subprocess.Popen([*TORCHRUN, MAIN, "--resume", "--steps", "99999", "--out", tmp_path],
                               cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen = ""
    while not re.search(r"\d( images/s|s/ images)", seen):
        seen += process.stderr.read(1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True,
                              capture_output=True).stdout.split()
    victim = next(pid for pid in map(int, children)
                  if b"RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read())
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: another process of the run has ended" in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# ---- folders of pictures ----
def test_pictures_of_all_kinds_are_read_and_the_others_counted(pictures, tmp_path, capsys):
    for path in pictures.rglob("*.*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "few/empty.png").touch()
    (tmp_path / "few/text.jpg").write_text("not a picture")
    (tmp_path / "few/notes.txt").write_text("not even called one")
    cut = (tmp_path / "few/0.jpg").read_bytes()
    (tmp_path / "few/cut.jpg").write_bytes(cut[:len(cut) // 2])
    Image.fromarray(np.full((40, 40), 9000, np.uint16)).save(tmp_path / "few/16bits.png")
    Image.new("RGB", (9000, 4000), "red").save(tmp_path / "many/giant.png")
    images, labels, classes, source = load("CIFAR10").load_data(tmp_path)
    assert images.shape == (21, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [10, 11] and classes == ["few", "many"]
    assert "4 of 25" in capsys.readouterr().out and "21 pictures" in source
    assert (images[-1].float().mean((1, 2)) == torch.tensor([255.0, 0, 0])).all()  # the giant


def test_a_centred_square_of_any_size(tmp_path):
    (tmp_path / "one class").mkdir()
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200                             # the middle third is the centred square
    Image.fromarray(stripes).save(tmp_path / "one class/stripes.png")
    images, _, classes, _ = load("CIFAR10").load_data(tmp_path, 64)
    assert images.shape == (1, 3, 64, 64) and (images.float().mean() > 190)
    assert classes == ["one class"]
    (tmp_path / ".empty").mkdir()                       # no class: it has no pictures
    assert load("CIFAR10").load_data(tmp_path)[2] == ["one class"]
    process = trial(tmp_path / "out", "--data", tmp_path, "--size", 16, "--steps", 1)
    assert process.returncode == 0, process.stderr


def test_folders_without_pictures(tmp_path):
    assert fails(trial(tmp_path / "out", "--data", tmp_path / "nowhere", "--steps", 1), "nowhere")
    (tmp_path / "data/a").mkdir(parents=True)
    assert fails(trial(tmp_path / "out", "--data", tmp_path / "data", "--steps", 1), "data")
    (tmp_path / "data/a/x.png").write_text("no picture")
    process = trial(tmp_path / "out", "--data", tmp_path / "data", "--steps", 1)
    assert fails(process, "not one picture") and "1 of 1 files" in process.stdout


# ---- the archive and its mirrors ----
@pytest.fixture(scope="module")
def archive():
    """A tiny cifar-10-python.tar.gz and the MD5s of what it holds: 10 pictures a batch."""
    rng, sums, buffer = np.random.default_rng(0), {}, io.BytesIO()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            content = pickle.dumps(
                {"label_names": list("abcdefghij")} if name == "batches.meta" else
                {"data": rng.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))})
            sums[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue(), sums


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body, way = self.server.body, self.path[1:]
        if way in ("404", "503"):
            return self.send_error(int(way))
        self.send_response(302 if way == "moved" else 200)
        self.send_header("Location", "/good")
        self.send_header("Content-Length", "0" if way == "moved" else str(len(body)))
        self.end_headers()
        if way == "moved":
            return
        if way == "wrong":
            body = body[::-1]
        if way in ("cut", "stall"):
            body = body[:len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if way == "stall":
            self.server.stop.wait(60)

    def log_message(self, *args):
        pass


@pytest.fixture
def cifar(archive, monkeypatch):
    """CIFAR10/main.py made to expect the tiny archive, and a server of it: (module, address)."""
    main, (body, sums) = load("CIFAR10"), archive
    kind = main.torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(main, "ARCHIVE_MD5", hashlib.md5(body).hexdigest())
    monkeypatch.setattr(main, "PATIENCE", 1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.body, server.stop = body, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield main, f"http://127.0.0.1:{server.server_port}/"
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("before", ["404", "503", "wrong", "cut", "stall", "refused"])
def test_a_bad_mirror_is_left_for_a_good_one(cifar, before, tmp_path, monkeypatch, capsys):
    main, address = cifar
    bad = "http://127.0.0.1:9/" if before == "refused" else address + before
    monkeypatch.setattr(main, "MIRRORS", (bad, address + "moved"))
    monkeypatch.setattr(main, "HERE", tmp_path)
    images, labels, classes, source = main.load_data()
    assert images.shape == (50, 3, 32, 32) and labels[:10].tolist() == list(range(10))
    assert classes == list("abcdefghij") and source == "CIFAR-10, 50 training pictures"
    assert capsys.readouterr().out.count("failed") == 1
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "cifar-10-batches-py", main.ARCHIVE]
    monkeypatch.setattr(main, "MIRRORS", ())
    assert torch.equal(main.load_data()[0], images)                     # not downloaded again
    assert torch.equal(main.load_data(tmp_path / "data")[0], images)    # by --data


def test_no_mirror_left_says_what_to_do(cifar, archive, tmp_path, monkeypatch):
    main, address = cifar
    monkeypatch.setattr(main, "MIRRORS", (address + "404", address + "cut"))
    with pytest.raises(main.UserError) as error:
        main.download(tmp_path)
    for word in (main.ARCHIVE, main.ARCHIVE_MD5, str(tmp_path), "170,498,071 bytes", "--data"):
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / main.ARCHIVE).write_bytes(archive[0])                   # the user does so
    main.download(tmp_path)
    assert (tmp_path / "cifar-10-batches-py/data_batch_1").exists()


def test_a_damaged_batch(cifar, tmp_path, monkeypatch):
    main, address = cifar
    monkeypatch.setattr(main, "MIRRORS", (address + "good",))
    main.download(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(b"x")
    with pytest.raises(main.UserError, match="no whole CIFAR-10"):
        main.load_data(tmp_path)


# ---- errors ----
@pytest.mark.parametrize("args", [
    ["--steps", "0"], ["--batch-size", "0"], ["--accumulate", "0"], ["--width", "0"],
    ["--blocks", "0"], ["--multipliers", "1", "0"], ["--size", "30"],
    ["--dropout", "1"], ["--lr", "nan"], ["--minutes", "-3"]])
def test_flags_out_of_range(args, tmp_path):
    assert fails(trial(tmp_path / "out", *args), args[0])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_mnist_here_and_the_reverse(dry, tmp_path):
    process = call("MNIST/main.py", "--dry-run", "--out", tmp_path / "digits")
    assert process.returncode == 0, process.stderr
    for script, path in (("CIFAR10", tmp_path / "digits"), ("MNIST", dry)):
        assert fails(call(f"{script}/visual.py", "--checkpoint", path / "checkpoint.pt"),
                     f"checkpoint of {script}/main.py")
        assert fails(call(f"{script}/main.py", "--resume", "--out", path), "checkpoint.pt")


def test_resume_keeps_the_net_and_the_classes(dry):
    before = (dry / "checkpoint.pt").read_bytes()
    assert fails(call(MAIN, "--resume", "--out", dry, "--width", 16), "--width")
    assert fails(call(MAIN, "--resume", "--out", dry, "--data", "made-up", "--steps", 9), "classes")
    assert (dry / "checkpoint.pt").read_bytes() == before


def test_init_keeps_what_other_classes_can_use(pictures, tmp_path):
    """The shipped weights on a folder of two classes: all of the net but its table of classes."""
    weights = torch.load(ROOT / "CIFAR10/pretrained.pt", weights_only=True)["ema"]
    process = call(MAIN, "--init", "CIFAR10/pretrained.pt", "--data", pictures, "--steps", 1,
                   "--batch-size", 2, "--lr", 1e-8, "--device", "cpu", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    run = read(tmp_path)
    assert run["classes"] == ["few", "many"] and len(run["model"]["label.weight"]) == 3
    for key in weights.keys() - {"label.weight"}:
        torch.testing.assert_close(run["model"][key], weights[key].float(), rtol=0, atol=1e-7)


def test_out_of_memory_names_the_flags(tmp_path):
    limit = resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30)
    process = run(MAIN, "--data", "made-up", "--batch-size", 10**6, "--device", "cpu", "--out",
                  tmp_path, preexec_fn=lambda: resource.setrlimit(*limit))
    assert fails(process, "--batch-size", "--accumulate", "--width")
