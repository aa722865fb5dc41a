"""Peak resident memory of an unroll, each measured in a process of its own: what a process has freed stays with it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Started by exec from a process as large as pytest with torch, a child inherits that process's peak on Linux: VmHWM is
# reset with the new address space, ru_maxrss is not.
CHILD = """
import json, sys
import torch, pdd_fast
width, size, batch, depth, engine, memory, *steps = sys.argv[1:]
width, size, batch, depth = int(width), int(size), int(batch), int(depth)
torch.manual_seed(0)
net = pdd_fast.ConvNet(3, 10, size, width, depth)
theta = pdd_fast.flatten_parameters(net)
images = torch.randn(batch, 3, size, size, requires_grad=True)
labels = torch.arange(batch) % 10
rate = torch.tensor(0.01, requires_grad=True)

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024

found = {"parameters": theta.numel()}
for count in map(int, steps):
    batches = [torch.randperm(batch) for _ in range(count)]
    result = pdd_fast.unroll(net, theta, images, labels, rate, batches, engine=engine, memory=memory)
    result.square().sum().backward()
    found[str(count)] = peak()
print(json.dumps(found))
"""

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


def measure(
    width: int, size: int, batch: int, depth: int, steps: list[int], engine: str, memory: str
) -> dict[str, int]:
    """Bytes at the peak after each of the numbers of steps, one after another in one process; parameters beside."""
    arguments = [*map(str, (width, size, batch, depth)), engine, memory, *map(str, steps)]
    output = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True)
    return json.loads(output.stdout)


@needs_proc
@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_a_step_more_takes_one_parameter_vector_more(engine: str) -> None:
    # 40 steps first, so that libraries, threads and the allocator's pools are all there. What the cache keeps of 16
    # images of 8x8 at width 128 is 1.8 MB a step, 1.5 times the vector: keeping it could not hide in the tolerance.
    found = measure(128, 8, 16, 3, [40, 140], engine, "recompute")
    vector = 4 * found["parameters"]
    growth = (found["140"] - found["40"]) / 100
    assert 0.9 * vector <= growth <= 1.1 * vector


@needs_proc
def test_the_cache_is_what_grows() -> None:
    """The other mode, so that the measurement is known to see activations."""
    found = measure(128, 8, 16, 3, [40, 140], "fused", "cache")
    assert (found["140"] - found["40"]) / 100 > 2 * 4 * found["parameters"]


@needs_proc
@pytest.mark.slow
def test_fifty_steps_of_fifty_images_fit_in_1500_megabytes() -> None:
    """The CIFAR-10 setting; plain autograd takes more than 10 GB (benchmarks/unroll.py measures it)."""
    assert measure(128, 32, 50, 3, [50], "fused", "recompute")["50"] < 1.5e9
