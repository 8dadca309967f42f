"""The program as its users meet it: what it prints, what it writes, how it ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from command import interrupted
from openai_names import openai_state_dict
from PIL import Image
from tiny_models import save_pipeline, shared_unet

from mlx_cm import cache
from mlx_cm import cli as command_line
from mlx_cm.metadata import read_parameters, read_recipe
from mlx_cm.presets import PRESETS


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A class-conditional model in diffusers' layout."""
    return save_pipeline(tmp_path_factory.mktemp("published") / "diffusers-model")


@pytest.fixture(scope="module")
def native(published, tmp_path_factory) -> Path:
    """The same model converted."""
    from mlx_cm.convert import Options, convert

    folder = tmp_path_factory.mktemp("native") / "model"
    convert(published, folder, Options(preset="cd-imagenet64-l2"))
    return folder


# --- generating


def test_one_picture_in_one_step(run, native, tmp_path):
    result = run("generate", "-m", native, "--label", 3)
    assert (result.code, result.lines) == (0, ["image.png"])
    assert result.err == ""
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (16, 16)


def test_the_same_command_gives_the_same_bytes(run, native, tmp_path):
    for name in ("a.png", "b.png"):
        assert run("generate", "-m", native, "--seed", 7, "--steps", 2, "-o", name).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_picture_of_several_equals_the_picture_alone(run, native, tmp_path, batch):
    result = run("generate", "-m", native, "--seed", "4,9", "--count", 2, "--batch", batch, "-o", "x.png")
    assert result.lines == ["x_s4.png", "x_s5.png", "x_s9.png", "x_s10.png"]
    assert run("generate", "-m", native, "--seed", 9, "-o", "alone.png").code == 0
    difference = np.asarray(Image.open("x_s9.png")).astype(int) - np.asarray(Image.open("alone.png"))
    assert np.abs(difference).max() <= (0 if batch == 1 else 1)


def test_nothing_is_overwritten_unless_asked(run, native, tmp_path):
    paths = [run("generate", "-m", native, "--seed", seed, "-o", "x.png").lines[0] for seed in (0, 1)]
    assert paths == ["x.png", "x_1.png"]
    first = (tmp_path / "x.png").read_bytes()
    assert run("generate", "-m", native, "--seed", 1, "-o", "x.png", "--overwrite").lines == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() != first


@pytest.mark.parametrize(("name", "kind"), [("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.webp", "WEBP")])
def test_a_picture_tells_how_it_was_made(run, native, tmp_path, name, kind):
    assert run("generate", "-m", native, "--label", 3, "--steps", 2, "--seed", 5, "-o", name).code == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
    recipe = read_recipe(tmp_path / name)
    told = {key: recipe[key] for key in ("task", "model", "label", "steps", "seed", "sampler", "rng", "width")}
    assert told == {
        **{"task": "generate", "model": "diffusers-model", "label": 3, "steps": 2},
        **{"seed": 5, "sampler": "multistep", "rng": "mlx", "width": 16},
    }
    assert "Steps: 2" in read_parameters(tmp_path / name)
    assert str(tmp_path) not in json.dumps(recipe)
    assert str(native.parent) not in json.dumps(recipe)


@pytest.mark.parametrize(
    "settings",
    [
        ["--label", "3", "--steps", "2", "--seed", "5"],
        ["--times", "70.5,1.25", "--rng", "torch"],
        ["--count", "5", "--grid"],
        ["--seed", "1,2", "--grid", "--label", "2,7", "--steps", "4"],
    ],
)
def test_a_picture_is_made_again_from_itself(run, native, tmp_path, settings):
    assert run("generate", "-m", native, *settings, "-o", "x.png").code == 0
    assert run("generate", "-m", native, "--from", "x.png", "-o", "again.png").code == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_options_go_before_the_recipe(run, native, tmp_path):
    assert run("generate", "-m", native, "--label", 3, "--steps", 2, "--seed", 5, "-o", "x.png").code == 0
    assert run("generate", "-m", native, "--from", "x.png", "--steps", 1, "--seed", 6, "-o", "y.png").code == 0
    recipe = read_recipe(tmp_path / "y.png")
    assert (recipe["label"], recipe["steps"], recipe["seed"]) == (3, 1, 6)


