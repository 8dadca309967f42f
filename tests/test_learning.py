"""Every objective of pixel space learns: runs of seconds on digits of 4x4 pixels, and the record of runs of minutes."""

import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_cm
from mlx_cm.training.run import train

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import digits  # noqa: E402
import learning  # noqa: E402

COUNT = 512  # pictures of a sample
# A network of one level for pictures of 4x4 pixels, and runs of seconds.
NETWORK = {
    "model.unet.sample_size": 4,
    "model.unet.block_out_channels": [16],
    "model.unet.down_block_types": ["DownBlock2D"],
    "model.unet.up_block_types": ["UpBlock2D"],
}
UNTRAINED = 1.0  # more than this is the distance of what is not even the data's mean picture
STEPS = {"ctm": 400}  # the others take 200
SHORT = {
    "train.ema": [0.95],
    "train.learning_rate": 3e-3,
    "train.batch_size": 64,
    "train.sample_every": 0,
    "train.checkpoint_every": 0,
}


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """The digits at half their size."""
    whole = digits.digits()[0].astype(np.float64)
    return np.rint(whole.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory, pictures) -> Path:
    """A folder with the data and a teacher."""
    folder = tmp_path_factory.mktemp("learning")
    digits.write_data(folder / "digits.npz", pictures)
    trained(folder, "teacher")
    return folder


def trained(place: Path, name: str) -> Path:
    """The model of a short run of a recipe."""
    experiment = learning.EXPERIMENTS[name]
    train(
        experiment.method, place / name, data=place / "digits.npz", config=learning.recipe(name),
        model=place / "teacher/model" if experiment.taught else None,
        overrides={"train.steps": STEPS.get(name, 200)} | SHORT | ({} if experiment.taught else NETWORK),
    )  # fmt: skip
    return place / name / "model"


def distance(space: digits.FeatureSpace, model: Path, steps: int) -> float:
    return space.distance(learning.sampled(mlx_cm.load(str(model), dtype="float32"), COUNT, steps=steps))


@pytest.mark.parametrize("name", [name for name in learning.EXPERIMENTS if name != learning.TEACHER])
def test_a_short_run_brings_one_step_nearer_to_the_data(place, pictures, name):
    """Much nearer than one step of what it begins with: the teacher, or a network without training."""
    space = digits.pixel_space(pictures)
    model = trained(place, name)
    begun = distance(space, place / "teacher/model", 1) if learning.EXPERIMENTS[name].taught else UNTRAINED
    found = distance(space, model, 1)
    assert found < begun / 2


def test_distances_are_those_of_the_data():
    pictures, labels = digits.digits()
    for space in (digits.pixel_space(pictures), digits.classifier_space(pictures, labels)):
        assert space.distance(pictures) == pytest.approx(0, abs=1e-6)
        mean = np.repeat(np.rint(pictures.mean(axis=0, keepdims=True)).astype(np.uint8), 10, axis=0)
        assert 0.5 < space.distance(mean) < 1.6
        assert space.distance(pictures[::2], pictures[1::2]) < 0.05
    assert digits.pixel_space(pictures).distance(mean) == pytest.approx(1, abs=0.01)


def test_what_is_recorded_holds():
    """The tables of the report are of all the recipes, and keep what the README says of them."""
    lines = (learning.REPORT / "tables.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head = next(row for row in rows if "recipe" in row)
    recorded = {row[1]: dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head) and row is not head}
    for name in learning.EXPERIMENTS:
        row = recorded[learning.recipe(name)]
        assert (ROOT / "recipes" / f"{learning.recipe(name)}.toml").is_file()
        if name != learning.TEACHER:
            assert float(row[learning.RUNS_BETTER]) >= learning.BETTER
            assert float(row[learning.RUNS_SECOND]) < 1
