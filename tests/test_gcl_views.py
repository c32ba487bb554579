"""What GCL stands on: turned bodies, guides of three sources, networks, scores of views."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from baselines import gcl, gcl_parts
from common import UserError
from formats.joints import COCO_CATEGORY
from formats.market import Sightings
from model import ViT, normalize
from plumbing.pictures import as_bytes
from puppet import body, people_set, poses_from_keypoints, sample_poses, take
from puppet.guide import draw_guides

SIZE = (64, 32)


# ------------------------------------------------------------------------------------------- bodies


def test_turning_is_the_yaw_of_a_camera_that_is_not_upright():
    """The same angles, seen by a camera that is tilted and looks down, at yaw 20 and 20 + 135."""
    angles, stature = np.zeros((1, len(body.LIMITS))), np.ones(1)
    angles[:, :6] = 10.0
    down = body.chain(body.rotation(2, np.array([5.0])), body.rotation(0, np.array([25.0])))

    def posed(yaw):
        root = body.chain(down, body.rotation(1, np.array([yaw])))
        points, head, chest = body.pose_body(angles, root, stature)
        points[:, :, 2] += 6
        rest = np.ones(1), np.zeros((1, 4)), np.ones((1, 17), bool), np.ones(1, bool), angles
        return body.Poses(points, head, chest, *rest, down[:, :, 1])

    turned, expected = body.turned(posed(20.0), 135), posed(155.0)
    for name in ("points", "head", "chest"):
        assert np.allclose(getattr(turned, name), getattr(expected, name), atol=1e-12), name


def test_turning_sampled_poses_is_another_yaw_of_their_camera(monkeypatch):
    turned, real, calls = body.turned(sample_poses(0, range(20)), 90), body.rotation, []

    def another_yaw(axis, degrees):  # the first rotation about axis 1 is the camera's yaw
        calls.append(axis)
        return real(axis, degrees + (90 if axis == 1 and calls.count(1) == 1 else 0))

    monkeypatch.setattr(body, "rotation", another_yaw)
    expected = sample_poses(0, range(20))
    for name in ("points", "head", "chest"):
        assert np.allclose(getattr(turned, name), getattr(expected, name), atol=1e-9), name


def test_sampled_poses_know_the_vertical():
    poses = sample_poses(0, range(20))
    back = body.turned(body.turned(poses, 90), -90)
    assert np.allclose(back.points, poses.points, atol=1e-12)
    height = (poses.points * poses.down[:, None]).sum(2)
    turned = body.turned(poses, np.arange(20) * 18.0)
    assert np.allclose((turned.points * poses.down[:, None]).sum(2), height, atol=1e-12)
    # Standing people stand upright in the world: ankles below the head, whatever the camera.
    assert (height[:, [body.L_ANK, body.R_ANK]].mean(1) > height[:, body.HEAD]).mean() > 0.8


def test_guides_show_the_turned_body_and_nothing_else():
    poses = sample_poses(3, range(6))
    guides = draw_guides(poses, (128, 64))
    xy, _ = body.project(poses, (128, 64))
    for guide, joints in zip(guides, xy):
        for x, y in joints[[body.L_SHO, body.R_SHO, body.L_KNE, body.R_KNE]]:
            if 1 <= x < 62 and 1 <= y < 126:
                assert guide[round(y), round(x)] > 20
        assert 0.02 < (guide > 0).mean() < 0.6
    assert np.array_equal(draw_guides(body.turned(poses, 360), (128, 64)), guides)
    behind = draw_guides(body.turned(poses, 180), (128, 64))
    assert np.abs(behind.astype(int) - guides).mean((1, 2)).min() > 1


# ------------------------------------------------------------------------------------ three sources


@pytest.fixture
def rendered(tmp_path):
    """A people set of generate.py, by its own functions, in PNG."""
    made = dict(task="people", backend="puppet", seed=4, pictures_per_camera=2, height=64)
    made |= dict(width=32, cameras=2, persons_train=2, persons_val=0, persons_test=1)
    made |= dict(picture_format="png")
    cfg, names = SimpleNamespace(**made), []
    for person in (1, 2):
        for picture, row in people_set.draw_person(cfg, person):
            path = tmp_path / row["file_name"]
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
            names.append(path.name)
    (tmp_path / "config.yaml").write_text(json.dumps(made))
    folder, ids = str(tmp_path / "bounding_box_train"), np.ones(len(names), int)
    return tmp_path, Sightings(folder, as_bytes(folder, names), ids, ids)


def test_a_rendered_persons_guide_and_truth_come_from_the_name(rendered):
    root, people = rendered
    assert len(people.files) == 8
    _, guides, left_out = gcl_parts.read_guides("puppet", root, people, SIZE)
    for row in range(8):  # the whole set, to the byte: the poses are the true ones
        assert np.array_equal(guides.truth(row, 0).transpose(1, 2, 0), np.asarray(people.load(row)))
    assert left_out == 0
    assert not np.array_equal(guides.draw(0, 0), guides.draw(0, 45))
    assert not np.array_equal(guides.truth(0, 0), guides.truth(0, 90))


def test_a_set_that_its_config_does_not_draw_is_refused(rendered):
    root, people = rendered
    text = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(text.replace('"seed": 4', '"seed": 5'))
    with pytest.raises(UserError, match="make the set anew"):
        gcl_parts.read_guides("puppet", root, people, SIZE)
    (root / "config.yaml").unlink()
    with pytest.raises(UserError, match="no set of generate.py task=people"):
        gcl_parts.read_guides("puppet", root, people, SIZE)


def test_guides_lifted_from_joints_stand_where_the_joints_are(rendered):
    root, people = rendered
    jobs = [people_set.job_of(name.decode(), 2) for name in people.files]
    poses, *_ = people_set.sightings(4, jobs)
    xy, _ = body.project(poses, (64, 32))
    seen = [0, 1, 2, 4, 5]  # of two pictures nothing is known, and of one nearly nothing
    images, rows = [], []
    for i in seen:
        name = f"bounding_box_train/{people.files[i].decode()}"  # as Market's own joints have it
        images.append(dict(id=i, file_name=name, width=32, height=64))
        points = np.column_stack([xy[i, :17], np.full(17, 2 if i < 5 else 0)])
        points[0, 2] = 2
        row = dict(id=i, image_id=i, category_id=1, bbox=[0, 0, 32, 64], area=2048, iscrowd=0)
        rows.append(row | dict(keypoints=points.ravel().tolist(), num_keypoints=1))
    file = root / "joints.json"
    document = dict(images=images, annotations=rows, categories=[COCO_CATEGORY])
    file.write_text(json.dumps(document))
    kept, guides, left_out = gcl_parts.read_guides(str(file), root, people, (128, 64))
    assert left_out == 4 and kept.files.tolist() == people.files[[0, 1, 2, 4]].tolist()
    there, _ = body.project(guides.poses, (128, 64))
    assert np.allclose(there[:, 5:17], 2 * xy[[0, 1, 2, 4], 5:17], atol=1e-6)


def test_a_folder_of_renders_must_be_whole(rendered):
    root, people = rendered
    for k in range(8):
        folder = root / "mesh" / (f"render_{45 * k}" if k else "render")
        folder.mkdir(parents=True)
        for i, name in enumerate(people.files):
            Image.new("L", (16, 32), 10 * k + i).save(folder / name.decode())
    _, guides, _ = gcl_parts.read_guides(str(root / "mesh"), root, people, SIZE)
    assert guides.draw(3, 90).shape == SIZE and guides.draw(3, 90).mean() == 23
    (root / "mesh/render_315" / people.files[5].decode()).unlink()
    with pytest.raises(UserError, match="render_315"):
        gcl_parts.read_guides(str(root / "mesh"), root, people, SIZE)


def test_all_seven_turns_are_drawn_and_a_sample_is_a_function_of_its_place(rendered):
    root, people = rendered
    _, guides, _ = gcl_parts.read_guides("puppet", root, people, SIZE)
    views, drawn = gcl_parts.Views(people, guides, SIZE, 0), []
    guides.draw = lambda row, turn: drawn.append(turn) or np.zeros(SIZE, np.uint8)
    for epoch in range(8):
        for index in range(8):
            views[epoch, index]
    assert set(drawn[1::2]) == {45, 90, 135, 180, 225, 270, 315} and set(drawn[::2]) == {0}
    again, drawn[:] = drawn[1], []
    views[0, 0]
    assert drawn == [0, again]


# ----------------------------------------------------------------------------------------- networks


def test_stripes_are_means_of_rows_of_patches():
    torch.manual_seed(0)
    vit = ViT(8, 1, 2, (64, 32), 8)  # 8 × 4 patches
    e_id = gcl_parts.Identity(vit, 4, 6).eval()
    x = torch.randn(2, 3, 64, 32)
    stripes, f = e_id(x)
    tokens = vit(x)[:, 2:].view(2, 4, 2, 4, 8)  # a stripe is two rows of four
    assert torch.allclose(stripes, tokens.mean((2, 3)), atol=1e-5)
    h = tokens.mean((1, 2, 3)) @ e_id.fc.weight.T + e_id.fc.bias
    assert torch.allclose(f, h / (1 + e_id.bn.eps) ** 0.5, atol=1e-5)


def test_the_batch_norm_begins_with_the_statistics_of_the_training_set(rendered):
    torch.manual_seed(0)
    cfg = SimpleNamespace(height=64, width=32, eval_batch=3, workers=0, precision="fp32")
    e_id = gcl_parts.Identity(ViT(8, 1, 2, SIZE, 8), 4, 6)
    gcl.fit_batch_norm(cfg, e_id, rendered[1], torch.device("cpu"))
    f = gcl.embed(cfg, e_id, rendered[1], torch.device("cpu"))
    x = [gcl_parts.Views(rendered[1], None, SIZE, 0).image(row) for row in range(8)]
    y = e_id.eval()(normalize(torch.stack(x)))[1]
    assert torch.allclose(y.mean(0), torch.zeros(6), atol=1e-3)
    assert torch.allclose(y.std(0), torch.ones(6), atol=0.1)
    assert torch.allclose(f, F.normalize(y), atol=1e-5)


def test_a_stripe_sets_mean_and_spread_of_its_own_block_alone():
    torch.manual_seed(0)
    block = gcl_parts.AdaptiveResidual(4, 3, 8)
    x, stripe = torch.randn(2, 4, 6, 5), torch.randn(2, 3)
    w, b = block.weight(stripe), block.bias(stripe)
    y = block.convs[0](x)
    y = (y - y.mean((2, 3), keepdim=True)) / (
        y.var((2, 3), keepdim=True, correction=0) + 1e-5
    ) ** 0.5
    y = F.leaky_relu(y * w[:, :4, None, None] + b[:, :4, None, None], 0.2)
    more = block(x, stripe) - x
    assert torch.allclose(more.mean((2, 3)), b[:, 4:], atol=1e-5)
    assert torch.allclose(more.std((2, 3), correction=0), w[:, 4:].abs(), atol=1e-3)
    z = block.convs[1](y)
    z = (z - z.mean((2, 3), keepdim=True)) / (
        z.var((2, 3), keepdim=True, correction=0) + 1e-5
    ) ** 0.5
    assert torch.allclose(more, z * w[:, 4:, None, None] + b[:, 4:, None, None], atol=1e-4)


def test_shapes_and_what_g_depends_on():
    torch.manual_seed(0)
    e_str, g, d = (
        gcl_parts.Structure(2),
        gcl_parts.Generator(6, 4, 2, 8),
        gcl_parts.Discriminator(2),
    )
    s, a = e_str(torch.rand(2, 1, 64, 32)), torch.randn(2, 4, 6)
    assert s.shape == (2, 16, 16, 8)
    assert g(s, a).shape == (2, 3, 64, 32)
    assert [tuple(out.shape) for out in d(g(s, a))] == [(2, 1, 16, 8), (2, 1, 8, 4), (2, 1, 4, 2)]
    for k in range(4):  # every stripe has a say
        other = a.clone()
        other[:, k] += 1
        assert not torch.allclose(g(s, other), g(s, a))


# ------------------------------------------------------------------------------------------- scores


def test_psnr_and_ssim_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 17, 15)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    error = sum((float(p) - float(q)) ** 2 for p, q in zip(a.ravel(), b.ravel())) / a.size
    assert gcl_parts.psnr(a, b) == pytest.approx(10 * np.log10(255**2 / error))
    assert gcl_parts.psnr(a, a) == 100 and gcl_parts.ssim(a, a) == pytest.approx(1)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for colour in range(3):  # where the window lies within the picture, as [Wang 2004]
        for y in range(5, 12):
            for x in range(5, 10):
                p = a[colour, y - 5 : y + 6, x - 5 : x + 6].astype(float)
                q = b[colour, y - 5 : y + 6, x - 5 : x + 6].astype(float)
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 2.55**2, 7.65**2
                top = (2 * mp * mq + c1) * (2 * both + c2)
                values.append(top / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert gcl_parts.ssim(a, b) == pytest.approx(np.mean(values), rel=1e-6)


def test_lifted_poses_turn_about_the_picture_s_vertical():
    points = np.zeros((1, 17, 3))
    sampled = take(sample_poses(5, range(1)), [0])
    points[0, :, :2] = body.project(sampled, (128, 64))[0][0, :17]
    points[0, :, 2] = 2
    poses = poses_from_keypoints(points, np.array([[0, 0, 64, 128]]), pad=1.0)
    assert np.array_equal(poses.down, [[0, 1, 0]])
    turned = body.turned(poses, 90)
    assert np.allclose(turned.points[..., 1], poses.points[..., 1])
