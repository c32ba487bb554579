"""Top-down 2-D pose, the numbers: regions and warps (UDP), heat maps, DARK decoding, OKS, PCK.

Legend: B pictures on this rank · N people · K joints · H, W input picture · h, w heat map · xy in px.
Frame: pixel centres at whole numbers (COCO's frame). UDP [UDP-Pose] measures in intervals between centres: a region of
w px lands on the W − 1 intervals of the input, and the input's W − 1 intervals on the heat map's w − 1, so that a
mirrored heat map fits the straight one without a shift.
"""

import contextlib
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import COCO_JOINTS

# ------------------------------------------------------------------------------------------------ regions and warps


def regions(boxes, aspect, padding=1.25):
    """Boxes (N, 4) x y w h px → centre (N, 2) and extent (N, 2): widened to w/h = aspect, × padding [HRNet]."""
    boxes = np.asarray(boxes, np.float64)
    centre, extent = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
    width = np.maximum(extent[:, 0], extent[:, 1] * aspect)
    return centre, np.stack([width, width / aspect], 1) * padding


def affine(centre, extent, size, degrees=0.0, mirror=False):
    """(2, 3) matrix: input px → picture px. The region, turned by `degrees`, fills the input of `size` (H, W)."""
    H, W = size
    sx, sy = extent[0] / (W - 1), extent[1] / (H - 1)  # UDP: intervals, not pixels
    sx = -sx if mirror else sx
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.array([[c * sx, -s * sy], [s * sx, c * sy]])
    return np.concatenate([linear, (np.asarray(centre) - linear @ [(W - 1) / 2, (H - 1) / 2])[:, None]], 1)


def to_picture(matrix, xy):
    """Input px (..., 2) → picture px."""
    return xy @ matrix[:, :2].T + matrix[:, 2]


