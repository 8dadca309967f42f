"""The names of the original programs, made from diffusers' and transformers' state dicts.

Written as substitutions in the published order of blocks, independently of the converter's tables, and checked in the
tests against diffusers' own way back.
"""

import re

import torch

State = dict[str, torch.Tensor]

UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet(state: State, layers: int) -> State:
    """A `UNet2DConditionModel`, every level of which has `layers` residual blocks on the way down."""
    with_attention = {name.split(".attentions.")[0] for name in state if ".attentions." in name}

    def block(match: re.Match) -> str:
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}.get(kind)
        if side == "down":
            last = kind == "downsamplers"
            return f"input_blocks.{1 + level * (layers + 1) + (layers if last else index)}.{place}"
        if kind == "upsamplers":
            place, index = ("2" if f"up_blocks.{level}" in with_attention else "1") + ".conv", layers
        return f"output_blocks.{level * (layers + 1) + index}.{place}"

    renamed = {}
    for name, value in state.items():
        new = name
        for old, other in UNET_OUTSIDE.items():
            new = re.sub(rf"^{re.escape(old)}\.", f"{other}.", new)
        new = re.sub(
            r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)(?:(?<=samplers\.0)\.conv)?", block, new
        )
        if "resnets" in name:
            for old, other in RESNET.items():
                new = new.replace(f".{old}.", f".{other}.")
        renamed[new] = value
    assert len(renamed) == len(state)
    return renamed


def autoencoder(state: State, levels: int) -> State:
    """An `AutoencoderKL`; its attention is made of 1x1 convolutions."""
    renamed = {}
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{1 + int(m[1])}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("conv_norm_out", "norm_out")
        if "attn_1" in new:
            for old, other in {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out.0": "proj_out",
            }.items():
                new = new.replace(f".{old}.", f".{other}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        renamed[new] = value
    assert len(renamed) == len(state)
    return renamed


def open_clip(state: State) -> State:
    """A text encoder of transformers as OpenCLIP stores it; names as `text_model....`."""
    renamed = {}
    for name, value in state.items():
        new = name.removeprefix("text_model.")
        new = new.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        new = new.replace("encoder.layers.", "transformer.resblocks.").replace("layer_norm", "ln_")
        new = new.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj").replace("self_attn", "attn")
        if match := re.fullmatch(r"(.*\.attn)\.q_proj\.(weight|bias)", new):
            heads = [state[name.replace("q_proj", f"{head}_proj")] for head in "qkv"]
            renamed[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(heads)
        elif re.search(r"attn\.[kv]_proj", new):
            continue
        elif new == "text_projection.weight":
            renamed["text_projection"] = value.T
        else:
            renamed[new] = value
    return renamed


def prefixed(prefix: str, state: State) -> State:
    """The state below a prefix; contiguous, as files hold it."""
    return {prefix + name: value.contiguous() for name, value in state.items()}
