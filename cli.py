"""The command line. A command checks its arguments, calls one library function and reports.

stdout carries results only: paths, or one JSON object with --json. Progress and messages go to stderr.
"""

import contextlib
import functools
import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import mlx_cm
from mlx_cm.errors import MlxCmError, ModelError, UsageError

SIGNALLED = 128  # what a shell adds to the number of the signal that has ended a program
INTERRUPTED, TERMINATED = SIGNALLED + signal.SIGINT, SIGNALLED + signal.SIGTERM
DEFAULT_STEM = "image"
MAX_SIDE = 65_500  # pixels; what the file formats hold
FULL_SIZE = "mlx-cm generate PROMPT -m SimianLuo/LCM_Dreamshaper_v7"
PROMPT_EXAMPLE = 'mlx-cm generate "red apple"'

# Options of `generate` that go to `load`, and those that go to the pipeline; a recipe carries them under these names.
LOAD_OPTIONS = ("dtype", "quantize", "lora", "lora_partial", "vae", "base")
SETTINGS = (
    *("prompt", "negative_prompt", "labels", "steps", "times", "sampler", "eta", "original_steps", "guidance_scale"),
    *("width", "height", "seed", "count", "image", "strength", "mask", "prompt_weights", "tiled", "rng"),
)
PICTURES = ("image", "mask")  # settings that are given as the path of a picture; a recipe has only digests of them

# What a recipe, which anyone can edit, may hold under the names of settings: one value, or several where that is said.
RECIPE_TYPES = {
    **dict.fromkeys(("prompt", "negative_prompt", "sampler", "rng", "dtype", "model_ref"), str),
    **dict.fromkeys(("label", "seed", "steps", "original_steps", "width", "height", "quantize", "frames"), int),
    **dict.fromkeys(("times", "eta", "guidance_scale", "strength"), float),
    **dict.fromkeys(("prompt_weights", "tiled", "lora_partial", "grid"), bool),
    **dict.fromkeys(("lora", "vae"), dict),
}
RECIPE_LISTS = {"prompt", "label", "seed", "times", "lora"}
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
# Options that take the place of others in a recipe, where they decide the same.
DISPLACED = {
    "steps": ("times",),
    "times": ("steps",),
    "original_steps": ("times",),
    "strength": ("times",),
    "sampler": ("eta",),
}


def main() -> None:
    """Runs the program and ends it with the exit code that fits what happened."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    debug = "--debug" in sys.argv
    try:
        cli.main(prog_name="mlx-cm", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", "stopped on request", None, INTERRUPTED)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context else None
        _fail("usage", error.format_message().rstrip("."), hint, UsageError.exit_code)
    except BrokenPipeError:  # the reader of stdout is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MlxCmError as error:
        if debug:
            traceback.print_exc()
        _fail(error.what, error.why, error.hint, error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail("internal", f"{type(error).__name__}: {error}", "run again with --debug and report it", 1)


def _fail(what: str, why: str, hint: str | None, code: int) -> None:
    click.secho(f"error: {what}: {why}", err=True, fg="red", color=_colour())
    if hint:
        click.echo(f"try: {hint}", err=True)
    sys.exit(code)


def _colour() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None


def common_options(command: Callable) -> Callable:
    """The options every command has: how much it says."""

    @click.option("-q", "--quiet", is_flag=True, help="Errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more.")
    @click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
    @functools.wraps(command)
    def wrapped(quiet: bool, verbose: bool, debug: bool, **arguments: Any) -> Any:
        level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
        logging.getLogger("mlx_cm").setLevel(level)
        return command(**arguments, quiet=quiet)

    return wrapped


class Integers(click.ParamType):
    """Whole numbers separated by commas."""

    name = "N[,N..]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, as 1 or 1,2,3", param, ctx)


def _options(*options: Callable) -> Callable[[Callable], Callable]:
    """Options that several commands have, listed in the order of --help."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


