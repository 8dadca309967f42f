"""What the tensors of a LoRA file are called.

Every trainer spells the name of a module in its own way, one of them with underscores for dots, which cannot be read
back. So the names are never taken apart: all spellings of all modules of the model at hand are written out, and a
file's names are looked up among them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from mlx_cm.convert.keymaps.ldm_unet import OUTSIDE
from mlx_cm.convert.keymaps.openai_unet import RESNET

Modules = Mapping[str, Mapping[str, tuple[int, ...]]]  # component => path of its module => shape of the weight

# How a tensor's name ends => what it is, and whose way of writing that is.
PARTS = {
    ".lora_down.weight": ("down", "kohya"),
    ".lora_up.weight": ("up", "kohya"),
    ".lora_mid.weight": ("mid", "LyCORIS"),
    ".lora_A.weight": ("down", "PEFT"),
    ".lora_B.weight": ("up", "PEFT"),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".lora_linear_layer.down.weight": ("down", "diffusers"),
    ".lora_linear_layer.up.weight": ("up", "diffusers"),
    "_lora.down.weight": ("down", "old diffusers"),
    "_lora.up.weight": ("up", "old diffusers"),
    ".alpha": ("alpha", None),
}
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
PEFT_DOWN, PEFT_UP = ".lora_A.weight", ".lora_B.weight"

# Written by wrappers around the model, wherever they stand: peft's two, and the attention processors of old diffusers.
WRAPPERS = re.compile(r"(?<![^.])base_model\.model\.|(?<=\.)processor\.")
# peft keeps several adapters apart by a name, and some files carry it.
PEFT_ADAPTER = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.weight$)")

# Adapters of other kinds, by a mark in the names of their tensors.
OTHER_KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)\b": "DoRA (weight-decomposed LoRA)",
    r"\.hada_": "LoHa (Hadamard products)",
    r"\.lokr_": "LoKr (Kronecker products)",
    r"\.oft_": "OFT (orthogonal fine-tuning)",
    r"\.on_input$": "(IA)^3",
    r"\.diff(_b)?$": "full differences of weights",
    r"\.(lora_B|lora_up|lora\.up)\.bias$": "LoRA with biases",
    r"\.lora_embedding_[AB]\b": "LoRA of an embedding table",
}

# What kohya's trainer puts before a module's name.
KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
LDM_PREFIX = "diffusion_model."  # before a module of the U-Net in the original code's names

# Other endings and beginnings of a module's path: old diffusers called all attentions' layers alike, and a text encoder
# without a projection has been a level flatter since transformers 5.
OTHER_ENDINGS = {
    ".to_out.0": ".to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}
OMITTED_BEGINNING = "text_model."

# The original code's names: of modules outside the U-Net's blocks, and of those inside them.
LDM_OUTSIDE = {target: source for source, target in OUTSIDE.items()}
LDM_INSIDE = {
    "resnets": {target: source for source, target in RESNET.items()},
    "downsamplers": {"conv": "op"},
}
BLOCK = re.compile(r"(?P<block>(?:(?:down|up)_blocks\.\d+|mid_block)\.(?P<kind>\w+)\.\d+)\.(?P<inside>.+)")

TEXT_KEYS = re.compile(r"(?:^|[._])attn2[._]to_k$")  # a module whose width is that of the model's text states
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
OTHER_MODELS = {
    r"(^|[._])(double_blocks|single_transformer_blocks)[._]": "FLUX",
    r"(^|[._])joint_blocks[._]": "Stable Diffusion 3",
}


def split_name(name: str) -> tuple[str, str, str | None] | None:
    """A tensor's name as (module, part, whose spelling), part being down, up, mid or alpha; None for other tensors."""
    name = PEFT_ADAPTER.sub("", WRAPPERS.sub("", name))
    for ending, (part, dialect) in PARTS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), part, dialect
    return None


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names make an adapter, of whatever kind."""
    names = list(names)
    return other_kind(names) is not None or any(split and split[2] for split in map(split_name, names))


def other_kind(names: Iterable[str]) -> str | None:
    """What kind of adapter the tensors are of, where it is not LoRA."""
    names = list(names)
    return next((kind for mark, kind in OTHER_KINDS.items() if any(re.search(mark, name) for name in names)), None)


def module_names(modules: Modules) -> dict[str, set[tuple[str, str]]]:
    """Every spelling of every module => what it can mean, as (component, path).

    Names without a component mean whichever has such a module; two text encoders do.
    """
    names: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for component, paths in modules.items():
        original = ldm_names(paths)
        for path in paths:
            meaning = (component, path)
            for spelling in _spellings(path):
                names[spelling].add(meaning)
                names[f"{component}.{spelling}"].add(meaning)
                for prefix in KOHYA_PREFIXES.get(component, ()):
                    names[kohya_name(prefix, spelling)].add(meaning)
            if path in original:
                names[LDM_PREFIX + original[path]].add(meaning)
                for prefix in KOHYA_PREFIXES.get(component, ()):
                    names[kohya_name(prefix, original[path])].add(meaning)
    return names


def kohya_name(prefix: str, path: str) -> str:
    """A module's name in kohya's spelling."""
    return prefix + path.replace(".", "_")


def _spellings(path: str) -> list[str]:
    spellings = [path, path.removeprefix(OMITTED_BEGINNING)]
    spellings += [
        spelling.removesuffix(ending) + other
        for ending, other in OTHER_ENDINGS.items()
        for spelling in list(spellings)
        if spelling.endswith(ending)
    ]
    return spellings


def ldm_names(paths: Iterable[str]) -> dict[str, str]:
    """The U-Net's modules in the names of the original latent diffusion code, as far as it has them.

    Its blocks are numbered in the order they run, which the paths tell: which blocks there are, and how many.
    """
    paths = list(paths)
    blocks = {match["block"] for match in map(BLOCK.fullmatch, paths) if match}
    numbered = {**_numbered_down(blocks), **_numbered_mid(blocks), **_numbered_up(blocks)}
    names = {path: LDM_OUTSIDE[path] for path in paths if path in LDM_OUTSIDE}
    for path in paths:
        match = BLOCK.fullmatch(path)
        if match and match["block"] in numbered:
            inner = LDM_INSIDE.get(match["kind"], {}).get(match["inside"], match["inside"])
            names[path] = f"{numbered[match['block']]}.{inner}"
    return names


def _numbered_down(blocks: set[str]) -> dict[str, str]:
    numbers, number, level = {}, 1, 0  # input_blocks.0 is conv_in
    while f"down_blocks.{level}.resnets.0" in blocks:
        layer = 0
        while f"down_blocks.{level}.resnets.{layer}" in blocks:
            numbers[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            numbers[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            layer, number = layer + 1, number + 1
        if f"down_blocks.{level}.downsamplers.0" in blocks:
            numbers[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
        level += 1
    return numbers


def _numbered_mid(blocks: set[str]) -> dict[str, str]:
    order = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    present = [block for block in order if block in blocks]
    return {block: f"middle_block.{number}" for number, block in enumerate(present)}


def _numbered_up(blocks: set[str]) -> dict[str, str]:
    numbers, number, level = {}, 0, 0
    while f"up_blocks.{level}.resnets.0" in blocks:
        layer = 0
        while f"up_blocks.{level}.resnets.{layer}" in blocks:
            numbers[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            numbers[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            layer, number = layer + 1, number + 1
        # The doubling stands in the level's last block, behind the transformer where there is one.
        place = 2 if f"up_blocks.{level}.attentions.0" in blocks else 1
        numbers[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{place}"
        level += 1
    return numbers


def base_of(widths: Iterable[int]) -> str:
    """Which models have text states of these widths."""
    return ", ".join(f"{BASES.get(width, 'a model')} (text states of width {width})" for width in sorted(set(widths)))


def other_model(names: Iterable[str]) -> str | None:
    """A family of models that calls its modules so, where it is not one of this program's."""
    names = list(names)
    return next((model for mark, model in OTHER_MODELS.items() if any(re.search(mark, name) for name in names)), None)
