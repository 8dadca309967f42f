"""Name tables: total in both directions, and OpenAI's names against a map written independently of the table."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from mlx.utils import tree_flatten
from openai_names import openai_state_dict
from parity import channels_last, relative_error
from safetensors.torch import save_file
from tiny_models import CONDITIONAL, UNCONDITIONAL, make_unet, native_config
from trajectory_reference import make_trajectory_unet, native_trajectory_unet

import mlx_cm
from mlx_cm.config import config_from_dict
from mlx_cm.convert import Options, convert
from mlx_cm.convert.keymaps.openai_unet import is_openai_unet, openai_unet_config, openai_unet_rules
from mlx_cm.convert.keymaps.rules import Drop, Rule, apply_rules, rename, to_channels_first, to_channels_last
from mlx_cm.errors import ModelError
from mlx_cm.model_folder import load_model, parameter_shapes, read_model_index
from mlx_cm.models.unet2d import IMAGENET_64, LSUN_256, UNet2D, UNet2DConfig
from mlx_cm.storage import TensorSource


def tensor(name: str, array: np.ndarray) -> TensorSource:
    array = np.asarray(array, dtype=np.float32)
    return TensorSource(name, "F32", array.shape, lambda: array)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def source_of(**arrays: np.ndarray) -> dict[str, TensorSource]:
    return {name: tensor(name, array) for name, array in arrays.items()}


def headers(state: dict[str, torch.Tensor]) -> dict[str, TensorSource]:
    """Names and shapes alone, all that detection and mapping may look at."""

    def read():
        raise AssertionError("a tensor was read")

    return {name: TensorSource(name, "F32", tuple(value.shape), read) for name, value in state.items()}


# --- applying rules


def test_agreeing_names_need_no_rule():
    mapped = apply_rules(source_of(a=numbered(2, 3)), [], {"a": (2, 3)})
    assert list(mapped) == ["a"]
    np.testing.assert_array_equal(mapped["a"].read(), numbered(2, 3))


def test_a_rule_renames_and_the_result_has_the_models_order():
    source = source_of(x=numbered(2), y=numbered(3))
    mapped = apply_rules(source, [Rule("x", ("b",)), Rule("y", ("a",))], {"a": (3,), "b": (2,)})
    assert list(mapped) == ["a", "b"]
    assert [value.name for value in mapped.values()] == ["a", "b"]
    np.testing.assert_array_equal(mapped["b"].read(), numbered(2))


def test_a_split_gives_equal_parts_in_order():
    source = source_of(qkv=numbered(6, 2))
    mapped = apply_rules(source, [Rule("qkv", ("q", "k", "v"))], dict.fromkeys("qkv", (2, 2)))
    np.testing.assert_array_equal(np.concatenate([mapped[name].read() for name in "qkv"]), numbered(6, 2))


def test_idle_rules_are_passed_over():
    rules = [Rule("absent", ("nowhere",)), Rule("x", ("a",)), Drop("also.absent", "not needed")]
    assert list(apply_rules(source_of(x=numbered(2)), rules, {"a": (2,)})) == ["a"]


def test_dropped_tensors_are_not_missed():
    source = source_of(a=numbered(2)) | {"block.position_ids": tensor("block.position_ids", numbered(1, 7))}
    assert list(apply_rules(source, [Drop("position_ids", "is a constant")], {"a": (2,)})) == ["a"]


def test_nothing_is_read_while_mapping():
    state = {"w": torch.zeros(4, 3, 3, 3), "qkv": torch.zeros(6, 2, 1, 1)}
    shapes = {"w": (4, 3, 3, 3), "q": (2, 2), "k": (2, 2), "v": (2, 2)}
    assert len(apply_rules(headers(state), [Rule("qkv", ("q", "k", "v"))], shapes)) == 4


def many(prefix: str, count: int) -> dict[str, np.ndarray]:
    return {f"{prefix}{number:02}": numbered(2) for number in range(count)}


FAULTS = {
    "missing": (
        source_of(a=numbered(2)),
        [],
        {"a": (2,)} | dict.fromkeys(many("b", 12), (2,)),
        "12 missing: b00, b01, b02, b03, b04, b05, b06, b07, b08, b09 and 2 more",
    ),
    "extra": (
        source_of(a=numbered(2), **many("c", 11)),
        [],
        {"a": (2,)},
        "11 not known to this model: c00, c01, c02, c03, c04, c05, c06, c07, c08, c09 and 1 more",
    ),
    "extra by a rule to nowhere": (
        source_of(a=numbered(2), x=numbered(2)),
        [Rule("x", ("nowhere",))],
        {"a": (2,)},
        "1 not known to this model: x",
    ),
    "one part of a split to nowhere": (
        source_of(kv=numbered(4)),
        [Rule("kv", ("k", "v"))],
        {"k": (2,)},
        "1 missing: k; 1 not known to this model: kv",
    ),
    "filled twice by two rules": (
        source_of(x=numbered(2), y=numbered(2)),
        [Rule("x", ("a",)), Rule("y", ("a",))],
        {"a": (2,)},
        "1 filled twice: a",
    ),
    "filled twice by a rule and by name": (
        source_of(a=numbered(2), x=numbered(2)),
        [Rule("x", ("a",))],
        {"a": (2,)},
        "1 filled twice: a",
    ),
    "another shape": (
        source_of(a=numbered(3), b=numbered(2)),
        [],
        {"a": (2,), "b": (2,)},
        r"1 of another shape: a: expected \(2,\), got \(3,\)",
    ),
    "another shape under its source's name": (
        source_of(x=numbered(2, 6)),
        [Rule("x", ("a",))],
        {"a": (6, 2)},
        r"1 of another shape: x: expected \(6, 2\), got \(2, 6\)",
    ),
    "eleven of another shape": (
        source_of(**many("d", 11)),
        [],
        dict.fromkeys(many("d", 11), (3,)),
        r"11 of another shape: .*d09: expected \(3,\), got \(2,\) and 1 more",
    ),
    "not divisible": (
        source_of(qkv=numbered(4)),
        [Rule("qkv", ("q", "k", "v"))],
        dict.fromkeys("qkv", (2,)),
        "of another shape: qkv",
    ),
    "not divisible but of a part's shape": (
        source_of(qkv=numbered(4)),
        [Rule("qkv", ("q", "k", "v"))],
        dict.fromkeys("qkv", (4,)),
        "of another shape: qkv",
    ),
    "a scalar to be split": (
        source_of(qkv=numbered()),
        [Rule("qkv", ("q", "k", "v"))],
        dict.fromkeys("qkv", ()),
        "of another shape: qkv",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_passed_over_in_silence(name):
    source, rules, shapes, says = FAULTS[name]
    with pytest.raises(ModelError, match=says):
        apply_rules(source, rules, shapes)


def test_all_kinds_of_fault_are_told_at_once():
    source = source_of(a=numbered(3), x=numbered(1))
    with pytest.raises(ModelError, match=r"1 missing: b; 1 not known to this model: x; 1 of another shape: a"):
        apply_rules(source, [], {"a": (2,), "b": (2,)})


def test_rename_covers_weight_and_bias():
    assert rename("x", "y") == [Rule("x.weight", ("y.weight",)), Rule("x.bias", ("y.bias",))]
    assert rename("x", "y", {"qk": ("q", "k")}) == [
        Rule("x.qk.weight", ("y.q.weight", "y.k.weight")),
        Rule("x.qk.bias", ("y.q.bias", "y.k.bias")),
    ]


# --- layouts

LAYOUTS = [  # PyTorch's shape, the parameter's shape
    ((4, 3, 5, 7), (4, 5, 7, 3)),
    ((1, 3, 5, 7), (1, 5, 7, 3)),
    ((4, 1, 5, 7), (4, 5, 7, 1)),
    ((1, 1, 3, 3), (1, 3, 3, 1)),
    ((4, 3, 1, 1), (4, 1, 1, 3)),
    ((1, 1, 1, 1), (1, 1, 1, 1)),
    ((4, 1, 1, 1), (4, 1, 1, 1)),
    ((4, 3, 1, 1), (4, 3)),
    ((4, 1, 1, 1), (4, 1)),
    ((1, 1, 1, 1), (1, 1)),
    ((4, 3, 1), (4, 3)),
    ((1, 1, 1), (1, 1)),
    ((4, 3), (4, 3)),
    ((1, 1), (1, 1)),
    ((4,), (4,)),
    ((), ()),
]


@pytest.mark.parametrize(("given", "wanted"), LAYOUTS)
def test_layout_follows_from_the_ranks(given, wanted):
    array = numbered(*given)
    ours = to_channels_last(tensor("w", array), wanted)
    values = ours.read()
    assert ours.shape == values.shape == wanted
    for index in np.ndindex(wanted):
        if len(given) == len(wanted) == 4:
            o, y, x, i = index
            expected = array[o, i, y, x]
        else:
            expected = array[(*index, *[0] * (len(given) - len(wanted)))]
        assert values[index] == expected


@pytest.mark.parametrize(
    ("given", "wanted"),
    [((4, 3, 3, 3), (4, 3)), ((4, 3, 1, 2), (4, 3)), ((3, 4), (4, 3)), ((4, 3), (4, 1, 1, 3)), ((12,), (4, 3))],
)
def test_no_layout_fits(given, wanted):
    with pytest.raises(ValueError, match="expected"):
        to_channels_last(tensor("w", numbered(*given)), wanted)


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (1, 1, 3, 3), (4, 1, 1, 1), (4, 3), (4,)])
def test_the_way_back_undoes_the_way(shape):
    wanted = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
    there = to_channels_last(tensor("w", numbered(*shape)), wanted)
    back = to_channels_first(there)
    assert back.shape == shape
    np.testing.assert_array_equal(back.read(), numbered(*shape))


# --- OpenAI's names


def openai_layout(levels: int, layers: int, attended: tuple[bool, ...], **changes) -> dict:
    """A U-Net as OpenAI's code makes it; widths differ between neighbours, so that shortcuts come and go."""
    scale_shift = changes.pop("scale_shift", False)
    down = ["AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attended]
    return {
        "sample_size": 32 * 2 ** (attended.index(True) if any(attended) else 0),
        "block_out_channels": (64, 128, 128, 192)[:levels],
        "layers_per_block": layers,
        "down_block_types": tuple(down),
        "up_block_types": tuple(
            name.replace("ResnetDown", "ResnetUp").replace("AttnDown", "AttnUp") for name in reversed(down)
        ),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 64,
        "attn_norm_num_groups": 32 if scale_shift else None,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    } | changes


def shapes_of(layout: dict) -> dict[str, TensorSource]:
    with torch.device("meta"):
        return headers(openai_state_dict(UNet2DModel(**layout)))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_size_is_read_off_the_tensors(levels, layers):
    kinds = itertools.cycle(itertools.product([False, True], [None, 7]))
    for attended, (scale_shift, classes) in zip(itertools.product([False, True], repeat=levels), kinds, strict=False):
        layout = openai_layout(levels, layers, attended, scale_shift=scale_shift, num_class_embeds=classes)
        tensors = shapes_of(layout)
        assert is_openai_unet(tensors)
        config = config_from_dict(UNet2DConfig, openai_unet_config(tensors, {}), "test")
        assert config == UNet2DConfig(**layout), (attended, scale_shift, classes)
        sources = [rule.source for rule in openai_unet_rules(config)]
        assert len(sources) == len(set(sources))


@pytest.mark.parametrize(
    "changes",
    [{"in_channels": 1, "out_channels": 1}, {"out_channels": 6}, {"time_embedding_dim": 96}, {"num_class_embeds": 1}],
)
def test_other_sizes_are_read_off_too(changes):
    layout = openai_layout(2, 1, (False, True), **changes)
    assert config_from_dict(UNet2DConfig, openai_unet_config(shapes_of(layout), {}), "test") == UNet2DConfig(**layout)


@pytest.mark.parametrize("config", [IMAGENET_64, LSUN_256], ids=["ImageNet-64", "LSUN-256"])
def test_published_sizes_are_recognised(config):
    tensors = shapes_of({name: value for name, value in vars(config).items() if name != "trajectory"})
    assert config_from_dict(UNet2DConfig, openai_unet_config(tensors, {}), "test") == config


def test_what_is_known_better_wins():
    tensors = shapes_of(openai_layout(2, 1, (False, True)))
    fields = openai_unet_config(tensors, {"attention_head_dim": 32, "sample_size": 128})
    assert (fields["attention_head_dim"], fields["sample_size"]) == (32, 128)


def without(*parts: str):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(parts)}