MODEL_OPTIONS = _options(
    click.option("-m", "--model", metavar="REF", help="Folder, checkpoint or Hub id; by default the bundled model."),
    click.option("--lora", metavar="REF[@SCALE]", multiple=True, help="An adapter to apply; may be repeated."),
    click.option("--lora-partial", is_flag=True, help="Leave out what of an adapter the model has no place for."),
    click.option("--base", metavar="REF", help="For a lone U-Net: the model that the other parts come from."),
    click.option("--vae", default="full", show_default=True, help="full, tiny, or the reference of an autoencoder."),
    click.option("--quantize", type=int, help="4 or 8 bits per weight of the linear layers."),
    click.option("--dtype", help="float32, float16, bfloat16; by default float16 on a GPU, float32 on a CPU."),
)
SAMPLING_OPTIONS = _options(
    click.option("-n", "--negative-prompt", metavar="TEXT", help="What the picture should not show."),
    click.option("--prompt-weights", is_flag=True, help="Read (word:1.3) and [word] in prompts as weights."),
    click.option("--steps", type=int, help="Network calls; by default what the model is made for."),
    click.option("--times", metavar="LIST", help="Levels 80,1.38; timesteps 999,499; grid:0,22; a preset; auto."),
    click.option(
        "--sampler", default="auto", show_default=True, help="onestep, multistep, heun, euler, ctm; lcm, tcd, ddim."
    ),
    click.option("--eta", type=float, help="Of tcd and ctm: how much noise is put in again, 0 to 1."),
    click.option("--original-steps", type=int, help="Steps of the distillation, where the checkpoint does not say."),
    click.option("--guidance", "guidance_scale", type=float, help="How strongly the prompt pulls; 1 is no guidance."),
    click.option("--width", type=click.IntRange(max=MAX_SIDE), help="Pixels."),
    click.option("--height", type=click.IntRange(max=MAX_SIDE), help="Pixels."),
    click.option("--tiled", is_flag=True, help="Let the autoencoder work tile by tile, in less memory."),
    click.option("--rng", default="mlx", show_default=True, help="mlx, or torch for PyTorch's CPU generator."),
)
OUTPUT_OPTIONS = _options(
    click.option("-o", "--output", metavar="PATH|DIR|-", default=".", help="File, folder, or - for stdout."),
    click.option("--format", "image_format", help="png, jpeg or webp; by default what the name says, or png."),
    click.option("--grid", is_flag=True, help="One contact sheet instead of single pictures."),
    click.option("--metadata", type=click.Choice(["embed", "sidecar", "none"]), default="embed", show_default=True),
    click.option("--overwrite", is_flag=True, help="Replace existing files instead of taking the next free name."),
    click.option("--json", "as_json", is_flag=True, help="Report as one JSON object."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlx_cm.__version__, prog_name="mlx-cm")
def cli() -> None:
    """Consistency models on Apple silicon: convert checkpoints, make pictures in a few steps."""


@cli.command()
@click.argument("prompt", required=False)
@MODEL_OPTIONS
@SAMPLING_OPTIONS
@click.option("--prompt-file", metavar="FILE|-", help="A prompt in each line.")
@click.option("--label", "labels", type=Integers(), help="Class of each picture; by default drawn from its seed.")
@click.option("--seed", type=Integers(), default="0", show_default=True, help="One picture for each, or --count.")
@click.option("--count", type=int, default=1, show_default=True, help="Pictures per seed s: seeds s, s+1, ...")
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures computed at once.")
@click.option("--image", metavar="PATH", help="A picture to start from.")
@click.option("--strength", type=float, help="How much of it is made anew, above 0 to 1; 0.5, with a mask 1.")
@click.option("--mask", metavar="PATH", help="White where the picture is made anew.")
@click.option("--low-ram", is_flag=True, help="Release each part of the model after its last use.")
@click.option("--max-memory", type=float, metavar="GB", help="Refuse what would take more.")
@OUTPUT_OPTIONS
@click.option("--from", "source_recipe", metavar="IMAGE|JSON", type=click.Path(path_type=Path), help="Make it again.")
@click.option("--preview", metavar="DIR", type=click.Path(path_type=Path), help="Write the picture of every step.")
@common_options
def generate(quiet: bool, **options: Any) -> None:
    """Make pictures.

    \b
    mlx-cm generate "red apple"
    mlx-cm generate "a lighthouse at dusk" -m SimianLuo/LCM_Dreamshaper_v7
    mlx-cm generate -m openai/diffusers-cd_imagenet64_l2 --label 207 --steps 2

    PROMPT - is read from standard input.
    """
    from mlx_cm import images

    recipe = _read_recipe(options["source_recipe"])
    settings, loading = _settings(options, recipe)
    _check_pictures(settings, recipe)
    grid = options["grid"] or bool(recipe.get("grid"))
    model = _model_ref(options["model"], recipe, quiet)
    target = _target(options)

    size = {"batch": options["batch"], "low_ram": options["low_ram"], "max_memory": options["max_memory"]}
    pipeline = _load(model, loading, settings, quiet, **size)
    _check_model(pipeline, recipe, explicit=options["model"] is not None)
    if hasattr(pipeline, "text_encoders") and "prompt" not in settings:
        raise UsageError("prompt", "no prompt given; an empty one is valid, but has to be said", PROMPT_EXAMPLE)
    request = pipeline.resolve(**settings)
    total = len(request.seeds)
    if target is None and total > 1 and not grid:
        raise UsageError("--output -", f"stdout takes one picture, {total} were asked for", "--grid")

    made, started = [], time.perf_counter()
    with _progress("generating", quiet, unit="step") as report:
        on_step = _on_step(report, request, pipeline.preview, options)
        results = pipeline.iterate(request, callback=on_step, batch_size=options["batch"], low_ram=options["low_ram"])
        if grid:
            sheet = images.contact_sheet([image for _, image in results])
            results = iter([(request, sheet)])
        for suffix, (single, image) in zip(_suffixes(request), results, strict=False):
            path = target if grid or total == 1 else target.with_name(f"{target.stem}{suffix}{target.suffix}")
            described = pipeline.recipe(single) | ({"grid": True} if grid else {})
            made.append(_save(image, path, described, options))
    _report(model, made, time.perf_counter() - started, options)


def _settings(options: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the pipeline and `load` are asked for: given options before the recipe's, the recipe's before defaults."""
    context = click.get_current_context()

    def given(name: str) -> bool:
        return context.get_parameter_source(name) not in (None, click.core.ParameterSource.DEFAULT)

    names = (*SETTINGS, *LOAD_OPTIONS)
    said = {name: recipe[name] for name in names if name not in PICTURES and recipe.get(name) is not None}
    if recipe.get("label") is not None:
        said["labels"] = recipe["label"]
    displaced = [name for option, others in DISPLACED.items() if given(option) for name in others]
    if given("image") and recipe.get("image_sha256") is None:  # a picture made from noise now starts from another
        displaced.append("times")
    for name in displaced:
        said.pop(name, None)
    if "lora" in said and not given("lora"):
        said["lora"] = [(_recorded(entry, "lora", "adapter"), entry["scale"]) for entry in said["lora"]]
    if "vae" in said and not given("vae"):
        said["vae"] = _recorded(said["vae"], "vae", "autoencoder")
    for name in (name for name in names if name in options):
        if given(name) or (name not in said and options[name] not in (None, False)):
            said[name] = options[name]
    if given("prompt") or given("prompt_file"):
        said["prompt"] = _prompts(options["prompt"], options["prompt_file"])
    for name in PICTURES:
        if said.get(name) is not None:
            from mlx_cm.images import open_image

            said[name] = open_image(Path(said[name]).expanduser())
    return tuple({name: said[name] for name in names if name in said} for names in (SETTINGS, LOAD_OPTIONS))


def _prompts(prompt: str | None, file: str | None) -> str | list[str]:
    if file is None:
        return _read_text("-").rstrip("\r\n") if prompt == "-" else prompt
    if prompt is not None:
        raise UsageError("--prompt-file", "a prompt was given as well; leave one of the two out")
    lines = [line for line in _read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UsageError("--prompt-file", "holds no prompt")
    twice = next((line for line in lines if lines.count(line) > 1), None)
    if twice is not None:
        raise UsageError("--prompt-file", f"holds {twice!r} twice, which would make the same pictures twice")
    return lines


def _read_text(path: str) -> str:
    """The text of a file, or of standard input where its name is a dash."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ModelError(path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise ModelError(name, f"is not UTF-8 text, at byte {error.start}") from None


def _recorded(entry: dict[str, Any], option: str, what: str) -> str:
    """The reference of a part that a recipe names; a local one has to be given again."""
    if entry.get("ref") is None:
        scale = f"@{entry['scale']:g}" if "scale" in entry else ""
        why = f"the picture was made with a local {what}, {entry.get('name')!r}; say where it is"
        raise UsageError("--from", why, f"--{option} PATH{scale}")
    return entry["ref"]


def _read_recipe(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from mlx_cm.metadata import read_recipe

    recipe = read_recipe(path)
    if recipe.get("task") != "generate":
        raise ModelError(str(path), f"its recipe is for {recipe.get('task')!r}, not for generate")
    for name, kind in RECIPE_TYPES.items():
        value = recipe.get(name)
        several = isinstance(value, list) and name in RECIPE_LISTS
        if value is not None and not all(_is_a(kind, one) for one in (value if several else [value])):
            raise ModelError(str(path), f"its recipe says {name} is {value!r:.60}, expected {TYPE_NAMES[kind]}")
    for part in [*(recipe.get("lora") or []), recipe.get("vae") or {}]:
        if not isinstance(part.get("ref"), str | None) or not _is_a(float, part.get("scale", 1.0)):
            raise ModelError(str(path), f"its recipe names a part as {part!r:.60}, expected ref, name and scale")
    return recipe


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value of JSON is of a type; a whole number is a number, and true is none."""
    return type(value) is kind or (kind is float and type(value) is int)


def _model_ref(model: str | None, recipe: dict[str, Any], quiet: bool) -> str:
    if model is not None:
        return model
    if recipe:
        if recipe.get("model_ref") is None:
            raise UsageError(
                "--from",
                f"the picture was made with a local model, {recipe.get('model')!r}; say where it is",
                "-m PATH",
            )
        return recipe["model_ref"]
    from mlx_cm.bundled import BUNDLED

    if not quiet:
        click.echo(f"using the bundled model {BUNDLED!r}; for large pictures of anything: {FULL_SIZE}", err=True)
    return BUNDLED


def _load(
    model: str,
    loading: dict[str, Any],
    settings: dict[str, Any],
    quiet: bool,
    *,
    batch: int = 1,
    low_ram: bool = False,
    max_memory: float | None = None,
) -> Any:
    """The pipeline; its weights are read once it is known that the work fits into memory."""
    from mlx_cm.loading import check_memory
    from mlx_cm.sources import native_folder

    parts = {name: value for name, value in loading.items() if name != "base"}
    with _progress("loading", quiet, unit="B") as report:
        folder = native_folder(model, dtype=loading.get("dtype"), base=loading.get("base"), progress=report)
        image = settings.get("image")
        asked = {"width": settings.get("width"), "height": settings.get("height")}
        check_memory(
            folder,
            **{name: value for name, value in parts.items() if name in ("dtype", "quantize", "vae")},
            **(asked if image is None else {side: asked[side] or getattr(image, side) for side in asked}),
            guidance_scale=settings.get("guidance_scale"),
            sampler=settings.get("sampler"),
            batch=min(batch, _count_of_pictures(settings)),
            low_ram=low_ram,
            tiled=settings.get("tiled") or None,
            max_memory=max_memory,
            progress=report,
        )
        return mlx_cm.load(folder, progress=report, **parts)


def _count_of_pictures(settings: dict[str, Any]) -> int:
    prompts, seeds = (settings.get(name) for name in ("prompt", "seed"))
    several = [len(one) for one in (prompts, seeds) if isinstance(one, list)]
    return max(math.prod(several) * settings.get("count", 1), 1)


def _check_model(pipeline: Any, recipe: dict[str, Any], explicit: bool) -> None:
    """A picture is made again only by the weights that made it."""
    if not recipe:
        return
    log = logging.getLogger("mlx_cm")
    made_with, loaded = recipe.get("model_sha256"), pipeline.weights_sha256
    if made_with != loaded:
        why = f"the picture was made with weights {str(made_with)[:10]}, this model has {str(loaded)[:10]}"
        if not explicit:
            raise ModelError("--from", why, "name the model with -m to use it all the same")
        log.warning("--from: %s: the result will differ", why)
    adapters = [
        [(one.get("sha256"), one.get("scale")) for one in said.get("lora") or []]
        for said in (recipe, pipeline.provenance)
    ]
    if adapters[0] != adapters[1]:
        log.warning("--from: the picture was made with other adapters, or other scales: the result will differ")


def _check_pictures(settings: dict[str, Any], recipe: dict[str, Any]) -> None:
    """A picture that was made from others is made again only from the same ones."""
    from mlx_cm.images import picture_digest

    for name in PICTURES:
        digest = recipe.get(f"{name}_sha256")
        if digest is None:
            continue
        if settings.get(name) is None:
            why = f"the picture was made with another as {name}, which it does not hold; say where it is"
            raise UsageError("--from", why, f"--{name} PATH")
        if picture_digest(settings[name]) != digest:
            logging.getLogger("mlx_cm").warning("--from: --%s is another picture: the result will differ", name)


def _target(options: dict[str, Any]) -> Path | None:
    """The file to write, or None for stdout. A wrong format is known before the work begins."""
    from mlx_cm.images import image_format

    output, given = options["output"], options["image_format"]
    options["image_format"] = given or "png" if output == "-" else given
    if output == "-":
        image_format(Path(f"x.{options['image_format']}"))
        return None
    path = Path(output).expanduser()
    if path.is_dir() or output.endswith(("/", os.sep)):
        path = path / f"{DEFAULT_STEM}.{given or 'png'}"
    image_format(path, given)
    return path


def _suffixes(request: Any) -> list[str]:
    """What tells the names of a request's pictures apart: number of the prompt, where there are more, and seed."""
    prompts = getattr(request, "prompts", None) or ("",) * len(request.seeds)
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts), start=1)}
    several = len(numbers) > 1
    return [
        f"_p{numbers[prompt]}_s{seed}" if several else f"_s{seed}"
        for prompt, seed in zip(prompts, request.seeds, strict=True)
    ]


