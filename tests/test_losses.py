"""The three losses against plain loops in float64, value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import PretendCuda
from small_batch import GRID, POSES, M, P, assert_same, batch, value_and_gradient

import losses


def loop_multi_positive(z, pose_id, tau):
    z = z / z.norm(dim=1, keepdim=True)
    ids, terms = pose_id.tolist(), []
    for i in range(len(z)):
        columns = [j for j in range(len(z)) if j != i and ids[j] != -1]
        positives = [j for j in columns if ids[j] == ids[i]]
        if ids[i] == -1 or not positives:
            continue
        total = sum(torch.exp(z[i] @ z[j] / tau) for j in columns)
        terms.append(
            sum(-torch.log(torch.exp(z[i] @ z[j] / tau) / total) for j in positives)
            / len(positives)
        )
    return sum(terms) / len(terms) if terms else 0.0 * z.sum()


def loop_alignment(a, b, tau):
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    total = 0.0
    for q, k in ((a, b), (b, a)):
        for i in range(len(q)):
            e = [torch.exp(q[i] @ k[j] / tau) for j in range(len(k))]
            total = total - 2 * tau * torch.log(e[i] / sum(e)) / len(q)
    return total


def loop_reconstruction(pred, images, mask, p):
    h, w = images.shape[2] // p, images.shape[3] // p
    total, count = 0.0, 0
    for b in range(len(images)):
        for r in range(h):
            for c in range(w):
                if not mask[b, r * w + c]:
                    continue
                pixels = [
                    images[b, k, r * p + y, c * p + x]
                    for y in range(p)
                    for x in range(p)
                    for k in range(3)
                ]
                pixels = torch.stack(pixels)
                mean = pixels.sum() / len(pixels)
                variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
                target = (pixels - mean) / torch.sqrt(variance + 1e-6)
                total = total + ((pred[b, r * w + c] - target) ** 2).mean()
                count += 1
    return total / count


@pytest.mark.parametrize("name", POSES)
def test_multi_positive_against_loops(name):
    data = batch()
    ours = value_and_gradient(lambda z: losses.multi_positive_loss(z, data[name], 0.1), data["x"])
    assert_same(
        ours, value_and_gradient(lambda z: loop_multi_positive(z, data[name], 0.1), data["x"])
    )
    if name == "none":
        assert ours[0] == 0 and (ours[1] == 0).all()


def test_multi_positive_leaves_out_pictures_without_pose():
    """id −1 gets no gradient and changes nothing; an id that occurs once is a negative, so removing
    it does.
    """
    data = batch()
    z, ids = data["x"], data["mixed"]
    value, gradient = value_and_gradient(lambda z: losses.multi_positive_loss(z, ids, 0.1), z)
    assert (gradient[ids == -1] == 0).all() and (gradient[ids != -1] != 0).any(1).all()
    torch.testing.assert_close(losses.multi_positive_loss(z[ids != -1], ids[ids != -1], 0.1), value)
    assert abs(losses.multi_positive_loss(z[ids != 5], ids[ids != 5], 0.1) - value) > 1e-3


def test_positives_may_have_weights():
    """Of any scale: torch's cross-entropy with the weights as probabilities."""
    torch.manual_seed(0)
    logits, weights = torch.randn(4, 6), torch.rand(4, 6) * torch.tensor([[0.1], [1], [3], [0]])
    column = torch.ones(4, 6, dtype=torch.bool)
    ours = losses.multi_positive_entropy(logits, weights, column)
    shares = weights[:3] / weights[:3].sum(1, keepdim=True)  # the fourth row pulls nobody
    torch.testing.assert_close(ours, F.cross_entropy(logits[:3], shares))


def test_multi_positive_hand_worked():
    """Two poses of two equal embeddings, the poses orthogonal: −log(e^(1/τ) / (e^(1/τ) + 2))."""
    z = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 2]])
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert losses.multi_positive_loss(z, torch.tensor([4, 4, 9, 9]), 0.5).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_alignment_against_loops():
    data = batch()
    ours = value_and_gradient(lambda a, b: losses.alignment_loss(a, b, 0.2), data["x"], data["x2"])
    assert_same(
        ours, value_and_gradient(lambda a, b: loop_alignment(a, b, 0.2), data["x"], data["x2"])
    )


