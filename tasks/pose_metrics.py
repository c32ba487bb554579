"""How right poses are: OKS with its AP and NMS [COCO], PCK and PCKh. In NumPy, on the CPU.

Legend: N people · K joints · xy in picture px. Fractions, not percent.
"""

import contextlib
import io
import math

import numpy as np

from formats.joints import COCO_JOINTS, joint_name
from formats.keypoints import AIC_JOINTS, CROWDPOSE_JOINTS
from tasks.pose import regions

# ---------------------------------------------------------------------------------------------- OKS

COCO_SIGMAS = dict(
    zip(COCO_JOINTS, [0.026] + [0.025] * 2 + [0.035] * 2 + [0.079] * 2 + [0.072] * 2 + [0.062] * 2
        + [0.107] * 2 + [0.087] * 2 + [0.089] * 2)
)  # fmt: skip
PUBLISHED_SIGMAS = (  # source, joint names in the file's order, their σ
    ("COCO's", COCO_JOINTS, list(COCO_SIGMAS.values())),
    ("CrowdPose's", CROWDPOSE_JOINTS,
     [0.079] * 2 + [0.072] * 2 + [0.062] * 2 + [0.107] * 2 + [0.087] * 2 + [0.089] * 2
     + [0.079] * 2),
    ("AIC's", AIC_JOINTS,
     [0.01388152, 0.01515228, 0.01057665, 0.01417709, 0.01497891, 0.01402144, 0.03909642]
     + [0.03686941, 0.01981803, 0.03843971, 0.03412318, 0.02415081, 0.01291456, 0.01236173]),
)  # fmt: skip
# Easy, medium and hard pictures by their crowdIndex, as CrowdPose's evaluator divides them. (Its
# paper writes that easy ones end at .1; published figures come from the evaluator.)
CROWD_LEVELS = {"easy": (-math.inf, 0.2), "medium": (0.2, 0.8), "hard": (0.8, math.inf)}


def oks_sigmas(joints):
    """Joint names → (σ (K,), where they come from). Sets without published σ: ours, by name.

    Ours: COCO's of that name; other joints (head, neck, thorax) have its shoulder's .079, the
    pelvis has its hip's .107.
    """
    for source, names, sigmas in PUBLISHED_SIGMAS:
        if list(joints) == [joint_name(name) for name in names]:  # as readers respell a file's
            return np.array(sigmas), f"{source} published sigmas"
    sigmas = [COCO_SIGMAS.get(name, 0.107 if name == "pelvis" else 0.079) for name in joints]
    why = "this joint set has no published ones; not comparable with other work"
    return np.array(sigmas), f"our sigmas ({why})"


def oks(xy, truth, area, sigmas):
    """Object keypoint similarity of poses (..., K, 2) with truth (..., K, 3) of area (...) px².

    NaN where the truth has no joint.
    """
    seen = truth[..., 2] > 0
    # OKS = Σ_k [v_k] exp(−d_k² / (2 s² (2σ_k)²)) / Σ_k [v_k],  s² = area
    square = ((xy - truth[..., :2]) ** 2).sum(-1)
    e = square / (np.asarray(area)[..., None] + np.spacing(1)) / (2 * (2 * np.asarray(sigmas)) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.exp(-e) * seen).sum(-1) / seen.sum(-1)


def oks_nms(poses, scores, areas, sigmas, threshold=0.9):
    """Ids of the kept poses (N, K, 2) of one picture, best first [HRNet].

    A pose closer than `threshold` to a kept one goes. Every joint counts; the area of a pair is
    the mean of their regions' areas.
    """
    order, keep = np.argsort(-np.asarray(scores), kind="stable"), []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(int(best))
        truth = np.concatenate([poses[best], np.ones((poses.shape[1], 1))], 1)
        pair = (areas[best] + areas[order]) / 2
        order = order[oks(poses[order], truth, pair, sigmas) <= threshold]
    return keep


def without_duplicates(people, found, score, cfg):
    """Ids that OKS-NMS keeps of poses (N, K, 3), picture by picture [HRNet].

    cfg.nms is its threshold. Area: that of a person's padded region.
    """
    area = regions(people.boxes, cfg.width / cfg.height, cfg.padding)[1].prod(1)
    sigmas, keep = oks_sigmas(people.joints)[0], []
    for image in np.unique(people.image_id):
        rows = np.flatnonzero(people.image_id == image)
        xy = found[rows, :, :2].astype(np.float64)
        keep.append(rows[oks_nms(xy, score[rows], area[rows], sigmas, cfg.nms)])
    return np.concatenate(keep)


def nearest_poses(truth, image_id, found, sigmas):
    """For each annotated person the most similar pose found in his picture.

    truth: T People; found (N, K, 3) in pictures image_id (N,). → (poses (T, K, 3), their OKS (T,));
    zeros where a picture has none.
    """
    best, similar = np.zeros_like(truth.keypoints), np.zeros(len(truth.files))
    for i, image in enumerate(truth.image_id):
        rows = np.flatnonzero(image_id == image)
        if len(rows):
            near = oks(found[rows][..., :2], truth.keypoints[i], truth.area[i], sigmas)
            best[i], similar[i] = found[rows[near.argmax()]], near.max()
    return best, similar


