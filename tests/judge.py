"""How good are generated images? A small classifier, trained here on real ones, judges them.

    python MNIST/visual.py --export digits.npz --n 2000
    python tests/judge.py digits.npz        a few minutes on two CPU cores
    python CIFAR10/visual.py --export pictures.npz --n 500
    python tests/judge.py pictures.npz      likewise; --data says where the real ones are

Prints the share that it recognises, of real images that it has not seen and of the generated ones
as the class that was asked for; and the Frechet distance of its 64 features to those of unseen real
images, which also grows when variety is missing (Heusel et al. 2017, arXiv:1706.08500, with our
features: no published number compares). Beside it: what as many real training images get.
"""
import argparse

import numpy as np
import torch
import torchvision
from loading import ROOT, load
from torch import nn
from torch.nn import functional as F
from tqdm import trange


class Judge(nn.Module):
    """forward(images uint8 (N, C, H, W)): features (N, 64) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.LazyConv2d(32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.LazyLinear(64), nn.ReLU())
        self.classify = nn.Linear(64, 10)

    def forward(self, images):
        features = self.features(images.float() / 127.5 - 1)
        return features, self.classify(features)


def train(images, labels, epochs=4, batch=128):
    torch.manual_seed(0)
    judge = Judge()
    judge(images[:2])
    steps = epochs * len(images) // batch
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="training the judge"):
        i = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(judge(images[i])[1], labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def look(judge, images, labels):
    """(features float64 (N, 64), the share recognised)."""
    features, logits = map(torch.cat, zip(*(judge(part) for part in images.split(500))))
    return features.double(), (logits.argmax(1) == labels).double().mean().item()


def frechet(a, b):
    """Squared distance of the Gaussians fitted to the features a and b, each (N, 64)."""
    means, covs = [x.mean(0) for x in (a, b)], [x.T.cov() for x in (a, b)]
    root = torch.linalg.eigvals(covs[0] @ covs[1]).real.clamp(min=0).sqrt().sum()
    return ((means[0] - means[1]).square().sum() + covs[0].trace() + covs[1].trace()
            - 2 * root).item()


def real(colour, data):
    """Images and labels of the training set, then of the test set: unseen by net or judge, but
    for CIFAR-10 every tenth training picture (the net has seen it, the judge has not)."""
    if colour:
        images, labels, *_ = load("CIFAR10").load_data(data)
        test = torch.arange(len(images)) % 10 == 0
        return images[~test], labels[~test], images[test], labels[test]
    images, labels, *_ = load("MNIST").load_data(data)
    test = torchvision.datasets.MNIST(data or ROOT / "MNIST/data", train=False)
    return images, labels, test.data[:, None], test.targets


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="what `visual.py --export` wrote, of one kind")
    parser.add_argument("--data", help="folder of the real images, as main.py's [its data/]")
    args = parser.parse_args()
    files = {file: np.load(file) for file in args.files}
    colour = next(iter(files.values()))["images"].ndim == 4
    images, labels, test, test_labels = real(colour, args.data)
    judge = train(images, labels)
    reference, share = look(judge, test, test_labels)
    print(f"real test images: {share:.4f}")
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for file, made in files.items():
        pixels = torch.from_numpy(made["images"])
        pixels = pixels.permute(0, 3, 1, 2) if colour else pixels[:, None]
        features, share = look(judge, pixels, torch.from_numpy(made["labels"]))
        known, _ = look(judge, images[some[:len(pixels)]], labels[some[:len(pixels)]])
        print(f"{file}, {len(pixels)} images: {share:.4f}, Frechet "
              f"{frechet(features, reference):.2f} (real: {frechet(known, reference):.2f})")


if __name__ == "__main__":
    main()
