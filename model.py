"""ViT with [CLS] and [POSE], the masked decoder, and GenPoCCL, whose forward is the method.

    L = L_rec + γ1·L_align + γ2·L_mp                                                       [paper]

MAE, HAP and StableRep are settings of it. Parameter names follow MAE and timm: their checkpoints
load by name. To take an encoder home, copy this file and losses.py (load_encoder, normalize).

Legend: B images on this rank · v views (maskings of the same images) · N patches, V of them
visible · S special tokens · T = S + V · D width · H, W picture · h, w grid · p patch side.
"""

import json

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

import losses
from losses import Projector, full_precision, no_autocast, patchify, split_mask, take_patches

EPS = 1e-6  # of LayerNorm [MAE]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # [MAE] [HAP]
BYTE_MEAN, BYTE_STD = (torch.tensor([IMAGENET_MEAN, IMAGENET_STD]) * 255).tolist()

# Encoders: tiny ours (for a CPU), small as DeiT-S, base [HAP], large [MAE]. Decoder [MAE, HAP].
DECODER = dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
SIZES = dict(
    tiny=dict(width=192, depth=6, heads=3, decoder_width=128, decoder_depth=2, decoder_heads=4),
    small=dict(width=384, depth=12, heads=6) | DECODER,
    base=dict(width=768, depth=12, heads=12) | DECODER,
    large=dict(width=1024, depth=24, heads=16) | DECODER,
)


def normalize(pictures):
    """uint8 (B, 3, H, W) → float32, less ImageNet's mean, over its standard deviation."""
    pixels = pictures.to(torch.float32, copy=True)
    # Numbers, not a tensor of three, which the host would copy to the GPU and wait for.
    # In place, because fresh memory for each result took 20 × as long on a CPU.
    for channel, mean, std in zip(pixels.unbind(1), BYTE_MEAN, BYTE_STD):
        channel.sub_(mean).div_(std)
    return pixels


# ---------------------------------------------------------------------------------- building blocks


def sincos_positions(grid, width):
    """Fixed 2-D sin-cos positions [MAE]: (1, h·w, D); half of D codes the column, half the row."""
    h, w = grid
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def attention(q, k, v):
    """softmax(q kᵀ / √d) v, for q, k, v of (B, heads, T, D / heads) each."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused CPU kernel took 7 × as long for the bfloat16 backward pass (T 66, d 64).
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # queries, keys and values in one product
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x):
        x = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x.unbind(0)  # three of (B, heads, T, D / heads)

    def forward(self, x):
        q, k, v = self.queries_keys_values(x)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # heads side by side


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. keep (2, B, 1, 1): what drop path leaves of its two branches."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)
        self.controller = None  # SOLIDER alone: ViT sets three of them

    def forward(self, x, keep=None):
        if keep is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x)) * keep[0]
        return x + self.mlp(self.norm2(x)) * keep[1]

    def last_tokens(self, x, n):
        """forward(x) of the last n ≥ 1 tokens alone: (B, T, D) → (B, n, D)."""
        q, k, v = self.attn.queries_keys_values(self.norm1(x))
        mixed = attention(q[:, :, -n:], k, v).transpose(1, 2).flatten(2)
        x = x[:, -n:] + self.attn.proj(mixed)
        return x + self.mlp(self.norm2(x))


class Controller(nn.Module):
    """[SOLIDER] x · softplus(W [λ, 1 − λ] + b) + V [λ, 1 − λ] + d, on all tokens of a picture."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Linear(2, width), nn.Linear(2, width)
        for layer in (self.scale, self.shift):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x, semantic_weight):
        """x (B, T, D), semantic_weight λ (B,): 0 appearance … 1 semantics → (B, T, D)."""
        pair = torch.stack([semantic_weight, 1 - semantic_weight], dim=1)[:, None]  # (B, 1, 2)
        return x * F.softplus(self.scale(pair)) + self.shift(pair)


def run_block(block, x, option, recompute):
    """block(x, option). recompute: keep x alone and compute the rest again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, option, use_reentrant=False)
    return block(x, option)


def initialize(module):
    """[MAE]: Xavier-uniform linear layers, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------ encoder


