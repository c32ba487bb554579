"""Official files of COCO, MPII, AI Challenger, CrowdPose and OCHuman are read, tuned on and
evaluated; names and ids of any kind change no figure.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pose_runs import DATA, QUICK, mpii_list, mpii_mat, needs_data, people_file, run, sets

from formats import keypoints as readers
from formats.coco import Limits
from formats.joints import COCO_JOINTS
from plumbing.errors import UserError
from tasks import pose_metrics as metrics

pytestmark = pytest.mark.usefixtures("small_pose")


FORMATS = {
    "coco": ("coco/test_coco.json", 17, None),
    "coco_boxes": ("coco/test_coco.json", 17, "coco/test_coco_det_AP_H_56.json"),
    "mpii": ("mpii/test_mpii.json", 16, None),
    "aic": ("aic/test_aic.json", 14, None),
    "crowdpose": ("crowdpose/test_crowdpose.json", 14, None),
    "crowdpose_boxes": (
        "crowdpose/test_crowdpose.json",
        14,
        "crowdpose/test_crowdpose_det_AP_40.json",
    ),
    "ochuman": ("ochuman/test_ochuman.json", 17, None),
}


@needs_data
@pytest.mark.parametrize("name", FORMATS)
def test_official_formats_are_read_tuned_on_and_evaluated(name, tmp_path, monkeypatch):
    path, n_joints, boxes = FORMATS[name]
    path = f"{DATA}/formats/{path}"
    extra = [f"boxes={DATA}/formats/{boxes}"] if boxes else []
    if name == "mpii":
        mpii_mat(tmp_path / "gt.mat", 5)
        extra = [f"mpii_mat={tmp_path}/gt.mat"]
    run(*sets(path, path), *QUICK, "batch=2", "limit=4", *extra, f"out={tmp_path}/run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert 0 <= metrics["AP"] <= 1 and len(results[0]["keypoints"]) == 3 * n_joints
    assert ("our sigmas" in metrics["oks_sigmas"]) == (name == "mpii")
    assert ("PCK@.2" in metrics) == (boxes is None) and ("PCKh@.5" in metrics) == (name == "mpii")


@needs_data
def test_true_poses_score_one_on_official_files():
    """Annotated joints handed in as results: AP 1, crowds and people without joints included."""
    for path in (
        "formats/coco/test_coco.json",
        "formats/crowdpose/test_crowdpose.json",
        "lspet/val.json",
    ):
        people, _, document = readers.read_truth(f"{DATA}/{path}")
        rows = [
            {"image_id": int(i), "category_id": 1, "score": 0.9, "keypoints": k.flatten().tolist()}
            for i, k in zip(people.image_id, people.keypoints)
        ]
        figures = metrics.coco_metrics(document, rows, metrics.oks_sigmas(people.joints)[0])
        assert np.isclose(figures["AP"], 1) and np.isclose(figures["AR"], 1), path


@needs_data
def test_mpii_boxes_and_joints_follow_the_published_rule():
    people, _, document = readers.read_truth(f"{DATA}/formats/mpii/test_mpii.json")
    row = json.loads(Path(f"{DATA}/formats/mpii/test_mpii.json").read_text())[0]
    side, (x, y) = 200 * row["scale"], row["center"]
    expected = [x - 1 - side / 2, y + 15 * row["scale"] - 1 - side / 2, side, side]
    assert np.allclose(people.boxes[0], expected, rtol=1e-5)
    assert people.keypoints[0, 0].tolist() == [803, 710, 2]
    assert people.size[0].tolist() == list(Image.open(f"{DATA}/formats/mpii/{row['image']}").size)
    assert len(document["images"]) == len({r.decode() for r in people.files})


def test_picture_names_of_any_language(tmp_path):
    people, _, document = readers.read_truth(mpii_list(tmp_path))
    assert document["images"][0]["file_name"] == "Zoë.png" and people.files[0].decode() == "Zoë.png"
    people, images = readers.read_own(tmp_path, COCO_JOINTS, [], Limits())
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"file_name": "Zoë.png", "bbox": [1, 2, 30, 40]}])
    )
    people, _, _ = readers.read_boxes(tmp_path / "boxes.json", images, people, Limits())
    assert people.files[0].decode() == "Zoë.png" and people.size.tolist() == [[80, 120]]


def test_a_picture_folder_of_mpii_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere/.* is missing, named by"):
        readers.read_truth(mpii_list(tmp_path), f"{tmp_path}/nowhere")


def test_ids_as_text_and_rows_of_other_categories_change_no_figure(dots, tmp_path):
    def figures(path):
        people, _, document = readers.read_truth(path, f"{dots[0].parent}/images")
        found = people.keypoints + np.array([3, 0, 0], np.float32)
        rows = zip(people.image_id.tolist(), found.reshape(len(found), -1).tolist())
        results = [{"image_id": i, "category_id": 1, "keypoints": k, "score": 1.0} for i, k in rows]
        return metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0])

    document = json.loads(dots[1].read_text())
    for entry in document["images"] + document["annotations"]:
        entry.update({key: str(entry[key]) for key in ("id", "image_id") if key in entry})
    document["annotations"].append(
        {"id": 99, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9]}
    )
    document["annotations"][0].pop("category_id")
    (tmp_path / "text.json").write_text(json.dumps(document))
    assert 0 < figures(dots[1])["AP"] < 1 and figures(tmp_path / "text.json") == figures(dots[1])


def test_truth_given_as_scores_counts_the_same_joints_everywhere(tmp_path):
    path = people_file(tmp_path, 3)
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        row["keypoints"][2::3] = [0.05, 0.9] * 8 + [0.2]
    path.write_text(json.dumps(document))
    people, _, document = readers.read_truth(path)
    assert people.keypoints[:, :, 2].tolist() == [[0, 2] * 8 + [2]] * 3
    for row in document["annotations"]:
        assert row["keypoints"][2::3] == [0, 2] * 8 + [2] and row["num_keypoints"] == 9