def test_alignment_of_hap_has_the_same_value_and_no_key_gradient():
    a, b = batch()["x"], batch()["x2"]
    ours = value_and_gradient(
        lambda a, b: losses.alignment_loss(a, b, 0.2, gather_gradient=False), a, b
    )
    assert ours[0] == losses.alignment_loss(a, b, 0.2)
    held = value_and_gradient(lambda a: loop_alignment(a, b, 0.2), a)  # a also pulled as a key here
    assert (ours[1] - held[1]).abs().max() > 1e-3


def test_reconstruction_against_loops():
    data = batch()
    images, mask = data["images"], data["mask"]
    ours = value_and_gradient(
        lambda pred: losses.reconstruction_loss(pred, images, mask, P), data["patches"]
    )
    assert_same(
        ours,
        value_and_gradient(
            lambda pred: loop_reconstruction(pred, images, mask, P), data["patches"]
        ),
    )


def test_reconstruction_without_masked_patch_is_zero():
    data = batch()
    none = torch.zeros_like(data["mask"])
    value, gradient = value_and_gradient(
        lambda pred: losses.reconstruction_loss(pred, data["images"], none, P), data["patches"]
    )
    assert value == 0 and (gradient == 0).all()


def test_patches_are_row_by_row_channel_last_and_return():
    images = batch()["images"]
    patches = losses.patchify(images, P)
    row, column, y, x, k = 1, 2, 1, 0, 2
    assert (
        patches[3, row * GRID[1] + column, (y * P + x) * 3 + k]
        == images[3, k, row * P + y, column * P + x]
    )
    assert torch.equal(losses.unpatchify(patches, GRID, P), images)
    target, mean, std = losses.normalized(losses.patchify(images, P))
    torch.testing.assert_close(target * std + mean, patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_inside_also_under_autocast(dtype):
    data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    exact = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}

    def all_three(d):
        return [
            losses.multi_positive_loss(d["x"], d["mixed"], 0.1),
            losses.alignment_loss(d["x"], d["x2"], 0.2),
            losses.reconstruction_loss(d["patches"], d["images"], d["mask"], P),
        ]

    with torch.autocast("cpu", torch.bfloat16):
        under = all_three(data)
    for a, b in zip(under, all_three(exact)):
        assert a.dtype == torch.float32 and a == b


def test_small_temperature_stays_finite():
    data = batch()
    for ids in POSES:
        z = (data["x"] * 1e6).float()
        value, gradient = value_and_gradient(
            lambda z, ids=ids: losses.multi_positive_loss(z, data[ids], 1e-3), z
        )
        assert value.isfinite() and gradient.isfinite().all()


def test_contrastive_health_against_loops():
    data = batch()
    z, ids = F.normalize(data["x"], dim=1), data["mixed"].tolist()
    pairs = [(i, j) for i in range(M) for j in range(M) if i != j and -1 not in (ids[i], ids[j])]
    positive = [float(z[i] @ z[j]) for i, j in pairs if ids[i] == ids[j]]
    negative = [float(z[i] @ z[j]) for i, j in pairs if ids[i] != ids[j]]
    health = losses.contrastive_health(data["x"], data["mixed"])
    assert health["positive_cosine"].item() == pytest.approx(sum(positive) / len(positive))
    assert health["negative_cosine"].item() == pytest.approx(sum(negative) / len(negative))
    assert health["without_positive"] == 1 and health["without_pose"] == 1


def test_no_wait_for_the_device():
    data = batch()
    with PretendCuda() as cuda:
        data = {name: value.cuda() for name, value in data.items()}
        z = data["x"].requires_grad_()
        cuda.watching = True
        total = losses.multi_positive_loss(z, data["mixed"], 0.1) + losses.alignment_loss(
            z, data["x2"], 0.2
        )
        total = total + losses.reconstruction_loss(data["patches"], data["images"], data["mask"], P)
        total.backward()
        losses.contrastive_health(z, data["mixed"])
    assert z.grad.shape == z.shape and not cuda.waits
