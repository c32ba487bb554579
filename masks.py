"""Which patches are hidden in pre-training: part-guided masks [HAP] and random ones [MAE], for whole batches at once.

Legend: B pictures on this rank · N patches · h, w patch grid. Masks are bool (B, N), True = masked.
Frame: keypoints in input pixels, pixel centres at whole numbers; third column 0 = missing.
"""

import math

import torch

# Six body parts as COCO-17 links [HAP].
PARTS = (
    ((0, 1), (0, 2), (1, 2), (1, 3), (2, 4)),  # head
    ((5, 7), (7, 9)),  # left arm
    ((6, 8), (8, 10)),  # right arm
    ((11, 13), (13, 15)),  # left leg
    ((12, 14), (14, 16)),  # right leg
    ((6, 11), (5, 12)),  # torso
)
BLOCK_TRIES, BLOCK_PATCHES, BLOCK_ASPECT = 10, 12, 0.3  # [HAP]
# deviates from HAP: at most so many rectangles, to draw a batch at once. HAP stops only when the budget is met or a
# round fails: of 20,000 masks of 16 × 8 patches 3 took a 12th, none a 13th.
BLOCK_ROUNDS = 12


def noise_parts(grid):
    """How many uniform numbers go to blocks, order of the parts, k, amounts, inside the parts, the rest."""
    n = grid[0] * grid[1]
    return [BLOCK_ROUNDS * BLOCK_TRIES * 4, 6, 1, 6, 6 * n, n]


def noise_size(grid):
    """Uniform numbers one picture's mask uses up."""
    return sum(noise_parts(grid))


def part_guided_mask(keypoints, grid, mask_ratio, patch_size, generator=None, noise=None):
    """Part-guided masks [HAP], for a whole batch at once.

    keypoints: (B, 17, 3) COCO-17 joints in input pixels, third column 0 = missing · grid: (h, w) patches.
    generator: where the randomness comes from, or noise: (B, noise_size(grid)) uniform numbers drawn by the caller for
    the global batch and cut to this rank's rows, which makes masks independent of the number of ranks.
    → bool (B, h·w), True = masked, exactly round(mask_ratio · h·w) per row.
    """
    B, N = len(keypoints), grid[0] * grid[1]
    if noise is None:
        device = keypoints.device if generator is None else generator.device
        noise = torch.rand(B, noise_size(grid), generator=generator, device=device)
    noise = noise.to(keypoints.device)
    n_masked = round(mask_ratio * N)
    block, order, k, amount, within, rest = noise.split(noise_parts(grid), 1)

    # Levels of the masking order: part 0..5 in this picture's shuffled order, 6 block-masked, 7 the rest.
    level = torch.where(block_mask(block, grid, n_masked), 6, 7)
    part = part_patches(keypoints, grid, patch_size)  # (B, 6, N)
    size = part.sum(2)  # (B, 6) patches of each part
    # Shuffle the parts, unusable ones last; rank of each part in that order.
    rank = torch.where(size > 0, order, order + 1).argsort(1).argsort(1)
    first_k = rank < (k * 7).long()  # k ~ U{0..6}. deviates from HAP's release, which draws k wrongly (always 0 soon)
    chosen = (size * amount * 0.3).long() * (first_k & (size > 0))  # floor(n · U(0, .3)) patches of each such part
    # A random `chosen` of the part's patches: those whose noise is below its chosen-th smallest.
    within = within.view(B, 6, N).masked_fill(~part, 2.0)
    bound = within.sort(2).values.gather(2, (chosen - 1).clamp(min=0).unsqueeze(2))
    front = (within <= bound) & (chosen > 0).unsqueeze(2)
    level = torch.where(front, rank.unsqueeze(2), 7).amin(1).minimum(level)
    # Mask the front of the order. Ties inside a level fall at random.
    # deviates from HAP's release, where the order of an unstable sort decides.
    return front_of_order(level + rest, n_masked)


