"""Fast paths equal plain ones, memory is what it is said to be, the benchmarks count right.

Nothing is timed here: benchmarks/throughput.py measures.
"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import common
import data
import losses
import model
from baselines.parts import Crops
from formats.coco import read_people
from formats.joints import COCO_JOINTS
from plumbing.pictures import load_picture
from plumbing.seeds import CROP, FLIP, seed_all

sys.path.append(str(ROOT / "benchmarks"))

from timing import PeakMemory, flops, ratio  # noqa: E402

ALONE = common.Ranks(0, 1, torch.device("cpu"))


def picture(w, h, seed=0):
    """Blurred noise: as sharp as a photograph, nowhere black or white, where resizing cuts off."""
    noise = np.random.default_rng(seed).integers(40, 216, (h // 3, w // 3, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((w, h), Image.Resampling.BILINEAR)


def a_set(folder, n=12, size=(60, 130)):
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in range(n):
        picture(*size, seed=i).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        box = [4.0, 6.0, size[0] - 9.0, size[1] - 13.0]
        keypoints = [v for j in range(17) for v in (5 + 2 * j, 10 + 6 * j, 2)]
        person = {"id": i, "image_id": i, "bbox": box, "keypoints": keypoints, "pose_id": i // 3}
        annotations.append(person)
    category = {"id": 1, "name": "person", "keypoints": COCO_JOINTS, "skeleton": []}
    document = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / "annotations.json").write_text(json.dumps(document))
    return read_people(folder / "annotations.json")[0]


# ----------------------------------------------------------------------------------------- pictures


def test_resize_equals_pillow_up_to_rounding(tmp_path):
    people = a_set(tmp_path)
    dataset = data.PretrainPictures([people], (96, 48), 3, data.Augmentation(shared="nothing"))
    for index in range(12):
        item = dataset[(1, index)]
        region = data.padded_box(people.boxes[index], 1.25, people.size[index])
        x, y, w, h = data.grown_region(region, 0.5, people.size[index])
        seed_all(FLIP, 3, 1, 1, index)
        mirrored = torch.rand(()) < 0.5
        seed_all(CROP, 3, 1, 1, index)
        left, top, cw, ch = data.random_crop(w, h, 0.8, 0.5)
        plain = load_picture(people.folder, people.files[index])
        plain = plain.crop((x + left, y + top, x + left + cw, y + top + ch))
        plain = plain.resize((48, 96), Image.Resampling.BICUBIC)
        plain = torch.from_numpy(np.array(plain)).permute(2, 0, 1)
        plain = plain.flip(2) if mirrored else plain
        gap = (item["image"].int() - plain.int()).abs()
        assert gap.max() <= 2 and (gap > 1).float().mean() < 0.002  # grey levels of 255


def same_distribution_as_torchvision(ours, w, h, share):
    """Area, ratio and place of n rectangles (n, 4) differ by less than chance allows."""
    n, region = len(ours), torch.empty(1, h, w)
    theirs = [RandomResizedCrop.get_params(region, share, (0.375, 2 / 3)) for _ in range(n)]
    theirs = torch.tensor(
        [(left, top, cw, ch) for top, left, ch, cw in theirs], dtype=torch.float64
    )
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= w).all() and (ours[:, 1] + ours[:, 3] <= h).all()
    for name, figure in {
        "area": lambda r: r[:, 2] * r[:, 3],
        "ratio": lambda r: r[:, 2] / r[:, 3],
        "left": lambda r: r[:, 0],
        "top": lambda r: r[:, 1],
    }.items():
        a, b = figure(ours).sort().values, figure(theirs).sort().values
        everywhere = torch.cat([a, b])
        below = [torch.searchsorted(x, everywhere, right=True) for x in (a, b)]
        gap = (below[0] - below[1]).abs().max() / n
        assert gap < 1.95 * (2 / n) ** 0.5, name  # Kolmogorov-Smirnov, once in a thousand


@pytest.mark.parametrize("w, h, low, high", [(130, 250, 0.8, 1.0), (200, 256, 0.08, 0.32)])
def test_crop_has_the_distribution_of_torchvision(w, h, low, high):
    torch.manual_seed(0)
    ours = [data.random_crop(w, h, low, 0.5, high) for _ in range(4000)]
    same_distribution_as_torchvision(torch.tensor(ours, dtype=torch.float64), w, h, (low, high))


def test_small_crops_of_the_neighbours_lie_anywhere_in_the_region(tmp_path):
    people, options = a_set(tmp_path), data.Augmentation(region="box", box_padding=1.0)
    crops = Crops([people], (32, 16), 0, options, globals_=1, local=(40, (32, 16), (0.08, 0.32)))
    x, y, w, h = (int(v) for v in data.padded_box(people.boxes[0], 1.0, people.size[0]))
    ours = torch.cat([crops[(epoch, 0)]["box"][1:] for epoch in range(25)]).double()
    ours -= torch.tensor([x, y, 0, 0])
    same_distribution_as_torchvision(ours, w, h, (0.08, 0.32))


NARROW = [((300, 20), (143, 0, 13, 20)), ((20, 300), (0, 123, 20, 53))]


@pytest.mark.parametrize("size, expected", NARROW)
def test_crop_of_a_region_that_no_rectangle_fits(size, expected):
    assert data.random_crop(*size, 0.8, 0.5) == expected


def test_normalize_is_the_formula_and_leaves_its_input_alone():
    pixels = torch.randint(256, (2, 3, 8, 4), dtype=torch.uint8)
    mean = torch.tensor(model.IMAGENET_MEAN).view(3, 1, 1) * 255
    std = torch.tensor(model.IMAGENET_STD).view(3, 1, 1) * 255
    assert torch.equal(model.normalize(pixels), (pixels.float() - mean) / std)
    floats = pixels.float()
    model.normalize(floats)
    assert torch.equal(floats, pixels.float())


# --------------------------------------------------------------------------------- annotation files


def test_annotations_are_arrays_that_are_shared_and_not_copied(tmp_path):
    """No Python object per annotation, in the data set or in the plan: workers share the pages."""
    people = a_set(tmp_path)
    dataset = data.PretrainPictures([people], (96, 48), seed=0)
    assert np.shares_memory(dataset.keypoints[0], people.keypoints)
    batches = data.PoseBatches(dataset, 6, 3, [], 0, ALONE)
    for thing in (dataset, batches, people):
        values = thing._asdict() if hasattr(thing, "_asdict") else vars(thing)
        for name, value in values.items():
            if name in ("joints", "skeleton", "flip", "category", "people", "folder", "size"):
                continue
            for part in value if isinstance(value, (list, tuple)) else [value]:
                assert not isinstance(part, (list, tuple, dict)) or len(part) < len(dataset), name


# ------------------------------------------------------------------------------ losses and the step


def test_target_by_hand_equals_var_mean():
    patches = torch.randn(5, 7, 48, dtype=torch.float64) * 3 + 100
    target, mean, std = losses.normalized(patches)
    variance, plain_mean = torch.var_mean(patches, dim=-1, keepdim=True)
    assert torch.allclose(mean, plain_mean) and torch.allclose(std, (variance + 1e-6).sqrt())
    assert torch.allclose(target, (patches - plain_mean) / (variance + 1e-6).sqrt())
    flat = torch.full((1, 1, 48), 0.3)
    assert losses.normalized(flat)[0].abs().max() < 1e-3  # one colour: no division by zero


@pytest.mark.parametrize("ranks", [1, 8])
def test_logits_are_own_rows_by_gathered_columns(ranks, monkeypatch):
    """The largest tensor of the contrastive terms, forward and backward: own rows × all columns."""
    M, D = 512, 16
    for name in ("gather_with_gradient", "gather_rows_of"):
        gather = getattr(losses, name)

        def repeated(x, gather=gather):  # all ranks hold our rows
            return gather(x).repeat(ranks, *[1] * (x.ndim - 1))

        monkeypatch.setattr(losses, name, repeated)
    z = torch.randn(M // ranks, D, requires_grad=True)
    pose_id = torch.arange(M // ranks) // 4
    matrix = M // ranks * M * 4  # bytes in float32
    largest = []

    class Watch(PeakMemory):
        def take(self, tensor):
            largest.append(tensor.numel())
            super().take(tensor)

    with Watch() as memory:
        (losses.multi_positive_loss(z, pose_id) + losses.alignment_loss(z, z.flip(0))).backward()
    assert max(largest) == M // ranks * M
    assert matrix < memory.peak < 8 * matrix + 40 * M * D * 4


def test_recomputing_activations_needs_less_memory_and_gives_the_same_gradient():
    def step(recompute):
        torch.manual_seed(0)
        encoder = model.ViT(48, 4, 3, (64, 32), 8, checkpoint_activations=recompute)
        net = model.GenPoCCL(encoder, model.Decoder(encoder, 32, 2, 2))
        images, masks = (
            torch.randn(8, 3, 64, 32),
            [torch.rand(8, 32).argsort(1) < 16 for _ in range(2)],
        )
        with PeakMemory(*net.parameters()) as memory:
            net(images, masks, torch.arange(8) // 4)["total"].backward()
        return [p.grad for p in net.parameters() if p.grad is not None], memory.peak

    (plain, most), (again, least) = step(False), step(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again)) and len(plain) == len(
        again
    )
    assert least < 0.6 * most


# ------------------------------------------------------------------------- the benchmark's counters


def test_counters():
    a = torch.randn(8, 16, requires_grad=True)
    b = torch.randn(16, 4)
    assert (
        flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 8 * 16 * 4
    )  # forward, and the gradient of a alone
    with PeakMemory(a) as memory:
        x = a.detach() + 1  # 512 bytes each
        x = x + 1
        del x
    assert memory.peak == 3 * 8 * 16 * 4 and memory.now == 8 * 16 * 4
    assert ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_a_table_prints_a_json_line_per_row():
    """The other tables run in test_on_gpu.py."""
    words = "memory size=tiny height=32 width=16 patch=8 batches=4,8".split()
    done = run_script("benchmarks/throughput.py", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 4 and all(row["table"] == "memory" for row in rows)
    assert rows[0]["peak_GB"] < rows[2]["peak_GB"]  # a larger batch holds more
    done = run_script("benchmarks/throughput.py", "stop")
    assert done.returncode == 2 and done.stderr.startswith('error: no table "stop"; ')


def test_the_cost_of_a_step_is_that_of_its_matrix_products():
    """benchmarks/cost.py against a count by hand: 6 FLOP per weight and token, and attention."""
    import cost

    D, width, seen, tokens = 768, 512, 64 + 2, 128 + 2
    encoder = 12 * (12 * D * D * seen + 2 * D * seen * seen) + 64 * 768 * D
    decoder = 8 * (12 * width**2 * tokens + 2 * width * tokens**2) + D * width * seen
    # The last block's queries, projection and MLP see the 64 masked patches alone.
    decoder -= 9 * width**2 * (tokens - 64)
    decoder += 64 * width * 768
    by_hand = 6 * 2 * (encoder + decoder)  # two views
    counted = cost.step_flops("base", ALONE)
    assert abs(counted / by_hand - 1) < 0.03
