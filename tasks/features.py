"""One feature per picture, from the encoder's tokens.

Legend: B pictures on this rank · S special tokens ([CLS], [POSE]) · N patches · D width.
"""

from plumbing.errors import UserError

TOKENS = ("cls", "pose", "both", "patch_mean", "patch_max")


def reads_pose(choice):
    """Does this `token` or `tokens` use [POSE]? Others' weights have none: only then one is added,
    untrained."""
    return choice in ("pose", "both", "add", "add_cls_pose")


def token_features(tokens, n_special, choice):
    """What stands for the whole picture: tokens (B, S + N, D) of the encoder → (B, D), or (B, 2D)
    for "both".

    cls, pose: that token; both: the two side by side; patch_mean, patch_max: over the patches,
    without special tokens.
    """
    if choice == "both":
        return tokens[:, :2].flatten(1)
    if choice == "patch_mean":
        return tokens[:, n_special:].mean(1)
    if choice == "patch_max":
        return tokens[:, n_special:].amax(1)
    return tokens[:, ("cls", "pose").index(choice)]


def feature_width(encoder, choice):
    """Width of token_features. Raises UserError for a choice that needs [POSE] where the encoder
    has none."""
    if choice in ("pose", "both") and encoder.n_special < 2:
        raise UserError(f"token={choice} needs an encoder with [POSE]; use token=cls or patch_mean")
    return encoder.width * (2 if choice == "both" else 1)
