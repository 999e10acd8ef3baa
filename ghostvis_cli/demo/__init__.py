"""The built-in demonstration model and its example pictures: paths only. `tools/train_demo` made them."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE_DIR = FOLDER / "base"
MODEL_TAG = "vlm_tiny"
EXAMPLES: tuple[Path, ...] = (
    FOLDER / "red-circle.png",
    FOLDER / "three-shapes.jpg",
    FOLDER / "two-circles-striped.png",
    FOLDER / "cross-and-diamond.jpg",
)
PHOTO = FOLDER / "photo.jpg"  # a landscape, which the model is not expected to understand
