"""The model that comes with the program, and what the README does with it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mlx_cm
from mlx_cm.bundled import BUNDLED, FOLDER
from mlx_cm.metadata import read_recipe
from mlx_cm.model_folder import read_model_index, weight_files
from recipes.emoji.bundle import LARGEST
from recipes.emoji.captions import held_out_captions
from recipes.emoji.evaluate import emoji_of, head_noun, held_out_sheet
from recipes.emoji.grid import SEEDS, WORDS, grid
from recipes.emoji.ink_style import SUBJECTS
from recipes.emoji.render import TINTS, WHITE

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64
UNSEEN = "rocket"  # is not among the twenty pictures of the style
COLOURED = {"red heart": 0, "green heart": 1, "blue heart": 2}  # => the channel that is brightest


@pytest.fixture(scope="module")
def pipeline():
    return mlx_cm.load(BUNDLED, dtype="float32")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


# --- the folder


def test_it_is_whole_small_and_in_half_precision():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    for part in read_model_index(FOLDER).components:
        if part != "scheduler":
            (weights,) = weight_files(FOLDER / part)
            sizes = {np.dtype("float16"): 0, np.dtype("float32"): 0}  # some layers stay float32
            for value in load_file(weights).values():
                sizes[value.dtype] += value.nbytes
            assert sizes[np.dtype("float16")] > 2 * sizes[np.dtype("float32")], part


def test_it_says_what_it_is():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for picture in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (FOLDER / picture).is_file()
    for said in ("Noto Color Emoji", "SIL Open Font License", "recipes/emoji/render.py", "recipes/emoji/evaluate.py"):
        assert said in card
    provenance = read_model_index(FOLDER).provenance
    assert provenance["source"] == BUNDLED
    assert str(Path.home()) not in json.dumps(provenance)


def test_it_is_a_latent_consistency_model_with_guidance(pipeline):
    assert pipeline.settings.sampler == "lcm"
    assert pipeline.has_guidance_embedding
    assert len(pipeline.text_encoders) == 1


# --- its pictures


def test_the_first_command_of_the_readme(run):
    (command,) = re.findall(r"\.venv/bin/mlx-cm (generate .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    first = run(*command.replace('"', "").split(maxsplit=1))
    assert first.code == 0, first.err
    assert f"bundled model '{BUNDLED}'" in first.err
    (path,) = first.lines
    image = Image.open(path)
    assert image.size == (SIDE, SIDE)
    assert read_recipe(path)["model"] == BUNDLED
    (again,) = run("generate", "red apple", "-m", BUNDLED, "-o", "again.png").lines
    np.testing.assert_array_equal(pixels(Image.open(again)), pixels(image))


def test_a_folder_of_its_name_does_not_take_its_place(run, tmp_path):
    """The recipe's own data is called so."""
    (tmp_path / "emoji").mkdir()
    assert run("generate", "pizza", "-o", "a.png").code == 0
    assert run("generate", "pizza", "-m", BUNDLED, "-o", "b.png").code == 0
    other = run("generate", "pizza", "-m", "./emoji", "-o", "c.png")
    assert (other.code, "emoji: " in other.err) == (3, True)


def test_without_a_prompt_there_is_nothing_to_draw(run, tmp_path):
    result = run("generate")
    assert (result.code, result.out) == (2, "")
    assert "error: " in result.err and "prompt" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 4])
def test_hearts_have_the_colour_that_was_asked_for(pipeline, steps):
    for name, channel in COLOURED.items():
        drawn = np.mean([pixels(image) for image in pipeline.generate(name, seed=[0, 1, 2, 3], steps=steps)], axis=0)
        middle = drawn[24:40, 24:40].mean(axis=(0, 1))
        assert middle.argmax() == channel, (name, middle)


def test_the_prompt_decides_more_than_the_seed(pipeline):
    """The mean squared difference of pictures of different words is several times that of the same word's."""
    words, seeds = ["red apple", "penguin", "rocket", "grinning face", "pizza"], [0, 1, 2]
    made = [pixels(image) for image in pipeline.generate(words, seed=seeds, steps=4)]
    drawn = np.stack(made).reshape(len(words), len(seeds), -1)
    centre = drawn.mean(axis=1)
    within = np.square(drawn - centre[:, None]).mean()
    between = np.square(centre - centre.mean(axis=0)).mean()
    assert between > 3 * within, (between, within)


def test_it_opens_nothing_but_its_own_files_and_draws_offline(tmp_path):
    """The first command of a newcomer, in a process that cannot open a connection."""
    script = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mlx_cm.cli import main
sys.argv = ["mlx-cm", "generate", "red apple", "-o", "apple.png"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "apple.png").size == (SIDE, SIDE)


