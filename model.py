"""ViT with [CLS] and [POSE], masked decoder, GenPoCCL itself; what else stands on the encoder's tokens is in heads.py.

Legend: B images on this rank · v views (independent maskings of the same images) · N patches, V of them visible ·
S special tokens ([CLS], [POSE]) · T = S + V tokens · D width · H, W picture · h, w grid · p patch side.

`GenPoCCL.forward` is the method: L = L_rec + γ1·L_align + γ2·L_mp. MAE, HAP and StableRep are settings of it.
Parameter names follow MAE and timm, so their checkpoints load without a table (weights.py).
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from losses import alignment_loss, full_precision, multi_positive_loss, no_autocast, patch_error, patchify
from plumbing.config import UserError
from tasks.heads import Projector

EPS = 1e-6  # LayerNorm [MAE]
# Encoders: tiny ours (for the demo on a CPU), small as DeiT-S, base [HAP], large [MAE]. Decoder [MAE, HAP], tiny ours.
SIZES = {
    "tiny": {"width": 192, "depth": 6, "heads": 3, "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4},
    "small": {"width": 384, "depth": 12, "heads": 6, "decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16},
    "base": {"width": 768, "depth": 12, "heads": 12, "decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16},
    "large": {"width": 1024, "depth": 24, "heads": 16, "decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16},
}

# --------------------------------------------------------------------------------------------------- building blocks


def sincos_positions(grid, width):
    """Fixed 2-D sin-cos positions [MAE]: (1, h·w, D); first half of D codes the column, second half the row."""
    h, w = grid
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def attention(q, k, v):
    """(B, heads, T, D / heads) each → the same. softmax(q kᵀ / √d) v, fused by torch."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused CPU kernel's bfloat16 backward took 7 × as long as these three lines (T 66, 64 wide heads).
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x):
        B, T, D = x.shape
        x = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        return x.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, D / heads)

    def forward(self, x, last=0):
        q, k, v = self.queries_keys_values(x).unbind(0)
        return self.proj(attention(q[:, :, -last:], k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `keep` (2, B, 1, 1) scales the two branches per picture (drop path), None = 1.

    last: return only the last so many tokens (they still look at all), 0 = all.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, x, keep=None, last=0):
        if keep is None:
            x = x[:, -last:] + self.attn(self.norm1(x), last)
            return x + self.mlp(self.norm2(x))
        x = x[:, -last:] + self.attn(self.norm1(x), last) * keep[0]
        return x + self.mlp(self.norm2(x)) * keep[1]


def run_block(block, x, keep, recompute, last=0):
    """With `recompute` the block keeps only its input and computes the rest again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, keep, last, use_reentrant=False)
    return block(x, keep, last)


def initialize(module):
    """[MAE]: Xavier-uniform linear layers, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def take_patches(patches, ids):
    """patches (B, N, C), ids (v·B, V) long → (v·B, V, C); row r takes from picture r mod B."""
    (B, N, C), rows = patches.shape, len(ids)
    picture = torch.arange(rows, device=ids.device).remainder(B)
    return patches.view(B * N, C).index_select(0, (picture[:, None] * N + ids).flatten()).view(rows, -1, C)


class PatchEmbed(nn.Module):
    """Holds the patch projection under its published name and shape (D, 3, p, p); ViT.embed uses it as a matrix."""

    def __init__(self, width, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))  # [MAE]: initialised like a linear layer
        nn.init.zeros_(self.proj.bias)


# ---------------------------------------------------------------------------------------------------------- encoder


