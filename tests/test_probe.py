"""tasks/probe.py against plain loops, pycocotools and known answers; the score that
pre-training logs, and experiments/probe.py from its command line.
"""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_sets import write_set
from conftest import ROOT, kill_after, run_script
from PIL import Image
from pycocotools.cocoeval import COCOeval

import common
from drawing.curves import curves_figure
from formats.coco import read_people
from formats.joints import COCO_JOINTS, flip_ids
from formats.weights import meta_of
from model import ViT, load_encoder
from plumbing.errors import UserError
from plumbing.files import save_weights
from tasks import probe
from tasks.pose_metrics import oks_sigmas

sys.path.append(str(ROOT / "experiments"))
SIGMAS = oks_sigmas(COCO_JOINTS)[0]
SMALL = "size=tiny height=64 width=32 patch=8 pictures_per_pose=3 batch=12 warmup_epochs=0.5"
SMALL = [*SMALL.split(), "device=cpu", "workers=0", "epochs=3", "save_every=2"]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """12 people of 4 poses, each with a box of its own and some joints missing."""
    path = write_set(tmp_path_factory.mktemp("people"), n_poses=4, size=(60, 80))
    document, rng = json.loads(path.read_text()), np.random.default_rng(5)
    for row in document["annotations"]:
        corner, sides = rng.uniform(0, 20, 2), rng.uniform(20, 40, 2)
        row["bbox"] = [*corner, *sides]
        points = np.array(row["keypoints"]).reshape(17, 3)
        points[:, :2] = corner + rng.random((17, 2)) * sides
        points[rng.random(17) < 0.2, 2] = 0
        row["keypoints"] = points.ravel().tolist()
    path.write_text(json.dumps(document))
    return read_people(path)[0]


def test_likeness_is_the_plain_loops(people):
    poses = probe.box_poses(people)
    oks, pck = probe.likeness(poses, poses, people.boxes, SIGMAS)
    for i in range(12):
        (x, y, w, h), side = people.boxes[i].astype(float), max(people.boxes[i][2:])
        for j in range(12):
            (u, v, p, q), other = people.boxes[j].astype(float), max(people.boxes[j][2:])
            similar, right, seen = 0.0, 0, 0
            for k in range(17):
                if people.keypoints[i, k, 2] == 0:
                    continue
                seen += 1
                if people.keypoints[j, k, 2] == 0:
                    continue
                a = (people.keypoints[i, k, :2] - (x + w / 2, y + h / 2)) / side
                b = (people.keypoints[j, k, :2] - (u + p / 2, v + q / 2)) / other
                d = np.hypot(*(a - b))
                area = 0.53 * (w / side) * (h / side)
                similar += np.exp(-(d**2) / (2 * area * (2 * SIGMAS[k]) ** 2))
                right += d <= 0.1
            assert oks[i, j] == pytest.approx(similar / seen, abs=1e-6)
            assert pck[i, j] == pytest.approx(right / seen, abs=1e-6)


def test_likeness_is_pycocotools_oks(people):
    """The found pose laid into the truth's box, where nobody lacks a joint."""
    full = people.keypoints.astype(float).copy()
    full[..., 2] = 2
    people = people._replace(keypoints=full)
    poses = probe.box_poses(people)
    ours = probe.likeness(poses, poses, people.boxes, SIGMAS)[0]
    for i in range(3):
        box, longer = people.boxes[i].astype(float), people.boxes[i, 2:].max()
        truth = dict(id=1, image_id=1, category_id=1, bbox=box.tolist(), iscrowd=0, ignore=0)
        truth |= dict(num_keypoints=17, keypoints=full[i].ravel().tolist())
        truth |= dict(area=0.53 * float(box[2] * box[3]))
        evaluation = COCOeval(iouType="keypoints")
        found = []
        for j in range(12):
            xy = poses[j, :, :2] * longer + box[:2] + box[2:] / 2
            points = np.concatenate([xy, np.full((17, 1), 2)], 1).ravel().tolist()
            found.append(dict(truth, keypoints=points, score=1.0 - j / 100))
        evaluation._gts[1, 1], evaluation._dts[1, 1] = [truth], found
        assert np.allclose(evaluation.computeOks(1, 1)[:, 0], ours[i], atol=1e-5)


