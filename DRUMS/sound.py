"""Sounds as pictures and back: short-time Fourier transform, mel bands, Griffin-Lim.

A sound is float32 (L,) or (N, L) in [-1, 1], at 16,000 numbers a second. Its picture is a
spectrogram, uint8 (N, 1, 64, 64): a column every 16 ms, the low bands at the bottom, and black for
80 dB below a tone of amplitude 1. A picture knows how loud each band is, not the phase: `to_sound`
has to find one.
"""
import glob
import math
import struct
import unicodedata
import wave
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

RATE = 16_000           # numbers a second
WINDOW = 1024           # numbers that a column is made of, 64 ms
HOP = 256               # from one column to the next
SIZE = 64               # columns, and bands
LENGTH = HOP * (SIZE - 1)   # of the sound of a picture, one second
DECIBELS = 80           # from black to white
FULL = (WINDOW / 4) ** 2    # power of a tone of amplitude 1, white
LEAD = WINDOW // 2      # silence before a hit
QUIET = 1e-3            # what stays below, -60 dB, is silence
SETTINGS = [RATE, WINDOW, HOP, SIZE, DECIBELS]      # what a picture means


class UserError(ValueError):
    """What a user can put right: `run` prints it as one line."""


# ---- Sound to picture, and back ----
def mel_bank():
    """How much of each frequency f a band takes: triangles (64, 513), evenly spaced in
    mel = 2595 log10(1 + f / 700), as the ear tells tones apart (O'Shaughnessy 1987).
    """
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, SIZE + 2) / 2595) - 1)  # Hz
    frequency = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    left, middle, right = (corners[i:i + SIZE, None] for i in range(3))
    rising = (frequency - left) / (middle - left)
    falling = (right - frequency) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0)


def stft(sound):
    """Complex (N, 513, columns) of sounds (N, L), or (513, columns) of one."""
    return torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="constant",
                      return_complex=True)


def to_picture(sounds):
    """Pictures uint8 (N, 1, 64, 64) of the first second of each of N sounds (L,)."""
    bank = mel_bank()
    power = []
    for hit in sounds:
        hit = F.pad(hit, (0, max(LENGTH - len(hit), 0)))[:LENGTH]
        power.append(bank @ stft(hit).abs() ** 2)
    power = torch.stack(power)  # (N, 64, 64)
    level = 10 * torch.log10(power / FULL + 1e-12)  # dB
    shade = (1 + level / DECIBELS).clamp(0, 1)
    return (255 * shade.flip(1)).round().to(torch.uint8)[:, None]


def to_sound(picture, rounds=60):
    """A sound (N, L) for each picture (N, 1, 64, 64), 0 to 255.

    The frequencies of each band by non-negative least squares (Lee & Seung 2001), the phases by
    fast Griffin-Lim (Perraudin et al. 2013): to and fro between what has the loudness asked for
    and what is the transform of a sound.
    """
    level = DECIBELS * (picture[:, 0].flip(1).float() / 255 - 1)
    power = FULL * (10 ** (level / 10) - 10 ** (-DECIBELS / 10)).clamp(min=0)  # black is silent

    # bands to frequencies
    bank = mel_bank()
    wanted = bank.T @ power
    fine = wanted.clone()  # (N, 513, columns)
    for _ in range(rounds):
        fine = fine * wanted / (bank.T @ (bank @ fine)).clamp(min=1e-9)
    loudness = fine.sqrt()

    # loudness to sound
    window = torch.hann_window(WINDOW)
    guess = loudness + 0j
    before = torch.zeros_like(guess)
    for _ in range(rounds):
        sound = torch.istft(guess, WINDOW, HOP, window=window, length=LENGTH)
        after = stft(sound)
        ahead = after + 0.99 * (after - before)
        guess = loudness * ahead / ahead.abs().clamp(min=1e-9)
        before = after
    return torch.istft(guess, WINDOW, HOP, window=window, length=LENGTH)


# ---- Variations of a sound ----
def resample(sound, length):
    """A sound (L,) stretched to another length; what the new rate cannot hold is cut."""
    padded = F.pad(sound, (0, len(sound)))  # else its end runs into its beginning
    spectrum = torch.fft.rfft(padded)
    stretched = torch.fft.irfft(spectrum[:length + 1], 2 * length) * (length / len(sound))
    return stretched[:length]


def augment(sound, generator):
    """A hit (L,) played anew: up to 3 semitones higher or lower, shorter, softer, later."""
    pitch, decay, gain, start = torch.rand(4, generator=generator).tolist()
    sound = resample(sound, round(len(sound) * 2 ** ((2 * pitch - 1) * 3 / 12)))
    fall = 12 * decay * torch.arange(len(sound)) / RATE  # dB
    sound = sound * 10 ** (-(fall + 6 * gain) / 20)
    return F.pad(sound, (int(HOP / 2 * start), 0))


