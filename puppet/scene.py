"""Where the puppet stands: light, ground, shadow, something in front; and the camera's faults.

Legend: H, W picture · c a Canvas. Lengths are shares of H or W: any size shows the same place.
"""

import numpy as np

from plumbing.seeds import CAMERA, SCENE, rng_of
from puppet.body import L_ANK, L_HEEL, L_HIP, L_TOE, R_HEEL, R_HIP, R_TOE
from puppet.canvas import patch, texture_bank

FAMILIES = ["street", "wall", "grass", "indoor", "plaza", "plain"]


def sample_scenes(seed, keys, camera=None):
    """keys (B, …) whole numbers → B scenes; scene i depends on (seed, keys[i]) only.

    camera (B,) whole numbers: pictures of one camera share, nearly, background, light and cast.
    """
    out = []
    for i, key in enumerate(keys):
        rng = rng_of(SCENE, seed, *np.atleast_1d(key))
        fixed = rng if camera is None else rng_of(CAMERA, seed, camera[i])
        out.append(sample_scene(rng, fixed))
    return out


def sample_scene(rng, fixed):
    """One scene. `fixed` draws what belongs to the place, `rng` what belongs to the moment."""
    s = dict(family=FAMILIES[fixed.integers(len(FAMILIES))])
    s["horizon"] = float(fixed.uniform(0.3, 0.75))
    # Most places are greyish.
    for name, low, high in (("wall", 0.3, 0.9), ("ground", 0.3, 0.72), ("far", 0.2, 0.8)):
        colour = 0.13 * fixed.uniform(0, 1, 3) + 0.87 * fixed.uniform(low, high)
        s[name] = colour.astype(np.float32)
    n, m = int(fixed.integers(2, 7)), int(fixed.integers(0, 5))
    rects = fixed.uniform(size=(n, 8)) * (1.3, 1.2, 0.5, 0.5, 1, 1, 1, 1)
    rects = rects + (-0.2, -0.2, 0.1, 0.1, 0, 0, 0, 0)
    # Columns: x, y, width, height, three of colour, lightness.
    rects[:, 4:7] = 0.35 * rects[:, 4:7] + 0.65 * rects[:, 7:]
    blobs = fixed.uniform(size=(m, 8)) * (1, 1, 0.2, 0.2, 1, 1, 1, 1)
    blobs = blobs + (0, 0, 0.06, 0.06, 0, 0, 0, 0)
    blobs[:, 4:7] = 0.3 * blobs[:, 4:7] + 0.6 * blobs[:, 7:]
    s["rects"], s["blobs"], s["panes"] = rects, blobs, fixed.uniform(0.6, 1.6, 2)
    s["grain"] = float(fixed.uniform(0.05, 0.35))
    s["cast"] = np.clip(fixed.normal(1, 0.05, 3), 0.86, 1.14).astype(np.float32)
    s["gain"] = float(np.clip(fixed.normal(1.0, 0.12) * rng.normal(1, 0.05), 0.65, 1.3))
    # Light from above, any side, and from our side.
    angle, height = fixed.uniform(-np.pi, 0), fixed.uniform(0.4, 0.9)
    light = np.array([np.cos(angle) * 0.8, np.sin(angle) * 0.6 - 0.2, -height])
    s["light"] = (light / np.sqrt((light**2).sum())).astype(np.float32)
    s["ambient"] = float(fixed.uniform(0.5, 0.8))
    s["shift"] = rng.integers(0, 4096, 4)  # origin of the textures and of the noise
    s["move"] = rng.normal(0, 0.04 if fixed is not rng else 0.0, 2)
    s["blur"] = float(max(0, rng.normal(0.3, 0.35)))  # px at a height of 128
    s["noise"] = float(abs(rng.normal(0, 0.018)))
    s["occluder"] = None
    if rng.random() < 0.18:
        kind = ("pole", "low", "bush", "side")[rng.integers(4)]
        where = float(rng.uniform(0.15, 0.85))
        colour = (0.25 * rng.random(3) + 0.6 * rng.random()).astype(np.float32)
        s["occluder"] = kind, where, float(rng.uniform(0.06, 0.2)), colour
    return s


