"""Every published form of LPIPS, to a component that computes what it computed."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from lpips_reference import WIDTHS, LPIPSReference, openai_lpips
from mlx.utils import tree_flatten
from parity import TOLERANCE, channels_last, relative_error
from safetensors.torch import save_file, save_model

import mlx_cm
from mlx_cm.convert import Options, convert, plan_conversion
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import load_model, read_model_index
from mlx_cm.models.lpips import LPIPSConfig

save_legacy = functools.partial(torch.save, _use_new_zipfile_serialization=False)  # as the published files are


@pytest.fixture(scope="module")
def reference() -> LPIPSReference:
    return LPIPSReference()


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand((2, 3, 33, 47), generator=generator) * 2 - 1 for _ in range(2))


def package_heads(reference: LPIPSReference) -> dict[str, torch.Tensor]:
    """The lpips package's `weights/v0.1/vgg.pth`."""
    return {f"lin{number}.model.1.weight": head for number, head in enumerate(reference.heads)}


def whole(path: Path, save: Callable, state: dict[str, torch.Tensor]) -> Path:
    save(state, path)
    return path


def separate(folder: Path, network: dict[str, torch.Tensor], heads, save_network: Callable = save_legacy) -> Path:
    folder.mkdir()
    save_network(network, folder / "vgg16-397923af.pth")
    save_legacy(heads, folder / "heads.pth")
    (folder / "README.md").write_text("where they come from")
    return folder


def assert_measures_as(folder: Path, reference: LPIPSReference, pictures, **settings) -> None:
    model = mlx_cm.load_component(folder)
    assert model.config == LPIPSConfig(block_out_channels=WIDTHS, **settings)
    a, b = pictures
    with torch.no_grad():
        assert relative_error(model(channels_last(a), channels_last(b)), reference(a, b)) < TOLERANCE


WHOLE = {
    "torch.save": lambda path, reference: whole(path / "lpips.pth", torch.save, reference.state_dict()),
    "of an older PyTorch": lambda path, reference: whole(path / "lpips.pt", save_legacy, reference.state_dict()),
    "inside a checkpoint": lambda path, reference: whole(
        path / "x.ckpt", torch.save, {"state_dict": reference.state_dict(), "epoch": 3}
    ),
    "heads and network only": lambda path, reference: whole(
        path / "lpips.bin",
        torch.save,
        {k: v for k, v in reference.state_dict().items() if not k.startswith(("lins.", "scaling"))},
    ),
    "safetensors": lambda path, reference: whole(
        path / "lpips.safetensors", save_file, {k: v.clone() for k, v in reference.state_dict().items()}
    ),
    "safetensors without what is there twice": lambda path, reference: whole(
        path / "lpips.safetensors", lambda model, file: save_model(model, str(file)), reference
    ),
    "heads in the list only": lambda path, reference: whole(
        path / "lpips.pth",
        torch.save,
        {k: v for k, v in reference.state_dict().items() if not k.startswith("lin") or k.startswith("lins.")},
    ),
    "network and heads under torchvision's names": lambda path, reference: whole(
        path / "both.pth", torch.save, reference.vgg16_state() | package_heads(reference)
    ),
}


@pytest.mark.parametrize("form", WHOLE)
def test_one_file(form, reference, pictures, tmp_path):
    report = convert(WHOLE[form](tmp_path, reference), tmp_path / "out", Options(verify=True))
    assert (report.components, report.tensors, report.verified) == ({"lpips": "LPIPS"}, 31, True)
    assert_measures_as(tmp_path / "out", reference, pictures)
    index = read_model_index(tmp_path / "out")
    assert (index.pipeline, index.components) == ("LPIPS", {"lpips": "LPIPS"})


def test_heads_without_dropout(pictures, tmp_path):
    reference = LPIPSReference(seed=7, dropout=False)
    assert "lin0.model.0.weight" in reference.state_dict()
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    convert(tmp_path / "lpips.pth", tmp_path / "out")
    assert_measures_as(tmp_path / "out", reference, pictures)


HEADS = {"lpips": package_heads, "piq": lambda reference: reference.heads}


@pytest.mark.parametrize("heads", HEADS)
def test_a_folder_with_torchvisions_network_and_the_heads(heads, reference, pictures, tmp_path):
    source = separate(tmp_path / "parts", reference.vgg16_state(), HEADS[heads](reference))
    convert(source, tmp_path / "out", Options(verify=True))
    assert_measures_as(tmp_path / "out", reference, pictures)
    files = {file["name"] for file in read_model_index(tmp_path / "out").provenance["files"]}
    assert files == {"vgg16-397923af.pth", "heads.pth"}