# ---- Files ----
def read_hits(root):
    """The hits (L,) in the sub-folders of root, and the sub-folders' names; says what it skips."""
    hits = []
    names = []
    skipped = []
    found = glob.glob("**", root_dir=root, recursive=True)  # without what is hidden
    paths = sorted(Path(root, name) for name in found)
    for path in tqdm([path for path in paths if path.is_file()], "reading sounds"):
        try:
            if path.parent == root:
                raise ValueError("in no sub-folder")
            hits.append(read_wav(path))
            names.append(unicodedata.normalize("NFC", path.relative_to(root).parts[0]))
        except Exception as error:
            skipped.append(f"{path}: {error}")
    if skipped:
        print(f"files left out: {len(skipped)}, the first: {skipped[0]}")
    if not hits:
        raise UserError(f"--data {root}: no .wav file in a sub-folder of it")
    return hits, names


def read_wav(path):
    """The hit in a .wav file, (L,): mono, 16 kHz, its peak 1, after LEAD of silence."""
    sound, rate = decode(path.read_bytes())  # (L, channels)
    if not len(sound):
        raise ValueError("no sound in it")
    if not sound.isfinite().all():
        raise ValueError("it holds numbers that are not finite")

    # one channel without an offset, loud enough to be no dither
    mono = sound.mean(dim=1)
    loudest = sound[:, sound.abs().amax(dim=0).argmax()]
    if mono.abs().max() < loudest.abs().max() / 10:  # the channels cancel
        mono = loudest
    mono = mono - mono.mean()
    if mono.abs().max() < QUIET:
        raise ValueError("silence")

    # from the attack on: where 10 ms hold a hundredth of the loudest 10 ms
    span = rate // 100
    total = F.pad((mono ** 2).double(), (1, span)).cumsum(0)
    energy = total[span:] - total[:-span]
    attack = (energy > energy.max() / 100).nonzero()[0].item()
    hit = mono[attack:attack + 2 * rate]
    hit = resample(hit, max(round(len(hit) * RATE / rate), 1))
    return F.pad(hit / hit.abs().max(), (LEAD, 0))


def decode(data):
    """Numbers (L, channels) in [-1, 1] and their rate, of a .wav file's bytes.

    The module wave knows no floats, and before Python 3.12 not the extensible kind.
    """
    if data[:4] not in (b"RIFF", b"RF64"):
        raise ValueError("no .wav file")

    # chunks: a name, a size, that many bytes; after an odd size a 0, which some forget
    chunks = {}
    place = 12
    while place + 8 <= len(data) and b"data" not in chunks:
        name = data[place:place + 4]
        size = int.from_bytes(data[place + 4:place + 8], "little")
        place += 8
        if name == b"data" and size in (0, 2 ** 32 - 1):  # never written, or RF64
            size = len(data)
        chunks[name] = data[place:place + size]
        place += size
        if size % 2 and data[place:place + 1] == b"\0":
            place += 1
    if b"fmt " not in chunks or b"data" not in chunks:
        raise ValueError("no sound in it: cut short, or damaged")

    # what the numbers are
    header = chunks[b"fmt "]
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", header[:16])
    if kind == 0xFFFE:  # extensible: the kind stands further behind
        kind = int.from_bytes(header[24:26], "little")
    width = block // max(channels, 1)
    floats = {2: torch.float16, 4: torch.float32, 8: torch.float64}
    if not rate or not (kind == 1 and width in (1, 2, 3, 4) or kind == 3 and width in floats):
        raise ValueError(f"its kind {kind} with {width} bytes a number is not read")

    # bytes to numbers
    whole = bytearray(chunks[b"data"])
    del whole[len(whole) // (channels * width) * channels * width:]
    if not whole:
        return torch.zeros(0, channels), rate
    parts = torch.frombuffer(whole, dtype=torch.uint8).view(-1, channels, width)
    if kind == 3:
        return parts.view(floats[width])[..., 0].float(), rate
    if width == 1:
        parts = parts ^ 128  # 8 bits come without a sign
    numbers = F.pad(parts, (4 - width, 0)).view(torch.int32)[..., 0]
    if bits < 8 * width and (numbers % 256).any():  # 24 bits at the lower end of 32
        numbers = numbers << (8 * width - bits)
    return numbers.double().div(2 ** 31).float(), rate


def write_wav(file, sounds):
    """Sounds (N, L) one after another, each until it is below -40 dB, as 16 bit mono."""
    track = []
    for sound in sounds:
        sound = sound / sound.abs().max().clamp(min=1)
        loud = (sound.abs() > 0.01).nonzero()
        end = loud.max() + 1 if len(loud) else 0
        track += [sound[:end], torch.zeros(RATE // 8)]
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, RATE, 0, "NONE", ""))
        wav.writeframes((32767 * torch.cat(track)).to(torch.int16).numpy().tobytes())