class ViT(nn.Module):
    """Plain ViT [HAP = MAE] with [CLS] and, after it, our [POSE]; only visible patches are embedded and encoded.

    image_size (H, W) in pixels, multiples of patch_size. pos_embed (1, N, D) belongs to the patches; special tokens
    have zero position. It is fixed in pre-training and trainable (trainable_positions) downstream.
    drop_path: rate of the last block, rising linearly from 0 over the depth; acts only when noise is given.
    checkpoint_activations: recompute blocks in the backward pass (about a third slower, far less memory).
    """

    def __init__(
        self,
        width,
        depth,
        heads,
        image_size,
        patch_size,
        pose_token=True,
        drop_path=0.0,
        trainable_positions=False,
        checkpoint_activations=False,
    ):
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise UserError(f"image size {tuple(image_size)} is not a multiple of patch={patch_size}; change one")
        if width % heads or width % 4:
            raise UserError(f"width {width} must be a multiple of 4 and of the number of heads {heads}")
        self.width, self.depth, self.patch_size = width, depth, patch_size
        self.image_size = tuple(image_size)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.n_special = 2 if pose_token else 1
        self.checkpoint_activations = checkpoint_activations
        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)  # N(0, .02) [MAE]
        # paper silent on [POSE]'s start: N(0, .02) like [CLS], zero position
        self.pose_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if pose_token else None
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, width), requires_grad=trainable_positions)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.blocks.apply(initialize)
        rates = torch.linspace(0, drop_path, depth).repeat_interleave(2)  # one per residual branch
        self.register_buffer("drop_rates", rates[:, None], persistent=False)

    def embed(self, images, visible=None):
        """images (B, 3, H, W), visible (v·B, V) long or None → tokens before the blocks (v·B, T, D)."""
        patches = patchify(images, self.patch_size)  # (B, N, p·p·3), channel last
        position = self.pos_embed
        if visible is not None:
            patches, position = take_patches(patches, visible), position[0][visible]  # (v·B, V, …)
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # a convolution of stride p as a matrix
        x = F.linear(patches, weight, self.patch_embed.proj.bias) + position
        special = [self.cls_token] if self.pose_token is None else [self.cls_token, self.pose_token]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in special), x], dim=1)

    def forward(self, images, visible=None, drop_noise=None, final_norm=True):
        """Final-norm tokens (v·B, S + V, D): [CLS], [POSE] (if any), then the visible patches in the order given.

        images (B, 3, H, W) float, ImageNet-normalised. visible (B, V) or, for v views at once, (v·B, V) long patch
        ids, view after view; None = all N patches in order, one view.
        drop_noise (2·depth, B) uniform [0, 1) for drop path, drawn by the caller for the global batch; None = off.
        final_norm=False: the last block's tokens as they are.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"pictures of {tuple(images.shape[-2:])} px given to a model for {self.image_size} px")
        x = self.embed(images, visible)
        keep = [None] * self.depth
        if drop_noise is not None:  # a branch is dropped with its rate, kept ones are scaled up
            keep = ((drop_noise >= self.drop_rates) / (1 - self.drop_rates)).view(self.depth, 2, -1, 1, 1).unbind(0)
        for block, k in zip(self.blocks, keep):
            x = run_block(block, x, k, self.checkpoint_activations)
        return self.norm(x) if final_norm else x

    @torch.no_grad()
    def attention_maps(self, images):
        """Last block: attention of each special token to the patches, mean over heads → (B, S, h, w).

        Each map sums to 1 minus what the token gives to the special tokens.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last, S = self.blocks[-1], self.n_special
        q, k, _ = last.attn.queries_keys_values(last.norm1(x)).float().unbind(0)
        attention = (q[:, :, :S] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, S, T)
        return attention[..., S:].mean(1).unflatten(-1, self.grid)