def _save(image: Any, path: Path | None, recipe: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Writes a picture and its metadata; returns what is reported of it."""
    from mlx_cm import images, metadata

    full = metadata.new_recipe(recipe)
    embedded = {}
    if options["metadata"] == "embed":
        embedded = {"recipe": full, "parameters": metadata.format_parameters(full)}
    if path is None:
        sys.stdout.buffer.write(images.encode_image(image, options["image_format"], **embedded))
        return {"path": None, **recipe}
    saved = images.save_image(image, path, format=options["image_format"], overwrite=options["overwrite"], **embedded)
    if options["metadata"] == "sidecar":
        metadata.write_sidecar(full, saved.with_suffix(".json"))
    if not options["as_json"]:
        click.echo(saved)
    return {"path": str(saved), **recipe}


def _report(model: str, made: list[dict[str, Any]], seconds: float, options: dict[str, Any]) -> None:
    if options["as_json"] and options["output"] != "-":
        click.echo(json.dumps({"model": model, "seconds": round(seconds, 3), "images": made}))


def _on_step(
    report: Callable[[int, int, str], None], request: Any, show: Callable, options: dict[str, Any]
) -> Callable[[Any], None]:
    """Shows how far the work is, and writes previews."""
    from mlx_cm import images

    folder, total = options["preview"], len(request.seeds) * len(request.times)
    suffixes = _suffixes(request)
    done = 0

    def on_step(step: Any) -> None:
        nonlocal done
        done += step.x.shape[0]
        report(done, total, "generating")
        if folder is not None:
            for suffix, image in zip(suffixes, show(step.x), strict=False):
                path = folder / f"{DEFAULT_STEM}{suffix}_step{step.index + 1}.png"
                images.save_image(image, path, overwrite=options["overwrite"])
        if step.index + 1 == step.total:
            del suffixes[: step.x.shape[0]]

    return on_step


@contextlib.contextmanager
def _progress(what: str, quiet: bool, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr where that is a terminal, told (done, total, what)."""
    bar = _bar(what, quiet, unit)

    def report(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_description_str(name[-40:], refresh=False)
        bar.update(done - bar.n)

    with bar:
        yield report


def _bar(what: str, quiet: bool, unit: str, **options: Any) -> Any:
    """tqdm's bar on stderr where that is a terminal."""
    from tqdm import tqdm

    return tqdm(
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        disable=quiet or not sys.stderr.isatty(),
        leave=False,
        colour=None,
        **options,
    )


@contextlib.contextmanager
def _training_progress(quiet: bool) -> Iterator[tuple[Callable, Callable]]:
    """Two bars, one after the other: told (done, total, what) of pictures, and (report, total, images/s) of steps.

    Training goes on where the terminal is gone.
    """
    stack, bar = contextlib.ExitStack(), None
    report = stack.enter_context(_progress("reading", quiet, unit="picture"))

    def on_picture(done: int, total: int, name: str) -> None:
        with contextlib.suppress(OSError):
            report(done, total, name)

    def on_step(step: Any, total: int, speed: float) -> None:
        nonlocal bar
        with contextlib.suppress(OSError):
            if bar is None:
                stack.close()
                bar = stack.enter_context(_bar("training", quiet, "step", total=total, initial=step.step - 1))
            bar.set_postfix_str(f"loss {step.loss:.4g}, {speed:.3g} images/s", refresh=False)
            bar.update()

    try:
        yield on_picture, on_step
    finally:
        with contextlib.suppress(OSError):
            stack.close()


def _pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` options, each value read as JSON where it is JSON."""
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not name=value", context, parameter)
        try:
            pairs[name] = json.loads(text)
        except ValueError:
            pairs[name] = text
    return pairs


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--dtype", help="float32, float16 or bfloat16; by default the source's.")
@click.option("--preset", help="Which published checkpoint it is, where the tensors do not tell: cd-imagenet64-l2, ...")
@click.option("--config", "overrides", multiple=True, callback=_pairs, metavar="NAME=VALUE", help="A config field.")
@click.option("--base", metavar="REF", help="The model that gives the parts which the source lacks.")
@click.option("--tokenizer", metavar="DIR", type=click.Path(path_type=Path), help="A vocabulary, for single files.")
@click.option("--variant", help="Which weights of a folder, as fp16.")
@click.option("--verify", is_flag=True, help="Read the result back and compare every tensor.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model.")
@click.option("--json", "as_json", is_flag=True, help="Report as one JSON object.")
@common_options
def convert(source: str, destination: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert a PyTorch checkpoint to a model folder, without PyTorch.

    SRC is a .safetensors, .pt, .pth, .ckpt or .bin file, a folder of diffusers' layout, or a Hub id. With --dtype it
    may also be a model folder of this program, whose weights get another type.
    """
    from mlx_cm.model_folder import is_native
    from mlx_cm.sources import convert_ref

    if options["dtype"] and is_native(Path(source)):
        from mlx_cm.rewriting import cast_folder

        idle = [name for name in ("preset", "overrides", "base", "tokenizer", "variant", "verify") if options[name]]
        if idle:
            raise UsageError(idle[0], "has no use for a model folder that is converted already")
        click.echo(cast_folder(source, destination, options["dtype"], overwrite=options["overwrite"]))
        return
    with _progress("converting", quiet, unit="B") as progress:
        report = convert_ref(source, destination, progress=progress, **options)
    if as_json:
        click.echo(json.dumps({**vars(report), "destination": str(report.destination)}))
        return
    if not quiet:
        for note in report.notes:
            click.echo(f"note: {note}", err=True)
        verified = ", verified" if report.verified else ""
        click.echo(
            f"{report.family}: {report.parameters:,} parameters in {report.tensors} tensors, "
            f"{report.bytes / 1e6:,.1f} MB{verified}",
            err=True,
        )
    click.echo(report.destination)


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@common_options
def export(source: str, destination: Path, overwrite: bool, quiet: bool) -> None:
    """Write a model folder under diffusers' names, for PyTorch."""
    from mlx_cm.sources import export_ref

    click.echo(export_ref(source, destination, overwrite=overwrite))


@cli.command()
@click.argument("source", metavar="REF")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--lora", metavar="REF[@SCALE]", multiple=True, required=True, help="An adapter; may be repeated.")
@click.option("--lora-partial", is_flag=True, help="Leave out what of an adapter the model has no place for.")
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@common_options
def fuse(source: str, destination: Path, quiet: bool, **options: Any) -> None:
    """Write a model with adapters fused into its weights."""
    from mlx_cm.rewriting import fuse_folder

    with _progress("loading", quiet, unit="B") as progress:
        click.echo(fuse_folder(source, destination, progress=progress, **options))


@cli.command()
@click.argument("source", metavar="REF")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--bits", type=int, default=8, show_default=True, help="4 or 8.")
@click.option("--overwrite", is_flag=True, help="Replace an existing folder.")
@common_options
def quantize(source: str, destination: Path, bits: int, overwrite: bool, quiet: bool) -> None:
    """Write a model with linear layers of 4 or 8 bits."""
    from mlx_cm.rewriting import quantize_folder
    from mlx_cm.sources import native_folder

    with _progress("loading", quiet, unit="B") as progress:
        folder = native_folder(source, progress=progress)
    click.echo(quantize_folder(folder, destination, bits, overwrite=overwrite))


@cli.command()
@click.argument("method", metavar="METHOD")
@click.option("--data", metavar="PATH", help="Folder of pictures, .npz, or tar shards.")
@click.option("-m", "--model", metavar="REF", help="What to start from, or to distil.")
@click.option("-o", "--output", metavar="RUN", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--config", metavar="FILE|RECIPE", help="Settings as TOML, or the name of a shipped recipe.")
@click.option("--set", "overrides", multiple=True, callback=_pairs, metavar="SECTION.NAME=VALUE", help="One setting.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--strict-data", is_flag=True, help="Refuse data with a picture that cannot be used.")
@click.option("--json", "as_json", is_flag=True, help="Report as one JSON object.")
@common_options
def train(method: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train a model.

    \b
    METHOD is one of
      teacher      a diffusion model, of pixels or latents, to distil from
      autoencoder  for latent models
      cd           consistency distillation of a teacher
      ct, ict      consistency training, without a teacher
      ctm          consistency trajectories
      lcd          latent consistency distillation, guidance included
      lcm-lora     the same as an adapter
      lcf          fine-tuning of a latent consistency model

    \b
    mlx-cm train ict --data pictures/ --config digits-ict -o run
    mlx-cm train ict -o run --resume

    \b
    mlx.launch -n 2 --backend ring mlx-cm train ict --data pictures/ --config digits-ict -o run

    Ctrl-C finishes the step under way and writes a checkpoint; a second one stops at once. The same goes for a
    terminal that is closed. Whatever happened, --resume goes on from the newest checkpoint as if it had not.
    """
    from mlx_cm.training.run import train as run_training
    from mlx_cm.training.run_folder import resume_command

    with _training_progress(quiet) as (on_picture, on_step):
        result = run_training(method, output, progress=on_picture, on_step=on_step, **options)
    if result.is_first:
        if result.skipped and not quiet:
            click.echo(f"note: {len(result.skipped)} pictures could not be used", err=True)
        if as_json:
            model = None if result.model is None else str(result.model)
            click.echo(json.dumps({"run": str(result.folder), "model": model, "step": result.step}))
        elif result.model is not None:
            click.echo(result.model)
    if result.stopped_by:
        where = f"at step {result.step}, of which there is a checkpoint"
        _fail("interrupted", where, resume_command(output, method), SIGNALLED + result.stopped_by)


@cli.group()
def edit() -> None:
    """Pictures made from others, or between them."""


@edit.command()
@click.argument("first", metavar="PROMPT")
@click.argument("last", metavar="PROMPT")
@MODEL_OPTIONS
@SAMPLING_OPTIONS
@click.option("--seed", type=Integers(), default="0", show_default=True, help="Of the first picture, and of the last.")
@click.option("--frames", type=int, default=8, show_default=True, help="Pictures in all.")
@click.option("--path", default="linear", show_default=True, help="Between the prompts: linear or spherical.")
@OUTPUT_OPTIONS
@common_options
def interpolate(first: str, last: str, seed: list[int], frames: int, path: str, quiet: bool, **options: Any) -> None:
    """Make pictures on the way from one prompt and seed to another."""
    from mlx_cm import images

    if len(seed) > 2:
        raise UsageError("--seed", f"expected one seed or two, got {len(seed)}")
    settings, loading = _settings(options, {})
    model, target = _model_ref(options["model"], {}, quiet), _target(options)
    if target is None and not options["grid"]:
        raise UsageError("--output -", "stdout takes one picture", "--grid")
    pipeline = _load(model, loading, settings, quiet)
    if not hasattr(pipeline, "interpolate"):
        raise UsageError("interpolate", "this model has no text encoder to lead from one prompt to another")
    ends = {"prompts": (first, last), "seeds": (seed[0], seed[-1])}
    started, made = time.perf_counter(), []
    described = pipeline.recipe(pipeline.resolve(first, seed=seed[0], **settings))
    described |= {"task": "interpolate", "prompt": [first, last], "seed": [seed[0], seed[-1]], "path": path}
    with _progress("generating", quiet, unit="picture") as report:
        pictures = []
        for number, picture in enumerate(pipeline.interpolate(**ends, frames=frames, path=path, **settings), start=1):
            report(number, frames, "generating")
            if options["grid"]:
                pictures.append(picture)
                continue
            name = target.with_name(f"{target.stem}_f{number:03}{target.suffix}")
            made.append(_save(picture, name, {**described, "frames": frames, "frame": number}, options))
        if options["grid"]:
            sheet = images.contact_sheet(pictures, columns=frames)
            made.append(_save(sheet, target, {**described, "frames": frames, "grid": True}, options))
    _report(model, made, time.perf_counter() - started, options)


@cli.command()
@click.argument("ref", metavar="REF|IMAGE")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@common_options
def inspect(ref: str, as_json: bool, quiet: bool) -> None:
    """Show what a model, a checkpoint, a Hub repository or a picture is."""
    from mlx_cm.inspection import describe, report_lines

    description = describe(ref)
    if as_json:
        click.echo(json.dumps(description))
    else:
        click.echo("\n".join(report_lines(description)))


@cli.group()
def models() -> None:
    """Converted models in the cache."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@common_options
def list_models(as_json: bool, quiet: bool) -> None:
    """List the models in the cache."""
    from mlx_cm import cache

    entries = cache.entries()
    if as_json:
        rows = [{**vars(entry), "path": str(entry.path)} for entry in entries]
        click.echo(json.dumps({"root": str(cache.cache_root()), "models": rows}))
        return
    for entry in entries:
        revision = f"@{entry.revision[:12]}" if entry.revision else ""
        click.echo(f"{entry.source or entry.path.name}{revision}\t{entry.size_bytes / 1e6:.1f} MB\t{entry.path}")
    if not entries and not quiet:
        click.echo(f"no models in {cache.cache_root()}", err=True)


@models.command()
@click.argument("ref", required=False)
@common_options
def where(ref: str | None, quiet: bool) -> None:
    """Print where the cache, or a model in it, lies."""
    from mlx_cm import cache

    if ref is None:
        click.echo(cache.cache_root())
        return
    for entry in _found(ref):
        click.echo(entry.path)


@models.command()
@click.argument("ref")
@common_options
def remove(ref: str, quiet: bool) -> None:
    """Remove a model from the cache. What was downloaded stays in the Hub's own cache."""
    from mlx_cm import cache

    freed = sum(cache.remove(entry) for entry in _found(ref))
    if not quiet:
        click.echo(f"freed {freed / 1e6:.1f} MB", err=True)


def _found(ref: str) -> list:
    from mlx_cm import cache

    found = cache.find(ref)
    if not found:
        raise ModelError(ref, "is not in the cache", "mlx-cm models list")
    return found


if __name__ == "__main__":
    main()
