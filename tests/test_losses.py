"""The three losses: against plain loops in float64 (value and gradient), and 2 and 3 gloo ranks
against one process.
"""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from pretend_cuda import PretendCuda

import losses
from losses import GlobalBatchNorm
from model import Decoder, GenPoCCL, Projector, ViT

M, D, P = 12, 6, 2  # rows of the global batch, width, patch side
GRID = (2, 3)
POSES = {
    # no pose keeps all its pictures on one rank of 2 or 3; 5 occurs once; −1 has no pose group
    "mixed": [0, 1, 2, 3, 0, 1, 2, 3, 0, 5, -1, 1],
    "none": list(range(M)),  # no positive pair anywhere
    "lone_rank": [7, 7] + [-1] * (M - 2),  # ranks after the first have no anchor at all
}


def batch():
    """The global batch in float64, the same in every process."""
    g = torch.Generator().manual_seed(0)
    N, C = GRID[0] * GRID[1], P * P * 3
    return {
        "x": torch.randn(M, D, generator=g, dtype=torch.float64),
        "x2": torch.randn(M, D, generator=g, dtype=torch.float64),
        "images": torch.randn(M, 3, GRID[0] * P, GRID[1] * P, generator=g, dtype=torch.float64),
        "patches": torch.randn(M, N, C, generator=g, dtype=torch.float64),
        "maps": torch.randn(M, D, 2, 3, generator=g, dtype=torch.float64) * 3 + 2,
        # ragged on purpose: the number of masked patches differs between ranks
        "mask": torch.rand(M, N, generator=g) < torch.linspace(0.1, 0.9, M)[:, None],
        **{name: torch.tensor(ids) for name, ids in POSES.items()},
    }


def linear(inputs, outputs):
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs).double()


# -------------------------------------------------------------------------------------- plain loops


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