def test_a_recipe_knows_the_weights_it_was_made_with(run, native, published, tmp_path):
    assert run("generate", "-m", native, "-o", "x.png").code == 0
    without = run("generate", "--from", "x.png")
    assert without.code == 2
    assert "local model, 'diffusers-model'" in without.err
    other = save_pipeline(tmp_path / "other", "unconditional")
    result = run("generate", "--from", "x.png", "-m", other, "-o", "y.png")
    assert "made with weights" in result.err


def test_metadata_beside_the_picture_or_nowhere(run, native, tmp_path):
    assert run("generate", "-m", native, "--metadata", "sidecar", "-o", "x.png").code == 0
    assert read_recipe(tmp_path / "x.json")["seed"] == 0
    assert "mlx-cm" not in Image.open(tmp_path / "x.png").info
    assert run("generate", "-m", native, "--from", "x.json", "-o", "y.png").code == 0
    assert run("generate", "-m", native, "--metadata", "none", "-o", "z.png").code == 0
    assert not Image.open(tmp_path / "z.png").info
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("x.png", "y.png", "z.png")]
    assert all(np.array_equal(pixels[0], one) for one in pixels[1:])


def test_json_is_one_object_on_stdout(run, native, tmp_path):
    result = run("generate", "-m", native, "--count", 2, "--json", "-o", "out/")
    report = json.loads(result.out)
    assert [image["seed"] for image in report["images"]] == [0, 1]
    assert all(Path(image["path"]).is_file() for image in report["images"])
    assert report["seconds"] > 0