def backdrop(scene, x, y, soft, hard):
    """→ (3, H, W): what is above the horizon, a wall, house front or sky, and things before it."""
    (H, W), (my, mx), family = soft.shape, scene["move"], scene["family"]
    horizon = np.float32(scene["horizon"])
    wall, far = scene["wall"][:, None, None], scene["far"][:, None, None]
    grain = np.float32(scene["grain"])
    upper = wall * (1.1 - 0.25 * y + 0.12 * grain * soft + 0.06 * grain * hard)
    if family == "wall":  # bricks or tiles
        rows = y * np.float32(20 * scene["panes"][0])
        stones = x * np.float32(9 * scene["panes"][0]) + 0.5 * (np.floor(rows) % 2)
        tone = np.sin(np.floor(rows) * 12.9 + np.floor(stones) * 78.2) * 0.06  # no two bricks alike
        joint = (np.abs(rows % 1 - 0.5) > 0.42) | (np.abs(stones % 1 - 0.5) > 0.45)
        upper = upper * (1 + tone - (0.1 + 0.6 * grain) * joint)
    elif family == "street":  # a house front with windows
        u = (x * np.float32(6 * scene["panes"][0])) % 1
        v = (y * np.float32(5 * scene["panes"][1])) % 1
        window = (np.abs(u - 0.5) < 0.24) & (np.abs(v - 0.5) < 0.32)
        upper = upper + window * (far * (0.6 + 0.3 * v) - upper) * np.float32(0.85)
    elif family == "grass":
        sky = np.array([0.60, 0.68, 0.74], np.float32)[:, None, None]
        upper = sky * (1.15 - 0.2 * y) * (1 + 0.06 * soft)
    if family in ("street", "plaza", "indoor"):
        for rx, ry, rw, rh, *tint, bright in scene["rects"]:  # doors, pictures, cars, furniture
            r0, r1 = (int(np.clip((v * horizon - my) * H, 0, H)) for v in (ry, ry + rh + 0.15))
            c0, c1 = (int(np.clip((v - mx) * H, 0, W)) for v in (rx * W / H, rx * W / H + rw * 0.7))
            tint = np.array(tint, np.float32)[:, None, None]
            upper[:, r0:r1, c0:c1] = tint * (1 + 0.08 * soft[r0:r1, c0:c1])
            if bright > 0.5:  # a pane inside
                a, b = (r1 - r0) // 6, (c1 - c0) // 6
                inside = slice(r0 + a, r1 - a)
                upper[:, inside, c0 + b : c1 - b] = tint * 0.55 + 0.35 * (1 - y[inside])
    return upper


def draw_background(scene, H, W):
    """The place without people → (3, H, W) float32."""
    fractal, fine, _ = texture_bank()
    zoom, (sy, sx, *_), (my, mx) = 256 / H, scene["shift"], scene["move"]
    y = (np.arange(H, dtype=np.float32)[:, None] + 0.5) / H + np.float32(my)
    x = (np.arange(W, dtype=np.float32)[None] + 0.5) / H + np.float32(mx)
    family, horizon = scene["family"], np.float32(scene["horizon"])
    grain = np.float32(scene["grain"])
    soft, hard = patch(fractal, sy, sx, H, W, zoom), patch(fine, sx, sy, H, W, zoom)
    ground, upper = scene["ground"][:, None, None], backdrop(scene, x, y, soft, hard)
    lower = ground * (1.05 - 0.3 * (1 - y) + (0.02 + 0.12 * grain) * hard + 0.03 * soft)
    if family == "grass":
        green = np.array([0.26, 0.38, 0.14], np.float32)[:, None, None]
        lower = (0.35 * ground + green) * (0.85 + 0.09 * hard + 0.07 * soft)
    if family in ("plaza", "indoor"):  # slabs in perspective
        depth = 0.25 / np.maximum(y - horizon + 0.06, 0.03)
        joint = np.abs((depth * 4) % 1 - 0.5) > 0.44
        joint = joint | (np.abs(((x - 0.25) * depth * 5) % 1 - 0.5) > 0.45)
        lower = lower * (1 - 0.2 * joint)
    sharp = np.float32(3 if family == "plain" else H)
    image = upper + np.clip((y - horizon) * sharp + 0.5, 0, 1) * (lower - upper)
    if family == "indoor":  # skirting board
        image = image * (1 - 0.35 * (np.abs(y - horizon) < 0.012))
    leaf = np.array([0.75, 1.05, 0.55] if family != "plaza" else [1, 1, 1], np.float32)
    # Trees and bushes.
    blobs = scene["blobs"] if family in ("grass", "street", "plaza") else ()
    for bx, by, rx, ry, *colour, _ in blobs:
        ex, top = (x - np.float32(bx * W / H)), np.float32(horizon * (0.25 + 0.7 * by))
        tint = (np.array(colour, np.float32) * leaf)[:, None, None]
        if family == "grass":
            trunk = (np.abs(ex) < 0.015) & (y > top) & (y < horizon + 0.03)
            bark = np.array([0.25, 0.18, 0.12], np.float32)[:, None, None]
            image = image + trunk * (bark - image)
        d = (ex / np.float32(rx)) ** 2 + ((y - top) / np.float32(ry)) ** 2 + 0.3 * soft
        shaded = tint * (0.75 + 0.10 * hard - (y - top))
        image = image + np.clip((1 - d) * 3, 0, 1) * (shaded - image)
    return image.astype(np.float32)


