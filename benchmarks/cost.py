"""What the paper's two sets and its pre-training cost, from counted operations.

  python benchmarks/cost.py efficiency=0.4      about a minute on any machine; no weights needed

The matrix products of one picture are counted, not run: Stable Diffusion 1.4 and the T2I-Adapter at
their published sizes as configs/generate_coco_t2i.yaml asks, and a training step of ViT-B and ViT-L
as configs/pretrain_coco.yaml asks.

    GPU hours = pictures × FLOP per picture / (peak FLOP/s of the GPU × efficiency) / 3600

peak: dense bf16 of the GPU's data sheet. efficiency: the share of it that is reached; .4 is what
one hopes for, to be replaced by what `step` and `generate` of throughput.py measure on your GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from generation import CONFIG, networks
from throughput import KEYS as STEP_KEYS
from throughput import Step
from timing import flops
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import generate
from plumbing.config import Key, read_config

PEAK = {"A100": 312e12, "H100 SXM": 989e12}  # dense bf16 FLOP/s, NVIDIA's data sheets
POSES, K, EPOCHS = 117126, 5, 400  # [paper], [paper, inferred], [HAP]
# Pictures of train2017 with annotated people [HRNet]. A painted one gives a crop a person.
PAINTED = 57_000
KEYS = dict(efficiency=Key(0.4, "share of the peak that is reached", low=0.01, high=1.0))
ROOT = Path(__file__).resolve().parent.parent


def picture_flops(cfg):
    """FLOP of one painted picture: the noise prediction with and without prompt at every step, the
    adapter once, the decoder once. (The text encoder takes .1 % of it.)"""
    side = cfg.resolution // 8
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unet, autoencoder, adapter = networks()
        noisy, words = torch.empty(2, 4, side, side), torch.empty(2, 77, 768)
        time = torch.zeros(2, dtype=torch.long)
        step = flops(lambda: unet(noisy, time, words))
        rest = flops(lambda: adapter(torch.empty(1, 3, cfg.resolution, cfg.resolution)))
        rest += flops(lambda: autoencoder.decode(torch.empty(1, 4, side, side)))
    return cfg.steps * step + rest


def step_flops(size, ranks):
    """FLOP of a training step per picture: both views, forward and backward."""
    argv = ["--cfg", str(ROOT / "configs/pretrain_coco.yaml"), f"size={size}", "batch=20"]
    argv += ["device=cpu", "precision=fp32", "mask=random"]  # as large as mask=part
    cfg = read_config(STEP_KEYS, __doc__, argv)
    with FakeTensorMode():
        return flops(Step(cfg, ranks).forward_backward) / cfg.batch


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks("cpu")
    painted = read_config(generate.KEYS, __doc__, ["--cfg", str(CONFIG)])
    name = f"GenCOCO, {POSES * K:,} crops of {PAINTED * K:,} painted pictures"
    jobs = {name: PAINTED * K * picture_flops(painted)}
    for size, name in (("base", "ViT-B"), ("large", "ViT-L")):
        jobs[f"{name}, {EPOCHS} epochs of them"] = POSES * K * EPOCHS * step_flops(size, ranks)
    print(f"efficiency {cfg.efficiency:g}; hours on 1, 8 and 64 GPUs\n")
    for name, work in jobs.items():
        print(f"{name}: {work / 1e18:,.0f} EFLOP")
        for gpu, peak in PEAK.items():
            hours = work / (peak * cfg.efficiency) / 3600
            print(f"  {gpu}: " + ", ".join(f"{hours / n:,.1f} h" for n in (1, 8, 64)))


if __name__ == "__main__":
    common.run_stage(main)
