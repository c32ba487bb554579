#!/usr/bin/env bash
# From nothing to four fine-tuned tasks on two CPU cores: generate → pretrain → fine-tune, from scratch and pre-trained.
# Every step is skipped if its run folder is finished, and continued if it was interrupted.
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt
run() { echo; echo "+ python $*"; "$python" "$@"; }
started=$SECONDS

# Stage 1: a pose-consistent set to pre-train on, and labelled people for 2-D pose. Other poses in each.
run generate.py --cfg configs/generate_demo.yaml
run generate.py --cfg configs/generate_demo.yaml out=runs/demo/pose_train poses=2400 first_pose=100000 pictures_per_pose=1 width=96
run generate.py --cfg configs/generate_demo.yaml out=runs/demo/pose_val poses=200 first_pose=200000 pictures_per_pose=1 width=96

# Stage 2.
run pretrain.py --cfg configs/pretrain_demo.yaml score_annotations=runs/demo/pose_val/annotations.json score_every=400

# Stage 3: each task twice, same schedule, same seed. People under several cameras for the last three.
encoder=runs/demo/pretrain/encoder.safetensors
for task in pose reid par t2i; do
  if [ "$task" = reid ]; then run generate.py --cfg configs/generate_people_demo.yaml; fi
  run "finetune_$task.py" --cfg "configs/finetune_${task}_demo.yaml" "out=runs/demo/${task}_scratch"
  run "finetune_$task.py" --cfg "configs/finetune_${task}_demo.yaml" "out=runs/demo/${task}_pretrained" "encoder=$encoder"
done

"$python" - "$((SECONDS - started))" <<'PYTHON'
import json
import sys

ROWS = [
    ("2-D pose, AP", "pose", "AP"),
    ("2-D pose, PCK@.2", "pose", "PCK@.2"),
    ("person ReID, mAP", "reid", "mAP"),
    ("attributes, mA", "par", "mA"),
    ("text-to-image ReID, R@1", "t2i", "t2i_R1"),
]
print(f"\n{'task, metric':26}{'from scratch':>14}{'pre-trained':>14}")
for title, task, metric in ROWS:
    values = [json.load(open(f"runs/demo/{task}_{kind}/metrics.json"))[metric] for kind in ("scratch", "pretrained")]
    print(f"{title:26}{values[0]:14.3f}{values[1]:14.3f}")
print(f"\n{int(sys.argv[1]) // 60} min {int(sys.argv[1]) % 60} s after installing. Pictures to look at:")
for path in (
    "set/sheet.png", "pretrain/reconstructions.png", "pretrain/neighbours.png", "pretrain/attention.png",
    "pose_pretrained/overlays.png", "reid_pretrained/ranked_lists.png", "par_pretrained/examples.png",
    "t2i_pretrained/ranking.png",
):
    print(f"  runs/demo/{path}")
PYTHON
