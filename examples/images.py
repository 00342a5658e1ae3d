"""Few-shot images of one's own: folders of pictures, a folder a class. Here the program draws them first."""
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import alpha_maml


def draw(root: Path, classes: int = 24, pictures: int = 12) -> None:
    """Polygons: a class has its own number of corners and colour, a picture its own place and turn."""
    for c in range(classes):
        colour, folder = tuple(np.random.default_rng(c).integers(60, 255, 3).tolist()), root / f"class{c:02}"
        folder.mkdir(parents=True)
        for i in range(pictures):
            random = np.random.default_rng(1000 * c + i)
            image = Image.new("RGB", (28, 28), tuple(random.integers(0, 40, 3).tolist()))
            x, y = random.integers(10, 18, 2).tolist()
            ImageDraw.Draw(image).regular_polygon((x, y, int(random.integers(6, 10))), 3 + c % 6, int(random.integers(0, 360)),
                                                  fill=colour)
            image.save(folder / f"{i}.png")


root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
if not any(root.glob("*")):
    draw(root)
run = alpha_maml.train("conv4", "folder", run_dir="runs/images", config={
    "data.root": str(root), "data.size": 28, "task.ways": 3, "task.shots": 1, "task.queries": 3, "task.batch": 4,
    "model.channels": 16, "iterations": 60, "evaluation.tasks": 40})
found = run.evaluate(tasks=40)
print(f"accuracy on unseen classes: {100 * found['accuracy']:.1f} +- {100 * found['accuracy_ci95']:.1f} %")
assert found["accuracy"] > 0.5, "chance is 33 %"
