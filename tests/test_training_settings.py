"""Settings: read from TOML, overridden one by one, refused with a reason, written back as they are."""

import dataclasses
import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import ROOT

import mlx_cm
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.training.methods import METHODS
from mlx_cm.training.settings import (
    TrainSettings,
    changed_settings,
    find_config,
    read_settings,
    settings_from_dict,
    settings_to_dict,
    shipped_recipes,
    to_toml,
)


def written(folder, text: str):
    path = folder / "a.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- reading


@pytest.mark.parametrize("method", METHODS)
def test_defaults_file_and_single_settings_go_on_top_of_each_other(tmp_path, method):
    path = written(tmp_path, "[train]\nsteps = 7\nbatch_size = 2\n[model.unet]\nsample_size = 8\n")
    defaults = read_settings(method)
    settings = read_settings(method, config=path, overrides={"train.steps": 9, "model.unet.in_channels": 1})
    assert settings.train == dataclasses.replace(defaults.train, steps=9, batch_size=2)
    assert settings.objective == defaults.objective
    assert settings.model == {"unet": {"sample_size": 8, "in_channels": 1}}
    assert type(settings.objective) is METHODS[method].settings
    for section, values in METHODS[method].defaults.items():
        for name, value in values.items():
            assert getattr(getattr(defaults, section), name) == (tuple(value) if isinstance(value, list) else value)


def test_one_run_leaves_the_defaults_of_the_next_alone():
    changed = read_settings("ct", overrides={"objective.end_scales": 3, "train.learning_rate": 0.5})
    assert read_settings("ct").objective.end_scales != changed.objective.end_scales
    assert read_settings("ct").train.learning_rate != 0.5


def test_null_stands_for_the_default(tmp_path):
    path = written(tmp_path, "[train]\ncompile = true\n[model.unet]\nnum_class_embeds = 3\n")
    settings = read_settings("ct", config=path, overrides={"train.compile": None, "model.unet.num_class_embeds": None})
    assert settings.train.compile is None
    assert settings.model == {"unet": {}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.stepz": 3}, r"ct: train.stepz: is unknown, expected one of steps, batch_size"),
        ({"objective.kl_weight": 3}, r"ct: objective.kl_weight: is unknown, expected one of curriculum"),
        ({"training.steps": 3}, r"ct: training: expected a section of train, data, samples, lora, objective, model"),
        ({"steps": 3}, r"--set steps: expected SECTION.NAME=VALUE"),
        ({"train.": 3}, r"--set train.: expected SECTION.NAME=VALUE"),
        ({".steps": 3}, r"--set .steps: expected SECTION.NAME=VALUE"),
        ({"train.steps.more": 3}, r"ct: \[train\]: steps: expected int, got \{'more': 3\}"),
        ({"model.unnet.sample_size": 3}, r"ct: \[model\]: does not know 'unnet', expected some of unet, schedule"),
        ({"train.steps": "many"}, r"ct: \[train\]: steps: expected int, got 'many'"),
        ({"train.steps": 1.5}, r"steps: expected int, got 1.5"),
        ({"train.steps": True}, r"steps: expected int, got True"),
        ({"train.steps": 2**31}, r"steps: expected a number below 2\^31"),
        ({"train.recompute": 1}, r"recompute: expected bool, got 1"),
        ({"train.ema": 0.9}, r"ema: expected a list, got 0.9"),
        ({"train.learning_rate": "1e-4"}, r"learning_rate: expected float, got '1e-4'"),
        ({"samples.prompts": "a cat"}, r"prompts: expected a list, got 'a cat'"),
    ],
)
def test_what_is_no_setting_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        read_settings("ct", overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.steps": 0}, "steps: expected at least 1, got 0"),
        ({"train.clip": math.inf}, "clip: expected at least 0, got inf"),
        ({"train.weight_decay": math.nan}, "weight_decay: expected at least 0, got nan"),
        ({"train.eps": -1e-8}, "eps: expected at least 0"),
        ({"train.learning_rate": math.nan}, "learning_rate: expected above 0, got nan"),
        ({"train.learning_rate": 0}, "learning_rate: expected above 0, got 0"),
        ({"train.betas": [0.9]}, "betas: expected two numbers"),
        ({"train.betas": [0.9, 1.0]}, "betas: expected two numbers"),
        ({"train.ema": [0.9, 0.9]}, "ema: expected different rates"),
        ({"train.ema": [1.0]}, "ema: expected different rates between 0 and 1"),
        ({"train.ema": []}, "export: there is no average to export"),
        ({"train.batch_size": 6, "train.accumulate": 4}, "batch_size 6 cannot be split into 4 equal parts"),
        ({"train.optimizer": "sgd"}, r"optimizer: 'sgd' is unknown, expected one of \['adam', 'adamw', 'radam'\]"),
        ({"train.optimizer": "adam", "train.weight_decay": 0.1}, "adam has none"),
        ({"train.decay": "step"}, "decay: 'step' is unknown"),
        ({"train.dtype": "float64"}, "dtype: 'float64' is unknown"),
        ({"train.export": "best"}, "export: 'best' is unknown"),
        ({"samples.count": 0}, "expected count and steps of at least 1"),
        ({"samples.steps": [0]}, "expected count and steps of at least 1"),
        ({"lora.rank": -1}, "rank: expected at least 0"),
        ({"objective.target_rate": 1.0}, "target_rate: expected at least 0 and below 1"),
        ({"data.crop": "left"}, "crop"),
    ],
)
def test_what_is_not_possible_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message) as error:
        read_settings("ct", overrides=overrides)
    assert error.value.exit_code == 2


