"""The gradient of a large batch in the memory of a part of it: accumulate= of pretrain.py.

Adding up the gradients of small batches is something else: L_align and L_mp compare a picture with
all others of its batch, and a small batch has few. Gradient caching [GradCache] keeps them all.
These two losses know the encoder's weights θ through the special tokens t alone, so that

    ∂L/∂θ = ∂L_rec/∂θ + Σ_i ∂(γ1·L_align + γ2·L_mp)/∂t_i · ∂t_i/∂θ,   i over the batch's tokens

Tokens without their graphs take little room: from them ∂(…)/∂t_i, the cache, is found for the whole
batch at once. The sum over i, and L_rec, a mean over pictures, are then taken part by part. The
price is a second forward pass of the encoder, not of the decoder.
"""

import torch
import torch.distributed as dist


def backward_in_parts(model, batch, n, autocast):
    """Forward and backward: the gradients of GenPoCCL's loss of the whole batch, to rounding.

    batch: this rank's images, masks and pose_id as for GenPoCCL.forward; n divides the number of
    pictures. A pose group may lie in several parts. autocast: for the forward passes.
    → dict: total, rec, align, mp, health, bad as of GenPoCCL.forward.
    """
    images, masks, pose_id = batch
    masks = zip(*([None] * n if mask is None else mask.chunk(n) for mask in masks))
    parts = list(zip(images.chunk(n), masks))
    zero = torch.zeros((), device=images.device)
    out, cache = dict(rec=zero, align=zero, mp=zero, health=[], total=zero), [0.0] * n

    if model.gamma_align > 0 or model.gamma_mp > 0:  # else MAE, which compares no pictures
        with torch.no_grad(), autocast:
            special = [model.reconstruct(*part, decode=False)["special"] for part in parts]
        special = torch.cat(special, dim=1).requires_grad_()  # (v, B, S, D) of the whole batch
        with autocast:
            out = model.contrast(out | dict(special=special), pose_id)
        out["total"].backward()  # the projector learns here
        cache = special.grad.chunk(n, dim=1)

    bad = []
    for part, cached in zip(parts, cache):
        with autocast:
            own = model.reconstruct(*part)
        # Σ_i t_i · cache_i has the derivative above. Parts are equal: a mean of means is exact.
        ((own["special"] * cached).sum() + own["rec"] / n).backward()
        out["rec"] = out["rec"] + own["rec"].detach() / n
        bad.append(own["bad"])

    # The mean over ranks, once a step and by hand: DistributedDataParallel takes it of what a call
    # of its own used, and here are n calls and a projector that learned outside of them.
    if dist.is_initialized():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
    return out | dict(total=out["total"].detach() + out["rec"], bad=torch.cat(bad))
