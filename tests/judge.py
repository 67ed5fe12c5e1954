"""How good are generated digits? A small classifier, trained here on real ones, judges them.

    python MNIST/visual.py --export digits.npz --n 5000
    python tests/judge.py digits.npz        a few minutes on two CPU cores

Prints the share of the images that it recognises as the class asked for, and the Frechet distance
of its 64 features between these images and the test digits (0 for equal distributions; it falls
with the number of images, so compare equal numbers). Beside both, the same for real training
digits. Its own measure: not to be compared with a published FID.
"""
import argparse

import numpy as np
import torch
import torchvision
from conftest import ROOT, load
from torch import nn
from torch.nn import functional as F
from tqdm import trange


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 49, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        features = self.body(images.float() / 127.5 - 1)
        return features, self.head(F.relu(features))


def train(images, labels, epochs=4, batch=128):
    torch.manual_seed(0)
    judge = Judge()
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


def frechet(a, b):
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features (N, 64)."""
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root).item()


@torch.no_grad()
def measure(judge, images, labels, real):
    parts = [judge(part) for part in images.split(500)]
    features = torch.cat([f for f, _ in parts]).double()
    right = torch.cat([y.argmax(1) for _, y in parts]) == labels
    distance = frechet(features, real) if real is not None else 0.0
    return right.double().mean().item(), features, distance


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="what `visual.py --export` wrote")
    parser.add_argument("--data", default=ROOT / "MNIST/data", help="folder with MNIST/raw in it")
    args = parser.parse_args()
    real, real_labels, _ = load("MNIST").load_data(args.data)
    test = torchvision.datasets.MNIST(args.data, train=False)
    judge = train(real, real_labels)
    accuracy, features, _ = measure(judge, test.data[:, None], test.targets, None)
    print(f"real test digits: accuracy {accuracy:.4f}")
    for file in args.files:
        made = np.load(file)
        images, labels = torch.from_numpy(made["images"])[:, None], torch.from_numpy(made["labels"])
        n = len(images)
        for name, x, y in ((f"{n} real training digits", real[-n:], real_labels[-n:]),
                           (file, images, labels)):
            accuracy, _, distance = measure(judge, x, y, features)
            print(f"{name}: accuracy {accuracy:.4f}, Frechet distance {distance:.3f}")


if __name__ == "__main__":
    main()