def test_retrieval_of_an_encoder_that_holds_the_pose_is_the_best_possible():
    rng = np.random.default_rng(0)
    joints = np.repeat(rng.random((20, 34)), 2, 0)  # every pose twice
    feature = joints / np.linalg.norm(joints, axis=1, keepdims=True)
    poses = np.concatenate([joints.reshape(40, 17, 2), np.ones((40, 17, 1))], 2)
    boxes = np.tile([0, 0, 1.0, 1.0], (40, 1))
    allowed = ~np.eye(40, dtype=bool)
    values = probe.likeness(poses, poses, boxes, SIGMAS)[0]
    chance, best = probe.bounds(allowed, values)
    noise = rng.normal(size=(40, 34))
    found = probe.retrieved({"joints": feature, "noise": noise}, allowed, values)
    assert best == pytest.approx(1) and found["joints"] == pytest.approx(1)
    assert chance < 0.5 and abs(found["noise"] - chance) < 0.1
    # By loops, with a stranger's rule that forbids more: the twin is not allowed.
    allowed = np.arange(40)[:, None] // 2 != np.arange(40) // 2
    near, mean, top = [], [], []
    for i in range(40):
        others = [j for j in range(40) if j // 2 != i // 2]
        near.append(values[i, max(others, key=lambda j: feature[i] @ feature[j])])
        mean.append(np.mean([values[i, j] for j in others]))
        top.append(max(values[i, j] for j in others))
    found = probe.retrieved({"joints": feature}, allowed, values)["joints"]
    assert found == pytest.approx(np.mean(near)) and found < 0.9
    assert probe.bounds(allowed, values) == pytest.approx((np.mean(mean), np.mean(top)))


def test_who_is_another_person(people):
    names = [b"0002_c1s1_0.jpg", b"query/0002_c2s1_0.jpg", b"0003_c1s1_0.jpg", b"a.jpg"]
    four = people.take([0, 1, 2, 3])._replace(files=np.array(names))
    four = four._replace(image_id=np.array([1, 2, 3, 3]))
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert probe.strangers(four).astype(int).tolist() == expected


def test_a_mirrored_pose_has_its_sides_swapped():
    pose = np.zeros((1, 17, 3))
    pose[0, COCO_JOINTS.index("left_wrist")] = (0.3, 0.1, 2)
    turned = probe.mirrored(pose, flip_ids(COCO_JOINTS))
    assert turned[0, COCO_JOINTS.index("right_wrist")].tolist() == [-0.3, 0.1, 2]
    assert (turned[0, COCO_JOINTS.index("left_wrist")] == 0).all()


def test_inputs_show_the_joints_where_they_say(tmp_path):
    path = write_set(tmp_path, n_poses=2, size=(90, 120))
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        row["bbox"] = [20, 10, 40, 90]
        row["keypoints"] = [40.0, 50.0, 2] + [0] * 48
        picture = np.zeros((120, 90, 3), np.uint8)
        picture[50, 40] = 255
        Image.fromarray(picture).save(tmp_path / "images" / f"{row['image_id']:03d}.png")
    for image in document["images"]:
        image["file_name"] = f"{image['id']:03d}.png"
    path.write_text(json.dumps(document))
    images, keypoints, scale = probe.pictures_of(read_people(path)[0], (64, 32))
    bright = images[0].float().sum(0)
    y, x = divmod(int(bright.argmax()), 32)
    assert np.abs(keypoints[0, 0, :2] - (x, y)).max() <= 1
    assert scale[0] == pytest.approx((32 / 50, 64 / 111))  # 1.25 × box, cut to the picture


def test_ridge_finds_joints_and_learns_nothing_from_a_groups_own_pictures():
    rng = np.random.default_rng(0)
    xy = np.repeat(rng.normal(size=(40, 10)), 3, 0)
    poses = np.concatenate([xy.reshape(120, 5, 2), np.ones((120, 5, 1))], 2)
    poses[rng.random((120, 5)) < 0.05, 2] = 0
    groups = np.repeat(np.arange(40), 3)
    feature = xy @ rng.normal(size=(10, 20)) + 0.01 * rng.normal(size=(120, 20))
    found, middle = probe.ridge_joints(feature, poses, groups)
    seen = poses[..., 2] > 0
    errors = [np.abs(x - poses[..., :2])[seen].mean() for x in (found, middle)]
    assert errors[0] < 0.3 * errors[1]
    # A feature that only names the group: known groups could be looked up, new ones cannot.
    named, _ = probe.ridge_joints(np.eye(40)[groups], poses, groups)
    assert np.abs(named - poses[..., :2])[seen].mean() > 0.95 * errors[1]


def test_logistic_attributes():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 4)) < (0.5, 0.1, 0.5, 0.0)).astype(np.int8)
    feature = np.concatenate([labels[:, :2] * 2.0 - 1, np.zeros((300, 6))], 1)
    feature += 0.1 * rng.normal(size=feature.shape)
    found = probe.logistic_attributes(feature[:200], labels[:200], feature[200:])
    right = (found > 0.5) == labels[200:]
    assert right[:, :2].all() and right[:, 3].all()  # the rare one too, and the one never seen
    assert 0.3 < right[:, 2].mean() < 0.7  # nothing tells it


