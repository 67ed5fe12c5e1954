"""How good are generated digits? A small classifier, trained here on real ones, judges them.

    python MNIST/visual.py --export digits.npz --n 5000
    python tests/judge.py digits.npz        a few minutes on two CPU cores

Prints the share that it recognises: of real test digits, which it has not seen, and of the images
as the class that was asked for.
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
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 49, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images.float() / 127.5 - 1)


def train(images, labels, epochs=4, batch=128):
    torch.manual_seed(0)
    judge = Judge()
    steps = epochs * len(images) // batch
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in trange(steps, desc="training the judge"):
        i = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(judge(images[i]), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge, images, labels):
    guess = torch.cat([judge(part).argmax(1) for part in images.split(500)])
    return (guess == labels).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="what `visual.py --export` wrote")
    parser.add_argument("--data", default=ROOT / "MNIST/data", help="folder with MNIST/raw in it")
    args = parser.parse_args()
    images, labels, _ = load("MNIST").load_data(args.data)
    test = torchvision.datasets.MNIST(args.data, train=False)
    judge = train(images, labels)
    print(f"real test digits: {accuracy(judge, test.data[:, None], test.targets):.4f}")
    for file in args.files:
        made = np.load(file)
        images, labels = torch.from_numpy(made["images"])[:, None], torch.from_numpy(made["labels"])
        print(f"{file}, {len(images)} digits: {accuracy(judge, images, labels):.4f}")


if __name__ == "__main__":
    main()
