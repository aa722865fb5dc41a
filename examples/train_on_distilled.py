"""Train a ResNet-18 on a distilled set in plain PyTorch.

`python train_on_distilled.py [RUN [EPOCHS]]`, with RUN the run directory of `pdd-fast distill` on
the digits. Without it, the script distills a small set first. The network is torchvision's
ResNet-18 where torchvision is installed, else the package's ConvNet.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import pdd_fast
import pdd_fast.data
from pdd_fast.cli.main import run

SMALL = (
    "num_experts=2 iterations=20 inner_steps=5 eval_every=0 eval_networks=1 "
    "eval_epochs=20 transition_epochs=20 union_epochs=20 repeats=1"
)


def distill(folder: Path) -> Path:
    """Make a small set; `pdd-fast distill --stages 5` makes a good one in a minute."""
    settings = [f"--set={setting}" for setting in SMALL.split()]
    if status := run(["distill", "--ipc=4", "--stages=2", f"--run-dir={folder}", *settings]):
        sys.exit(status)
    return folder


def network() -> nn.Module:
    """Return a ResNet-18 for gray images of 8×8 pixels."""
    try:
        from torchvision.models import resnet18
    except ImportError:
        return pdd_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, depth=2)
    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


with tempfile.TemporaryDirectory() as temporary:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else distill(Path(temporary, "run"))
    distilled = pdd_fast.load_distilled(path)
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 8

torch.manual_seed(0)
net = network()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
dsa = pdd_fast.DSA("color_crop_cutout_scale_rotate")  # as the images were made; no flip for digits
for stage in range(1, distilled.stages + 1):  # the stages in order, as the method intends
    for _ in range(epochs):
        for images, labels in DataLoader(distilled.union(stage), batch_size=64, shuffle=True):
            images = pdd_fast.augment(images, dsa.sample(len(images), images.shape[-1]))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()

test = pdd_fast.data.load("digits").test  # normalized like the distilled images
net.eval()
with torch.no_grad():
    accuracy = 100 * (net(test.images).argmax(1) == test.labels).float().mean()
print(f"{type(net).__name__}: {accuracy:.1f}% of {len(test.labels)} test images are right")