def pose_score(box_score, joint_scores, floor=0.2):
    """Box score × mean of the joint scores above .2 (0 if there is none) [HRNet]: (N,), (N, K)."""
    above = joint_scores > floor
    return np.asarray(box_score) * (joint_scores * above).sum(1) / np.maximum(above.sum(1), 1)


def coco_metrics(document, results, sigmas, bad_images=()):
    """OKS-AP and AR by pycocotools. document: COCO JSON as read; results: COCO keypoint results.

    People without joints (num_keypoints 0) and crowds are ignored as pycocotools does. Pictures
    named in `bad_images` (ids) are left out. → dict of fractions, None where a class is empty.
    AP_medium and AP_large go by a person's size. Where all pictures have a crowdIndex,
    AP_crowd_easy, _medium and _hard are the AP of such pictures alone.
    """
    from pycocotools.coco import COCO  # here alone: the puppet, which scores no pose, works without
    from pycocotools.cocoeval import COCOeval

    names = "AP AP50 AP75 AP_medium AP_large AR AR50 AR75 AR_medium AR_large".split()
    images = [image for image in document["images"] if image["id"] not in set(bad_images)]
    levels = CROWD_LEVELS if all("crowdIndex" in image for image in images) else {}
    if not results:
        return dict.fromkeys([*names, *(f"AP_crowd_{level}" for level in levels)], 0.0)
    truth = COCO()
    # pycocotools takes a match with an annotation of id 0 for none. Nobody asks for these ids.
    rows = [row | {"id": n} for n, row in enumerate(document["annotations"], 1)]
    truth.dataset = document | {"annotations": rows}

    def figures(ids):
        evaluation = COCOeval(truth, found, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas)
        evaluation.params.imgIds, evaluation.params.catIds = ids, [results[0]["category_id"]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return [float(v) if v >= 0 else None for v in evaluation.stats]

    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([dict(row) for row in results])
        out = dict(zip(names, figures(sorted(image["id"] for image in images))))
        for level, (low, high) in levels.items():
            ids = sorted(image["id"] for image in images if low <= image["crowdIndex"] < high)
            out[f"AP_crowd_{level}"] = figures(ids)[0] if ids else None
    return out


# ---------------------------------------------------------------------------------------------- PCK


def pck(xy, truth, reference, threshold):
    """Share of labelled joints within threshold · reference px of the truth.

    xy (N, K, 2), truth (N, K, 3), reference (N,) px; who has none > 0 is left out.
    → (pooled over all joints, per joint (K,) with NaN where none is labelled, people left out).
    """
    reference = np.asarray(reference)
    usable = reference > 0
    seen = (truth[..., 2] > 0) & usable[:, None]
    near = np.linalg.norm(xy - truth[..., :2], axis=-1) <= threshold * reference[:, None]
    right, count = (near & seen).sum(0), seen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(right.sum() / count.sum()), right / count, int((~usable).sum())


def torso_size(truth, joints):
    """(N,) px, left shoulder to right hip [MODEC], else the other diagonal; NaN without both."""
    size = apart(truth, joints, "left_shoulder", "right_hip")
    return np.where(np.isnan(size), apart(truth, joints, "right_shoulder", "left_hip"), size)


def apart(truth, joints, one, other):
    """(N,) px between two joints; NaN where one of them is missing or not of this joint set."""
    if not {one, other} <= set(joints):
        return np.full(len(truth), np.nan)
    a, b = truth[:, joints.index(one)], truth[:, joints.index(other)]
    both = (a[:, 2] > 0) & (b[:, 2] > 0)
    return np.where(both, np.linalg.norm(a[:, :2] - b[:, :2], axis=1), np.nan)


def pck_metrics(xy, truth, joints, heads=None):
    """PCK@.2 of the torso and, for MPII's joints, PCKh@.5. → (figures, full account)

    xy (N, K, 2), truth (N, K, 3) px. heads: MPII's official (head size (N,) px, labelled (N, K),
    joints (N, K, 2) px), which alone decide about PCKh then, or None: head size and joints of the
    list. A figure for which no joint counts is left out.
    """
    xy, truth, flat, full = xy.astype(np.float64), truth.astype(np.float64), {}, {}

    def per_joint(values):
        return {name: None if np.isnan(v) else float(v) for name, v in zip(joints, values)}

    share, each, left_out = pck(xy, truth, torso_size(truth, joints), 0.2)
    if not np.isnan(share):
        flat["PCK@.2"] = share
        full = {"PCK@.2": share, "torso": "left shoulder to right hip, else the other diagonal"}
        full |= {"people_without_torso": left_out, "PCK@.2_per_joint": per_joint(each)}
    if {"head_top", "upper_neck"} <= set(joints):
        # Stands in for MPII's head box (ours).
        head = apart(truth, joints, "head_top", "upper_neck")
        source = "head_top to upper_neck (ours: no official .mat given)"
        if heads:
            head, source = heads[0], "0.6 × diagonal of the official head box"
            truth = np.concatenate([heads[2], heads[1][..., None] * 2], 2)
        counted = [j for j in range(len(joints)) if joints[j] not in ("pelvis", "thorax")]  # [MPII]
        share, _, left_out = pck(xy[:, counted], truth[:, counted], head, 0.5)
        if not np.isnan(share):
            flat["PCKh@.5"] = share
            full |= {"PCKh@.5": share, "head_size": source, "people_without_head": left_out}
            full["PCKh@.5_per_joint"] = per_joint(pck(xy, truth, head, 0.5)[1])
    return flat, full
