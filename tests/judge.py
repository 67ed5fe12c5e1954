"""How good are generated images? A small classifier, trained here on real ones, judges them.

    python MNIST/visual.py --export digits.npz --n 2000
    python tests/judge.py digits.npz        a few minutes on two CPU cores; likewise the others

Prints the share that it recognises as the class asked for, and the Frechet distance of its 64
features to those of unseen real images (Heusel et al. 2017, arXiv:1706.08500, with our features: no
published number compares). Beside each: what real images get.
"""
import argparse

import numpy as np
import torch
import torchvision
from loading import ROOT, load
from torch import nn
from torch.nn import functional as F
from tqdm import trange


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", help="what `visual.py --export` wrote")
    parser.add_argument("--data", help="folder of the real images, as main.py's [its data/]")
    args = parser.parse_args()
    made = np.load(args.file)
    pixels, wanted = torch.from_numpy(made["images"]), torch.from_numpy(made["labels"])
    folder = {28: "MNIST", 32: "CIFAR10", 64: "DRUMS"}[pixels.shape[1]]
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    images, labels, *_ = load(folder).load_data(args.data)
    if folder == "MNIST":
        test = torchvision.datasets.MNIST(args.data or ROOT / "MNIST/data", train=False)
        unseen, unseen_labels = test.data[:, None], test.targets
    else:                       # what the net saw, but the judge has not
        test = torch.arange(len(images)) % 10 == 0
        if folder == "DRUMS":   # some hits, five in a row, as neighbours are alike; all variations
            hits = len([*(ROOT / "DRUMS/hits").glob("*/*.wav")])
            test = torch.arange(len(images)) % hits // 5 % 5 == 0
        unseen, unseen_labels = images[test], labels[test]
        images, labels = images[~test], labels[~test]
    judge = train(images, labels, epochs=8 if folder == "DRUMS" else 4)
    reference, real = look(judge, unseen, unseen_labels)
    features, share = look(judge, pixels, wanted)
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:len(pixels)]
    known, _ = look(judge, images[some], labels[some])
    print(f"{args.file}, {len(pixels)} images: {share:.4f} (real: {real:.4f}), Frechet "
          f"{frechet(features, reference):.2f} (real: {frechet(known, reference):.2f})")


if __name__ == "__main__":
    main()
