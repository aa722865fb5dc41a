"""Add a method: match the mean and the spread of each class's pixels, with no network at all.

A method is a class with a `step()`. Stages, selection, resume and evaluation then work as for the
package's own methods (docs/method.md, "Another method").
"""

import sys
import tempfile

import torch
from pydantic import Field
from torch import Tensor

from pdd_fast.cli.main import run
from pdd_fast.methods import BaseMethod, MethodSettings, StageProblem, register

SMALL = (
    "iterations=50 eval_every=0 eval_networks=1 eval_epochs=20 transition_epochs=20 "
    "union_epochs=100 repeats=2 lr_img=10.0"
)


class Moments(BaseMethod):
    """Learn images whose class means and standard deviations are those of the real images."""

    class Settings(MethodSettings):  # the method's own; --set lr_img=5 gives another value
        lr_img: float = Field(10.0, ge=0, description="Learning rate of the images.")

    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem)
        self.done = 0, problem.images

    iteration = property(lambda self: self.done[0])
    images = property(lambda self: self.done[1])

    def moments(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of every pixel."""
        return torch.stack([images.mean(0), images.var(0, correction=0).add(1e-4).sqrt()])

    def step(self) -> dict[str, float]:
        """Move the stage's images along the gradient; the earlier stages' images stay."""
        images, real = self.images.clone().requires_grad_(), self.problem.real
        old, old_labels = self.problem.union.up_to()
        seen, labels = torch.cat([old, images]), torch.cat([old_labels, self.labels])
        loss = images.new_zeros(())
        for label in labels.unique():
            ours = self.moments(seen[labels == label])
            theirs = self.moments(real.images[real.labels == label])
            loss = loss + (ours - theirs).square().mean()
        (gradient,) = torch.autograd.grad(loss, images)
        # The state changes at the very end, so an interrupt leaves the one before.
        self.done = self.iteration + 1, self.images - self.settings.lr_img * gradient
        return {"loss": float(loss.detach())}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {"iteration": torch.tensor(self.iteration), "images": self.images.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self.done = int(state["iteration"]), state["images"].to(self.images.device)


register("moments", Moments)
with tempfile.TemporaryDirectory() as folder:
    settings = [f"--set={setting}" for setting in SMALL.split()]
    settings += ["--set=method=moments", "--set=width=32", "--set=depth=2"]
    command = ["distill", "--ipc=6", "--stages=3", f"--run-dir={folder}/run"]
    sys.exit(run([*command, *settings]))