def test_backgrounds_are_those_that_were_asked_for(pipeline):
    """Also behind what never had them in the data: nearest of the data's tints, for most of the held-out captions."""
    asked = [caption for caption in held_out_captions() if caption.endswith(" background")]
    drawn = [pixels(image)[:6, :6].mean(axis=(0, 1)) * 255 for image in pipeline.generate(asked, seed=0)]
    tints = {name: np.array(tint) for name, tint in TINTS.items()} | {"white": np.array(WHITE)}
    nearest = [min(tints, key=lambda name: np.abs(tints[name] - corner).sum()) for corner in drawn]
    right = [name in caption for name, caption in zip(nearest, asked, strict=True)]
    assert len(asked) >= 12 and np.mean(right) > 0.75, list(zip(asked, nearest, strict=True))


# --- what is made of it


@pytest.fixture(scope="module")
def ink(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("style") / "ink"
    subprocess.run(
        [sys.executable, ROOT / "recipes/emoji/ink_style.py", folder], check=True, capture_output=True, cwd=ROOT
    )
    return folder


def test_the_style_is_twenty_captioned_pictures(ink):
    captions = [json.loads(line)["text"] for line in (ink / "metadata.jsonl").read_text().splitlines()]
    assert captions == list(SUBJECTS)
    assert len(list(ink.glob("*.png"))) == len(SUBJECTS) == 20
    assert UNSEEN not in SUBJECTS


def assert_in_ink(before: np.ndarray, after: np.ndarray) -> None:
    """White paper has become blue, and the thing that is drawn is still the same."""
    paper = [picture[:6, :6].mean(axis=(0, 1)) for picture in (before, after)]
    assert abs(paper[0][2] - paper[0][0]) < 0.05, paper
    assert paper[1][2] - paper[1][0] > 0.08, paper
    shades = [picture.mean(axis=2).ravel() for picture in (before, after)]
    assert np.corrcoef(shades)[0, 1] > 0.6, np.corrcoef(shades)


# In the README these runs are three times as long.
REDUCED = ("--set", "train.steps=100", "--set", "train.sample_every=0", "--set", "train.checkpoint_every=0")


def test_the_readme_teaches_it_a_style(run, pipeline, ink, tmp_path):
    made = run("train", "lcm-lora", "--data", ink, "--model", BUNDLED, "--config", "style", "-o", "run", *REDUCED)
    assert made.code == 0, made.err
    adapter = tmp_path / "run/lora/pytorch_lora_weights.safetensors"
    (path,) = run("generate", UNSEEN, "--seed", "0", "--lora", adapter).lines
    assert_in_ink(pixels(pipeline.generate(UNSEEN, seed=0)[0]), pixels(Image.open(path)))


def test_the_readme_fine_tunes_it(run, pipeline, ink):
    made = run("train", "lcf", "--data", ink, "--model", BUNDLED, "--config", "style-whole", "-o", "fine", *REDUCED)
    assert made.code == 0, made.err
    (path,) = run("generate", UNSEEN, "--seed", "0", "-m", "fine/model").lines
    assert_in_ink(pixels(pipeline.generate(UNSEEN, seed=0)[0]), pixels(Image.open(path)))


# --- the recipe


def assert_same_picture(shown: Image.Image, drawn: Image.Image) -> None:
    """Up to what another machine's half precision rounds."""
    assert shown.size == drawn.size
    apart = np.abs(pixels(shown) - pixels(drawn))
    assert apart.mean() < 0.002 and np.quantile(apart, 0.999) < 0.05, (apart.mean(), np.quantile(apart, 0.999))


def test_the_grid_of_the_readme_is_this_models():
    """No picture is left out: a row per word, a column per seed."""
    shown = Image.open(ROOT / "docs/images/emoji.png")
    padding = 8
    assert shown.size == tuple(n * (SIDE + padding) + padding for n in (len(SEEDS), len(WORDS)))
    assert_same_picture(shown, grid(mlx_cm.load(BUNDLED)))


def test_the_sheet_of_the_card_is_this_models():
    assert_same_picture(Image.open(FOLDER / "held_out.png"), held_out_sheet(mlx_cm.load(BUNDLED)))


def test_head_nouns():
    named = ["red apple", "face with tears of joy", "man in lotus position", "couple with heart", "of"]
    assert [head_noun(name) for name in named] == ["apple", "face", "position", "couple", "of"]


def test_pictures_of_an_emoji_belong_together():
    entries = [SimpleNamespace(name=f"{code}.png") for code in ("1f34e_0", "1f34e_1", "1f350_0")]
    data = SimpleNamespace(captions=["red apple", "apple", "a pear"], entries=entries)
    first, second = emoji_of(data)
    assert (first.code, first.name, first.pictures) == ("1f34e", "red apple", (0, 1))
    assert second.pictures == (2,)
