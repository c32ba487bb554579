"""The training step that the tables measure: pretrain.py's own, on one batch of made-up pictures. Its bytes, too.

Legend: B pictures on this rank.
"""

import contextlib
from types import SimpleNamespace

import torch
from timing import PeakMemory

import data
import losses
import pretrain
from common import WEIGHTS, autocast, distributed, parameter_groups, seed_all


def changed(cfg, **values):
    return SimpleNamespace(**(vars(cfg) | values))


class Step:
    """A training step as pretrain.py's loop makes it: normalise, mask, forward, backward, norm, AdamW, health."""

    def __init__(self, cfg, device, rank=0, world=1):
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        seed_all(WEIGHTS, cfg.seed)
        self.model = pretrain.build_model(cfg)
        if device.type != "cpu":
            self.model.to(device)
        self.optimizer = adamw(self.model, cfg)
        if cfg.compile:
            self.model.compile()
        self.runner = distributed(self.model, device)
        B = cfg.batch // world
        keypoints = torch.rand(B, 17, 3) * torch.tensor([cfg.width, cfg.height, 3.0])
        keypoints[..., 2].floor_()  # 0 missing, 1 hidden, 2 visible
        pose_id = (torch.arange(B) + rank * B) // cfg.pictures_per_pose
        images = torch.randint(256, (B, 3, cfg.height, cfg.width), dtype=torch.uint8)
        self.sample = {"image": images, "keypoints": keypoints, "pose_id": pose_id}

    def masks(self, keypoints):
        return pretrain.draw_masks(self.cfg, keypoints, self.model.encoder.grid, 0, self.rank, self.world)

    def inputs(self, sample=None):
        values = ((sample or self.sample)[name] for name in ("image", "keypoints", "pose_id"))
        images, keypoints, pose_id = (value.to(self.device, non_blocking=True) for value in values)
        return data.normalize(images), self.masks(keypoints), pose_id

    def forward_backward(self, sample=None):
        with autocast(self.device, self.cfg.precision):
            result = self.runner(*self.inputs(sample))
        result["total"].backward()
        return result

    def __call__(self, sample=None):
        result = self.forward_backward(sample)
        update(self.model, self.optimizer)
        for z, ids in zip(result["z"], result["z_pose_id"]) if self.cfg.gamma_mp else ():
            losses.contrastive_health(z, ids)


def adamw(model, cfg):
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, cfg.beta2), fused=True)


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_memory(step):
    """CUDA: the allocator's peak. CPU: what tensors hold at most during a step, counted."""
    step()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step()
        return torch.cuda.max_memory_allocated(step.device)
    with PeakMemory(*state_of(step)) as memory:
        step()
    return memory.peak


def state_of(step):
    state = [v for values in step.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return [*step.model.parameters(), *step.model.buffers(), *state, *step.sample.values()]


@contextlib.contextmanager
def replaced(thing, **values):
    """Attributes of a module or object replaced inside the `with`."""
    kept = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(thing, name, value)
