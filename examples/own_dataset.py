"""Distill a folder of images: `python own_dataset.py DIR`, with DIR/train/<class>/ and DIR/test/.

Without DIR, the script makes such a folder from scikit-learn's digits. The settings below are
small, so that it ends within a minute; the recipe alone (without --set) gives good images.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

import pdd_fast
from pdd_fast.cli.main import run

SMALL = (
    "num_experts=2 iterations=20 inner_steps=5 eval_every=0 eval_networks=1 "
    "eval_epochs=20 transition_epochs=20 union_epochs=60 repeats=2"
)


def make_folder(folder: Path) -> Path:
    """Write the digits as PNG files, one folder per class; every fifth image is for the test."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("test" if i % 5 == 0 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(place / f"{i}.png")
    return folder


with tempfile.TemporaryDirectory() as temporary:
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else make_folder(Path(temporary, "digits"))
    where = Path(temporary, "run")  # a run of your own goes to a folder that stays, such as runs/
    settings = [f"--set={setting}" for setting in SMALL.split()]
    # The same as `pdd-fast distill ...` in a shell.
    command = [
        "distill",
        f"--dataset=imagefolder:{images}",
        "--recipe=digits",
        f"--run-dir={where}",
    ]
    status = run([*command, "--ipc=4", "--stages=2", *settings])
    if status:
        sys.exit(status)
    distilled = pdd_fast.load_distilled(where)
    print(distilled)
    print("classes:", ", ".join(distilled.metadata["classes"]))
    print("learning rate of each stage:", [f"{lr:.3f}" for lr in distilled.learning_rates.tolist()])
