"""The teachers of baselines/synclr.py and baselines/solider.py in whole runs."""

import importlib
import math
import sys

import pytest
import torch
from coco_sets import write_set

from baselines import parts
from plumbing.config import read_config


@pytest.mark.parametrize("name", ["synclr", "solider"])
def test_the_teacher_moves_after_every_step(tmp_path, monkeypatch, name):
    """θ_t ← m θ_t + (1 − m) θ_s, m on half a cosine up to 1."""
    path = write_set(tmp_path / "set", n_poses=8, per_pose=4)
    script, moves = importlib.import_module(f"baselines.{name}"), []
    real = parts.update_teacher

    def watched(teacher, student, momentum):
        before = [p.detach().clone() for p in teacher.parameters()]
        real(teacher, student, momentum)
        for old, new, theirs in zip(before, teacher.parameters(), student.parameters()):
            expected = momentum * old + (1 - momentum) * theirs.detach()
            torch.testing.assert_close(new.detach(), expected, rtol=1e-5, atol=1e-7)
        moves.append(momentum)

    monkeypatch.setattr(parts, "update_teacher", watched)
    keys = [f"annotations={path}", f"out={tmp_path}/run", "batch=8", "epochs=1", "device=cpu"]
    keys += "size=tiny height=64 width=32 local_height=32 local_width=16 workers=0".split()
    keys += "warmup_epochs=0 precision=fp32".split()
    if name == "synclr":
        keys += "prototypes=24 head_width=64 pictures_per_caption=2".split()
        keys += "projector_width=64 projector_out=32".split()
    else:
        keys += "out_dim=24 head_hidden=64 local_crops=2".split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *keys])
    script.main()
    cfg = read_config(script.KEYS, "", keys)
    first, total = cfg.momentum if name == "synclr" else cfg.teacher_momentum, len(moves)
    assert total == 4  # 32 pictures, 8 a step
    shares = [0.5 + 0.5 * math.cos(math.pi * step / total) for step in range(total)]
    assert moves == pytest.approx([1 - (1 - first) * share for share in shares])
