"""Run by torchrun: gradients of two processes, each with half a batch, and of one with it all.

Prints the largest difference of this process's own half, and of both together, to the gradient of
the joint batch, and the largest element of that.
"""
import json

import torch
from loading import load
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
main, rank = load("CIFAR10"), dist.get_rank()
torch.manual_seed(0)
net = main.UNet(3, 16, 2, (8, 16), 1, (8,), 0.0)
torch.nn.init.normal_(net.out[2].weight)
x, t, y = torch.randn(8, 3, 16, 16), torch.randint(1000, (8,)), torch.randint(2, (8,))
half = slice(4 * rank, 4 * rank + 4)


def gradient(model, part):
    net.zero_grad()
    model(x[part], t[part], y[part]).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


joint, alone = gradient(net, slice(None)), gradient(net, half)
together = gradient(DistributedDataParallel(net), half)
if rank == 0:
    print(json.dumps([(alone - joint).abs().max().item(), (together - joint).abs().max().item(),
                      joint.abs().max().item()]))
dist.barrier()  # DDP's threads outlive the group: let them put its tensors down before Python ends
dist.destroy_process_group()
