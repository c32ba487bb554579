"""Command lines of pretrain.py for small sets, and the rows of its log."""

import json

SMALL = "size=tiny height=64 width=32 patch=8 pictures_per_pose=3 batch=12 warmup_epochs=0.5"
SMALL = [*SMALL.split(), "device=cpu", "workers=0"]


def arguments(sets, out, *more):
    return [f"annotations={','.join(map(str, sets))}", f"out={out}", *SMALL, *more]


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_speed(out):
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in rows(out)]