def to_input(matrix, xy):
    """Picture px (..., 2) → input px."""
    return (xy - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def warp(picture, matrix, size):
    """The input (H, W, 3) uint8 that `matrix` cuts from a PIL picture; bilinear, black outside.

    deviates from [HRNet]: a picture more than twice too large is first shrunk by a whole factor, which avoids aliasing.
    """
    H, W = size
    linear, shift = matrix[:, :2], matrix[:, 2].copy()
    factor = int(np.linalg.norm(linear, axis=0).min())
    if factor >= 2:
        corners = to_picture(matrix, np.array([[0, 0], [W, 0], [0, H], [W, H]], float) - 0.5)
        low = np.clip(np.floor(corners.min(0)) - factor, 0, picture.size).astype(int)
        high = np.clip(np.ceil(corners.max(0)) + factor, 0, picture.size).astype(int)
        if (high - low >= factor).all():
            picture = picture.reduce(factor, box=(*low, *high))
            linear, shift = linear / factor, (shift - low - (factor - 1) / 2) / factor
    shift = shift + 0.5 - linear.sum(1) / 2  # Pillow counts from pixel edges
    data = (*linear[0], shift[0], *linear[1], shift[1])
    return np.array(picture.transform((W, H), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))


UPPER_HALF = 0.6915  # P(N(0, 1) < .5) [HRNet]
LOWER_BODY = ("hip", "knee", "ankle", "pelvis")  # by name, so that any joint set has two halves; as [HRNet] for COCO


def lower_body(joints):
    return np.array([any(part in name for part in LOWER_BODY) for name in joints])


def half_body(keypoints, lower, aspect, rng):
    """Region of the upper or lower half [HRNet]: (centre, extent), or None with ≤ 8 visible joints or a half of ≤ 2.

    keypoints (K, 3) px; lower (K,) bool; rng: `random`. The half's joints' bounding box, × 1.5, widened to the aspect.
    The upper half comes with probability .69: HRNet and ViTPose ask if a normal number is below .5.
    """
    seen = keypoints[:, 2] > 0
    if seen.sum() <= 8:
        return None
    halves = [keypoints[seen & ~lower, :2], keypoints[seen & lower, :2]]
    first = 0 if rng.random() < UPPER_HALF else 1
    xy = halves[first] if len(halves[first]) > 2 else halves[1 - first]
    extent = np.ptp(xy, axis=0) if len(xy) > 2 else np.zeros(2)
    if extent.min() <= 0:
        return None
    width = max(extent[0], extent[1] * aspect) * 1.5
    return xy.mean(0).astype(np.float64), np.array([width, width / aspect])


# -------------------------------------------------------------------------------------------- heat maps and decoding


def heat_maps(keypoints, size, map_size, sigma=2.0):
    """UDP targets: keypoints (B, K, 3) input px + visibility → maps (B, K, h, w) with peak 1, weight (B, K) 0 or 1.

    The Gaussian's centre is not rounded. A joint is weighted 0 if missing or if its 3σ square misses the map [HRNet].
    deviates from [HRNet]: Gaussians are not cut off at 3σ (there they are 0.011).
    """
    (H, W), (h, w) = size, map_size
    mu_x = keypoints[..., 0] * ((w - 1) / (W - 1))  # heat-map px
    mu_y = keypoints[..., 1] * ((h - 1) / (H - 1))
    inside = (mu_x > -3 * sigma) & (mu_x < w - 1 + 3 * sigma)
    inside &= (mu_y > -3 * sigma) & (mu_y < h - 1 + 3 * sigma)
    x, y = (torch.arange(n, device=mu_x.device, dtype=mu_x.dtype) for n in (w, h))
    # g(x, y) = exp(−((x − μx)² + (y − μy)²) / 2σ²), the product of a row and a column
    gx = torch.exp(-((x - mu_x.unsqueeze(2)) ** 2) / (2 * sigma**2))
    gy = torch.exp(-((y - mu_y.unsqueeze(2)) ** 2) / (2 * sigma**2))
    return gy.unsqueeze(3) * gx.unsqueeze(2), ((keypoints[..., 2] > 0) & inside).to(mu_x.dtype)


def heat_map_loss(pred, target, weight):
    """L = 1/(B·K·h·w) Σ (v_k (pred − target))²: missing joints count as zero error [ViTPose]. float32 or wider."""
    pred = pred.float() if pred.dtype != torch.float64 else pred
    return ((pred - target).square().mean((2, 3)) * weight.square()).mean()


def decode(heat, size, blur=11):
    """UDP-DARK: heat maps (B, K, h, w) → (B, K, 3) float32 x, y in input px and the peak's height.

    Newton step on the blurred map's logarithm from its highest pixel: μ = m − H⁻¹ ∇ [DARK]; blur 11 px, σ 2 [ViTPose].
    deviates from [ViTPose]: zeros beyond the border, not a mirror image, which pulls joints near it by up to 2 px.
    """
    heat = heat.float()
    (B, K, h, w), (H, W) = heat.shape, size
    score, place = heat.flatten(2).max(2)
    x, y = place % w, place // w
    offsets = torch.arange(blur, device=heat.device) - blur // 2
    kernel = torch.exp(-(offsets**2) / (2 * (0.3 * ((blur - 1) * 0.5 - 1) + 0.8) ** 2))  # σ as OpenCV derives it
    kernel = (kernel / kernel.sum()).view(1, 1, 1, blur)
    smooth = F.conv2d(heat.reshape(B * K, 1, h, w), kernel, padding=(0, blur // 2))
    smooth = F.conv2d(smooth, kernel.transpose(2, 3), padding=(blur // 2, 0))
    # 1e-3 and 50 [DARK]; the border is repeated once for the derivatives there
    log = F.pad(smooth.clamp(1e-3, 50).log(), [1] * 4, mode="replicate").view(B, K, -1)

    def at(dx, dy):
        return log.gather(2, ((y + 1 + dy) * (w + 2) + x + 1 + dx).unsqueeze(2)).squeeze(2)

    m = at(0, 0)
    gx, gy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    gxx, gyy = at(1, 0) - 2 * m + at(-1, 0), at(0, 1) - 2 * m + at(0, -1)
    gxy = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * m - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    det = gxx * gyy - gxy * gxy
    # A flat or saddle-shaped map has no peak to step to: stay on the pixel. Ours: never step further than 2 px.
    peak = (det > 1e-9) & (gxx < 0)
    det = torch.where(peak, det, 1.0)
    step_x = torch.where(peak, (gyy * gx - gxy * gy) / det, 0.0).clamp(-2, 2)
    step_y = torch.where(peak, (gxx * gy - gxy * gx) / det, 0.0).clamp(-2, 2)
    return torch.stack([(x - step_x) * (W - 1) / (w - 1), (y - step_y) * (H - 1) / (h - 1), score], 2)


# -------------------------------------------------------------------------------------------------------------- OKS

COCO_SIGMAS = dict(
    zip(COCO_JOINTS, [0.026] + [0.025] * 2 + [0.035] * 2 + [0.079] * 2 + [0.072] * 2 + [0.062] * 2 + [0.107] * 2
        + [0.087] * 2 + [0.089] * 2)
)  # fmt: skip
PUBLISHED_SIGMAS = {  # joint names in the file's order → (source, σ per joint)
    tuple(COCO_JOINTS): ("COCO's", list(COCO_SIGMAS.values())),
    tuple(
        "left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip right_hip left_knee "
        "right_knee left_ankle right_ankle head neck".split()
    ): (
        "CrowdPose's",
        [0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089, 0.079, 0.079],
    ),
    tuple(
        "right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip right_knee right_ankle "
        "left_hip left_knee left_ankle head_top neck".split()
    ): (
        "AIC's",
        [0.01388152, 0.01515228, 0.01057665, 0.01417709, 0.01497891, 0.01402144, 0.03909642, 0.03686941]
        + [0.01981803, 0.03843971, 0.03412318, 0.02415081, 0.01291456, 0.01236173],
    ),
}  # fmt: skip
BOX_AREA = 0.53  # person area ÷ box area where an annotation has none [CrowdPose's evaluator]
# Easy, medium and hard pictures by their crowdIndex, as CrowdPose's evaluator divides them. (Its
# paper writes that easy ones end at .1; published figures come from the evaluator.)
CROWD_LEVELS = {"easy": (-math.inf, 0.2), "medium": (0.2, 0.8), "hard": (0.8, math.inf)}


def oks_sigmas(joints):
    """Joint names → (σ (K,), where they come from). Sets without published σ: ours, by name from COCO's.

    Ours: joints COCO lacks get its shoulder's .079 (head, neck, thorax), the pelvis the hip's .107.
    """
    if tuple(joints) in PUBLISHED_SIGMAS:
        source, sigmas = PUBLISHED_SIGMAS[tuple(joints)]
        return np.array(sigmas), f"{source} published sigmas"
    sigmas = [COCO_SIGMAS.get(name, 0.107 if name == "pelvis" else 0.079) for name in joints]
    return np.array(sigmas), "our sigmas (this joint set has no published ones; not comparable with other work)"


def area_from_box(joints):
    """Is a person's area .53 × box, whatever the file says? [CrowdPose's evaluator; mmpose: AIC]"""
    return PUBLISHED_SIGMAS.get(tuple(joints), ("", []))[0] in ("CrowdPose's", "AIC's")


def oks(xy, truth, area, sigmas):
    """Object keypoint similarity of poses xy (..., K, 2) with truth (..., K, 3) of area (...); NaN without joints."""
    seen = truth[..., 2] > 0
    # OKS = Σ_k [v_k] exp(−d_k² / (2 s² (2σ_k)²)) / Σ_k [v_k],  s² = area
    square = ((xy - truth[..., :2]) ** 2).sum(-1)
    e = square / (np.asarray(area)[..., None] + np.spacing(1)) / (2 * (2 * np.asarray(sigmas)) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.exp(-e) * seen).sum(-1) / seen.sum(-1)


def oks_nms(poses, scores, areas, sigmas, threshold=0.9):
    """Ids of the kept poses (N, K, 2) of one picture, best first: a pose closer than .9 to a kept one goes [HRNet].

    Every joint counts; the area of a pair is the mean of their regions' areas.
    """
    order, keep = np.argsort(-np.asarray(scores), kind="stable"), []
    while len(order):
        best, order = order[0], order[1:]
        keep.append(int(best))
        truth = np.concatenate([poses[best], np.ones((poses.shape[1], 1))], 1)
        pair = (areas[best] + areas[order]) / 2
        order = order[oks(poses[order], np.broadcast_to(truth, (len(order), *truth.shape)), pair, sigmas) <= threshold]
    return keep


def without_duplicates(people, found, score, aspect, padding, threshold):
    """Ids that OKS-NMS keeps of poses (N, K, 3), picture by picture. Area: that of the padded region [HRNet]."""
    area, keep = regions(people.boxes, aspect, padding)[1].prod(1), []
    for image in np.unique(people.image_id):
        rows = np.flatnonzero(people.image_id == image)
        xy = found[rows, :, :2].astype(np.float64)
        keep.append(rows[oks_nms(xy, score[rows], area[rows], oks_sigmas(people.joints)[0], threshold)])
    return np.concatenate(keep)


def nearest_poses(truth, image_id, found, sigmas):
    """Of each annotated person (truth: People) the most similar of the poses found (N, K, 3) in picture image_id (N,).

    → (the poses (T, K, 3), their OKS (T,)); zeros where a picture has none.
    """
    best, similar = np.zeros_like(truth.keypoints), np.zeros(len(truth.files))
    for i, image in enumerate(truth.image_id):
        rows = np.flatnonzero(image_id == image)
        if len(rows):
            goal = np.broadcast_to(truth.keypoints[i], (len(rows), *truth.keypoints[i].shape))
            near = oks(found[rows][..., :2], goal, np.full(len(rows), truth.area[i]), sigmas)
            best[i], similar[i] = found[rows[near.argmax()]], near.max()
    return best, similar


def pose_score(box_score, joint_scores, floor=0.2):
    """Box score × mean of the joint scores above .2 (0 if there is none) [HRNet]. joint_scores (N, K)."""
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
    truth.dataset = document

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


# -------------------------------------------------------------------------------------------------------------- PCK


def pck(xy, truth, reference, threshold):
    """Share of labelled joints within threshold · reference px of the truth.

    xy (N, K, 2), truth (N, K, 3), reference (N,) px; people whose reference is not > 0 are left out.
    → (pooled over all joints, per joint (K,) with NaN where none is labelled, people left out).
    """
    usable = np.asarray(reference) > 0
    seen = (truth[..., 2] > 0) & usable[:, None]
    near = np.linalg.norm(xy - truth[..., :2], axis=-1) <= threshold * np.asarray(reference)[:, None]
    count = seen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((near & seen).sum() / count.sum()), (near & seen).sum(0) / count, int((~usable).sum())


def torso_size(truth, joints):
    """(N,) px, left shoulder to right hip [MODEC], or the other diagonal where one end is missing; NaN without both."""
    size = np.full(len(truth), np.nan)
    for pair in (("right_shoulder", "left_hip"), ("left_shoulder", "right_hip")):  # the last one counts
        if set(pair) <= set(joints):
            a, b = (truth[:, joints.index(name)] for name in pair)
            both = (a[:, 2] > 0) & (b[:, 2] > 0)
            size[both] = np.linalg.norm(a[both, :2] - b[both, :2], axis=1)
    return size


def head_size(truth, joints):
    """(N,) px from head_top to upper_neck, NaN where one is missing: stands in for MPII's head box (ours)."""
    a, b = (truth[:, joints.index(name)] for name in ("head_top", "upper_neck"))
    return np.where((a[:, 2] > 0) & (b[:, 2] > 0), np.linalg.norm(a[:, :2] - b[:, :2], axis=1), np.nan)


def pck_metrics(xy, truth, joints, heads=None):
    """PCK@.2 of the torso and, for MPII's joints, PCKh@.5: xy (N, K, 2), truth (N, K, 3) px → (figures, full account).

    heads: MPII's official (head size (N,) px, labelled (N, K), joints (N, K, 2) px), which alone
    decide about PCKh then, or None: head size and joints of the list.
    Figures that no labelled joint of a person with such a reference counts for are left out.
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
        head, source = head_size(truth, joints), "head_top to upper_neck (ours: no official .mat given)"
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
