"""The program with latent models, as its users meet it: prompts, pictures, adapters, and folders made from others."""

import io
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_latent
import torch
from command import Result, Run, interrupted
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_latent import PIXELS
from tiny_models import save_pipeline

from mlx_cm import memory
from mlx_cm.convert import convert
from mlx_cm.convert.adapters import SAMPLER_KEY, to_kohya
from mlx_cm.loading import check_memory
from mlx_cm.lora import Adapter, LoraLayer, adaptable_modules, lora_targets
from mlx_cm.metadata import read_parameters, read_recipe
from mlx_cm.model_folder import build_model, read_model_index

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', on schedulers without steps_offset

PROMPT = "a red fox on Straße 7"
LCM = ["--sampler", "lcm"]
PIPELINES = {
    "lcm": (LatentConsistencyModelPipeline, LCMScheduler),
    "sd": (StableDiffusionPipeline, DDIMScheduler),  # a base model
    "inpainting": (StableDiffusionInpaintPipeline, LCMScheduler),
    "xl lcm": (StableDiffusionXLPipeline, LCMScheduler),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small, torch's threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_lora(path: Path, model: Path, *, seed: int = 0, **metadata: str) -> None:
    """A LoRA of the model's attention in kohya's spelling."""
    unet, rng = build_model(model / "unet"), np.random.default_rng(seed)
    shapes = adaptable_modules(unet)

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / 4

    targets = lora_targets(unet, ("to_q", "to_k", "to_v", "to_out.0"))
    layers = [LoraLayer.from_numpy(name, values(2, shapes[name][1]), values(shapes[name][0], 2), 2) for name in targets]
    save_file(to_kohya(Adapter("lora", {"unet": {layer.path: layer for layer in layers}})), path, metadata)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Native models, adapters and pictures by name; to be read only."""
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for family, (pipeline, scheduler) in PIPELINES.items():
        tiny_latent.reference_pipeline(family, pipeline, scheduler).save_pretrained(folder / "theirs" / family)
        made[family] = folder / family
        convert(folder / "theirs" / family, made[family])
    save_pipeline(folder / "theirs" / "pixel")
    made["pixel"] = folder / "pixel"
    convert(folder / "theirs" / "pixel", made["pixel"])
    made["tiny"] = folder / "taesd"
    tiny_latent.autoencoder("tiny")[1].save_pretrained(made["tiny"])
    loras = {"style": ("sd", {}), "distilled": ("sd", {SAMPLER_KEY: "lcm"}), "other base": ("xl lcm", {})}
    for seed, (name, (family, metadata)) in enumerate(loras.items()):
        made[name] = folder / f"{name}.safetensors"
        write_lora(made[name], made[family], seed=seed, **metadata)
    made["no lora"] = folder / "theirs" / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    pictures = {"picture": tiny_latent.picture(40, 32), "other picture": tiny_latent.picture(40, 32, seed=1)}
    masks = {"mask": tiny_latent.mask(40, 32), "small": tiny_latent.mask(32, 32)}
    for name, picture in (pictures | masks).items():
        made[name] = folder / f"{name}.png"
        picture.save(made[name])
    (folder / "text.png").write_text("no picture")
    made["text"] = folder / "text.png"
    return made


@pytest.fixture
def generate(run, files) -> Run:
    """Runs `generate` with a model; {name} in an argument stands for one of the files."""

    def generate(family: str, *arguments: object) -> Result:
        return run("generate", "-m", files[family], *(str(one).format(**files) for one in arguments))

    return generate


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def standard_input(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# --- what pictures are made of, what they say of it, and that they are made again from it:
# model, arguments, what the recipe says, arguments to be given again

IMAGE = ["--image", "{picture}"]
MASKED = [*IMAGE, "--mask", "{mask}"]
MADE = {
    "a prompt": (
        "lcm",
        [PROMPT],
        {"prompt": PROMPT, "steps": 4, "sampler": "lcm", "guidance_scale": 8.5, "width": PIXELS, "height": PIXELS},
        [],
    ),
    "the empty prompt": ("lcm", [""], {"prompt": ""}, []),
    "spaces": ("lcm", ["  "], {"prompt": "  "}, []),
    "steps": ("lcm", [PROMPT, "--steps", 2], {"steps": 2, "times": [999, 499]}, []),
    "timesteps": ("lcm", [PROMPT, "--times", "999,500,7"], {"steps": 3, "times": [999, 500, 7]}, []),
    "original steps": ("lcm", [PROMPT, "--original-steps", 20, "--steps", 2], {"times": [999, 499]}, []),
    "guidance": ("lcm", [PROMPT, "--guidance", 3], {"guidance_scale": 3.0, "negative_prompt": None}, []),
    "a size": ("lcm", [PROMPT, "--width", 40, "--height", 56], {"width": 40, "height": 56}, []),
    "a seed": ("lcm", [PROMPT, "--seed", 2**64 - 1], {"seed": 2**64 - 1}, []),
    "torch's noise": ("lcm", [PROMPT, "--rng", "torch"], {"rng": "torch"}, []),
    "weighted words": ("lcm", ["a (fox:1.5)", "--prompt-weights"], {"prompt_weights": True}, []),
    "8 bits": ("lcm", [PROMPT, "--quantize", 8], {"quantize": 8}, []),
    "another autoencoder": (
        "lcm",
        [PROMPT, "--vae", "{tiny}"],
        {"vae": {"name": "taesd", "ref": None}},
        ["--vae", "{tiny}"],
    ),
    "a picture": ("lcm", [PROMPT, *IMAGE], {"strength": 0.5, "width": 40, "height": 32}, IMAGE),
    "much of a picture": ("lcm", [PROMPT, *IMAGE, "--strength", 0.8, "--steps", 2], {"strength": 0.8}, IMAGE),
    "a mask": ("lcm", [PROMPT, *MASKED], {"strength": 1.0}, MASKED),
    "an inpainting model": ("inpainting", [PROMPT, *MASKED], {"strength": 1.0, "guidance_scale": 1.0}, MASKED),
    "a base model": ("sd", [PROMPT, *LCM], {"sampler": "lcm", "guidance_scale": 1.0}, []),
    "a negative prompt": ("sd", [PROMPT, *LCM, "-n", "blue", "--guidance", 1.5], {"negative_prompt": "blue"}, []),
    "TCD": ("sd", [PROMPT, "--sampler", "tcd"], {"sampler": "tcd", "eta": 0.3}, []),
    "TCD, eta 0": ("sd", [PROMPT, "--sampler", "tcd", "--eta", 0], {"eta": 0.0}, []),
    "DDIM": (
        "sd",
        [PROMPT, "--sampler", "ddim", "--steps", 4],
        {"sampler": "ddim", "guidance_scale": 7.5, "times": [751, 501, 251, 1]},
        [],
    ),
    "SDXL": ("xl lcm", [PROMPT], {"sampler": "lcm", "guidance_scale": 8.0}, []),
    "adapters": (
        "sd",
        [PROMPT, "--lora", "{distilled}@0.8", "--lora", "{style}"],
        {"sampler": "lcm"},
        ["--lora", "{distilled}@0.8", "--lora", "{style}@1"],
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_a_picture_tells_how_it_was_made_and_is_made_again(generate, files, tmp_path, case):
    family, arguments, said, again = MADE[case]
    result = generate(family, *arguments)
    assert (result.code, result.out, result.err) == (0, "image.png\n", "")
    recipe = read_recipe("image.png")
    assert {key: recipe[key] for key in said} == said
    assert pixels("image.png").shape == (recipe["height"], recipe["width"], 3)
    for local in (files[family].parent, tmp_path):
        assert str(local) not in json.dumps(recipe)
    result = generate(family, "--from", "image.png", "-o", "again.png", *again)
    assert (result.code, result.err) == (0, "")
    assert Path("image.png").read_bytes() == Path("again.png").read_bytes()


MISSING = {
    "the picture": (MASKED, ["--mask", "{mask}"], "made with another as image", "--image PATH"),
    "the mask": (MASKED, IMAGE, "made with another as mask", "--mask PATH"),
    "the adapter": (["--lora", "{style}@0.75"], [], "a local adapter, 'style.safetensors'", "--lora PATH@0.75"),
    "the autoencoder": (["--vae", "{tiny}"], [], "a local autoencoder, 'taesd'", "--vae PATH"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_a_picture_does_not_hold_has_to_be_given_again(generate, case):
    arguments, again, why, hint = MISSING[case]
    assert generate("sd", PROMPT, *LCM, *arguments, "-o", "x.png").code == 0
    result = generate("sd", "--from", "x.png", *again)
    assert (result.code, result.out) == (2, "")
    assert why in result.err
    assert f"try: {hint}\n" in result.err


OTHER = {
    "another picture": (IMAGE, ["--image", "{other picture}"], "--image is another picture"),
    "another scale": (["--lora", "{style}@0.75"], ["--lora", "{style}@0.5"], "other adapters, or other scales"),
    "no adapter": ([], ["--lora", "{style}"], "other adapters, or other scales"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_things_than_a_picture_was_made_with_are_told(generate, case):
    arguments, again, said = OTHER[case]
    assert generate("sd", PROMPT, *LCM, *arguments, "-o", "x.png").code == 0
    result = generate("sd", "--from", "x.png", "-o", "y.png", *again)
    assert result.code == 0
    assert said in result.err
    assert "the result will differ" in result.err
    assert not np.array_equal(pixels("x.png"), pixels("y.png"))


# What was made; what is given beside it; all that the second picture is made with
STARTED = [*IMAGE, "--strength", 0.3]
CHANGED = {
    "prompt": ([*LCM, "--steps", 3], ["another"], ["another", *LCM, "--steps", 3]),
    "steps": ([*LCM, "--steps", 3], ["--steps", 2], [PROMPT, *LCM, "--steps", 2]),
    "times": ([*LCM, "--steps", 3], ["--times", "999,7"], [PROMPT, *LCM, "--times", "999,7"]),
    "original steps": (
        [*LCM, "--steps", 3],
        ["--original-steps", 9],
        [PROMPT, *LCM, "--steps", 3, "--original-steps", 9],
    ),
    "a picture to start from": (
        [*LCM, "--steps", 3],
        IMAGE,
        [PROMPT, *LCM, "--steps", 3, *IMAGE, "--width", PIXELS, "--height", PIXELS],
    ),
    "more of a picture": ([*LCM, *STARTED], [*IMAGE, "--strength", 0.9], [PROMPT, *LCM, *IMAGE, "--strength", 0.9]),
    "sampler": (["--sampler", "tcd", "--eta", 0.2], LCM, [PROMPT, *LCM]),
}


@pytest.mark.parametrize("case", CHANGED)
def test_options_go_before_a_recipe_and_before_what_followed_from_them(generate, case):
    made, changes, spelled_out = CHANGED[case]
    commands = {
        "x.png": [PROMPT, "--seed", 5, *made],
        "y.png": ["--from", "x.png", *changes],
        "z.png": ["--seed", 5, *spelled_out],
    }
    for name, arguments in commands.items():
        result = generate("sd", *arguments, "-o", name)
        assert (result.code, result.err) == (0, "")
    assert Path("y.png").read_bytes() == Path("z.png").read_bytes()
    assert not np.array_equal(pixels("x.png"), pixels("y.png"))


def test_several_pictures_from_a_recipe(generate):
    assert generate("lcm", PROMPT, "--seed", 5, "-o", "x.png").code == 0
    assert generate("lcm", "--from", "x.png", "--count", 2, "-o", "y.png").lines == ["y_s5.png", "y_s6.png"]
    assert Path("x.png").read_bytes() == Path("y_s5.png").read_bytes()


BROKEN_RECIPES = {
    "steps": "4",
    "seed": [0, "1"],
    "seed of truth": True,
    "prompt": ["x", 3],
    "times": "999",
    "width": 32.5,
    "guidance_scale": "much",
    "lora": [{"ref": 3}],
    "lora without scale": [{"ref": "a/b", "scale": "1"}],
    "vae": "tiny",
    "model_ref": 7,
}


@pytest.mark.parametrize("case", BROKEN_RECIPES)
def test_a_recipe_that_someone_has_broken(generate, case):
    assert generate("lcm", PROMPT, "--metadata", "sidecar", "-o", "x.png").code == 0
    name = case.split()[0]
    recipe = json.loads(Path("x.json").read_text()) | {name: BROKEN_RECIPES[case]}
    Path("x.json").write_text(json.dumps(recipe))
    result = generate("lcm", "--from", "x.json", "-o", "y.png")
    assert (result.code, result.out) == (3, "")
    assert "error: x.json: its recipe " in result.err
    assert name in result.err or "names a part as" in result.err


def test_a_recipe_does_not_name_pictures_of_this_machine(generate, files):
    """Someone else's recipe does not choose which files are read."""
    assert generate("lcm", PROMPT, "--metadata", "sidecar", "-o", "x.png").code == 0
    recipe = json.loads(Path("x.json").read_text()) | {"image": str(files["picture"])}
    Path("x.json").write_text(json.dumps(recipe))
    assert generate("lcm", "--from", "x.json", "-o", "y.png").code == 0
    assert np.array_equal(pixels("x.png"), pixels("y.png"))


def test_what_other_programs_read(generate):
    assert generate("sd", PROMPT, *LCM, "-n", "blue", "--guidance", 1.5, "--seed", 3, "--steps", 2).code == 0
    lines = read_parameters("image.png").splitlines()
    assert lines[:2] == [PROMPT, "Negative prompt: blue"]
    assert lines[2].startswith(
        f"Steps: 2, Sampler: LCM, CFG scale: 1.5, Seed: 3, Size: {PIXELS}x{PIXELS}, Model hash: "
    )


# --- prompts


def test_a_prompt_from_standard_input(generate, monkeypatch):
    assert generate("lcm", PROMPT, "-o", "x.png").code == 0
    for number, data in enumerate((f"{PROMPT}\n", f"\ufeff{PROMPT}\r\n")):
        standard_input(monkeypatch, data.encode())
        assert generate("lcm", "-", "-o", f"y{number}.png").code == 0
        assert Path("x.png").read_bytes() == Path(f"y{number}.png").read_bytes()


def test_a_file_of_prompts(generate):
    Path("prompts.txt").write_text("a fox\n\n   \na bear\r\n")
    result = generate("lcm", "--prompt-file", "prompts.txt", "--seed", "3,5", "-o", "x.png", "--preview", "steps")
    assert (result.code, result.err) == (0, "")
    expected = {f"x_p{p}_s{s}.png": (prompt, s) for p, prompt in ((1, "a fox"), (2, "a bear")) for s in (3, 5)}
    assert result.lines == list(expected)
    for name, (prompt, seed) in expected.items():
        recipe = read_recipe(name)
        assert (recipe["prompt"], recipe["seed"]) == (prompt, seed)
    assert generate("lcm", "a bear", "--seed", 3, "-o", "alone.png").code == 0
    assert Path("alone.png").read_bytes() == Path("x_p2_s3.png").read_bytes()
    names = {f"image_p{p}_s{s}_step{step}.png" for p in (1, 2) for s in (3, 5) for step in (1, 2, 3, 4)}
    assert {path.name for path in Path("steps").iterdir()} == names
    previews = {path.read_bytes() for path in Path("steps").iterdir()}
    assert len(previews) == len(names)


def test_a_sheet_of_several_prompts_is_made_again(generate):
    Path("prompts.txt").write_text("a fox\na bear\n")
    assert generate("lcm", "--prompt-file", "prompts.txt", "--count", 2, "--grid", "-o", "x.png").lines == ["x.png"]
    assert pixels("x.png").shape == (2 * PIXELS + 24, 2 * PIXELS + 24, 3)
    assert generate("lcm", "--from", "x.png", "-o", "y.png").code == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()


# --- output


def test_json_is_one_object(generate):
    result = generate("lcm", PROMPT, "--count", 2, "--json", "-o", "out/")
    (report,) = map(json.loads, result.lines)
    assert [(image["seed"], image["prompt"]) for image in report["images"]] == [(0, PROMPT), (1, PROMPT)]
    assert [Path(image["path"]).name for image in report["images"]] == ["image_s0.png", "image_s1.png"]


def test_several_at_once_differ_by_rounding_only(generate):
    assert generate("lcm", PROMPT, "--count", 3, "--batch", 2, "-o", "x.png").code == 0
    assert generate("lcm", PROMPT, "--seed", 1, "-o", "alone.png").code == 0
    assert np.abs(pixels("x_s1.png") - pixels("alone.png")).max() <= 1
    assert not np.array_equal(pixels("x_s1.png"), pixels("x_s2.png"))


@pytest.mark.parametrize("family", ["lcm", "xl lcm"])
def test_releasing_parts_changes_nothing(generate, family):
    for name, options in {"x.png": [], "y.png": ["--low-ram"]}.items():
        assert generate(family, PROMPT, *options, "-o", name).code == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_bits_differ_a_little_and_are_those_of_the_quantised_model(generate, run, files, bits):
    plain = ["--metadata", "none"]
    assert generate("lcm", PROMPT, *plain, "-o", "x.png").code == 0
    assert generate("lcm", PROMPT, *plain, "-o", "q.png", "--quantize", bits).code == 0
    difference = np.abs(pixels("x.png") - pixels("q.png"))
    assert 0 < difference.mean() < {4: 40, 8: 4}[bits]
    result = run("quantize", files["lcm"], "small", "--bits", bits)
    assert (result.code, result.out, result.err) == (0, "small\n", "")
    assert run("generate", PROMPT, "-m", "small", *plain, "-o", "s.png").code == 0
    assert Path("q.png").read_bytes() == Path("s.png").read_bytes()
    assert run("quantize", "small", "smaller").code == 3
    assert not Path("smaller").exists()


# --- adapters


def test_an_adapter_that_says_what_it_distils_for_makes_a_base_model_usable(generate):
    assert generate("sd", PROMPT, "--lora", "{distilled}", "-o", "x.png").code == 0
    assert generate("sd", PROMPT, *LCM, "-o", "y.png").code == 0
    assert np.abs(pixels("x.png") - pixels("y.png")).mean() > 1


def test_an_adapter_that_fits_in_part(generate, files):
    """Only on request, and the picture knows of it."""
    unknown = {f"lora_unet_elsewhere.lora_{part}.weight": np.ones((2, 2), np.float32) for part in ("down", "up")}
    save_file(load_file(files["style"]) | unknown, "more.safetensors")
    for name, options in {
        "x.png": ["--lora", "{style}"],
        "y.png": ["--lora", "more.safetensors", "--lora-partial"],
    }.items():
        assert generate("sd", PROMPT, *LCM, *options, "-o", name).code == 0
    assert np.array_equal(pixels("x.png"), pixels("y.png"))
    result = generate("sd", PROMPT, *LCM, "--lora", "more.safetensors")
    assert (result.code, "fits only partly" in result.err, "--lora-partial" in result.err) == (3, True, True)
    result = generate("sd", "--from", "y.png", "--lora", "more.safetensors", "-o", "z.png")
    assert result.code == 0, result.err
    assert Path("y.png").read_bytes() == Path("z.png").read_bytes()


def test_fused_adapters_act_as_those_that_are_loaded(generate, run, files):
    adapters = ["--lora", "{distilled}@0.8", "--lora", "{style}@-0.5"]
    assert generate("sd", PROMPT, *adapters, "--metadata", "none", "-o", "x.png").code == 0
    result = run("fuse", files["sd"], "fused", *(one.format(**files) for one in adapters))
    assert (result.code, result.out, result.err) == (0, "fused\n", "")
    assert run("generate", PROMPT, "-m", "fused", "--metadata", "none", "-o", "y.png").code == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()
    index = read_model_index(Path("fused"))
    assert index.sampler["sampler"] == "lcm"
    assert [one["scale"] for one in index.provenance["fused"]["adapters"]] == [0.8, -0.5]


# --- wrong arguments: model, arguments, exit code, what the message says

WRONG = {
    "no prompt": ("lcm", [], 2, ["prompt: no prompt given", 'try: mlx-cm generate "']),
    "prompt and prompt file": ("lcm", ["x", "--prompt-file", "{text}"], 2, ["a prompt was given as well"]),
    "prompt file that is not there": ("lcm", ["--prompt-file", "no.txt"], 3, ["no.txt: cannot be read"]),
    "prompt too long": ("lcm", ["fox " * 100], 2, ["prompt", "the text encoder takes 75"]),
    "words that are no text": ("lcm", ["a \udcff fox"], 2, ["prompt", "not valid"]),
    "label": ("lcm", ["x", "--label", "1"], 2, ["labels: this model is told by a prompt"]),
    "steps 0": ("lcm", ["x", "--steps", "0"], 2, ["steps 0", "expected 1 to 50"]),
    "too many steps": ("lcm", ["x", "--steps", "51"], 2, ["steps 51", "expected 1 to 50"]),
    "too many steps for so little": (
        "lcm",
        ["x", *IMAGE, "--strength", "0.1", "--steps", "6"],
        2,
        ["steps 6", "strength 0.1 leaves 5"],
    ),
    "steps and times": ("lcm", ["x", "--steps", "3", "--times", "999,499"], 2, ["leave one of the two out"]),
    "times that ascend": ("lcm", ["x", "--times", "499,999"], 2, ["times", "descend"]),
    "times beyond the range": ("lcm", ["x", "--times", "1000"], 2, ["times", "999"]),
    "times between": ("lcm", ["x", "--times", "999.5"], 2, ["times"]),
    "times in words": ("lcm", ["x", "--times", "soon"], 2, ["expected auto, or timesteps as 999,499"]),
    "times not a number": ("lcm", ["x", "--times", "nan"], 2, ["times"]),
    "original steps beside times": ("lcm", ["x", "--times", "999", "--original-steps", "20"], 2, ["original_steps"]),
    "negative prompt without use": ("lcm", ["x", "-n", "blue"], 2, ["negative_prompt", "guidance baked in"]),
    "negative prompt without guidance": (
        "sd",
        ["x", *LCM, "-n", "blue", "--guidance", "1"],
        2,
        ["negative_prompt: guidance_scale is 1", "try: --guidance 1.5"],
    ),
    "guidance not a number": ("lcm", ["x", "--guidance", "nan"], 2, ["guidance_scale nan"]),
    "guidance below 0": ("lcm", ["x", "--guidance", "-1"], 2, ["guidance_scale -1"]),
    "guidance without effect": ("sd", ["x", *LCM, "--guidance", "0.5"], 2, ["less would have no effect"]),
    "width": ("lcm", ["x", "--width", "30"], 2, ["width 30: expected a multiple of 8", "try: --width 32"]),
    "height": ("lcm", ["x", "--height", "61"], 2, ["height 61: expected a multiple of 8", "try: --height 64"]),
    "width 0": ("lcm", ["x", "--width", "0"], 2, ["width 0"]),
    "height below 0": ("lcm", ["x", "--height", "-8"], 2, ["height -8", "try: --height 8"]),
    "seeds that repeat": ("lcm", ["x", "--seed", "1,2", "--count", "2"], 2, ["same image twice"]),
    "seed beyond": ("lcm", ["x", "--seed", str(2**64)], 2, [f"seed {2**64}"]),
    "batch 0": ("lcm", ["x", "--batch", "0"], 2, ["batch_size 0"]),
    "strength without a picture": ("lcm", ["x", "--strength", "0.5"], 2, ["strength", "try: --image PATH"]),
    "mask without a picture": ("lcm", ["x", "--mask", "{mask}"], 2, ["mask", "try: --image PATH"]),
    "strength 0": ("lcm", ["x", *IMAGE, "--strength", "0"], 2, ["strength 0"]),
    "strength not a number": ("lcm", ["x", *IMAGE, "--strength", "nan"], 2, ["strength nan"]),
    "strength against times": (
        "lcm",
        ["x", *IMAGE, "--strength", "0.5", "--times", "999"],
        2,
        ["strength 0.5", "leave one of the two out"],
    ),
    "mask of another size": ("lcm", ["x", *IMAGE, "--mask", "{small}"], 2, ["mask: is 32x32, the picture 40x32"]),
    "picture that is not there": ("lcm", ["x", "--image", "no.png"], 3, ["no.png: file is missing"]),
    "mask that is not there": ("lcm", ["x", *IMAGE, "--mask", "no.png"], 3, ["no.png: file is missing"]),
    "text for a picture": ("lcm", ["x", "--image", "{text}"], 3, ["text.png"]),
    "folder for a picture": ("lcm", ["x", "--image", "{tiny}"], 3, ["taesd"]),
    "inpainting without a picture": ("inpainting", ["x"], 2, ["image", "try: --image PATH --mask PATH"]),
    "inpainting without a mask": ("inpainting", ["x", *IMAGE], 2, ["mask", "try: --mask PATH"]),
    "base model alone": ("sd", ["x"], 2, ["this is a base model", "--sampler lcm", "--sampler ddim"]),
    "base model with a style": ("sd", ["x", "--lora", "{style}"], 2, ["sampler auto", "say which kind it is"]),
    "adapter for another base": (
        "sd",
        ["x", *LCM, "--lora", "{other base}"],
        3,
        ["other base.safetensors", "width 72", "width 32"],
    ),
    "no adapter at all": ("sd", ["x", *LCM, "--lora", "{no lora}"], 3, ["is no LoRA"]),
    "adapter that is not there": ("sd", ["x", *LCM, "--lora", "no.safetensors"], 3, ["no.safetensors"]),
    "scale that is none": ("sd", ["x", *LCM, "--lora", "{style}@nan"], 2, ["lora scale nan"]),
    "another sampler": ("lcm", ["x", "--sampler", "tcd"], 2, ["distilled for lcm"]),
    "unknown sampler": ("lcm", ["x", "--sampler", "euler"], 2, ["expected auto, lcm, tcd"]),
    "eta without use": ("lcm", ["x", "--eta", "0.5"], 2, ["eta: the lcm sampler has no such setting"]),
    "eta not a number": ("sd", ["x", "--sampler", "tcd", "--eta", "nan"], 2, ["eta nan: expected 0 to 1"]),
    "bits": ("lcm", ["x", "--quantize", "3"], 2, ["quantize 3: expected one of 4, 8"]),
    "autoencoder that is not there": ("lcm", ["x", "--vae", "nothing"], 3, ["nothing: no such file"]),
    "no autoencoder": ("lcm", ["x", "--vae", "{no lora}"], 3, ["is a UNet2DCondition, expected"]),
    "base for a whole model": ("lcm", ["x", "--base", "{sd}"], 2, ["base"]),
    "memory": (
        "lcm",
        ["x", "--max-memory", "0.000001"],
        5,
        ["memory: needs", "GB to encode text", "GB to denoise", "GB to decode", "allowed"],
    ),
    "memory not a number": ("lcm", ["x", "--max-memory", "nan"], 2, ["max_memory nan"]),
    "a picture too large for any machine": ("lcm", ["x", "--width", "65496", "--height", "65496"], 5, ["available"]),
    "several on stdout": ("lcm", ["x", "--count", "2", "-o", "-"], 2, ["stdout takes one picture", "--grid"]),
    "previews in a file": ("lcm", ["x", "--preview", "{text}"], 6, ["text.png"]),
    "recipe that is not there": ("lcm", ["x", "--from", "no.json"], 3, ["no.json: file is missing"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_clear_error(generate, files, tmp_path, case):
    family, arguments, code, said = WRONG[case]
    result = generate(family, *arguments)
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert all(words in result.err for words in said), result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


PROMPT_FILES = {
    "empty": (b"", 2, "--prompt-file: holds no prompt"),
    "blank": (b"\n \n\t\n", 2, "--prompt-file: holds no prompt"),
    "a prompt twice": (b"a fox\na bear\na fox\n", 2, "'a fox' twice"),
    "no text": (b"a fox\n\xff\xfe", 3, "prompts.txt: is not UTF-8 text, at byte 6"),
}


@pytest.mark.parametrize("case", PROMPT_FILES)
def test_a_wrong_file_of_prompts(generate, monkeypatch, case):
    content, code, said = PROMPT_FILES[case]
    Path("prompts.txt").write_bytes(content)
    result = generate("lcm", "--prompt-file", "prompts.txt")
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    if case == "no text":
        standard_input(monkeypatch, content)
        assert "standard input: is not UTF-8 text, at byte 6" in generate("lcm", "-").err


# --- memory


def test_what_will_not_fit_is_refused_before_it_is_loaded(generate, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    monkeypatch.setattr("mlx_cm.loading.load_model", lambda *_: pytest.fail("weights were read"))
    result = generate("lcm", PROMPT)
    assert result.code == 5
    assert "available: 0.00 GB" in result.err
    assert "--low-ram" in result.err


EIGHT = {"width": 8, "height": 8}
TINIEST = ["--width", 8, "--height", 8]
# model, arguments, what of them the estimate is told, without what it is less
COSTLY = {
    "guidance": ("sd", [*TINIEST, "--guidance", 1.5], {"guidance_scale": 1.5, **EIGHT}, "guidance_scale"),
    "DDIM's guidance": ("sd", [*TINIEST, "--sampler", "ddim", "--steps", 2], {"sampler": "ddim", **EIGHT}, "sampler"),
    "a larger picture": ("sd", ["--width", 64], {"width": 64}, "width"),
    "a larger picture to start from": ("sd", IMAGE, {"width": 40, "height": 32}, "width"),
    "several at once": ("sd", ["--count", 2, "--batch", 9], {"batch": 2}, "batch"),
    "several seeds at once": ("lcm", ["--seed", "1,2", "--batch", 4], {"batch": 2}, "batch"),
    "parts that stay": ("lcm", [], {"low_ram": False}, "low_ram"),
}


@pytest.mark.parametrize("case", COSTLY)
def test_memory_is_that_of_the_request(generate, files, case):
    family, arguments, size, costly = COSTLY[case]
    limit = check_memory(files[family], **size).peak / memory.GB
    less = {"low_ram": True} if costly == "low_ram" else {key: size[key] for key in size if key != costly}
    assert check_memory(files[family], **less).peak / memory.GB < limit
    sampler = LCM if family == "sd" else []
    for factor, code in ((1.0001, 0), (0.9999, 5)):
        assert generate(family, PROMPT, *sampler, "--steps", 1, "--max-memory", limit * factor, *arguments).code == code


# --- between pictures


def test_interpolation_leads_from_one_picture_to_the_other(generate, run, files):
    plain = ["--metadata", "none"]
    for name, prompt, seed in (("first.png", "a seed", 3), ("last.png", "a tree", 8)):
        assert generate("lcm", prompt, "--seed", seed, *plain, "-o", name).code == 0
    ends = ["edit", "interpolate", "a seed", "a tree", "-m", files["lcm"], "--seed", "3,8", *plain]
    result = run(*ends, "--frames", 3, "-o", "x.png")
    assert (result.code, result.lines, result.err) == (0, ["x_f001.png", "x_f002.png", "x_f003.png"], "")
    assert Path("x_f001.png").read_bytes() == Path("first.png").read_bytes()
    assert Path("x_f003.png").read_bytes() == Path("last.png").read_bytes()
    assert not np.array_equal(pixels("x_f002.png"), pixels("first.png"))
    assert run(*ends, "--frames", 3, "--grid", "--path", "spherical", "-o", "sheet.png").lines == ["sheet.png"]
    sheet = pixels("sheet.png")
    assert sheet.shape == (PIXELS + 16, 3 * PIXELS + 32, 3)
    assert np.array_equal(sheet[8:-8, 8 : 8 + PIXELS], pixels("first.png"))


def test_interpolation_tells_how_it_was_made(run, files):
    result = run("edit", "interpolate", "a", "b", "-m", files["sd"], *LCM, "--frames", 2, "--json", "-o", "x.png")
    images = json.loads(result.out)["images"]
    assert [(image["frame"], image["prompt"], image["seed"]) for image in images] == [
        (n, ["a", "b"], [0, 0]) for n in (1, 2)
    ]
    again = run("generate", "-m", files["sd"], "--from", "x_f001.png")
    assert (again.code, "its recipe is for 'interpolate'" in again.err) == (3, True)


INTERPOLATION_WRONG = {
    "one frame": ("lcm", ["--frames", "1"], 2, "frames 1: expected at least 2"),
    "no frame": ("lcm", ["--frames", "0"], 2, "frames 0: expected at least 2"),
    "three seeds": ("lcm", ["--seed", "1,2,3"], 2, "expected one seed or two"),
    "unknown path": ("lcm", ["--path", "crooked"], 2, "expected one of linear, spherical"),
    "pixel model": ("pixel", [], 2, "has no text encoder"),
    "base model": ("sd", [], 2, "this is a base model"),
    "several on stdout": ("lcm", ["-o", "-"], 2, "stdout takes one picture"),
    "memory": ("lcm", ["--width", "65496", "--height", "65496"], 5, "GB"),
}


@pytest.mark.parametrize("case", INTERPOLATION_WRONG)
def test_an_interpolation_that_cannot_be(run, files, tmp_path, case):
    family, arguments, code, said = INTERPOLATION_WRONG[case]
    result = run("edit", "interpolate", "a", "b", "-m", files[family], *arguments)
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert list(tmp_path.iterdir()) == []


# --- folders from folders


def test_diffusers_makes_our_picture_from_an_export(generate, run, files):
    result = run("export", files["lcm"], "exported")
    assert (result.code, result.out, result.err) == (0, "exported\n", "")
    pipeline = DiffusionPipeline.from_pretrained("exported")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="np").images[0]
    assert generate("lcm", PROMPT, "--steps", 2, "--seed", 3, "--rng", "torch", "-o", "x.png").code == 0
    assert np.abs(pixels("x.png") - 255 * theirs).max() < 0.6


FOLDERS_WRONG = {
    "fuse nothing": (["fuse", "{sd}", "out"], 2, "--lora"),
    "fuse what does not fit": (["fuse", "{sd}", "out", "--lora", "{other base}"], 3, "other base.safetensors"),
    "fuse what is no adapter": (["fuse", "{sd}", "out", "--lora", "{no lora}"], 3, "is no LoRA"),
    "fuse into a pixel model": (["fuse", "{pixel}", "out", "--lora", "{style}"], 2, "is for latent models"),
    "fuse into itself": (["fuse", "{sd}", "{sd}", "--lora", "{style}", "--overwrite"], 2, "is the source"),
    "fuse in place of something": (["fuse", "{sd}", "{tiny}", "--lora", "{style}"], 6, "exists already"),
    "quantise a pixel model": (["quantize", "{pixel}", "out"], 2, "no component that gains by it"),
    "quantise to 3 bits": (["quantize", "{lcm}", "out", "--bits", "3"], 2, "expected one of 4, 8"),
    "quantise nothing": (["quantize", "nothing", "out"], 3, "nothing: no such file or folder"),
    "export nothing": (["export", "nothing", "out"], 3, "nothing: no such file or folder"),
    "export in place of something": (["export", "{lcm}", "{tiny}"], 6, "exists already"),
}


@pytest.mark.parametrize("case", FOLDERS_WRONG)
def test_a_folder_that_cannot_be_made(run, files, tmp_path, case):
    arguments, code, said = FOLDERS_WRONG[case]
    result = run(*(one.format(**files) for one in arguments))
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert list(tmp_path.iterdir()) == []


# --- inspecting


def test_inspect_a_latent_model(run, files):
    lines = run("inspect", files["lcm"]).lines
    assert lines[0] == "model lcm: LatentConsistencyPipeline"
    for part in ("unet: UNet2DCondition", "vae: AutoencoderKL", "text_encoder: CLIPTextModel"):
        assert any(line.startswith(f"  {part}, ") for line in lines)
    assert "  guidance_scale: 8.5" in lines
    told = json.loads(run("inspect", files["lcm"], "--json").out)
    parameters = {part: component["parameters"] for part, component in told["components"].items()}
    theirs = tiny_latent.unet("lcm")[1]
    assert parameters["unet"] == sum(value.numel() for value in theirs.parameters())
    assert told["memory_bytes"] > 4 * sum(parameters.values())
    assert run("quantize", files["lcm"], "small", "--bits", 4).code == 0
    small = json.loads(run("inspect", "small", "--json").out)
    assert {part: component["parameters"] for part, component in small["components"].items()} == parameters
    assert small["bits"] == {"unet": 4, "text_encoder": 4}
    assert small["components"]["unet"]["bytes"] < told["components"]["unet"]["bytes"]


def test_inspect_an_adapter(run, files):
    lines = run("inspect", files["distilled"]).lines
    assert lines[0] == "adapter distilled.safetensors: LoRA"
    assert "kohya spelling, rank 2, F32" in lines[1]
    assert lines[2:] == ["  base: a model (text states of width 32)", "  sampler: lcm"]
    told = json.loads(run("inspect", files["distilled"], "--json").out)
    tensors = load_file(files["distilled"])
    assert (told["kind"], told["modules"], told["ranks"]) == ("adapter", len(tensors) // 3, [2])
    assert (told["sampler"], told["metadata"]) == ("lcm", {SAMPLER_KEY: "lcm"})
    assert told["parameters"] == sum(value.size for value in tensors.values())
    assert json.loads(run("inspect", files["style"], "--json").out)["sampler"] is None


def test_inspect_an_adapter_of_another_kind(run):
    save_file({"lora_unet_x.hada_w1_a": np.zeros((2, 2), np.float32)}, "loha.safetensors")
    result = run("inspect", "loha.safetensors")
    assert (result.code, result.out) == (3, "")
    assert "LoHa" in result.err


# --- interruption


def test_an_interruption_ends_within_a_step(files, tmp_path):
    """Each step is a large picture's, and its preview appears as soon as it is done."""
    command = [sys.executable, "-m", "mlx_cm.cli", "generate", PROMPT, "-m", str(files["lcm"]), "--steps", "50"]
    command += ["--width", "256", "--height", "256", "--preview", "steps", "-o", "out.png"]
    seen = []

    def several() -> bool:
        seen[:] = tmp_path.glob("steps/*.png")
        return len(seen) >= 2

    done = interrupted(command, tmp_path, signal.SIGINT, several)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "error: interrupted: stopped on request"
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]
    left = list((tmp_path / "steps").iterdir())
    assert 2 <= len(left) <= len(seen) + 2
    for path in left:
        with Image.open(path) as image:
            image.load()