class ViT(nn.Module):
    """Plain ViT [HAP = MAE] with [CLS] and, after it, our [POSE]; only visible patches are encoded.

    image_size (H, W) in pixels, multiples of patch_size. pos_embed (1, N, D) belongs to the
    patches, special tokens have position zero; fixed in pre-training, trainable downstream.
    drop_path: rate of the last block, rising linearly from 0 at the first; needs drop_noise.
    checkpoint_activations: recompute blocks in the backward pass, a fifth slower, far less memory.
    controller: SOLIDER's, after ¼, ½ and ¾ of the depth ≥ 4; semantic_weight: its λ, else None.
    ValueError for sides, a width or pictures that do not fit patches, heads or the model.
    """

    def __init__(
        self, width, depth, heads, image_size, patch_size, pose_token=True, drop_path=0.0,
        trainable_positions=False, checkpoint_activations=False, controller=False,
    ):  # fmt: skip
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(f"image size {image_size} is no multiple of patch={patch_size}")
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        self.width, self.depth, self.patch_size = width, depth, patch_size
        self.image_size = tuple(image_size)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.n_special = 2 if pose_token else 1
        self.checkpoint_activations = checkpoint_activations
        self.patch_embed = nn.Module()  # patch_embed.proj: its published name
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, patch_size)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # [MAE]: as linear
        nn.init.zeros_(self.patch_embed.proj.bias)  # [MAE] leaves torch's default
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)  # N(0, .02) [MAE]
        # paper silent on [POSE]'s start: N(0, .02) like [CLS], zero position
        self.pose_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if pose_token else None
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, width), trainable_positions)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.blocks.apply(initialize)
        self.semantic_weight = 1.0 if controller else None  # 1 [SOLIDER] until somebody sets it
        for quarter in (1, 2, 3) if controller else ():
            self.blocks[depth * quarter // 4 - 1].controller = Controller(width)
        rates = torch.linspace(0, drop_path, depth).repeat_interleave(2)  # one per branch
        self.register_buffer("drop_rates", rates[:, None], persistent=False)

    def embed(self, images, visible=None):
        """Tokens before the first block: images (B, 3, H, W), visible (v·B, V) → (v·B, T, D)."""
        patches, position = patchify(images, self.patch_size), self.pos_embed  # (B, N, p·p·3)
        if visible is not None:  # masked patches are never seen: that is what makes it fast [MAE]
            patches, position = take_patches(patches, visible), position[0][visible]
        # A convolution of stride p is a matrix product over the pixels of a patch.
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(patches, weight, self.patch_embed.proj.bias) + position  # (v·B, V, D)
        special = [self.cls_token, self.pose_token][: self.n_special]  # [POSE] behind [CLS]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in special), x], dim=1)

    def forward(self, images, visible=None, drop_noise=None, final_norm=True, semantic_weight=None):
        """Tokens (v·B, S + V, D): [CLS], [POSE] (if any), then the visible patches as given.

        images (B, 3, H, W) float, ImageNet-normalised. visible (B, V) or, for v views at once,
        (v·B, V) long patch ids, view after view; None = all N patches in order, one view.
        drop_noise (2·depth, B) uniform [0, 1) for drop path, drawn by the caller for the global
        batch; None = off. final_norm=False: the last block's tokens as they are. semantic_weight
        (v·B,) λ of each row; None: the encoder's own.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            given = tuple(images.shape[-2:])
            raise ValueError(f"{given} px given to a model of {self.image_size} px")
        x = self.embed(images, visible)
        keep = [None] * self.depth  # evaluation and pre-training drop nothing
        if drop_noise is not None:  # a branch is dropped with its rate, kept ones are scaled up
            kept = (drop_noise >= self.drop_rates) / (1 - self.drop_rates)
            keep = kept.view(self.depth, 2, -1, 1, 1).unbind(0)
        if semantic_weight is None and self.semantic_weight is not None:
            semantic_weight = x.new_full((len(x),), self.semantic_weight)
        for block, k in zip(self.blocks, keep):
            x = run_block(block, x, k, self.checkpoint_activations)
            if block.controller is not None:
                x = block.controller(x, semantic_weight)
        return self.norm(x) if final_norm else x


def load_encoder(path):
    """An encoder.safetensors of this project → ViT in evaluation mode, as large as the file says.

    Its output on normalize(pictures) has [CLS] at [:, 0] and, if it has one, [POSE] at [:, 1].
    """
    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get("encoder")
        if said is None:
            raise ValueError(f"{path} is no encoder.safetensors of this project")
        state = {name: file.get_tensor(name) for name in file.keys()}
    meta = json.loads(said)
    width, depth, heads, p = (int(meta[name]) for name in ("width", "depth", "heads", "patch_size"))
    size = int(meta["height"]), int(meta["width_px"])
    pose_token, controller = meta["pose_token"] == "True", "semantic_weight" in meta
    vit = ViT(width, depth, heads, size, p, pose_token, controller=controller)
    vit.semantic_weight = float(meta["semantic_weight"]) if controller else None
    vit.load_state_dict(state)
    return vit.eval()


# ----------------------------------------------------------------------------- decoder and GenPoCCL


class Decoder(nn.Module):
    """[MAE, HAP] Mask tokens follow the visible tokens; positions say where each belongs.

    `encoder` is only asked for its shape. The special tokens pass through and are dropped at the
    end [HAP for [CLS]]; paper silent on [POSE]: pose_in_decoder=False keeps it out, and L_rec
    reaches it through the encoder alone, where patches attend to it.
    """

    def __init__(self, encoder, width, depth, heads, pose_in_decoder=True):
        super().__init__()
        self.n_special = encoder.n_special if pose_in_decoder else 1
        self.drop_pose = encoder.n_special == 2 and not pose_in_decoder
        self.checkpoint_activations = encoder.checkpoint_activations
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)  # N(0, .02) [MAE]
        zero = torch.zeros(1, self.n_special, width)
        position = torch.cat([zero, sincos_positions(encoder.grid, width)], dim=1)
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, encoder.patch_size**2 * 3)
        self.apply(initialize)

    def forward(self, tokens, visible, masked):
        """Predict the masked patches, in the order of `masked`.

        tokens (v·B, S + V, D) from the encoder; visible (v·B, V) and masked (v·B, N − V) long patch
        ids that together are all N. → (v·B, N − V, p·p·3) normalised pixels.
        """
        if self.drop_pose:
            tokens = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
        x, S, B = self.embed(tokens), self.n_special, len(tokens)
        # A token's place is its position code, not its row: mask tokens follow the visible ones.
        place = self.pos_embed[0, S:][torch.cat([visible, masked], dim=1)]  # (v·B, N, width)
        position = torch.cat([self.pos_embed[:, :S].expand(B, -1, -1), place], dim=1)
        mask_tokens = self.mask_token.to(x.dtype).expand(B, masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1) + position
        for block in self.blocks[:-1]:
            x = run_block(block, x, None, self.checkpoint_activations)
        # Only masked patches are predicted, which saves 5.6 % of a tiny model's step.
        x = run_block(self.blocks[-1].last_tokens, x, masked.shape[1], self.checkpoint_activations)
        return self.head(self.norm(x))


class GenPoCCL(nn.Module):
    """The pre-training model; its forward is the algorithm. A term whose γ is 0 is not computed.

    MAE: gamma_align = gamma_mp = 0, one random mask. HAP: gamma_mp = 0. StableRep: decoder None, no
    mask, gamma_align 0, mp_token "cls".
    views_are_positives (paper silent): True = the views of one picture are positives of each other
    like other pictures of the pose; False = L_mp within each view, averaged over views.
    gather_gradient: False is HAP's release, whose keys carry no gradient (losses.alignment_loss).
    """

    def __init__(
        self, encoder, decoder, projector=None, mask_ratio=0.5, gamma_align=0.05, gamma_mp=0.05,
        tau_align=0.2, tau_mp=0.1, mp_token="pose", views_are_positives=True, gather_gradient=True,
    ):  # fmt: skip
        super().__init__()
        if gamma_mp > 0 and mp_token == "pose" and encoder.pose_token is None:
            raise ValueError("mp_token=pose needs an encoder with [POSE]; or use mp_token=cls")
        self.encoder, self.decoder = encoder, decoder
        # Without L_mp a projector would hold parameters without gradient, which DDP refuses.
        self.projector = (projector or Projector(encoder.width)) if gamma_mp > 0 else None
        N = encoder.grid[0] * encoder.grid[1]
        self.n_visible = N - round(mask_ratio * N)  # mask_ratio .5 [HAP]
        self.gamma_align, self.gamma_mp = gamma_align, gamma_mp  # γ1 = γ2 = .05 [paper]
        self.tau_align, self.tau_mp = tau_align, tau_mp  # .2 [HAP], .1 [StableRep; paper silent]
        self.token = {"cls": 0, "pose": 1}[mp_token]  # [POSE] [paper, Fig. 2]
        self.views_are_positives, self.gather_gradient = views_are_positives, gather_gradient

    def compile(self, **options):
        """torch.compile of what takes the time; losses and gather stay plain."""
        self.encoder.compile(**options)
        if self.decoder is not None:
            self.decoder.compile(**options)

    def forward(self, images, masks, pose_id):
        """One step of the method.

        images (B, 3, H, W) float, ImageNet-normalised. masks: one bool (B, N) per view, True =
        masked, exactly round(mask_ratio · N) per row; or [None] for one unmasked view; γ1 > 0
        needs two views. pose_id (B,) int64, −1 = no pose group.
        → dict: total, rec, align, mp (scalars, this rank's shares: see losses.py); special
          (v, B, S, D) final-norm tokens, of them cls, pose (v, B, D) (None without the token);
          health: a dict of figures for each set of embeddings that meets in L_mp (none without
          it); pred (v, B, N − V, p·p·3) of the masked patches in grid order (None without
          decoder); bad (B,) bool: pictures whose output is not finite.
        """
        # Each picture by itself: tokens, L_rec. Then the whole batch: L_align, L_mp, L.
        return self.contrast(self.reconstruct(images, masks), pose_id)

    def reconstruct(self, images, masks, decode=True):
        """The first half of forward: special tokens (v, B, S, D), L_rec, what is not finite.

        Pictures do not meet here, so a batch may be taken in parts. decode=False: tokens alone.
        """
        v, B = len(masks), len(images)
        zero = torch.zeros((), device=images.device)
        out = dict(rec=zero, align=zero, mp=zero, pred=None, health=[])

        # All views go through encoder and decoder as one batch: larger products, the same numbers.
        visible, masked = None, None
        if masks[0] is not None:
            visible, masked = split_mask(torch.cat(masks), self.n_visible)
        tokens = self.encoder(images, visible)  # (v·B, S + V, D)
        out["special"] = tokens[:, : self.encoder.n_special].unflatten(0, (v, B))
        finite = tokens.detach().float().sum((1, 2)).view(v, B)  # a sum shows any NaN or infinity

        # Eq.  L_rec = mean over views and masked patches of ‖pred − target‖² / (3p²)
        if self.decoder is not None and decode:
            pred = self.decoder(tokens, visible, masked)  # (v·B, N − V, p·p·3)
            with no_autocast(pred):
                pred, patches = full_precision(pred, patchify(images, self.encoder.patch_size))
                error = losses.patch_error(pred, take_patches(patches, masked))
                # Every picture masks equally many patches: this is the mean over all of them.
                out["rec"] = error.mean()
            out["pred"] = pred.detach().unflatten(0, (v, B))
            finite = finite + error.detach().sum(1).view(v, B)
        out["bad"] = ~finite.isfinite().all(0)
        return out

    def contrast(self, out, pose_id):
        """The second half: adds to the first one's dict what compares pictures, and L.

        Here pictures are compared: it needs the whole batch.
        """
        special, v = out["special"], len(out["special"])
        out["cls"] = special[:, :, 0]
        out["pose"] = special[:, :, 1] if special.shape[2] > 1 else None

        # Eq.  L_align = 2τ [CE(cls of view 1 → view 2) + CE(view 2 → view 1)]
        if self.gamma_align > 0:
            one, two = out["cls"]  # the same pictures under two maskings
            out["align"] = losses.alignment_loss(one, two, self.tau_align, self.gather_gradient)

        # Eq.  L_mp = −1/|A| Σ_i Σ_j p_ij log q_ij  on [POSE]
        if self.gamma_mp > 0:
            z = self.projector(special[:, :, self.token].flatten(0, 1))  # (v·B, d), view by view
            s = 1 if self.views_are_positives else v  # all views in one set, or each by itself
            sets = list(zip(z.chunk(s), pose_id.repeat(v).chunk(s)))
            out["mp"] = sum(losses.multi_positive_loss(z, id, self.tau_mp) for z, id in sets) / s
            out["health"] = [losses.contrastive_health(z, id) for z, id in sets]  # to be logged

        # Eq.  L = L_rec + γ1·L_align + γ2·L_mp
        out["total"] = out["rec"] + self.gamma_align * out["align"] + self.gamma_mp * out["mp"]
        return out