def layer_of(name, depth):
    """Parameter name → its layer for layer decay [ViTPose, MAE]: embeddings 0, block i → i + 1, the rest depth + 1."""
    block = re.search(r"\bblocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"\b(patch_embed|cls_token|pose_token|pos_embed)\b", name) else depth + 1


# ---------------------------------------------------------------------------------------------------------- decoder


class Decoder(nn.Module):
    """[MAE, HAP] decoder: visible tokens go back to their places, mask tokens fill the rest, all patches are predicted.

    `encoder` is only asked for its shape. The special tokens pass through and are dropped at the end [HAP for [CLS]];
    paper silent on [POSE]: pose_in_decoder=False keeps it out, so that it cannot carry pixels.
    """

    def __init__(self, encoder, width, depth, heads, pose_in_decoder=True):
        super().__init__()
        self.n_special = encoder.n_special if pose_in_decoder else 1
        self.drop_pose = encoder.n_special == 2 and not pose_in_decoder
        self.checkpoint_activations = encoder.checkpoint_activations
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)  # N(0, .02) [MAE]
        position = torch.cat([torch.zeros(1, self.n_special, width), sincos_positions(encoder.grid, width)], dim=1)
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, encoder.patch_size**2 * 3)
        self.apply(initialize)

    def forward(self, tokens, visible, masked=None):
        """tokens (B, S + V, D) from the encoder, visible (B, V) long → all predicted patches (B, N, p·p·3).

        With masked (B, N − V) long, the other patch ids: only theirs, in that order; no other is predicted.
        """
        if self.drop_pose:
            tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
        x, S = self.embed(tokens), self.n_special
        B, N = len(x), self.pos_embed.shape[1] - S
        n_masked = N - visible.shape[1]
        rest = masked
        if masked is None:
            hidden = torch.ones(B, N, dtype=torch.uint8, device=x.device).scatter(1, visible, 0)
            rest = hidden.argsort(dim=1, descending=True, stable=True)[:, :n_masked]
        order = torch.cat([visible, rest], dim=1)
        # A token's place is its position code, not its row, so the mask tokens simply follow the visible ones.
        position = torch.cat([self.pos_embed[:, :S].expand(B, -1, -1), self.pos_embed[0, S:][order]], dim=1)
        mask_tokens = self.mask_token.to(x.dtype).expand(B, n_masked, -1)
        x = torch.cat([x, mask_tokens], dim=1) + position
        for block in self.blocks[:-1]:
            x = run_block(block, x, None, self.checkpoint_activations)
        wanted = N if masked is None else n_masked
        x = run_block(self.blocks[-1], x, None, self.checkpoint_activations, last=wanted)
        pred = self.head(self.norm(x))
        if masked is not None:
            return pred
        return pred.gather(1, order.argsort(1)[..., None].expand(-1, -1, pred.shape[2]))  # back in grid order


# --------------------------------------------------------------------------------------------------------- GenPoCCL