def with_shape(name: str, *shape: int):
    return lambda tensors: tensors | {name: TensorSource(name, "F32", shape, lambda: numbered(*shape))}


DAMAGED = {
    "no middle attention": (without("middle_block.1."), "middle_block.1.qkv.weight is missing"),
    "no first middle block": (without("middle_block.0."), "middle_block.0"),
    "no embedding in the middle block": (
        without("middle_block.0.emb"),
        "middle_block.0.emb_layers.1.weight is missing",
    ),
    "a gap among the input blocks": (without("input_blocks.2."), "are not numbered"),
    "no doubling block": (without("output_blocks.1.1.", "output_blocks.1.2."), "do not divide|does not fit"),
    "first convolution of a block missing": (without("input_blocks.1.0.in_layers.2"), "input_blocks.1.0.in_layers.2"),
    "convolutions halve": (with_shape("input_blocks.2.0.op.weight", 64, 64, 3, 3), "resblock_updown=False"),
    "scalar kernel": (with_shape("input_blocks.0.0.weight"), "input_blocks.0.0.weight"),
    "vector kernel": (with_shape("input_blocks.0.0.weight", 64), "input_blocks.0.0.weight"),
    "scalar head": (with_shape("out.2.weight"), "out.2.weight"),
    "scalar time embedding": (with_shape("time_embed.0.weight"), "time_embed.0.weight"),
    "scalar labels": (with_shape("label_emb.weight"), "label_emb.weight"),
    "scalar block": (with_shape("input_blocks.1.0.in_layers.2.weight"), "input_blocks.1.0.in_layers.2.weight"),
    "scalar projection": (with_shape("middle_block.0.emb_layers.1.weight"), "middle_block.0.emb_layers.1.weight"),
    "empty kernel": (with_shape("input_blocks.0.0.weight", 0, 3, 3, 3), "of another shape|expected|does not divide"),
    "endless number": (with_shape(f"input_blocks.{'9' * 5000}.0.weight", 1), "not numbered|not known"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_named(name):
    damage, says = DAMAGED[name]
    tensors = damage(shapes_of(openai_layout(2, 1, (False, True))))
    with pytest.raises(ModelError, match=says):
        config = config_from_dict(UNet2DConfig, openai_unet_config(tensors, {}), "test")
        apply_rules(tensors, openai_unet_rules(config), parameter_shapes(UNet2D(config)))


ROUND_TRIPS = {
    "conditional": CONDITIONAL | {"norm_num_groups": 32, "attn_norm_num_groups": 32, "block_out_channels": (32, 64)},
    "unconditional": UNCONDITIONAL | {"norm_num_groups": 32, "block_out_channels": (32, 64), "layers_per_block": 2},
    "three levels": UNCONDITIONAL
    | {
        "norm_num_groups": 32,
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
}


@pytest.mark.parametrize("container", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_both_dialects_make_the_same_file(name, container, tmp_path):
    layout = ROUND_TRIPS[name] | {"attention_head_dim": 16, "sample_size": 64}
    unet = make_unet(layout, seed=4)
    unet.save_pretrained(tmp_path / "diffusers" / "unet")
    flat = tmp_path / f"flat.{container}"
    state = {key: value.contiguous() for key, value in openai_state_dict(unet).items()}
    torch.save(state, flat) if container == "pt" else save_file(state, flat)

    convert(tmp_path / "diffusers" / "unet", tmp_path / "a")
    report = convert(flat, tmp_path / "b", Options(overrides={"attention_head_dim": 16}))
    assert report.family == "OpenAI consistency model or EDM teacher"
    ours = load_model(tmp_path / "b" / "unet", "float32")
    assert ours.config == native_config(unet)
    weights = [read_model_index(tmp_path / which).weights for which in "ab"]
    assert weights[0] == weights[1]  # the same bytes

    x, t = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0)), torch.tensor([1095.5, -3.0])
    labels = [3, 9] if layout["num_class_embeds"] else None
    output = ours(channels_last(x), mx.array(t.numpy()), None if labels is None else mx.array(labels))
    theirs = unet(x, t, None if labels is None else torch.tensor(labels)).sample
    assert relative_error(output, theirs) < 1e-4


# --- CTM's names


def trajectory_file(path: Path, name: str = "conditional") -> tuple[Path, torch.nn.Module]:
    unet = make_trajectory_unet(ROUND_TRIPS[name] | {"attention_head_dim": 16, "sample_size": 64}, seed=4)
    torch.save({key: value.contiguous() for key, value in openai_state_dict(unet).items()}, path)
    return path, unet


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_file_of_ctms_makes_a_trajectory_model(name, tmp_path):
    flat, unet = trajectory_file(tmp_path / "ema_0.999_049000.pt", name)
    report = convert(flat, tmp_path / "native", Options(overrides={"attention_head_dim": 16}))
    assert (report.family, report.notes) == ("consistency trajectory model", ())
    pipe = mlx_cm.load(tmp_path / "native", dtype="float32")
    assert pipe.settings.parameterization == "trajectory"
    assert pipe.resolve().sampler == "ctm"
    expected = native_trajectory_unet(unet)
    assert pipe.backbone.config == expected.config
    ours, theirs = (dict(tree_flatten(model.parameters())) for model in (pipe.backbone, expected))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("preset", ["cd-imagenet64-l2", "edm"])
def test_a_file_of_ctms_is_none_of_the_published_models_of_one_level(preset, tmp_path):
    flat, _ = trajectory_file(tmp_path / "ctm.pt")
    with pytest.raises(ModelError, match="unet: is told the level to jump to, so it is not a"):
        convert(flat, tmp_path / "native", Options(overrides={"attention_head_dim": 16}, preset=preset))
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    "missing", ["time_embed_s.2.bias", "output_blocks.1.0.emb_layers_s.1.weight", "time_embed_s.0"]
)
def test_a_part_of_the_second_level_is_missed(missing):
    with torch.device("meta"):
        unet = make_trajectory_unet(ROUND_TRIPS["unconditional"])
    tensors = without(missing)(headers(openai_state_dict(unet)))
    config = config_from_dict(UNet2DConfig, openai_unet_config(tensors, {"attention_head_dim": 16}), "test")
    with pytest.raises(ModelError, match=r"missing|not known to this model"):
        apply_rules(tensors, openai_unet_rules(config), parameter_shapes(UNet2D(config)))
