"""The pool that passes take their memory from: one owner at a time, from any thread, and never too
small a piece.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import pdd_fast
from pdd_fast.ops import _native, convnet
from pdd_fast.ops._buffers import Buffer, BufferPool
from pdd_fast.ops.convnet import ConvNetPasses, ConvNetShape

pytestmark = pytest.mark.skipif(not convnet.available(), reason="the CPU kernels are not built")


@contextmanager
def switching_often() -> Iterator[None]:
    """Let threads take turns every microsecond, so that a race that is possible happens."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(count: int, work: object) -> None:
    """Run ``work(number)`` in ``count`` threads at once and raise the first error."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    with switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_a_piece_has_one_owner_and_is_large_enough_for_many_threads_and_sizes() -> None:
    pool = BufferPool()

    def work(number: int) -> None:
        order = random.Random(number)
        held: list[tuple[Buffer, int]] = []
        for _ in range(300):
            size = order.choice((1, 7, 64, 1000, 4096))
            buffer = pool.buffer(size, torch.float32)
            assert buffer.tensor.numel() == size
            assert buffer._memory.numel() >= 4 * size
            mark = order.randrange(1 << 20)
            buffer.tensor.fill_(mark)
            held.append((buffer, mark))
            if len(held) > 4:
                kept, expected = held.pop(order.randrange(len(held)))
                assert bool((kept.tensor == expected).all()), "another thread wrote into this piece"

    in_threads(8, work)
    gc.collect()
    assert (
        len({memory.data_ptr() for memory in pool._idle}) == len(pool._idle) <= 8 * 6
    )  # six at once in a thread


def test_networks_of_several_sizes_in_many_threads_get_what_one_thread_gets() -> None:
    """Forward, backward, gradient and dual passes of three shapes and five batches, each against
    the same alone.
    """
    shapes = [ConvNetShape(3, 9, 8, width, 2, 4) for width in (3, 8, 17)]
    batches = (1, 3, 7, 12, 24)
    images = torch.randn(24, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 4

    def results(shape: ConvNetShape, batch: int) -> list[torch.Tensor]:
        passes, theta = ConvNetPasses(shape), torch.linspace(-1, 1, shape.parameters)
        x, y = images[:batch], labels[:batch]
        logits, kept = passes.forward(theta, x, keep=True)
        assert kept is not None
        backward = passes.backward(theta, x, kept, logits, want_images=True)
        losses, gradient, saved = passes.gradient(theta, x, y, keep=True)
        dual = passes.dual(theta, x, y, theta, saved, True, None)
        again = passes.dual(theta, x, y, theta, None, True, None)
        return [logits, *backward, losses, gradient, *dual[:3], *again[:3]]  # type: ignore[list-item]

    expected = {(shape, batch): results(shape, batch) for shape in shapes for batch in batches}

    def work(number: int) -> None:
        order = random.Random(number)
        for _ in range(15):
            case = order.choice(shapes), order.choice(batches)
            for found, truth in zip(results(*case), expected[case], strict=True):
                assert torch.equal(found, truth)

    in_threads(6, work)


def test_buffers_can_be_freed_while_other_threads_take_them() -> None:
    net = pdd_fast.ConvNet(3, 4, 8, width=4, depth=2)
    images = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = net(images)

    def work(number: int) -> None:
        for _ in range(100):
            if number == 0:
                pdd_fast.free_buffers()
            else:
                loss = net(images)
                assert torch.equal(loss.detach(), expected)
                torch.autograd.grad(loss.sum(), list(net.parameters()))

    in_threads(4, work)


def test_a_buffer_that_a_collection_frees_inside_the_lock_comes_back() -> None:
    """A cycle is found by the garbage collector, which may run in the thread that holds the pool's
    lock.
    """
    pool = BufferPool()

    class Cycle:
        def __init__(self) -> None:
            self.buffer, self.itself = pool.buffer(8, torch.float32), self

    Cycle()
    with pool._lock:
        gc.collect()
    assert pool.idle_bytes() == 32


def test_the_smallest_piece_that_fits_is_taken_and_a_smaller_one_makes_room_for_a_larger() -> None:
    pool = BufferPool()
    held = [pool.buffer(size, torch.float32) for size in (10, 1000, 100)]
    places = {buffer.tensor.numel(): buffer.tensor.data_ptr() for buffer in held}
    held.clear()
    assert pool.buffer(50, torch.float32).tensor.data_ptr() == places[100]
    assert pool.buffer(100, torch.float64).tensor.data_ptr() == places[1000]
    assert pool.idle_bytes() == 4 * 1110
    larger = pool.buffer(5000, torch.float32)
    assert pool.idle_bytes() == 4 * 1100  # the piece of 10 is gone
    del larger
    assert pool.idle_bytes() == 4 * 6100


@pytest.mark.parametrize(("workspace", "saved", "name"), [(-1, 0, "workspace"), (0, -1, "saved")])
def test_the_kernel_refuses_a_piece_that_is_too_small(
    workspace: int, saved: int, name: str
) -> None:
    shape = ConvNetShape(3, 8, 8, 4, 2, 4)
    sizes = ConvNetPasses(shape).sizes(5, saved=True)
    theta, images = torch.zeros(shape.parameters), torch.zeros(5, 3, 8, 8)
    memory = [torch.zeros(sizes.workspace), torch.zeros(sizes.saved)]
    device = torch.device("cpu")
    arguments = _native.loaded("cpu").ConvNetArguments(
        [5, *shape],
        0,
        1e-5,
        _native.address(theta, device),
        _native.address(images, device),
        images.stride(),
        _native.address(memory[0], device),
        sizes.workspace + workspace,
        _native.address(memory[1], device),
        sizes.saved + saved,
    )
    with pytest.raises(ValueError, match=rf"{name} must hold \d+ elements, got \d+"):
        _native.call("convnet_forward", theta, arguments, torch.zeros(5, 4))


def freed() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (lambda: torch.zeros(3, device="meta"), "one on meta"),
        (lambda: torch._neg_view(torch.zeros(3)), "a Tensor without memory"),
        (lambda: torch.zeros(3).to_sparse(), "a Tensor without memory"),
        (lambda: torch._efficientzerotensor((3,)), "a Tensor without memory"),
        (lambda: TwoTensor(torch.zeros(3), torch.zeros(3)), "a TwoTensor without memory"),
        (freed, "a Tensor without memory"),
        (lambda: torch.func.vmap(address_of)(torch.zeros(2, 3)), "a Tensor without memory"),
    ],
    ids=["meta", "negative view", "sparse", "zeros", "a wrapper", "freed", "transformed"],
)
def test_no_address_is_taken_of_what_is_not_in_the_memory_of_the_device(
    tensor: Callable[[], torch.Tensor], found: str
) -> None:
    with pytest.raises(
        TypeError, match=f"a kernel must be given tensors in the memory of cpu, got {found}"
    ):
        address_of(tensor())
    assert address_of(torch.zeros(0)) == 0


def address_of(tensor: torch.Tensor) -> int:
    return _native.address(tensor, torch.device("cpu"))


def test_threads_that_differentiate_one_graph_get_their_own_gradients() -> None:
    torch.manual_seed(0)
    net = pdd_fast.ConvNet(3, 10, 16, width=8, depth=2)
    images = torch.randn(8, 3, 16, 16, requires_grad=True)
    logits, grads = net(images), torch.randn(4, 8, 10)
    expected = [torch.autograd.grad(logits, images, grad, retain_graph=True)[0] for grad in grads]

    def work(number: int) -> None:
        for _ in range(30):
            (found,) = torch.autograd.grad(logits, images, grads[number], retain_graph=True)
            assert torch.equal(found, expected[number])

    in_threads(4, work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_process_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    net, images = pdd_fast.ConvNet(3, 4, 8, width=4, depth=2), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = net(images)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with convnet._WORKSPACES._lock, convnet._SAVED._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits forever is ended
        with torch.no_grad():
            os._exit(0 if torch.equal(net(images), expected) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
