"""Compare the meta-gradient of `unroll` with plain autograd through the same training steps.

Both give the gradient of an outer loss with respect to images and learning rate. Autograd keeps the
graph of all steps; `unroll` keeps the parameters of each step.
"""

import time

import torch
from torch import nn
from torch.func import functional_call

import pdd_fast

STEPS, IMAGES, LR = 20, 20, 0.02

torch.manual_seed(0)
net = pdd_fast.ConvNet(in_channels=3, num_classes=10, image_size=16, width=16, depth=2).double()
theta = pdd_fast.flatten_parameters(net)
target = theta + 0.01 * torch.randn_like(theta)  # stands for an expert's later checkpoint
start_images = torch.randn(IMAGES, 3, 16, 16, dtype=torch.float64)
labels = torch.arange(IMAGES) % 10


def with_unroll(images: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Train on all images in every step, by the package."""
    return pdd_fast.unroll(net, theta, images, labels, lr, [torch.arange(IMAGES)] * STEPS)


def with_autograd(images: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Do the same with `create_graph=True`."""
    values = dict(net.named_parameters())
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(functional_call(net, values, images), labels)
        gradients = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        pairs = zip(values.items(), gradients, strict=True)
        values = {name: value - lr * gradient for (name, value), gradient in pairs}
    return torch.cat([value.flatten() for value in values.values()])


found = {}
for train in (with_unroll, with_autograd):
    images = start_images.clone().requires_grad_()
    lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    begin = time.perf_counter()
    end = train(images, lr)
    loss = pdd_fast.trajectory_matching_loss(end, start=theta, target=target)
    found[train] = torch.autograd.grad(loss, [images, lr])
    print(f"{train.__name__}: loss {loss.item():.6f}, {time.perf_counter() - begin:.2f} s")

for name, ours, theirs in zip(("images", "lr"), *found.values(), strict=True):
    print(f"relative difference, {name}: {float((ours - theirs).norm() / theirs.norm()):.0e}")
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)
