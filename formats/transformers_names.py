"""Names and shapes of a ViT's weights in the transformers library, to ours and back.

Read: DeiTModel, ViTModel and ViTMAE as they are published, old names and new alike, for both are
stored under the old ones. Written: DeiTModel, whose distillation token stands where [POSE] does,
and ViTModel where there is no [POSE]. What is a tensor in one layout is one or three in the other:
transformers has queries, keys and values apart, and gives the special tokens a position.

Legend: D width · N patches · S special tokens.
"""

import re

import torch

BLOCK = {  # a block's layer: ours → theirs
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = [f"attention.attention.{name}" for name in ("query", "key", "value")]
PATCH, POSITIONS = "embeddings.patch_embeddings.projection", "embeddings.position_embeddings"
TOKENS = {"cls_token": "embeddings.cls_token", "pose_token": "embeddings.distillation_token"}


def layer_names(depth):
    """{our layer: theirs}, for all layers that have a weight and a bias in both."""
    names = {"patch_embed.proj": PATCH, "norm": "layernorm"}
    for i in range(depth):
        names |= {f"blocks.{i}.{a}": f"encoder.layer.{i}.{b}" for a, b in BLOCK.items()}
    return names


def to_transformers(vit):
    """A model.ViT → {name: tensor} of DeiTModel, or of ViTModel if it has no [POSE]."""
    own, found = vit.state_dict(), {}
    for ours, theirs in TOKENS.items():
        if ours in own:
            found[theirs] = own[ours]
    zero = own["pos_embed"].new_zeros(1, vit.n_special, vit.width)  # of the special tokens
    found[POSITIONS] = torch.cat([zero, own["pos_embed"]], dim=1)  # (1, S + N, D)
    for kind in ("weight", "bias"):
        for ours, theirs in layer_names(vit.depth).items():
            found[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"]
        for i in range(vit.depth):
            parts = own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for theirs, part in zip(QKV, parts):
                found[f"encoder.layer.{i}.{theirs}.{kind}"] = part
    return {name: value.contiguous() for name, value in found.items()}


def from_transformers(state):
    """{name: tensor} of a file → the same, or by our names where it is in transformers' layout.

    The positions of special tokens are added to the tokens, which is the same sum. What is not of
    the encoder (pooler, decoder, mask token) keeps its name.
    """
    state = {re.sub(r"^(vit|deit)\.", "", name): value for name, value in state.items()}
    depth = sum(bool(re.match(r"encoder\.layer\.\d+\.layernorm_before\.weight", n)) for n in state)
    if not depth or POSITIONS not in state:
        return state
    found = {}
    positions, S = state.pop(POSITIONS), 0
    for ours, theirs in TOKENS.items():
        if theirs in state:
            # A register (weights.py) is what others call a token in the place of [POSE].
            name = "reg_token" if ours == "pose_token" else ours
            found[name] = state.pop(theirs) + positions[:, S : S + 1]
            S += 1
    found["pos_embed"] = positions[:, S:]
    for kind in ("weight", "bias"):
        for ours, theirs in layer_names(depth).items():
            found[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
        for i in range(depth):
            parts = [state.pop(f"encoder.layer.{i}.{theirs}.{kind}") for theirs in QKV]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return found | state