class GenPoCCL(nn.Module):
    """The pre-training model; its forward is the algorithm. A term whose γ is 0 is not computed.

    MAE: gamma_align = gamma_mp = 0, one random mask. HAP: gamma_mp = 0. StableRep: decoder None, no mask,
    gamma_align 0, mp_token "cls".
    views_are_positives (paper silent): True = the views of one picture are positives of each other like other pictures
    of the pose; False = L_mp within each view, averaged over views, so that a picture never meets itself.
    """

    def __init__(
        self,
        encoder,
        decoder,
        projector=None,
        mask_ratio=0.5,  # [HAP]
        gamma_align=0.05,  # γ1 [paper]
        gamma_mp=0.05,  # γ2 [paper]
        tau_align=0.2,  # [HAP]
        tau_mp=0.1,  # [StableRep; paper silent]
        mp_token="pose",  # [paper, Fig. 2]
        views_are_positives=True,
        gather_gradient=True,  # deviates from HAP: keys carry gradients, so that ranks do not change the result
    ):
        super().__init__()
        if gamma_mp > 0 and mp_token == "pose" and encoder.pose_token is None:
            raise UserError("mp_token=pose needs an encoder with pose_token=true; or use mp_token=cls")
        self.encoder, self.decoder = encoder, decoder
        # An unused projector would hold parameters without gradient, which DistributedDataParallel refuses.
        self.projector = (projector or Projector(encoder.width)) if gamma_mp > 0 else None
        N = encoder.grid[0] * encoder.grid[1]
        self.n_visible = N - round(mask_ratio * N)
        self.gamma_align, self.gamma_mp = gamma_align, gamma_mp
        self.tau_align, self.tau_mp = tau_align, tau_mp
        self.token = {"cls": 0, "pose": 1}[mp_token]
        self.views_are_positives, self.gather_gradient = views_are_positives, gather_gradient

    def compile(self, **options):
        """torch.compile of what takes the time; losses and gather stay plain, so ranks add no graph breaks."""
        self.encoder.compile(**options)
        if self.decoder is not None:
            self.decoder.compile(**options)

    def forward(self, images, masks, pose_id):
        """One step of the method.

        images (B, 3, H, W) float, ImageNet-normalised. masks: one bool (B, N) per view, True = masked, exactly
        round(mask_ratio · N) per row; or [None] for one unmasked view. pose_id (B,) int64, −1 = no pose group.
        → dict: total, rec, align, mp (scalars, this rank's shares: see losses.py); cls, pose (v, B, D) final-norm
          tokens (pose None without the token); z (s, n, d) and z_pose_id (s, n), the s sets of embeddings that
          meet in L_mp, s · n = v · B (None if not computed); pred (v, B, n_masked, p·p·3) of the masked patches
          in grid order (None without decoder; call the decoder for all patches); bad (B,) bool: picture with
          non-finite output.
        """
        v, B = len(masks), len(images)
        zero = torch.zeros((), device=images.device)
        out = {"rec": zero, "align": zero, "mp": zero, "pred": None, "z": None, "z_pose_id": None}

        # All views go through encoder and decoder as one batch: larger matrix products, the same numbers.
        visible = None
        if masks[0] is not None:
            order = torch.cat(masks).to(torch.uint8).argsort(dim=1, stable=True)  # visible first, in grid order
            visible, masked = order[:, : self.n_visible], order[:, self.n_visible :]
        tokens = self.encoder(images, visible)  # (v·B, S + V, D)
        special = tokens[:, : self.encoder.n_special].unflatten(0, (v, B))
        out["cls"], out["pose"] = special[:, :, 0], special[:, :, 1] if self.encoder.n_special == 2 else None
        finite = tokens.detach().float().sum((1, 2)).view(v, B)

        # Eq.  L_rec = mean over views and masked patches of ‖pred − target‖² / (3p²)
        if self.decoder is not None:
            pred = self.decoder(tokens, visible, masked)  # (v·B, n_masked, p·p·3)
            with no_autocast(pred):
                pred, patches = full_precision(pred, patchify(images, self.encoder.patch_size))
                error = patch_error(pred, take_patches(patches, masked))
                out["rec"] = error.mean()  # every picture on every rank has n_masked, so means of means are exact
            out["pred"] = pred.detach().unflatten(0, (v, B))
            finite = finite + error.detach().sum(1).view(v, B)

        # Eq.  L_align = 2τ [CE(cls of view 1 → view 2) + CE(view 2 → view 1)]
        if self.gamma_align > 0:
            out["align"] = alignment_loss(out["cls"][0], out["cls"][1], self.tau_align, self.gather_gradient)

        # Eq.  L_mp = −1/|A| Σ_i Σ_j p_ij log q_ij  on [POSE]
        if self.gamma_mp > 0:
            z = self.projector(special[:, :, self.token].flatten(0, 1))  # (v·B, d)
            s = 1 if self.views_are_positives else v  # all views in one set, or each view by itself
            out["z"], out["z_pose_id"] = z.unflatten(0, (s, -1)), pose_id.repeat(v).view(s, -1)
            out["mp"] = sum(multi_positive_loss(z, id, self.tau_mp) for z, id in zip(out["z"], out["z_pose_id"])) / s

        # Eq.  L = L_rec + γ1·L_align + γ2·L_mp
        out["total"] = out["rec"] + self.gamma_align * out["align"] + self.gamma_mp * out["mp"]
        out["bad"] = ~finite.isfinite().all(0)
        return out
