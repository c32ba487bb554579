"""What stands on the encoder's tokens: the projector before L_mp, the pose model and its heads, features of a picture.

Legend: B images on this rank · S special tokens ([CLS], [POSE]) · N patches · D width · C channels · K joints ·
H, W picture · h, w grid.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from losses import full_precision, no_autocast, sum_over_ranks, world_size
from plumbing.config import UserError

# -------------------------------------------------------------------------------------------- batch norm, projector


class GlobalBatchNorm(nn.Module):
    """Batch norm over the batches of all ranks, for (B, C) and (B, C, H, W); exact on gloo, NCCL and one process.

    torch's SyncBatchNorm has no CPU path. Same names, momentum and running statistics as nn.BatchNorm. Every rank
    must call it equally often; ranks may hold different numbers of rows.
    """

    def __init__(self, channels, eps=1e-5, momentum=0.1):  # torch's defaults, as in [StableRep], [ViTPose]
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if not self.training or world_size() == 1:
            stats = (self.running_mean, self.running_var)
            return F.batch_norm(x, *stats, self.weight, self.bias, self.training, self.momentum, self.eps)
        with no_autocast(x):
            (y,) = full_precision(x)
            axes = [0, *range(2, x.ndim)]
            shape = [1, -1] + [1] * (x.ndim - 2)
            count = sum_over_ranks(y.new_full((), x.numel() // x.shape[1]))  # new_full: no copy, so no wait
            mean = sum_over_ranks(y.sum(axes)) / count
            y = y - mean.view(shape)
            # two passes: E[x²] − E[x]² would cancel in float32
            variance = sum_over_ranks(y.square().sum(axes)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * count / (count - 1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (y * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class Projector(nn.Module):
    """From a token to the space of L_mp: "none", or "mlp": 768 → 4096 → 4096 → 256, norm and ReLU between [StableRep].

    The batch statistics are those of all rows given, pictures without a pose group included.
    deviates from [StableRep]: there the k-th pictures of all prompts have statistics of their own.
    """

    def __init__(self, width, kind="none", hidden=4096, out=256):
        super().__init__()
        if kind not in ("none", "mlp"):
            raise UserError(f"projector must be none or mlp, not {kind}")
        sides = [width, hidden, hidden, out] if kind == "mlp" else []
        layers = []
        for i, (a, b) in enumerate(zip(sides, sides[1:])):
            last = i == len(sides) - 2
            layers += [nn.Linear(a, b, bias=last)] + ([] if last else [GlobalBatchNorm(b), nn.ReLU(inplace=True)])
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


# --------------------------------------------------------------------------------------------------------- 2-D pose


class ClassicHead(nn.Module):
    """[ViTPose] classic: 2 × [deconvolution 4×4 stride 2, batch norm, ReLU], 1×1 → K heat maps at 4 × the grid."""

    def __init__(self, width, n_joints, channels=256):  # 256 [ViTPose]
        super().__init__()
        layers = []
        for a in (width, channels):
            layers += [nn.ConvTranspose2d(a, channels, 4, 2, 1, bias=False), GlobalBatchNorm(channels), nn.ReLU(True)]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(channels, n_joints, 1)
        for module in self.modules():  # N(0, .001) [ViTPose]
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, tokens, grid):
        """Patch tokens (B, h·w, D) and grid (h, w) → heat maps (B, K, 4h, 4w)."""
        return self.final_layer(self.deconv_layers(tokens.transpose(1, 2).unflatten(2, grid)))


class SimpleHead(nn.Module):
    """[ViTPose] simple: ReLU, bilinear × 4, one 3×3 convolution → K heat maps at 4 × the grid."""

    def __init__(self, width, n_joints):
        super().__init__()
        self.final_layer = nn.Conv2d(width, n_joints, 3, padding=1)
        nn.init.normal_(self.final_layer.weight, std=0.001)  # [ViTPose]
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, tokens, grid):
        """Patch tokens (B, h·w, D) and grid (h, w) → heat maps (B, K, 4h, 4w)."""
        x = tokens.transpose(1, 2).unflatten(2, grid).relu()
        return self.final_layer(F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False))


POSE_TOKENS = ("drop", "add", "add_cls_pose")


class PoseModel(nn.Module):
    """ViT → patch tokens → head → heat maps. Special tokens: drop; add [POSE] to every patch; add_cls_pose: both."""

    def __init__(self, encoder, head, tokens):
        super().__init__()
        self.encoder, self.head, self.tokens = encoder, head, tokens
        if tokens != "drop" and encoder.n_special < 2:
            raise UserError(f"tokens={tokens} needs an encoder with [POSE]; this one has none: use tokens=drop")

    def forward(self, images, drop_noise=None):
        """images (B, 3, H, W) normalised, drop_noise (2·depth, B) or None → heat maps (B, K, 4h, 4w)."""
        x = self.encoder(images, drop_noise=drop_noise)  # (B, S + N, D)
        special, patches = x.tensor_split([self.encoder.n_special], 1)
        # paper silent: how [POSE] takes part downstream. HAP drops [CLS].
        if self.tokens == "add":
            patches = patches + special[:, 1:]
        elif self.tokens == "add_cls_pose":
            patches = patches + special.sum(1, keepdim=True)
        return self.head(patches, self.encoder.grid)


# ------------------------------------------------------------------------------------------ one feature per picture

TOKENS = ("cls", "pose", "both", "patch_mean", "patch_max")


def reads_pose(choice):
    """Does this `token` or `tokens` use [POSE]? Others' weights have none: only then one is added, untrained."""
    return choice in ("pose", "both", "add", "add_cls_pose")


def token_features(tokens, n_special, choice):
    """What stands for the whole picture: tokens (B, S + N, D) of the encoder → (B, D), or (B, 2D) for "both".

    cls, pose: that token; both: the two side by side; patch_mean, patch_max: over the patches, without special tokens.
    """
    if choice == "both":
        return tokens[:, :2].flatten(1)
    if choice == "patch_mean":
        return tokens[:, n_special:].mean(1)
    if choice == "patch_max":
        return tokens[:, n_special:].amax(1)
    return tokens[:, ("cls", "pose").index(choice)]


def feature_width(encoder, choice):
    """Width of token_features. Raises UserError for a choice that needs [POSE] where the encoder has none."""
    if choice in ("pose", "both") and encoder.n_special < 2:
        raise UserError(f"token={choice} needs an encoder with [POSE]; use token=cls or patch_mean")
    return encoder.width * (2 if choice == "both" else 1)