def value_and_gradient(loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


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


# ------------------------------------------------------------------------------------ several ranks


class OwnSliceOnly(torch.autograd.Function):
    """Mutant: the gather of SimCLR's and MoCo's code; what other ranks say about own columns is
    dropped.
    """

    @staticmethod
    def forward(ctx, x):
        return losses.gather_rows_of(x)

    @staticmethod
    def backward(ctx, gradient):
        n = len(gradient) // losses.world_size()
        return gradient[dist.get_rank() * n :][:n]


MUTANTS = {"no_gradient": losses.gather_rows_of, "own_slice": OwnSliceOnly.apply}


def case_mp(rows, name="mixed"):
    layer = linear(D, D)
    return losses.multi_positive_loss(layer(rows["x"]), rows[name], 0.1), layer


def case_align(rows):
    layer = linear(D, D)
    return losses.alignment_loss(layer(rows["x"]), layer(rows["x2"]), 0.2), layer


def case_rec(rows):
    layer = linear(P * P * 3, P * P * 3)
    return losses.reconstruction_loss(
        layer(rows["patches"]), rows["images"], rows["mask"], P
    ), layer


def case_norm(rows, kind="x"):
    layer = nn.Sequential(linear(D, D), GlobalBatchNorm(D).double())
    x = rows[kind]
    y = layer[0](x) if x.ndim == 2 else layer[0](x.transpose(1, 3)).transpose(1, 3)
    return layer[1](y).pow(3).flatten(1).mean(1).mean(), layer


CASES = {
    "mp": case_mp,
    "mp_none": lambda rows: case_mp(rows, "none"),
    "mp_lone_rank": lambda rows: case_mp(rows, "lone_rank"),
    "align": case_align,
    "rec": case_rec,
    "norm_rows": case_norm,
    "norm_maps": lambda rows: case_norm(rows, "maps"),
}


def tiny_model():
    torch.manual_seed(2)
    encoder = ViT(16, 1, 2, (GRID[0] * P, GRID[1] * P), P)
    return GenPoCCL(encoder, Decoder(encoder, 8, 1, 2), Projector(16, "mlp", 16, 8)).double()


def model_steps(model, rows, steps=2):
    """Two steps of SGD (Adam would hide a wrong scale); → the three terms of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    g = torch.Generator().manual_seed(3)
    masks = [torch.rand(M, GRID[0] * GRID[1], generator=g).argsort(1) < 3 for _ in range(2)]
    for _ in range(steps):
        out = model(rows["images"], [m[rows["own"]] for m in masks], rows["mixed"])
        optimizer.zero_grad()
        out["total"].backward()
        optimizer.step()
    return torch.stack([out[name].detach() for name in ("total", "rec", "align", "mp")])


def outcome(case, rows, world):
    loss, layer = case(rows)
    loss.backward()
    tensors = [loss.detach(), *(p.grad for p in layer.parameters())]
    if world > 1:  # what DistributedDataParallel does
        for t in tensors:
            dist.all_reduce(t)
            t /= world
    return [*tensors, *layer.buffers()]


def one_rank(rank, world, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    own = slice(rank * M // world, (rank + 1) * M // world)
    rows = {**{k: v[own] for k, v in batch().items()}, "own": own}
    found = {name: outcome(case, rows, world) for name, case in CASES.items()}
    right = losses.gather_with_gradient
    for mutant, gather in MUTANTS.items():
        losses.gather_with_gradient = gather
        for name in ("mp", "align"):
            found[f"{name}_{mutant}"] = outcome(CASES[name], rows, world)
    losses.gather_with_gradient = right
    found["health"] = list(losses.contrastive_health(rows["x"], rows["mixed"]).values())
    model = tiny_model()
    terms = model_steps(nn.parallel.DistributedDataParallel(model), rows)
    dist.all_reduce(terms)
    found["model"] = [terms / world, *model.state_dict().values()]
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each of 2 or 3 real gloo processes found."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.spawn(one_rank, (request.param, str(folder)), request.param)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(
            OMP_NUM_THREADS=before
        )
    return [torch.load(folder / f"rank{r}.pt") for r in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    rows = {**batch(), "own": slice(None)}
    found = {name: outcome(case, rows, 1) for name, case in CASES.items()}
    found["health"] = list(losses.contrastive_health(rows["x"], rows["mixed"]).values())
    model = tiny_model()
    found["model"] = [model_steps(model, rows), *model.state_dict().values()]
    return found


@pytest.mark.parametrize("name", [*CASES, "health", "model"])
def test_ranks_equal_one_process(ranks, alone, name):
    """Loss, gradient of shared weights, running statistics; for the model: weights after two SGD
    steps.
    """
    for rank in ranks:
        assert_same(rank[name], alone[name], 1e-9)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", ["mp", "align"])
def test_a_wrong_gather_is_seen(ranks, alone, name, mutant):
    wrong, right = ranks[0][f"{name}_{mutant}"], alone[name]
    torch.testing.assert_close(wrong[0], right[0])  # the value hides it ...
    assert (wrong[1] - right[1]).norm() > 0.1 * right[1].norm()  # ... the gradient does not


@pytest.mark.parametrize("kind", ["x", "maps"])
def test_global_batch_norm_equals_torch(alone, kind):
    """Value, gradient and running statistics of nn.BatchNorm on the whole batch; then evaluation
    mode.
    """
    x = batch()[kind]
    ours, theirs = (
        GlobalBatchNorm(D).double(),
        (nn.BatchNorm1d if kind == "x" else nn.BatchNorm2d)(D).double(),
    )
    assert_same(
        value_and_gradient(lambda x: ours(x).pow(3).sum(), x),
        value_and_gradient(lambda x: theirs(x).pow(3).sum(), x),
    )
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    # the several-rank path is tied to this one by the cases norm_rows and norm_maps
    case = alone["norm_rows" if kind == "x" else "norm_maps"]
    layer = nn.Sequential(linear(D, D), theirs)
    theirs.train().reset_running_stats()
    y = layer[0](x) if x.ndim == 2 else layer[0](x.transpose(1, 3)).transpose(1, 3)
    loss = theirs(y).pow(3).mean()
    loss.backward()
    assert_same(case[:5], [loss.detach(), *(p.grad for p in layer.parameters())])
    assert_same(case[5:], [theirs.running_mean, theirs.running_var])