def draw_occluder(c, scene):
    """Something nearer than the person; what it covers is background in the part map."""
    kind, where, width, colour = scene["occluder"]
    fractal, fine, _ = texture_bank()
    y = (np.arange(c.H, dtype=np.float32)[:, None] + 0.5) / c.H
    x = (np.arange(c.W, dtype=np.float32)[None] + 0.5) / c.W
    soft = patch(fractal, *scene["shift"][2:], c.H, c.W, 256 / c.H)
    hard = patch(fine, 7, 11, c.H, c.W, 256 / c.H)
    if kind == "pole":
        d = np.abs(x - where) - width * 0.5
    elif kind == "low":  # a car, a table, a wall in front
        d = (1 - width * 1.4) - y
    elif kind == "side":
        d = (x - width) if where < 0.5 else (1 - width) - x
    else:  # a bush
        d = np.hypot(x - where, (y - 1.05) * 1.6) - width * 2.2 + 0.04 * soft
    light = 0.9 + 0.05 * hard - (0.5 * np.abs(x - where) if kind == "pole" else 0.0)
    d = d * np.float32(c.W if kind in ("pole", "side") else c.H)
    c.paint(slice(None), slice(None), d, colour[:, None, None] * light, 0)


def draw_ground(c, scene, xy, ppm, seat):
    """Contact shadow under the lowest points and, for a sitting body, something to sit on."""
    y, x = np.arange(c.H, dtype=np.float32)[:, None], np.arange(c.W, dtype=np.float32)[None]
    floor, s = xy[:, 1].max() + 0.02 * ppm[L_ANK], ppm[L_ANK]
    if seat:
        hip = (xy[L_HIP] + xy[R_HIP]) / 2
        low, high = (hip[0] - 0.26 * s, hip[1] + 0.05 * s), (hip[0] + 0.26 * s, floor - 0.02 * s)
        rows, columns, bx, by = c.window(low, high)
        tint = scene["wall"][::-1, None, None] * np.float32(0.62)
        side = 1 - 0.35 * np.abs(bx - hip[0]) / np.float32(0.26 * s)
        side = side - 0.25 * (by > hip[1] + 0.12 * s)
        c.paint(rows, columns, np.float32(-1), tint * side, None)
    if floor > c.H * 1.2:
        return
    for toe, heel in ((L_TOE, L_HEEL), (R_TOE, R_HEEL)):
        mx, my = (xy[toe] + xy[heel]) / 2
        fade = float(np.exp(-(((floor - my) / (0.2 * s)) ** 2)))
        dx = (x - np.float32(mx + 0.08 * s)) / np.float32(0.24 * s)
        dy = (y - np.float32(floor - 0.02 * s)) / np.float32(0.055 * s)
        c.image *= 1 - 0.5 * fade * np.exp(-(dx**2)) * np.exp(-(dy**2))


def expose(c, scene):
    """Light, colour cast, blur, noise → uint8 (H, W, 3)."""
    image = c.image * (scene["cast"] * np.float32(scene["gain"]))[:, None, None]
    sigma = scene["blur"] * c.H / 128
    # [w, 1 - 2w, w] twice over; the variances 2w add up to sigma².
    for _ in range(int(np.ceil(sigma**2 / 0.5))):
        w = np.float32(sigma**2 / np.ceil(sigma**2 / 0.5) / 2)
        for _ in "yx":
            padded = np.concatenate([image[:, :1], image, image[:, -1:]], 1)
            image = (image + w * (padded[:, 2:] + padded[:, :-2] - 2 * image)).swapaxes(1, 2)
    noise = patch(texture_bank()[2], scene["shift"][0], scene["shift"][1], c.H, c.W, 1)
    image = image + np.float32(scene["noise"]) * noise
    image = np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)
    return image.astype(np.uint8).transpose(1, 2, 0)
