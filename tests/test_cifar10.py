"""CIFAR10/ as its users run it, on pictures and archives made here: what differs from MNIST/."""
import functools
import hashlib
import http.server
import io
import pickle
import shutil
import socket
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import FIGURES, copied, fails, read, works
from loading import ROOT, load
from PIL import Image

MAIN = "CIFAR10/main.py"
SMALL = ["--batch-size", 4, "--device", "cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """CIFAR10/ in another folder, its nets narrow, its T small: trains and draws in seconds."""
    return copied(tmp_path_factory.mktemp("copy") / "CIFAR10", ("T = 1000 ", "T = 20 "),
                  ("(32, 64, 128, 128)", "(8, 8, 8, 8)"), source="CIFAR10")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two classes, in all the kinds that people have."""
    root = tmp_path_factory.mktemp("pictures") / "of $x^$"      # no formula
    digits = load("MNIST").load_data("embedded")[0][::250, 0].numpy()
    for k, digit in enumerate(digits):
        path = root / ("few" if k < 6 else "many") / str(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(digit).resize((40 + 7 * k, 60))
        kind, suffix = [("RGB", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "webp")][k % 4]
        grey.convert(kind).save(path.with_suffix(f".{suffix}"))
    return root


# ---- the two commands ----
def test_every_figure_and_export(narrow, pictures, tmp_path):
    said = works(narrow / "main.py", *SMALL, "--data", pictures, "--steps", 3)
    assert "few 6, many 14" in said
    works(narrow / "visual.py", "all", "--steps", 2)
    assert sorted(path.name for path in (narrow / "figures").iterdir()) == sorted(FIGURES)
    works(narrow / "visual.py", "--export", tmp_path / "x.npz", "--n", 5, "--label", "many",
          "--steps", 2)
    made = np.load(tmp_path / "x.npz")
    assert made["images"].shape == (5, 32, 32, 3) and made["labels"].tolist() == [1] * 5
    fails(narrow / "visual.py", "--label", "none", words=["few, many"])


# ---- the network and the step ----
@pytest.mark.parametrize("processes", [1, 2])
def test_accumulation_equals_a_big_batch(narrow, pictures, tmp_path, processes):
    script = [narrow / "main.py"] if processes == 1 else [*TORCHRUN, narrow / "main.py"]
    for name, batch, accumulate in (("a", 8, 1), ("b", 2, 4)):
        out = works(*script, "--data", pictures, "--device", "cpu", "--steps", 3, "--batch-size",
                    batch, "--accumulate", accumulate, "--out", tmp_path / name)
        assert f"{batch} images x {accumulate} x {processes}" in out
        assert out.count("next: ") == 1
    # as far as bf16 tells: the optimizer's running mean of the gradients
    a, b = (torch.cat([state["exp_avg"].flatten() for state in
                       read(tmp_path / name)["optimizer"]["state"].values()]) for name in "ab")
    assert (a - b).abs().max() < 0.02 * a.abs().max()
    works(narrow / "main.py", "--resume", tmp_path / "b/checkpoint.pt", "--steps", 4)


# ---- folders of pictures ----
def test_what_is_no_picture_is_skipped_and_said(pictures, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    (root / "beside.png").write_bytes((root / "few/1.png").read_bytes())
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints/1.png").write_bytes((root / "few/1.png").read_bytes())
    (root / "few/empty.png").touch()
    (root / "few/cut.jpg").write_bytes((root / "few/0.jpg").read_bytes()[:500])
    (root / "phone").mkdir()
    (root / "phone/photo.heic").write_bytes(b"....ftypheic")
    Image.fromarray(np.full((40, 40), 9000, np.uint16)).save(root / "few/16bits.png")
    Image.new("RGBA", (900, 400), (255, 0, 0, 0)).save(root / "many/transparent.png")
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200                             # the middle third is the centred square
    Image.fromarray(stripes).save(root / "few/stripes.png")
    images, labels, classes, source = load("CIFAR10").load_data(root, 64)
    assert images.shape == (22, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [7, 15] and classes == ["few", "many"]
    said = capsys.readouterr().out
    assert "files left out: 5" in said and "beside.png: in no sub-folder" in said
    assert "few 7, many 15" in source and images[6].float().mean() > 190
    assert (images[-1] == 255).all()                    # seen through: white
    for size in (30, 0, -8):
        fails(MAIN, "--size", size, words=["multiple of 8"])
    for folder in (root / "phone", root / "nowhere"):
        fails(MAIN, "--data", folder, words=[str(folder)])


# ---- the archive and its mirrors ----
@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR10/main.py made to expect a tiny archive, and the address of a host that has it."""
    main, rng, sums = load("CIFAR10"), np.random.default_rng(0), {}
    kind, archive = main.torchvision.datasets.CIFAR10, tmp_path / "good"
    with tarfile.open(archive, mode="w:gz") as tar:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
            content = pickle.dumps(
                {"label_names": list("abcdefghij")} if name == "batches.meta" else
                {"data": rng.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))})
            sums[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    for name, value in (("train_list", [[name, sums[name]] for name, _ in kind.train_list]),
                        ("test_list", [[name, sums[name]] for name, _ in kind.test_list]),
                        ("meta", kind.meta | {"md5": sums["batches.meta"]}), ("tgz_md5", md5)):
        monkeypatch.setattr(kind, name, value)
    wait = main.socket.setdefaulttimeout                # less patience than twenty seconds
    monkeypatch.setattr(main.socket, "setdefaulttimeout", lambda seconds: wait(seconds / 30))
    monkeypatch.setattr(main, "HERE", tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield main, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    wait(None)


@pytest.mark.parametrize("before", ["wrong", "cut", "silent", "refused"])
def test_a_bad_mirror_is_left_for_a_good_one(cifar, before, tmp_path, monkeypatch, capsys):
    main, address = cifar
    content = (tmp_path / "good").read_bytes()
    (tmp_path / "wrong").write_bytes(content[::-1])
    (tmp_path / "cut").write_bytes(content[:-1000])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        bad = {"silent": f"http://127.0.0.1:{silent.getsockname()[1]}/",
               "refused": "http://127.0.0.1:9/"}.get(before, address + before)
        monkeypatch.setattr(main, "MIRRORS", (bad, address + "good"))
        images, labels, classes, source = main.load_data()
    assert images.shape == (50, 3, 32, 32) and labels[:10].tolist() == list(range(10))
    assert classes == list("abcdefghij") and source == "CIFAR-10, 50 pictures"
    assert f"no CIFAR-10 from {bad}" in capsys.readouterr().out
    assert (tmp_path / "data/cifar-10-batches-py").is_dir()
    monkeypatch.setattr(main, "MIRRORS", (bad,))
    assert torch.equal(main.load_data(tmp_path / "data")[0], images)    # by --data, not again
    (tmp_path / "data/cifar-10-batches-py/data_batch_2").write_bytes(b"x")
    (tmp_path / "data/cifar-10-python.tar.gz").unlink()
    with pytest.raises(main.UserError, match="no whole CIFAR-10 in .*: unpack cifar-10-python"):
        main.load_data()


# ---- checkpoints ----
def test_init_keeps_what_other_classes_can_use(pictures, tmp_path):
    """The shipped weights on a folder of two classes: each class begins as any class."""
    weights = torch.load(ROOT / "CIFAR10/pretrained.pt", weights_only=True)["ema"]
    works(MAIN, "--init", "CIFAR10/pretrained.pt", "--data", pictures, "--steps", 1, *SMALL,
          "--lr", 1e-8, "--out", tmp_path / "run")
    run = read(tmp_path / "run")
    assert run["config"]["classes"] == ["few", "many"]
    weights["label.weight"] = weights["label.weight"][:1].repeat(3, 1)
    for key in weights:
        torch.testing.assert_close(run["model"][key], weights[key].float(), rtol=0, atol=1e-7)


def test_init_of_another_meaning_is_refused(narrow, pictures, tmp_path):
    fails(narrow / "main.py", "--init", "CIFAR10/pretrained.pt", "--data", pictures, *SMALL,
          words=["with T 1000, here it is 20"])
    folder = copied(tmp_path / "CIFAR10", ('TARGET = "v" ', 'TARGET = "eps" '), source="CIFAR10")
    fails(folder / "main.py", "--init", "CIFAR10/pretrained.pt", "--data", pictures, *SMALL,
          words=["target v, here it is eps"])