def test_the_files_of_a_folder_are_known_by_their_content(reference, pictures, tmp_path):
    (tmp_path / "parts").mkdir()
    state = reference.vgg16_state()
    # timm's names, and a name that a folder of its own would be read by
    classifier = {f"pre_logits.fc1.{name}": state.pop(f"classifier.0.{name}") for name in ("weight", "bias")}
    classifier |= {f"head.fc.{name}": state.pop(f"classifier.6.{name}") for name in ("weight", "bias")}
    save_file({**state, **classifier}, tmp_path / "parts" / "model.safetensors")
    save_legacy(reference.heads, tmp_path / "parts" / "a.pt")
    convert(tmp_path / "parts", tmp_path / "out")
    assert_measures_as(tmp_path / "out", reference, pictures)


def test_loading_a_foreign_file_converts_it(reference, pictures, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    assert_measures_as(tmp_path / "lpips.pth", reference, pictures)
    separate(tmp_path / "parts", reference.vgg16_state(), package_heads(reference))
    assert_measures_as(tmp_path / "parts", reference, pictures)


def test_tensors_are_the_sources(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    convert(tmp_path / "lpips.pth", tmp_path / "out")
    weights = dict(tree_flatten(load_model(tmp_path / "out" / "lpips").parameters()))
    expected = reference.native_weights()
    assert weights.keys() == expected.keys()
    assert all(mx.array_equal(weights[name], expected[name]) for name in expected)


# --- settings


def test_the_variant_of_openai(reference, pictures, tmp_path, run):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    settings = ["--config", "pooling=avg", "--config", "resize=40", "--config", "resize_below=64"]
    done = run("convert", "lpips.pth", "out", *settings)
    assert done.code == 0, done.err
    assert "LPIPS on VGG16" in done.err
    assert "note:" not in done.err
    model = mlx_cm.load_component(tmp_path / "out")
    assert model.config == LPIPSConfig(WIDTHS, pooling="avg", resize=40, resize_below=64)
    a, b = pictures
    with torch.no_grad():
        expected = openai_lpips(reference.features, reference.heads, a, b, 40, 64)
    assert relative_error(model(channels_last(a), channels_last(b)), expected) < TOLERANCE


def test_a_note_tells_of_the_other_variant(reference, tmp_path, run):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    done = run("convert", "lpips.pth", "out")
    assert "note: computed as the lpips package does; for the variant of OpenAI's" in done.err
    assert "--config pooling=avg --config resize=224" in done.err


def test_it_stays_float32_whatever_it_is_stored_in(reference, pictures, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    convert(tmp_path / "lpips.pth", tmp_path / "out", Options(dtype="float16"))
    for dtype in (None, "float16", "bfloat16"):
        model = mlx_cm.load_component(tmp_path / "out", dtype)
        assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float32}
    a, b = pictures
    with torch.no_grad():
        assert relative_error(model(channels_last(a), channels_last(b)), reference(a, b)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision(dtype, reference, tmp_path):
    save_file(
        {name: value.to(dtype).clone() for name, value in reference.state_dict().items()}, tmp_path / "x.safetensors"
    )
    convert(tmp_path / "x.safetensors", tmp_path / "out", Options(verify=True))
    weights = dict(tree_flatten(load_model(tmp_path / "out" / "lpips").parameters()))
    expected = channels_last(reference.features[0].weight.to(dtype).float())
    assert mx.array_equal(weights["features.0.weight"], expected)


def test_what_the_program_says_of_it(reference, tmp_path, run):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    convert(tmp_path / "lpips.pth", tmp_path / "out")
    for ref in ("lpips.pth", "out"):
        described = json.loads(run("inspect", ref, "--json").out)
        assert (described["pipeline"], described["memory_bytes"]) == ("LPIPS", 0)
        assert described["components"]["lpips"]["tensors"] == 31
        assert "to generate" not in run("inspect", ref).out
    drawing = run("generate", "-m", "out", "-o", "x.png")
    assert drawing.code == 3
    assert "is a lone LPIPS, which makes no pictures by itself" in drawing.err
    exported = run("export", "out", "back")
    assert exported.code == 3
    assert "has a part of class LPIPS, which diffusers lacks" in exported.err
    assert not (tmp_path / "back").exists()


# --- what cannot be converted


def test_half_of_it(reference, tmp_path):
    torch.save(reference.vgg16_state(), tmp_path / "vgg16.pth")
    torch.save(package_heads(reference), tmp_path / "vgg.pth")
    torch.save(reference.heads, tmp_path / "lpips_weights.pt")
    for name, missing in {"vgg16.pth": "heads", "vgg.pth": "network", "lpips_weights.pt": "network"}.items():
        with pytest.raises(ModelError, match=f"{name}: is half of LPIPS, without its {missing}") as raised:
            plan_conversion(tmp_path / name, Options())
        assert "into one folder" in raised.value.hint


def test_a_folder_with_more_than_two_files_is_not_guessed_at(reference, tmp_path):
    source = separate(tmp_path / "parts", reference.vgg16_state(), package_heads(reference))
    torch.save(package_heads(reference), source / "another.pth")
    with pytest.raises(ModelError, match=r"has no weight files; it holds .*another.pth"):
        plan_conversion(source, Options())


def test_two_files_that_are_something_else(tmp_path):
    (tmp_path / "parts").mkdir()
    torch.save({"x": torch.ones(2)}, tmp_path / "parts" / "one.pth")
    (tmp_path / "parts" / "two.pth").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="has no weight files"):
        plan_conversion(tmp_path / "parts", Options())


def test_heads_for_another_network(reference, tmp_path):
    """The package's for AlexNet are as many, under the same names."""
    heads = {f"lin{i}.model.1.weight": torch.ones((1, width, 1, 1)) for i, width in enumerate((6, 11, 13, 9, 9))}
    source = separate(tmp_path / "parts", reference.vgg16_state(), heads)
    with pytest.raises(ModelError, match=r"3 of another shape: lin1.model.1.weight: expected \(1, 10\), got \(1, 11\)"):
        plan_conversion(source, Options())


def test_a_network_of_other_depth(reference, tmp_path):
    """VGG19: more layers, other numbers."""
    state = {name: value for name, value in reference.vgg16_state().items() if not name.startswith("features.17.")}
    torch.save(state | {"features.16.weight": torch.ones(12, 12, 3, 3)}, tmp_path / "vgg19.pth")
    with pytest.raises(ModelError, match="belong to no known family"):
        plan_conversion(tmp_path / "vgg19.pth", Options())


@pytest.mark.parametrize("change", [{"extra.weight": torch.ones(3)}, {"net.slice5.28.bias": None}])
def test_every_tensor_has_its_place(change, reference, tmp_path):
    state = {name: value for name, value in (dict(reference.state_dict()) | change).items() if value is not None}
    torch.save(state, tmp_path / "lpips.pth")
    with pytest.raises(ModelError, match=r"1 (not known to this model: extra.weight|missing: features.28.bias)"):
        plan_conversion(tmp_path / "lpips.pth", Options())


def test_other_colours(reference, tmp_path):
    state = dict(reference.state_dict())
    state["scaling_layer.scale"] = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    torch.save(state, tmp_path / "lpips.pth")
    with pytest.raises(ModelError, match=r"scaling_layer.scale: expected \[0.458, 0.448, 0.45\], got \[0.2"):
        plan_conversion(tmp_path / "lpips.pth", Options())
    state = dict(reference.state_dict()) | {"net.slice1.0.weight": torch.ones(6, 1, 3, 3)}
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(ModelError, match=r"slice1.0.weight: expected \(out, 3, 3, 3\), got \(6, 1, 3, 3\)"):
        plan_conversion(tmp_path / "grey.pth", Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "cd-imagenet64-l2"}, "preset cd-imagenet64-l2: is for pixel-space consistency models only"),
        ({"base": Path("base")}, "base base: this source is complete without it"),
        ({"overrides": {"sample_size": 64}}, "config sample_size: cannot be set for .*these can: .*pooling, resize"),
    ],
)
def test_options_without_a_use(options, message, reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    with pytest.raises(UsageError, match=message):
        plan_conversion(tmp_path / "lpips.pth", Options(**options))


def test_an_impossible_setting(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    with pytest.raises(ModelError, match="pooling: 'median' is not supported"):
        plan_conversion(tmp_path / "lpips.pth", Options(overrides={"pooling": "median"}))


def test_the_heads_alone_have_the_shape_of_heads():
    """A list of other tensors is not taken for `piq`'s."""
    from mlx_cm.convert.keymaps.lpips import has_heads
    from mlx_cm.storage import TensorSource

    def tensors(shape):
        return {str(i): TensorSource(str(i), "F32", shape, lambda: np.zeros(shape)) for i in range(5)}

    assert has_heads(tensors((1, 7, 1, 1)))
    for shape in ((7, 1, 1), (7, 1, 1, 1), (1, 7, 3, 3), (1, 7)):
        assert not has_heads(tensors(shape))
