"""DRUMS/: sounds as pictures and back, and files of all kinds."""
import math
import signal
import struct
import wave

import numpy as np
import pytest
import torch
from conftest import copied, fails, first_step, read, same, start, works
from loading import ROOT, load
from PIL import Image

HITS = ROOT / "DRUMS/hits"
FILES = ["reverse.png", "reverse.gif", "reverse.wav", "grid.png", "sounds.png", "steps.png",
         "guidance.png", "neighbours.png", "loss.png"]
SMALL = ["--batch-size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def sound():
    return load("DRUMS", "sound")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A reader's sounds, two a class."""
    root = tmp_path_factory.mktemp("sounds") / "mine"
    for name in ("low", "high"):
        (root / name).mkdir(parents=True)
    for k, path in enumerate(sorted(HITS.glob("[kt]*/*_[12].wav"))[:4]):
        (root / ("low" if k < 2 else "high") / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """DRUMS/ in another folder, its net narrow, its T 20."""
    return copied(tmp_path_factory.mktemp("copy") / "DRUMS", ("T = 1000 ", "T = 20 "),
                  ("(16, 32, 48, 64)", "(8, 8, 8, 8)"), ("PICTURES = 6000", "PICTURES = 400"),
                  source="DRUMS")


# ---- sounds ----
def test_from_picture_to_sound_to_picture(sound):
    hits = [sound.read_wav(path) for path in sorted(HITS.glob("*/*.wav"))[::6]]
    before = sound.to_picture(hits)
    after = sound.to_picture(sound.to_sound(before))
    loud = before > 255 * (1 - 60 / sound.DECIBELS)
    difference = (after.float() - before.float()).abs()[loud].mean() * sound.DECIBELS / 255
    assert difference < 1.5             # dB


@pytest.mark.parametrize("hertz", [250, 1000, 4000])
def test_a_tone_lands_in_its_band(sound, hertz):
    """Bands are even in mel, 0 at the bottom, 8 kHz at the top."""
    tone = torch.sin(2 * math.pi * hertz * torch.arange(sound.RATE) / sound.RATE)
    column = sound.to_picture([tone])[0, 0, :, 30]
    mel, top = (math.log10(1 + f / 700) for f in (hertz, 8000))
    assert abs(64 - column.argmax() - 65 * mel / top) <= 1
    assert column.max() > 245 and column[:column.argmax() - 5].max() < 100


def wav(path, numbers, width, rate=16000):
    """Numbers (L, channels) in [-1, 1] as a .wav file of that many bytes a number."""
    whole = (numbers * (2 ** (8 * width - 1) - 1)).astype("<i4")
    if width == 1:
        whole = whole + 128
    with wave.open(str(path), "wb") as file:
        file.setparams((numbers.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(whole[..., None].view(np.uint8)[..., :width].tobytes())


def hit(rate):
    t = np.arange(rate) / rate
    return 0.5 * np.exp(-8 * t) * np.sin(2 * np.pi * 200 * t)


def begins(sound, path):
    """Whether what is read of a file is that hit, from its attack on, within 10 ms."""
    got = sound.read_wav(path)[sound.LEAD:]
    wanted = torch.tensor(hit(16000) / hit(16000).max()).float()
    errors = [(got[:3000] - wanted[k:3000 + k]).abs().max() for k in range(160)]
    errors += [(got[k:3000 + k] - wanted[:3000]).abs().max() for k in range(160)]
    return min(errors) < 0.07 and got.abs().max() == 1


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels, rate", [(1, 16000), (2, 44100)])
def test_wav_files_of_any_kind_are_the_same_hit(sound, tmp_path, width, channels, rate):
    numbers = np.concatenate([np.zeros(rate // 3), hit(rate)])
    path = tmp_path / "a.wav"
    wav(path, np.stack(channels * [numbers], 1), width, rate)
    assert begins(sound, path)
    if width == 4:
        whole = path.read_bytes()
        for kind, bits in (("<f4", 32), ("<f2", 16), ("<f8", 64)):      # floats, extensible
            data = bytearray(whole)
            data[44:] = np.repeat(numbers, channels).astype(kind).tobytes()
            data[16], data[20:22] = 40, b"\xfe\xff"
            data[32:36] = struct.pack("<HH", channels * bits // 8, bits)
            data[36:36] = bytes(8) + b"\x03" + bytes(15)
            data[-len(data) + 64:-len(data) + 68] = bytes(4)            # a size never written
            path.write_bytes(data)
            assert begins(sound, path), kind


def test_headers_that_others_write(sound, tmp_path):
    """24 bits at the lower end of 4 bytes, RF64, and an odd chunk with and without its padding."""
    path = tmp_path / "a.wav"
    wav(path, hit(16000)[:, None], 4)
    whole = path.read_bytes()
    low = (np.frombuffer(whole[44:], "<i4") >> 8).astype("<i4").tobytes()
    path.write_bytes(whole[:34] + struct.pack("<H", 24) + whole[36:44] + low)
    assert begins(sound, path)
    path.write_bytes(b"RF64" + whole[4:40] + b"\xff\xff\xff\xff" + whole[44:])
    assert begins(sound, path)
    for padding in (b"\0", b""):
        note = b"note" + struct.pack("<I", 3) + b"abc" + padding
        path.write_bytes(whole[:12] + note + whole[12:])
        assert begins(sound, path)


@pytest.mark.parametrize("before", ["noise", "offset", "click", "silence", "half a minute"])
def test_the_hit_is_where_its_attack_is(sound, tmp_path, before):
    rate = 44100 if before == "silence" else 16000
    numbers = np.concatenate([np.zeros(rate * (30 if before == "half a minute" else 1)), hit(rate)])
    rng = np.random.default_rng(0)
    if before == "noise":
        numbers += 0.5 * 10 ** (-45 / 20) * rng.normal(size=len(numbers))
    if before == "offset":
        numbers += 0.005
    if before == "click":
        numbers[rate // 2] = 0.05
    if before == "silence":                             # and it rings when the file ends
        numbers = np.concatenate([numbers, hit(rate)[:2000]])
    wav(tmp_path / "a.wav", numbers[:, None], 2, rate)
    assert begins(sound, tmp_path / "a.wav")


def test_no_level_comes_out_of_nothing(sound, tmp_path):
    path, rng = tmp_path / "a.wav", np.random.default_rng(0)
    for numbers, words in ((rng.integers(-1, 2, (16000, 1)) / 32767, "silence"),
                           (np.zeros((0, 1)), "no sound")):
        wav(path, numbers, 2)
        with pytest.raises(ValueError, match=words):
            sound.read_wav(path)
    wav(path, np.stack([hit(16000), -hit(16000)], 1), 2)                # opposite phases
    assert begins(sound, path)
    wav(path, hit(16000)[:, None], 4)
    data = path.read_bytes()
    path.write_bytes(data[:20] + b"\3" + data[21:44] + np.full(99, np.nan, "<f4").tobytes())
    with pytest.raises(ValueError, match="not finite"):
        sound.read_wav(path)
    path.write_bytes(data[:20] + b"\2" + data[21:])
    with pytest.raises(ValueError, match="kind 2"):
        sound.read_wav(path)


def test_nothing_wraps_round(sound):
    """A tone that is cut while it rings leaves no trace at its beginning, also when varied."""
    ringing = torch.cat([torch.zeros(4000), torch.ones(4001)])
    assert sound.resample(ringing, 3001)[:1400].abs().max() < 0.01
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        assert sound.augment(ringing, generator)[:3000].abs().max() < 0.01


def test_files_that_hold_no_hit_are_named(narrow, few, tmp_path):
    root = tmp_path / "odd"
    (root / "class").mkdir(parents=True)
    wav(root / "class/a silence.wav", np.zeros((100, 1)), 2)
    fails(narrow / "main.py", *SMALL, "--data", root, words=["no .wav file"])
    (root / "class/cover.jpg").write_bytes(b"JFIF")
    (root / "class/cut.wav").write_bytes(next(HITS.glob("*/*.wav")).read_bytes()[:30])
    wav(root / "loose.wav", np.ones((100, 1)), 2)
    wav(root / "class/short.wav", hit(16000)[:400, None], 2)
    out = works(narrow / "main.py", *SMALL, "--data", root, "--steps", 1, "--out", tmp_path / "a")
    assert "files left out: 4" in out and "a silence.wav: silence" in out and "class 1" in out


# ---- the two commands ----
def test_every_figure_and_sound(narrow, tmp_path):
    out = works(narrow / "main.py", *SMALL, "--steps", 3)
    assert "133 hits: cymbal 20, hand 31, kick 32, snare 28, tom 22" in out
    works(narrow / "visual.py", "all", "--steps", 2, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "sounds"])
    assert sorted(path.stem for path in (tmp_path / "sounds").iterdir()) == [
        "cymbal", "hand", "kick", "snare", "tom"]
    for name in FILES:
        if name.endswith("wav"):
            with wave.open(str(tmp_path / name)) as file:
                assert file.getparams()[:3] == (1, 2, 16000) and file.getnframes() > 16000
        else:
            assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 10, name


def test_a_reader_s_own_sounds_and_resume_bit_for_bit(narrow, few, tmp_path):
    run = [narrow / "main.py", *SMALL, "--data", few, "--steps", 60]
    process = start(*run, "--out", tmp_path / "a")
    first_step(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    works(narrow / "main.py", "--resume", tmp_path / "a/checkpoint.pt")
    works(*run, "--out", tmp_path / "b")
    assert same(read(tmp_path / "a"), read(tmp_path / "b"))
    works(narrow / "visual.py", "neighbours", "--checkpoint", tmp_path / "a/checkpoint.pt")
    works(narrow / "visual.py", "--checkpoint", tmp_path / "a/checkpoint.pt", "--label", "low",
          "--export", tmp_path / "x", "--n", 3)
    assert np.load(tmp_path / "x.npz")["images"].shape == (3, 64, 64)


def test_another_meaning_of_a_picture_is_refused(few, tmp_path):
    folder = copied(tmp_path / "DRUMS", source="DRUMS")
    code = (folder / "sound.py").read_text()
    (folder / "sound.py").write_text(code.replace("HOP = 256 ", "HOP = 128 "))
    fails(folder / "visual.py", "--checkpoint", "DRUMS/pretrained.pt", words=["trained with sound"])


def test_shipped_weights_draw_the_drum_asked_for(tmp_path):
    works("DRUMS/visual.py", "--checkpoint", "DRUMS/pretrained.pt", "--export", tmp_path / "x.npz",
          "--n", 25)
    made = np.load(tmp_path / "x.npz")
    images, labels, *_ = load("DRUMS").load_data()
    images, labels = images[:133].flatten(1).float(), labels[:133]
    # the nearest real hit is mostly of the class asked for; of real hits, the next nearest: 0.74
    i = torch.cdist(torch.from_numpy(made["images"]).flatten(1).float(), images).argmin(1)
    assert (labels[i].numpy() == made["labels"]).mean() > 0.6