def test_a_picture_on_stdout(native, tmp_path):
    command = [sys.executable, "-m", "mlx_cm.cli", "generate", "-m", str(native), "-o", "-", "--format", "png"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == []


def test_previews_of_every_step(run, native, tmp_path):
    assert run("generate", "-m", native, "--steps", 2, "--count", 2, "--preview", "steps").code == 0
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [f"image_s{seed}_step{step}.png" for seed in (0, 1) for step in (1, 2)]
    last = np.asarray(Image.open(tmp_path / "steps/image_s1_step2.png"))
    assert np.array_equal(last, np.asarray(Image.open(tmp_path / "image_s1.png")))


def test_a_foreign_folder_is_converted_once(run, published, tmp_path):
    assert run("generate", "-m", published, "-o", "a.png").code == 0
    (entry,) = cache.entries()
    made = entry.path.stat().st_mtime_ns
    assert run("generate", "-m", published, "-o", "b.png").code == 0
    assert entry.path.stat().st_mtime_ns == made


# --- wrong arguments: (arguments, exit code, what the message says)

WRONG = {
    "model that is not there": (["-m", "nowhere"], 3, ["nowhere: no such file or folder, and not a Hub id"]),
    "file that is not there": (["-m", "a/b.safetensors"], 3, ["no such file or folder"]),
    "steps 0": (["--steps", "0"], 2, ["steps 0: expected at least 1"]),
    "more steps than levels": (["--steps", "41"], 2, ["expected 1 to 40"]),
    "times and steps": (["--steps", "2", "--times", "80"], 2, ["leave one of the two out"]),
    "times that ascend": (["--times", "1,80"], 2, ["must descend"]),
    "times beyond the range": (["--times", "90"], 2, ["lies in [0.002, 80]"]),
    "times not a number": (["--times", "nan"], 2, ["lies in [0.002, 80]"]),
    "times in words": (["--times", "soon"], 2, ["expected auto, noise levels"]),
    "grid index beyond": (["--times", "grid:0,99"], 2, ["grid index 99", "0 to 39"]),
    "preset without a list": (["--times", "cd-cat256-l2"], 2, ["no multistep list was published"]),
    "label beyond": (["--label", "10"], 2, ["label 10", "classes 0 to 9"]),
    "labels and seeds": (["--label", "1,2", "--seed", "1,2,3"], 2, ["2 labels", "3 images"]),
    "count 0": (["--count", "0"], 2, ["count 0"]),
    "seed below 0": (["--seed", "-1"], 2, ["seed -1"]),
    "seeds that repeat": (["--seed", "0,1", "--count", "2"], 2, ["same image twice"]),
    "seed in words": (["--seed", "x"], 2, ["'x' is not a list of whole numbers"]),
    "unknown sampler": (["--sampler", "lcm"], 2, ["expected auto, onestep, multistep"]),
    "teacher's sampler": (["--sampler", "heun"], 2, ["this model is a consistency model"]),
    "two steps of one": (["--sampler", "onestep", "--steps", "2"], 2, ["the onestep sampler makes 1"]),
    "prompt": (["a cat"], 2, ["prompt: this model has no text encoder"]),
    "guidance": (["--guidance", "2"], 2, ["guidance_scale: this model was trained without guidance"]),
    "negative prompt": (["-n", "x"], 2, ["negative_prompt: this model has no text encoder"]),
    "another size": (["--width", "32"], 2, ["16 by 16 pixels only"]),
    "unknown generator": (["--rng", "dice"], 2, ["expected one of mlx, torch"]),
    "unknown dtype": (["--dtype", "int4"], 2, ["float32, float16, bfloat16"]),
    "adapter": (["--lora", "x"], 2, ["lora: is for latent models"]),
    "quantisation": (["--quantize", "4"], 2, ["quantize: is for latent models"]),
    "batch 0": (["--batch", "0"], 2, ["batch_size 0"]),
    "memory": (["--max-memory", "0.000001"], 5, ["GB to denoise", "allowed", "try: a smaller --batch"]),
    "unknown format": (["--format", "gif"], 2, ["expected one of png, jpeg, webp"]),
    "unknown extension": (["-o", "x.gif"], 2, ["names no image format"]),
    "format against name": (["-o", "x.png", "--format", "jpeg"], 2, ["the extension says png"]),
    "several on stdout": (["-o", "-", "--count", "2"], 2, ["stdout takes one picture"]),
    "recipe that is not there": (["--from", "no.png"], 3, ["no.png"]),
    "unknown option": (["--colour"], 2, ["No such option", "try: mlx-cm generate --help"]),
    "target in a file": (["-o", "taken/x.png"], 6, ["taken"]),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_a_wrong_argument_is_one_clear_error(run, native, tmp_path, case):
    arguments, code, said = WRONG[case]
    (tmp_path / "taken").write_text("a file")
    model = [] if "-m" in arguments else ["-m", native]
    result = run("generate", *model, *arguments)
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert all(words in result.err for words in said), result.err
    assert "Traceback" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_traceback_only_on_request(run):
    assert "Traceback" in run("generate", "-m", "nowhere", "--debug").err


def test_a_foreign_picture_carries_no_recipe(run, native, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    result = run("generate", "-m", native, "--from", "foreign.png")
    assert result.code == 3
    assert "carries no mlx-cm recipe" in result.err


def test_a_blank_picture_is_an_error(run, native, monkeypatch, tmp_path):
    from mlx_cm.pipelines import pixel

    monkeypatch.setattr(pixel.ConsistencyModelPipeline, "sample", lambda self, request, **_: 0 * NOISE)
    result = run("generate", "-m", native)
    assert result.code == 7
    assert "is blank" in result.err
    monkeypatch.setattr(pixel.ConsistencyModelPipeline, "sample", lambda self, request, **_: NOISE / 0)
    result = run("generate", "-m", native)
    assert result.code == 7
    assert "NaN or infinite" in result.err
    assert list(tmp_path.iterdir()) == []


NOISE = __import__("mlx.core").core.random.normal((1, 16, 16, 3))


# --- interruption


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_program_and_leaves_whole_files(native, tmp_path, sign, code):
    command = [sys.executable, "-m", "mlx_cm.cli", "generate", "-m", str(native), "--count", "100000", "-o", "out/"]
    done = interrupted(command, tmp_path, sign, lambda: len(list(tmp_path.glob("out/*.png"))) > 3)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    files = list((tmp_path / "out").iterdir())
    assert {path.suffix for path in files} == {".png"}
    for path in files:
        with Image.open(path) as image:
            image.load()


def test_a_reader_that_goes_away_ends_the_work_in_silence(native, tmp_path):
    command = f"{sys.executable} -m mlx_cm.cli generate -m {native} --count 30 -o out/ | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(list((tmp_path / "out").iterdir())) < 30


# --- progress


def test_a_bar_on_a_terminal_only(native, tmp_path):
    command = [sys.executable, "-m", "mlx_cm.cli", "generate", "-m", str(native), "--count", "3"]
    silent = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert silent.stderr == ""
    for quiet in ([], ["-q"]):
        reader, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 80))  # a bar needs room
        subprocess.run([*command, *quiet], cwd=tmp_path, stdout=subprocess.PIPE, stderr=terminal, check=True)
        os.set_blocking(reader, False)
        try:
            shown = os.read(reader, 65536)
        except BlockingIOError:  # nothing was written
            shown = b""
        os.close(terminal)
        os.close(reader)
        assert (b"generating" in shown) == (not quiet)


# --- converting


@pytest.fixture(scope="module")
def openai_file(tmp_path_factory) -> Path:
    """A flat state dict with OpenAI's names."""
    path = tmp_path_factory.mktemp("openai") / "model.pt"
    torch.save(openai_state_dict(shared_unet("conditional")), path)
    return path


HEADS = ["--config", "attention_head_dim=4", "--config", "norm_num_groups=4", "--config", "attn_norm_num_groups=4"]
SIZE = ["--config", "sample_size=16"]


def test_convert_reports_and_says_what_it_assumed(run, openai_file):
    result = run("convert", openai_file, "model", "--verify", *HEADS, *SIZE)
    assert (result.code, result.lines) == (0, ["model"]), result.err
    assert "note: the tensors do not tell how the model was trained" in result.err
    assert "verified" in result.err
    assert run("generate", "-m", "model", "--label", 1).code == 0


def test_convert_in_json(run, openai_file):
    result = run("convert", openai_file, "model", "--json", "--preset", "ct-imagenet64", *HEADS, *SIZE)
    report = json.loads(result.out)
    assert report["tensors"] > 0
    assert report["verified"] is False
    told = json.loads(run("inspect", "model", "--json").out)
    assert told["sampler"]["preset"] == "ct-imagenet64"
    assert result.err == ""


def test_both_dialects_make_the_same_picture(run, openai_file, published, tmp_path):
    assert run("convert", openai_file, "flat", *HEADS, *SIZE, "-q").code == 0
    assert run("convert", published, "folder", "-q").code == 0
    for name in ("flat", "folder"):
        assert run("generate", "-m", name, "--label", 2, "--metadata", "none", "-o", f"{name}.png").code == 0
    assert (tmp_path / "flat.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


CONVERT_WRONG = {
    "nothing there": (["no.pt", "x"], 3, "no such file or folder"),
    "existing target": (["{source}", "taken"], 6, "exists already"),
    "unknown preset": (["{source}", "x", "--preset", "best"], 2, "expected one of cd-imagenet64-l2"),
    "unknown dtype": (["{source}", "x", "--dtype", "int8"], 2, "expected one of float32"),
    "no pair": (["{source}", "x", "--config", "heads"], 2, "is not name=value"),
    "unknown field": (["{source}", "x", "--config", "heads=3"], 3, "does not know heads"),
    "text for weights": (["text.pt", "x"], 3, "text.pt"),
}


@pytest.mark.parametrize("case", CONVERT_WRONG, ids=list(CONVERT_WRONG))
def test_a_conversion_that_cannot_be_is_one_clear_error(run, openai_file, tmp_path, case):
    arguments, code, said = CONVERT_WRONG[case]
    (tmp_path / "taken").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    result = run("convert", *(str(openai_file) if one == "{source}" else one for one in arguments))
    assert result.code == code, result.err
    assert said in result.err
    assert "Traceback" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "text.pt"]
    assert list((tmp_path / "taken").iterdir()) == []


# --- inspecting


def test_inspect_a_model(run, native):
    result = run("inspect", native)
    assert "unet: UNet2D" in result.out
    assert "preset: cd-imagenet64-l2" in result.out
    assert "sha256" in result.out
    told = json.loads(run("inspect", native, "--json").out)
    unet = told["components"]["unet"]
    parameters = sum(value.numel() for value in shared_unet("conditional").parameters())
    assert (unet["parameters"], unet["dtypes"]) == (parameters, ["F32"])
    assert unet["shapes"]["conv_in.weight"] == [16, 3, 3, 3]
    assert told["memory_bytes"] > 4 * parameters


def test_inspect_a_checkpoint(run, published):
    told = json.loads(run("inspect", published, "--json").out)
    assert told["kind"] == "checkpoint"
    assert told["components"]["unet"]["class"] == "UNet2D"


def test_inspect_a_picture(run, native, tmp_path):
    assert run("generate", "-m", native, "--label", 3, "-o", "x.png").code == 0
    assert "  label: 3" in run("inspect", "x.png").out
    told = json.loads(run("inspect", "x.png", "--json").out)
    assert told["recipe"]["label"] == 3
    assert told["parameters"].startswith("class 3")


@pytest.mark.parametrize("name", ["x.png", "nowhere", "x.safetensors"])
def test_inspect_nothing(run, name):
    result = run("inspect", name)
    assert result.code == 3
    assert "no such file or folder" in result.err


# --- the cache


def test_models_are_listed_found_and_removed(run, published):
    assert "no models in" in run("models", "list").err
    assert run("generate", "-m", published).code == 0
    (line,) = run("models", "list").lines
    assert line.startswith("diffusers-model\t")
    (row,) = json.loads(run("models", "list", "--json").out)["models"]
    assert row["source"] == "diffusers-model"
    (where,) = run("models", "where", "diffusers-model").lines
    assert Path(where).is_dir()
    assert run("models", "where").lines == [str(cache.cache_root())]
    assert "freed" in run("models", "remove", "diffusers-model").err
    assert not Path(where).exists()
    gone = run("models", "remove", "diffusers-model")
    assert (gone.code, "not in the cache" in gone.err) == (3, True)


# --- the program itself


def test_help_answers_without_loading_mlx():
    script = "import sys; from mlx_cm import cli; cli.cli.main(['--help'], standalone_mode=False); "
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            script + "print([m for m in ('mlx.core', 'PIL', 'huggingface_hub') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_the_script_in_the_checkout_is_the_same_program():
    root = Path(command_line.__file__).resolve().parent
    done = subprocess.run([sys.executable, root / "cli.py", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mlx-cm, version")


def test_presets_are_the_published_ones():
    listed = {name: preset.repositories for name, preset in PRESETS.items() if preset.repositories}
    assert len(listed) == 9
    for name, repositories in listed.items():
        assert repositories == (f"openai/diffusers-{name.replace('-', '_', 2)}",) or repositories == (
            f"openai/diffusers-{name.replace('-', '_')}",
        )
