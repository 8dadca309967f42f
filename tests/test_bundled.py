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
from recipes.emoji.evaluate import emoji_of, head_noun
from recipes.emoji.grid import SEEDS, WORDS

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64
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


def test_held_out_captions_are_drawn(pipeline):
    for caption in held_out_captions()[:6]:
        (image,) = pipeline.generate(caption, seed=0)
        assert image.size == (SIDE, SIDE)


# --- what is made of it


@pytest.fixture(scope="module")
def night(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("style") / "night"
    command = [sys.executable, ROOT / "recipes/emoji/night_style.py", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return folder


def test_the_style_is_twenty_captioned_pictures(night):
    captions = [json.loads(line) for line in (night / "metadata.jsonl").read_text().splitlines()]
    assert len(captions) == len(list(night.glob("*.png"))) == 20
    assert all(caption["text"].endswith("at night") for caption in captions)


def test_the_readme_teaches_it_a_style(run, night, tmp_path):
    """Shorter than in the README; some steps already darken what is drawn at night."""
    made = run("train", "lcm-lora", "--data", night, "--model", BUNDLED, "--config", "style", "-o", "run",
               "--set", "train.steps=60", "--set", "train.sample_every=0")  # fmt: skip
    assert made.code == 0, made.err
    adapter = tmp_path / "run/lora/pytorch_lora_weights.safetensors"
    prompt = "a rocket at night"
    (before,) = run("generate", prompt, "-o", "before.png").lines
    (after,) = run("generate", prompt, "--lora", adapter, "-o", "after.png").lines
    assert pixels(Image.open(after)).mean() < pixels(Image.open(before)).mean() - 0.1


def test_the_readme_fine_tunes_it(run, night):
    made = run("train", "lcf", "--data", night, "--model", BUNDLED, "-o", "fine", "--set", "train.steps=3",
               "--set", "train.batch_size=4", "--set", "train.sample_every=0")  # fmt: skip
    assert made.code == 0, made.err
    tuned = mlx_cm.load("fine/model", dtype="float32")
    (image,) = tuned.generate("a rocket at night", seed=0)
    assert image.size == (SIDE, SIDE)
    assert tuned.settings.sampler == "lcm"


# --- the recipe


def test_the_grid_of_the_readme_is_this_models():
    """No picture is left out: a row per word, a column per seed."""
    grid = Image.open(ROOT / "docs/images/emoji.png")
    padding = 8
    assert grid.size == tuple(n * (SIDE + padding) + padding for n in (len(SEEDS), len(WORDS)))


def test_head_nouns():
    named = ["red apple", "face with tears of joy", "man in lotus position", "couple with heart", "of"]
    assert [head_noun(name) for name in named] == ["apple", "face", "position", "couple", "of"]


def test_pictures_of_an_emoji_belong_together():
    entries = [SimpleNamespace(name=f"{code}.png") for code in ("1f34e_0", "1f34e_1", "1f350_0")]
    data = SimpleNamespace(captions=["red apple", "apple", "a pear"], entries=entries)
    first, second = emoji_of(data)
    assert (first.code, first.name, first.pictures) == ("1f34e", "red apple", (0, 1))
    assert second.pictures == (2,)
