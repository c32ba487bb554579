"""The three losses of GenPoCCL, L_mp's projector, and the gather they need.

    L = L_rec + γ1·L_align + γ2·L_mp

Legend: B embeddings on this rank · M embeddings on all ranks, in rank order · N patches, V of them
visible · v views · D width · p patch side · H, W picture · h, w grid.

Several ranks. Each loss returns this rank's *share*: the mean of the shares over the ranks is the
loss of the global batch, and DistributedDataParallel's mean of the gradients is the exact gradient
of that loss. Three things make it so: own rows meet gathered columns (never all × all), the gather
sends gradients back to the rank a column came from, and sums are divided by a count over all ranks.
Every rank must hold the same number of rows. Without a process group the same lines compute the
plain loss.

Precision: float32 inside, also under autocast (contrastive logits in half precision lose the small
differences that the softmax lives on); float64 input stays float64. Nothing here waits for the
device.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# -------------------------------------------------------------------------------- between the ranks


class GatherWithGradient(torch.autograd.Function):
    """(B, …) on each rank → (M, …) on all. Backward: own rows of the sum of all ranks' gradients.

    Keeping only the own slice of the own gradient (Spijkervet's SimCLR, open_clip by default) loses
    what the other ranks' anchors say about this rank's columns: docs/lesson.md, section 7.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        return gather_rows_of(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()  # autograd may still own the original
        # Every rank's anchors met this column, as a negative or a positive: all send a gradient.
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


class SumOverRanks(torch.autograd.Function):
    """Σ over ranks of x, on every rank; backward: Σ over ranks of the gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient)


def gather_rows_of(x):
    """All ranks' rows without gradient: (B, …) → (M, …) in rank order. One process: x itself."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.detach().contiguous())
    return out


def gather_with_gradient(x):
    """(B, …) → (M, …) of all ranks in rank order; gradients return to the rank of their row."""
    return GatherWithGradient.apply(x) if world_size() > 1 else x


def sum_over_ranks(x):
    """Differentiable Σ over ranks, for counts and batch statistics."""
    return SumOverRanks.apply(x) if world_size() > 1 else x


def own_columns(x):
    """x (B, …) → (B,) int64: the columns of this rank's rows among the gathered ones."""
    first = dist.get_rank() * len(x) if world_size() > 1 else 0
    return torch.arange(first, first + len(x), device=x.device)


def full_precision(*tensors):
    """float32 unless already float64."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def no_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


class GlobalBatchNorm(nn.Module):
    """Batch norm of (B, C) or (B, C, H, W) over all ranks' batches; exact on any number of ranks.

    torch's SyncBatchNorm has no CPU path. Names, momentum and running statistics: nn.BatchNorm's,
    without num_batches_tracked. Every rank must call it equally often; ranks may hold different
    numbers of rows. A single value per channel has no variance: ValueError on one rank, else NaN.
    """

    # torch's defaults, as in [StableRep], [ViTPose]
    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if not self.training or world_size() == 1:
            stats = (self.running_mean, self.running_var)
            more = self.weight, self.bias, self.training, self.momentum, self.eps
            return F.batch_norm(x, *stats, *more)
        with no_autocast(x):
            (y,) = full_precision(x)
            axes = [0, *range(2, x.ndim)]
            shape = [1, -1] + [1] * (x.ndim - 2)
            # new_full copies nothing to the device, so nothing waits for it.
            count = sum_over_ranks(y.new_full((), x.numel() // x.shape[1]))
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


# -------------------------------------------------------------------------------------------- L_rec


def patchify(images, patch_size):
    """(B, 3, H, W) → (B, N, p·p·3): patches, and their pixels, row by row; channel last [MAE]."""
    # Split each side into patches and pixels of a patch, then bring the pixels of a patch together.
    (B, C, H, W), p = images.shape, patch_size
    x = images.view(B, C, H // p, p, W // p, p)  # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, H // p * (W // p), p * p * C)


def split_mask(mask, n_visible):
    """mask (B, N), True = masked → ids of visible (B, V) and masked (B, N − V), in grid order."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # 0, visible, comes first
    return order[:, :n_visible], order[:, n_visible:]


def take_patches(patches, ids):
    """patches (B, N, C), ids (v·B, V) long → (v·B, V, C); row r takes from picture r mod B."""
    (B, N, C), rows = patches.shape, len(ids)
    picture = torch.arange(rows, device=ids.device).remainder(B)
    place = (picture[:, None] * N + ids).flatten()
    return patches.reshape(-1, C).index_select(0, place).view(rows, -1, C)


def unpatchify(patches, grid, patch_size):
    """(B, N, p·p·3) and grid (h, w) → (B, 3, h·p, w·p). The inverse of patchify."""
    (B, _, C), (h, w), p = patches.shape, grid, patch_size
    x = patches.view(B, h, w, p, p, C // (p * p))  # (B, h, w, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * p, w * p)


def normalized(patches):
    """(…, C) → target (…, C), mean, std (…, 1; unbiased): target · std + mean = pixels."""
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    # The variance is ‖centred‖² / (n − 1). torch.var_mean takes 7 × as long on a CPU; summing the
    # squares by hand costs 1.2 % of a tiny model's step.
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    std = (norm.square() / (patches.shape[-1] - 1) + 1e-6).sqrt()  # [MAE]
    return centred / std, mean, std


def patch_error(pred, patches):
    """pred, pixels (…, p·p·3) → (…) ‖pred − target‖² / (3p²), target: normalised pixels [MAE]."""
    target, _, _ = normalized(patches)
    return F.mse_loss(pred, target, reduction="none").mean(-1)


def reconstruction_loss(pred, images, mask, patch_size):
    """L_rec [MAE]: mean squared error to normalised pixels, over the masked patches of all ranks.

    pred (B, N, p·p·3): pixels row by row, channel last; images (B, 3, H, W) float, as the encoder
    saw them; mask (B, N) bool, True = masked, any number in a row. → scalar ≥ 0, this rank's share;
    nothing masked: 0. GenPoCCL, whose rows mask equally many, takes patch_error's mean.
    """
    with no_autocast(pred):
        pred, images = full_precision(pred, images)
        error = patch_error(pred, patchify(images, patch_size))  # (B, N), also of visible patches
        # L_rec = 1/|masked| Σ_masked ‖pred − target‖² / (3p²)
        count = sum_over_ranks(mask.sum().to(error.dtype)).clamp(min=1)
        return world_size() * error.masked_fill(~mask, 0.0).sum() / count


# ------------------------------------------------------------------------------------------ L_align


def alignment_loss(a, b, tau=0.2, gather_gradient=True):
    """L_align [HAP]: the [CLS] of one view finds that of the other among all ranks' pictures.

    a, b (B, D) float, row i of both: picture i under two masks; L2-normalised here. tau .2 [HAP].
    → scalar, this rank's share.
    Deviates from HAP, whose keys carry no gradient (gather_gradient=False): there each picture is
    pulled only as a query. That saves the backward communication and is kept to reproduce HAP; the
    gradient is then that of no loss.
    """
    with no_autocast(a):
        # Of length 1, so that a product is a cosine and cannot grow without end.
        a, b = (F.normalize(x, dim=-1) for x in full_precision(a, b))
        gather = gather_with_gradient if gather_gradient else gather_rows_of
        own = own_columns(a)
        # L_align = 2τ · [ CE(a_i·b_j / τ, i) + CE(b_i·a_j / τ, i) ],  j over all ranks
        # Both ways: each view once asks and once answers. 2τ keeps the gradient's size for any τ.
        logits_ab = a @ gather(b).T / tau  # (B, M)
        logits_ba = b @ gather(a).T / tau
        return 2 * tau * (F.cross_entropy(logits_ab, own) + F.cross_entropy(logits_ba, own))


# --------------------------------------------------------------------------------------------- L_mp


class Projector(nn.Module):
    """From a token to the space of L_mp: "none", or "mlp" 768 → 4096 → 4096 → 256 [StableRep].

    The batch statistics are those of all rows given, pictures without a pose group included.
    deviates from [StableRep]: there the k-th pictures of all prompts have statistics of their own.
    """

    def __init__(self, width, kind="none", hidden=4096, out=256):
        super().__init__()
        self.layers = nn.Identity()
        if kind == "mlp":
            self.layers = nn.Sequential(
                *(nn.Linear(width, hidden, bias=False), GlobalBatchNorm(hidden), nn.ReLU()),
                *(nn.Linear(hidden, hidden, bias=False), GlobalBatchNorm(hidden), nn.ReLU()),
                nn.Linear(hidden, out),
            )

    def forward(self, x):
        return self.layers(x)


def pair_masks(pose_id):
    """pose_id (B,) int64 → (B, M) bool each: who is a positive of a row, who is in its softmax.

    Rebuilt at every call: a mask kept by batch size (StableRep, SynCLR) is wrong as soon as labels
    are real.
    """
    id_all = gather_rows_of(pose_id)
    own, every = own_columns(pose_id), torch.arange(len(id_all), device=pose_id.device)
    other = own[:, None] != every  # j ≠ i
    # Pictures without a pose group may show any pose: they are no sure negatives either.
    column = other & (id_all >= 0) & (pose_id >= 0)[:, None]
    return column & (pose_id[:, None] == id_all), column


def multi_positive_loss(z, pose_id, tau=0.1):
    """L_mp [StableRep's loss, on poses]: each embedding finds all others of the same pose.

    z (B, D) float, L2-normalised here; pose_id (B,) int64. tau 0.1 [StableRep; paper silent].
    Several views of a picture: the caller stacks their embeddings and repeats the pose ids.
    → scalar, this rank's share; 0 with a (zero) gradient where no rank has a positive pair.

    pose_id −1 = a picture without a pose group: neither anchor nor column. An id ≥ 0 that
    occurs once is a negative for the others but no anchor: SupCon's mean gives NaN there,
    StableRep's counts a zero.
    """
    with no_autocast(z):
        z = F.normalize(full_precision(z)[0], dim=-1)
        positive, column = pair_masks(pose_id)
        logits = z @ gather_with_gradient(z).T / tau  # (B, M)
        return multi_positive_entropy(logits, positive, column)


def multi_positive_entropy(logits, positive, column):
    """L_mp of given logits (B, M), with positive, column (B, M) bool as of pair_masks; positive
    may hold weights ≥ 0. → scalar, this rank's share. Split off for methods whose columns are no
    anchors, such as SynCLR's."""
    # q_ij = exp(z_i·z_j/τ) / Σ_{k≠i} exp(z_i·z_k/τ)
    # A finite floor: −∞ would make a row without columns NaN.
    log_sum = logits.masked_fill(~column, torch.finfo(logits.dtype).min).logsumexp(1)
    # p_ij = 1[pose_i = pose_j, j ≠ i] / #positives of i
    # Σ_j p_ij log q_ij = Σ_j p_ij z_i·z_j/τ − log Σ_{k≠i} exp(z_i·z_k/τ)
    n_positive = positive.sum(1)
    pulled = (logits * positive).sum(1) / torch.where(n_positive > 0, n_positive, 1)
    # An embedding that has no partner in the batch can pull nobody.
    anchor = n_positive > 0
    count = sum_over_ranks(anchor.sum().to(logits.dtype)).clamp(min=1)
    # L_mp = −1/|A| Σ_{i∈A} Σ_j p_ij log q_ij,  A = anchors of all ranks
    return world_size() * torch.where(anchor, log_sum - pulled, 0.0).sum() / count


@torch.no_grad()
def contrastive_health(z, pose_id):
    """Is L_mp learning poses or collapsing? Figures over all ranks, still on the device.

    z (B, D), pose_id (B,) as for multi_positive_loss. → dict of 0-d tensors: positive_cosine and
    negative_cosine (means over ordered pairs; 0 where there is no such pair), without_positive
    (embeddings with a pose id but no positive) and without_pose (embeddings with id −1); both kinds
    are no anchors of L_mp.
    """
    with no_autocast(z):
        z = F.normalize(full_precision(z)[0], dim=-1)
        positive, column = pair_masks(pose_id)
        cosine = z @ gather_rows_of(z).T  # (B, M)
        negative = column & ~positive
        sums = [(cosine * positive).sum(), positive.sum()]
        sums += [(cosine * negative).sum(), negative.sum()]
        lonely = (pose_id >= 0) & ~positive.any(1)
        sums = torch.stack([s.to(cosine.dtype) for s in (*sums, lonely.sum(), (pose_id < 0).sum())])
        total = sum_over_ranks(sums)
    return {
        "positive_cosine": total[0] / total[1].clamp(min=1),
        "negative_cosine": total[2] / total[3].clamp(min=1),
        "without_positive": total[4],
        "without_pose": total[5],
    }