def test_correspondence_is_the_plain_loops():
    """Patches that say which joint is under them find it; what is left is the patch's size."""
    rng, h, w, p = np.random.default_rng(1), 8, 4, 8
    keypoints = np.concatenate(
        [rng.random((6, 5, 2)) * (w * p + 6, h * p) - 3, np.ones((6, 5, 1))], 2
    )
    keypoints[0, 0, 2] = 0
    patches = rng.normal(size=(6, h, w, 40)) * 0.01
    for n in range(6):
        for k in range(5):
            x, y = (int((v + 0.5) // p) for v in keypoints[n, k, :2])
            if 0 <= x < w and 0 <= y < h:
                patches[n, y, x, k] = 1
    patches /= np.linalg.norm(patches, axis=3, keepdims=True)
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    reach = np.tile([6.0, 7.0], (6, 1))
    found = probe.correspondence(patches, keypoints, pairs, reach, p)
    total, counts = 0, dict(patches=0, same_place=0, chance=0, best=0)
    for a, b in pairs:
        for k in range(5):
            inside = [
                keypoints[n, k, 2] > 0 and -0.5 <= keypoints[n, k, 0] < w * p - 0.5
                and -0.5 <= keypoints[n, k, 1] < h * p - 0.5 for n in (a, b)
            ]  # fmt: skip
            if not all(inside):
                continue
            total += 1
            cells = [(r, c) for r in range(h) for c in range(w)]
            near = {}
            for r, c in cells:
                dx, dy = (np.array([c, r]) + 0.5) * p - 0.5 - keypoints[b, k, :2]
                near[r, c] = (dx / 6) ** 2 + (dy / 7) ** 2 <= 1
            c, r = (int((v + 0.5) // p) for v in keypoints[a, k, :2])
            answer = max(cells, key=lambda cell: patches[a, r, c] @ patches[b][cell])
            counts["patches"] += near[answer]
            counts["same_place"] += near[r, c]
            counts["chance"] += sum(near.values()) / len(cells)
            counts["best"] += any(near.values())
    assert found == pytest.approx({name: n / total for name, n in counts.items()})
    assert found["patches"] > 2 * found["same_place"] and found["best"] > found["patches"] - 1e-9


# ------------------------------------------------------------------------- pre-training's own score


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same 9 steps without and with a score every 4 steps."""
    root = tmp_path_factory.mktemp("runs")
    trained, held = write_set(root / "a", n_poses=12), write_set(root / "b", n_poses=5, seed=1)
    command = [f"annotations={trained}", *SMALL]
    scored = [*command, f"score_annotations={held}", "score_every=4"]
    for name, words in (("plain", command), ("scored", scored)):
        done = run_script("pretrain.py", *words, f"out={root / name}")
        assert done.returncode == 0, done.stderr
    return root, scored


def rows(out):
    read = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in read]


def test_a_score_changes_nothing_of_training(runs):
    root, _ = runs
    for name in ("last.pt", "encoder.safetensors"):
        assert (root / "plain" / name).read_bytes() == (root / "scored" / name).read_bytes()
    log = rows(root / "scored")
    assert [row for row in log if "lr" in row] == rows(root / "plain")
    scores = [row for row in log if "lr" not in row]
    assert [row["step"] for row in scores] == [4, 8, 9]
    names = [f"{a}_{b}" for a in ("oks", "same_pose")
             for b in ("cls", "pose", "patch_mean", "chance", "best")]  # fmt: skip
    assert list(scores[0]) == ["step", *names]
    assert scores[0]["same_pose_best"] == 1
    # The last line is that of the finished encoder, taken home and asked again.
    people = probe.read_held(root / "b/annotations.json")
    vit = load_encoder(root / "scored/encoder.safetensors")
    tokens = probe.tokens_of(vit, probe.pictures_of(people, (64, 32))[0], "cpu")
    poses = probe.box_poses(people)
    values = probe.likeness(poses, poses, people.boxes, SIGMAS)[0]
    features = {"pose": F.normalize(tokens[:, 1], dim=1).numpy()}
    found = probe.retrieved(features, probe.strangers(people), values)
    assert scores[2]["oks_pose"] == pytest.approx(found["pose"], abs=1e-5)
    assert scores[0]["same_pose_chance"] == pytest.approx(2 / 14, abs=1e-5)
    assert all(0 <= v <= 1 for row in scores for k, v in row.items() if k != "step")


def test_scores_after_a_kill_and_on_two_ranks(runs, tmp_path):
    root, scored = runs
    out = [f"out={tmp_path / 'killed'}"]
    assert kill_after("pretrain.py", *scored, *out, lines=6, log=tmp_path / "killed/log.jsonl")
    assert run_script("pretrain.py", *scored, *out).returncode == 0
    assert rows(tmp_path / "killed") == rows(root / "scored")
    assert (tmp_path / "killed/last.pt").read_bytes() == (root / "scored/last.pt").read_bytes()
    done = run_script("pretrain.py", *scored, f"out={tmp_path / 'two'}", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (
        [row for row in rows(out) if "lr" not in row] for out in (root / "scored", tmp_path / "two")
    )
    assert [row["step"] for row in two] == [4, 8, 9]
    assert two[0]["oks_best"] == one[0]["oks_best"]
    assert two[0]["oks_pose"] == pytest.approx(one[0]["oks_pose"], abs=0.1)


def test_scores_have_a_panel_with_chance_and_best(runs):
    root, _ = runs
    figure = curves_figure([root / "scored"])
    (panel,) = [axis for axis in figure.axes if axis.get_title().startswith("OKS")]
    lines = {x.get_label(): list(x.get_xdata()) for x in panel.lines if x.get_label()[0] != "_"}
    assert lines == dict.fromkeys(("oks_cls", "oks_pose", "oks_patch_mean"), [4, 8, 9])
    words = [text.get_text() for text in panel.texts]
    assert [word.split(":")[0] for word in words] == ["chance", "best"]


def test_what_cannot_be_scored_is_refused(tmp_path):
    path = write_set(tmp_path, n_poses=2, per_pose=2)
    with pytest.raises(UserError, match="4 people with 8 joints"):
        probe.read_held(path)
    document = json.loads(path.read_text())
    document["categories"][0] = {"id": 1, "name": "person"}
    for row in document["annotations"]:
        del row["keypoints"], row["num_keypoints"], row["pose_id"]
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="neither joints nor pose_id"):
        probe.read_held(path)
    path = write_set(tmp_path / "few", n_poses=4, per_pose=5)
    words = f"encoders=none size=tiny height=64 width=32 poses={path} out={tmp_path}/out"
    done = run_script("experiments/probe.py", *words.split())
    assert "has 4 pose groups; " in done.stderr and not (tmp_path / "out").exists()


def test_a_limit_keeps_pose_groups_whole(tmp_path):
    people = probe.read_held(write_set(tmp_path, n_poses=12, per_pose=3), limit=18)
    ids, counts = np.unique(people.pose_id, return_counts=True)
    assert len(ids) == 6 and (counts == 3).all() and ids[0] == 0 and ids[-1] == 11


# ------------------------------------------------------------------------------------ the command


def test_the_command(tmp_path):
    """Ours, published weights and random ones; poses, ReID and attributes."""
    held = write_set(tmp_path / "held", n_poses=5)
    torch.manual_seed(0)
    vit = ViT(192, 6, 3, (64, 32), 16)
    (tmp_path / "own").mkdir()
    save_weights(tmp_path / "own/encoder.safetensors", vit, **meta_of(vit))
    (tmp_path / "mae").mkdir()
    state = {k: v for k, v in vit.state_dict().items() if k not in ("pose_token", "drop_rates")}
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 192), state["pos_embed"]], 1)
    torch.save({"model": state}, tmp_path / "mae/weights.pth")
    lines = ["image,hat,bag"]
    for folder in ("query", "bounding_box_test"):
        (tmp_path / "market" / folder).mkdir(parents=True)
        for n in range(6):
            name = f"{n % 3 + 1:04d}_c{1 + n // 3 if folder == 'query' else 3}s1_{n}.jpg"
            Image.fromarray(
                np.random.default_rng(n).integers(0, 255, (64, 32, 3), dtype=np.uint8)
            ).save(tmp_path / "market" / folder / name)
            lines.append(f"market/{folder}/{name},{n % 2},{n // 3}")
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    files = f"{tmp_path}/own/encoder.safetensors,{tmp_path}/mae/weights.pth,none"
    words = [f"encoders={files}", "size=tiny", "height=64", "width=32", f"poses={held}"]
    words += [f"market={tmp_path}/market", f"attributes_train={tmp_path}/a.csv"]
    words += [f"attributes_test={tmp_path}/a.csv", f"out={tmp_path}/out", "workers=0"]
    done = run_script("experiments/probe.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/probe.json").read_text())
    assert list(found) == ["chance", "best possible", "own", "mae", "none"]
    assert (tmp_path / "out/probe.png").stat().st_size > 0
    own, mae = found["own"], found["mae"]
    for name in ("oks", "pck", "same_pose", "mirror_oks", "ridge_oks", "ridge_pck"):
        for token in ("cls", "pose", "both", "patch_mean"):
            assert 0 <= own[f"{name}_{token}_held"] <= 1
        assert f"{name}_held" in found["chance"] and f"{name}_pose_held" not in mae
    assert {"patch_pck_patches_held", "mAP_pose", "mA_patch_mean"} <= set(own)
    assert "[POSE]" in done.stdout and "(f) PCK" in done.stdout
    # The file in MAE's layout has no [POSE]; its patches are those of a ViT without it.
    alone = ViT(192, 6, 3, (64, 32), 16, pose_token=False)
    alone.load_state_dict({k: v for k, v in vit.state_dict().items() if k != "pose_token"})
    people = probe.read_held(held)
    tokens = probe.tokens_of(alone.eval(), probe.pictures_of(people, (64, 32))[0], "cpu")
    features, poses = probe.features_of(tokens, 1), probe.box_poses(people)
    values = probe.likeness(poses, poses, people.boxes, SIGMAS)[0]
    expected = probe.retrieved(features, probe.strangers(people), values)["cls"]
    assert mae["oks_cls_held"] == pytest.approx(expected)
    (tmp_path / "fine").mkdir()
    fine = ViT(192, 6, 3, (64, 32), 8)
    save_weights(tmp_path / "fine/encoder.safetensors", fine, **meta_of(fine))
    words[0] += f",{tmp_path}/fine/encoder.safetensors"
    done = run_script("experiments/probe.py", *words[:5], f"out={tmp_path}/two", "workers=0")
    assert "these encoders' patches differ" in done.stdout, done.stderr
    two = json.loads((tmp_path / "two/probe.json").read_text())
    assert not any(
        "patch_pck" in key for level in ("chance", "best possible") for key in two[level]
    )
    assert two["own"]["patch_pck_patches_held"] == own["patch_pck_patches_held"]
    assert "oks_held" in two["chance"]
    assert json.loads((tmp_path / "two/run.json").read_text())[-1]["how"] == "finished"
    refused = run_script("experiments/probe.py", f"encoders={files}", f"out={tmp_path}/other")
    assert refused.returncode == 2 and "nothing to probe on" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_score_draws_no_random_number(tmp_path):
    class Cfg:
        score_annotations, score_every = str(write_set(tmp_path, n_poses=5)), 2
        height, width = 64, 32

    held, vit = probe.HeldOut(Cfg), ViT(192, 2, 3, (64, 32), 16)
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    held.score(vit, common.Ranks(0, 1, torch.device("cpu")))
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert held.due(2, 9) and held.due(9, 9) and not held.due(3, 9)