def test_an_average_is_not_needed_where_none_is_exported():
    assert read_settings("ct", overrides={"train.ema": [], "train.export": "student"}).train.ema == ()


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="method 'gan': expected one of teacher, autoencoder, cd"):
        read_settings("gan")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("steps = 3", UsageError, r"a.toml: steps: expected a section"),
        ("train = 3", UsageError, r"a.toml: train: is a section, but is given as 3"),
        ("model = 'sd'", UsageError, r"a.toml: model: is a section, but is given as 'sd'"),
        ("[train\n", ModelError, "a.toml: is not valid TOML"),
        ("[train]\nsteps = 1\nsteps = 2\n", ModelError, "a.toml: is not valid TOML"),
        ("method = 'cd'\n", UsageError, "a.toml: is for the method 'cd', not 'ct'"),
    ],
)
def test_a_file_that_says_nothing_sensible_is_refused(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        read_settings("ct", config=written(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="is not valid TOML"):
        read_settings("ct", config=tmp_path / "a.toml")


# --- recipes


def test_a_recipe_is_known_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small-ct.toml").write_text("method = 'ct'\n[train]\nsteps = 4\n")
    monkeypatch.setattr(mlx_cm, "__path__", [*mlx_cm.__path__, str(tmp_path)])
    assert read_settings("ct", config="small-ct").train.steps == 4
    with pytest.raises(UsageError, match=r"small-ct.toml: is for the method 'ct', not 'cd'") as error:
        read_settings("cd", config="small-ct")
    assert error.value.hint == "mlx-cm train ct"
    with pytest.raises(ModelError, match="no-such: is no file, and no recipe of this name is shipped") as missing:
        find_config("no-such")
    assert "small-ct" in missing.value.hint


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path):
    method = tomllib.loads(path.read_text(encoding="utf-8"))["method"]
    assert read_settings(method, config=path).method == method
    if path.parent.name == "recipes":
        assert shipped_recipes()[path.stem] == path


# --- writing


@pytest.mark.parametrize("method", METHODS)
def test_settings_written_out_are_the_same_settings(tmp_path, method):
    model = {"unet": {"sample_size": 8, "block_out_channels": [8, 16]}, "schedule": {"rho": 5.0}, "vae": "a b/ü"}
    overrides = {
        "train.betas": [0.5, 0.9999999],
        "train.eps": 1e-16,
        "train.learning_rate": 1.1e-5,
        "train.compile": False,
        "data.size": [24, 16],
        "samples.prompts": ['a "cat" \\ \U0001f408\x7f\n\t', "", "ü"],
        "lora.alpha": 0.1 + 0.2,
    }
    settings = read_settings(method, overrides=overrides)
    settings = dataclasses.replace(settings, model=model)
    path = written(tmp_path, to_toml({"method": method} | settings_to_dict(settings)))
    again = read_settings(method, config=path)
    assert again == settings
    assert changed_settings(settings, again) == []
    assert settings_from_dict(method, settings_to_dict(settings), "told") == settings


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts, st.lists)
sections = st.recursive(
    st.dictionaries(texts, values, max_size=3),
    lambda inner: st.dictionaries(texts, inner | values, max_size=3),
    max_leaves=6,
)


@given(sections)
def test_any_sections_are_written_as_toml(value):
    assert tomllib.loads(to_toml(value)) == value


def test_changed_settings_are_named():
    before = read_settings("ct", overrides={"model.unet.sample_size": 8})
    after = read_settings(
        "ct", overrides={"train.steps": 3, "samples.guidance_scale": 2.0, "model.unet.sample_size": 4, "model.vae": "x"}
    )
    assert changed_settings(before, after) == ["train.steps", "samples.guidance_scale", "model.unet", "model.vae"]
    assert changed_settings(before, dataclasses.replace(before, model={})) == ["model"]


def test_every_setting_of_a_run_is_spelled_out():
    sections = settings_to_dict(read_settings("ct"))
    optional = {field.name for field in dataclasses.fields(TrainSettings) if field.default is None}
    assert set(sections["train"]) == {field.name for field in dataclasses.fields(TrainSettings)} - optional
    assert set(sections) == {"train", "data", "samples", "lora", "objective"}
