"""CrowdPose: who is counted, areas and levels of crowding, against xtcocotools."""

import json
import math

import numpy as np
import pytest
from pose_runs import people_file

from formats import keypoints as readers
from plumbing.errors import UserError
from tasks import pose_metrics as metrics


def crowd_file(folder, levels=(0.1, 0.15, 0.2, 0.79, 0.8, 1.0), change=None):
    """One person a picture. Areas are nonsense, which CrowdPose's evaluator never reads."""
    path = people_file(folder, len(levels), 6, "crowd.json", readers.CROWDPOSE_JOINTS)
    document = json.loads(path.read_text())
    for image, level in zip(document["images"], levels):
        image["crowdIndex"] = level
    for a in document["annotations"]:
        a["area"] = 1.0
    if change:
        change(document)
    path.write_text(json.dumps(document))
    return path


def crowd_figures(path, move=0.0):
    """Metrics of the annotated joints moved by `move` · √(.53 · box area)."""
    people, notes, document = readers.read_truth(path)
    results = []
    for i, box, keypoints in zip(people.image_id.tolist(), people.boxes, people.keypoints):
        shift = move * math.sqrt(0.53 * box[2] * box[3])
        rows = (keypoints + [shift, 0, 0]).flatten().tolist()
        results.append({"image_id": i, "category_id": 1, "keypoints": rows, "score": 0.5})
    return (
        metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0]),
        people,
        notes,
    )


def test_crowdpose_counts_whom_the_file_counts(tmp_path):
    """Head and neck are not counted in num_keypoints: who has no other joint is not looked for."""

    def change(document):
        for a in document["annotations"][:2]:
            visible = np.reshape(a["keypoints"], (14, 3))
            visible[:12] = 0
            visible[12:, 2] = 2
            a.update(keypoints=visible.flatten().tolist(), num_keypoints=0)

    figures, people, _ = crowd_figures(crowd_file(tmp_path, change=change))
    assert len(people.files) == 4 and figures["AP"] > 0.999 and figures["AR"] > 0.999


def test_crowdposes_area_is_half_the_box_whatever_the_file_says(tmp_path):
    """OKS of a shift by m·√area: the mean over joints of exp(−m² / 2(2σ)²)."""
    figures, people, _ = crowd_figures(crowd_file(tmp_path), move=0.06)
    sigmas, _ = metrics.oks_sigmas(people.joints)
    each = np.exp(-(0.06**2) / (2 * (2 * sigmas) ** 2))
    oks = [each[k[:, 2] > 0].mean() for k in people.keypoints]
    right = (np.array(oks)[:, None] >= np.arange(0.5, 1, 0.05)).mean(0)
    assert figures["AR"] == pytest.approx(right.mean(), abs=1e-6) and 0.5 < figures["AR"] < 1
    assert figures["AP_medium"] is not None  # 1 px² would be too small for it


def test_ap_of_easy_medium_and_hard_pictures(tmp_path):
    """The bounds .2 and .8 of CrowdPose's evaluator; each level has two pictures here."""
    path = crowd_file(tmp_path)
    people, _, document = readers.read_truth(path)
    far = {3: 0.0, 5: 900.0, 6: 900.0}  # medium: one of two is found; hard: none is
    results = [{"image_id": i, "category_id": 1, "score": 0.5} for i in people.image_id.tolist()]
    for row, keypoints in zip(results, people.keypoints):
        row["keypoints"] = (keypoints + [far.get(row["image_id"], 0), 0, 0]).flatten().tolist()
    results = [row for row in results if row["image_id"] != 4]
    figures = metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0])
    assert figures["AP_crowd_easy"] > 0.999 and figures["AP_crowd_hard"] == 0
    assert figures["AP_crowd_medium"] == pytest.approx(51 / 101)  # precision 1 up to recall .5
    easy = metrics.coco_metrics(
        document, results, metrics.oks_sigmas(people.joints)[0], {3, 4, 5, 6}
    )
    assert easy["AP_crowd_hard"] is None and easy["AP"] > 0.999


def test_crowd_figures_equal_xtcocotools(tmp_path):
    """These nine figures are what xtcocotools 1.14.3 (keypoints_crowd) says of this same file."""
    rng = np.random.default_rng(0)
    path = crowd_file(tmp_path, np.linspace(0, 1, 24).round(3).tolist())
    people, _, document = readers.read_truth(path)
    noise = rng.normal(0, 6, (24, 14, 3)) * [1, 1, 0]
    rows = (people.keypoints + noise).reshape(24, -1).tolist()
    results = [
        {"image_id": int(i), "category_id": 1, "keypoints": row, "score": float(rng.random())}
        for i, row in zip(people.image_id, rows)
    ]
    ours = metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0])
    names = "AP AP50 AP75 AR AR50 AR75 AP_crowd_easy AP_crowd_medium AP_crowd_hard".split()
    theirs = [0.434689, 1, 0.25165, 0.5125, 1, 0.416667, 0.4486, 0.4392, 0.527]
    assert [ours[name] for name in names] == pytest.approx(theirs, abs=1e-4)


def test_pictures_listed_with_their_sides_swapped_keep_their_own(tmp_path):
    """As in CrowdPose's old lists of train and test. A picture of another size stays an error."""

    def swap(document):
        for image in document["images"]:
            image["width"], image["height"] = image["height"], image["width"]

    figures, people, notes = crowd_figures(crowd_file(tmp_path, change=swap))
    plain = readers.read_pose_file(crowd_file(tmp_path / "plain"))[0]
    assert np.array_equal(people.size, plain.size) and np.array_equal(people.boxes, plain.boxes)
    assert notes["turned"] == 6 and "swapped: 6" in readers.said(notes) and figures["AP"] > 0.999
    path = crowd_file(tmp_path, change=lambda d: d["images"][2].update(width=999))
    with pytest.raises(UserError, match=r"6_3.png is .* but its annotation says"):
        readers.read_pose_file(path)
