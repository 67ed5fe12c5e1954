"""How good are generated images? A small classifier, trained here on real ones, judges them.

    python MNIST/visual.py --export digits.npz --n 2000
    python MNIST/judge.py digits.npz        a few minutes on two CPU cores
    python MNIST/judge.py pictures.npz --folder CIFAR10     likewise DRUMS

Prints the share that it recognises as the class asked for, and the Frechet distance of its 64
features to those of unseen real images (Heusel et al. 2017, arXiv:1706.08500, with our features: no
published number compares). Beside each: what real images get.
"""
import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from tqdm import trange


ROOT = Path(__file__).resolve().parent.parent


def train(images, labels, epochs, batch=128):
    """(features, classifier): two modules, trained on images uint8 (N, C, H, W), labels (N,)."""
    torch.manual_seed(0)
    layers = []
    for c_out in (32, 64, 64):
        layers += [nn.LazyConv2d(c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
                   nn.MaxPool2d(2)]
    features = nn.Sequential(*layers[:-1], nn.Flatten(), nn.LazyLinear(64), nn.ReLU())
    classify = nn.Linear(64, 10)
    features(images[:2].float())                        # the lazy layers learn their size
    optimizer = torch.optim.AdamW([*features.parameters(), *classify.parameters()], 2e-3)
    steps = epochs * len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="training the judge"):
        i = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(classify(features(images[i].float() / 127.5 - 1)), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return features.eval(), classify


@torch.no_grad()
def look(judge, images, labels):
    """(features float64 (N, 64), the share recognised)."""
    features = torch.cat([judge[0](part.float() / 127.5 - 1) for part in images.split(500)])
    return features.double(), (judge[1](features).argmax(1) == labels).double().mean().item()


def frechet(a, b):
    """Squared distance of the Gaussians fitted to the features a and b, each (N, 64)."""
    means, covs = [x.mean(0) for x in (a, b)], [x.T.cov() for x in (a, b)]
    root = torch.linalg.eigvals(covs[0] @ covs[1]).real.clamp(min=0).sqrt().sum()
    return ((means[0] - means[1]).square().sum() + covs[0].trace() + covs[1].trace()
            - 2 * root).item()


def real_images(folder, data):
    """(images, labels) to train on, and the same that the judge does not see."""
    sys.path.insert(0, str(ROOT / folder))
    main = importlib.import_module("main")
    images, labels, _, source = main.load_data(data)
    print(source)
    if "MNIST," in source:
        test = torchvision.datasets.MNIST(data or ROOT / "MNIST/data", train=False)
        return (images, labels), (test.data[:, None], test.targets)

    test = torch.arange(len(images)) % 10 == 0
    if folder == "DRUMS":  # some hits, five in a row, as neighbours are alike; all variations
        hits = len([*(ROOT / "DRUMS/hits").glob("*/*.wav")])
        test = torch.arange(len(images)) % hits // 5 % 5 == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="what `visual.py --export` wrote")
    parser.add_argument("--folder", choices=("MNIST", "CIFAR10", "DRUMS"), default="MNIST")
    parser.add_argument("--data", help="folder of the real images, as main.py's [its data/]")
    args = parser.parse_args()
    made = np.load(args.file)
    pixels = torch.from_numpy(made["images"])
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    wanted = torch.from_numpy(made["labels"])
    known, unseen = real_images(args.folder, args.data)
    if pixels.shape[1:] != known[0].shape[1:]:
        parser.error(f"{args.file} holds images {tuple(pixels.shape[1:])}, "
                     f"{args.folder} has {tuple(known[0].shape[1:])}")

    judge = train(*known, epochs=8 if args.folder == "DRUMS" else 4)
    reference, real = look(judge, *unseen)
    features, share = look(judge, pixels, wanted)
    some = torch.randperm(len(known[0]), generator=torch.Generator().manual_seed(0))[:len(pixels)]
    others, _ = look(judge, known[0][some], known[1][some])
    print(f"{args.file}, {len(pixels)} images: {share:.4f} (real: {real:.4f}), Frechet "
          f"{frechet(features, reference):.2f} (real: {frechet(others, reference):.2f})")


if __name__ == "__main__":
    main()