def front_of_order(score, n_masked):
    """(B, N) scores → bool mask of the n_masked smallest of each row, exactly."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.argsort(1)[:, :n_masked], True)


def random_mask(noise, mask_ratio):
    """[MAE] noise (B, N) uniform → bool (B, N), exactly round(mask_ratio · N) random patches per row."""
    return front_of_order(noise, round(mask_ratio * noise.shape[1]))


def part_patches(keypoints, grid, patch_size):
    """(B, 17, 3) → bool (B, 6, N): each part's patches = union of the patch rectangles its links' end points span."""
    (h, w), (x, y, v) = grid, keypoints.unbind(2)
    column = (x / patch_size).floor().long().clamp(0, w - 1)  # (B, 17)
    row = (y / patch_size).floor().long().clamp(0, h - 1)
    joints = torch.stack([column, row, (v > 0).long()], 2).unbind(1)  # 17 × (B, 3)
    # One by one: an index of joint ids would be copied to the GPU, and the host would wait.
    links = [link for part in PARTS for link in part]
    a = torch.stack([joints[i] for i, _ in links], 1)  # (B, L, 3)
    b = torch.stack([joints[j] for _, j in links], 1)
    low, high = a.minimum(b), a.maximum(b)
    valid = low[..., 2:] > 0  # a link with a missing end point is skipped
    columns, rows = torch.arange(w, device=low.device), torch.arange(h, device=low.device)
    across = (columns >= low[..., :1]) & (columns <= high[..., :1])  # (B, L, w)
    down = (rows >= low[..., 1:2]) & (rows <= high[..., 1:2]) & valid  # (B, L, h)
    patches = down.unsqueeze(3) & across.unsqueeze(2)  # (B, L, h, w)
    parts = patches.split([len(part) for part in PARTS], 1)
    return torch.stack([p.any(1) for p in parts], 1).flatten(2)


def block_mask(noise, grid, budget):
    """Block mask [HAP, after BEiT]: random rectangles, never beyond the budget. → bool (B, N); may stop short.

    A round draws up to 10 rectangles: area uniform between 12 patches and what is left of the budget (below 12 at the
    end), aspect log-uniform in [.3, 1/.3], place uniform. It keeps the first that is smaller than the grid in height
    and in width and adds between 1 and the remaining budget of new patches. A round that keeps none is the last.
    All pictures run a round together.
    """
    (h, w), B = grid, len(noise)
    noise = noise.view(B, BLOCK_ROUNDS, 4, BLOCK_TRIES)
    mask = torch.zeros(B, h, w, dtype=torch.bool, device=noise.device)
    going_on = torch.ones(B, 1, dtype=torch.bool, device=noise.device)
    rows, columns = torch.arange(h, device=noise.device), torch.arange(w, device=noise.device)
    bound = -math.log(BLOCK_ASPECT)
    for r in range(BLOCK_ROUNDS):
        area_u, aspect_u, top_u, left_u = noise[:, r].unbind(1)  # (B, tries) each
        left_over = budget - mask.sum((1, 2)).unsqueeze(1)  # (B, 1)
        area = BLOCK_PATCHES + area_u * (left_over - BLOCK_PATCHES)
        aspect = torch.exp((2 * aspect_u - 1) * bound)
        tall, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = (top_u * (h - tall + 1).clamp(min=1)).long()
        left = (left_u * (w - wide + 1).clamp(min=1)).long()
        bottom, right = (top + tall).clamp(max=h), (left + wide).clamp(max=w)
        # Patches already masked inside each rectangle, from sums over the upper left.
        sums = torch.nn.functional.pad(mask.int().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)

        def inside(y, x, sums=sums):
            return sums.gather(1, y * (w + 1) + x)

        old = inside(bottom, right) - inside(top, right) - inside(bottom, left) + inside(top, left)
        new = tall * wide - old
        fits = going_on & (tall < h) & (wide < w) & (new > 0) & (new <= left_over)
        going_on = fits.any(1, keepdim=True)
        pick = fits.int().argmax(1, keepdim=True)  # the first that fits
        top, bottom, left, right = (v.gather(1, pick) for v in (top, bottom, left, right))
        down = (rows >= top) & (rows < bottom) & going_on
        mask |= down.unsqueeze(2) & ((columns >= left) & (columns < right)).unsqueeze(1)
    return mask.flatten(1)
