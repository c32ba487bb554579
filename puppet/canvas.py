"""What the puppet is drawn with: canvas, textures, soft shaded shapes with a signed distance in px.

Legend: H, W picture · h, w the patch that a shape covers, its bounding box: no other is touched.
"""

from functools import lru_cache

import numpy as np


@lru_cache
def texture_bank():
    """Tiling noise, always the same: fractal and fine (512, 512), white (3, 512, 512); 0 ± 1."""
    rng = np.random.default_rng(2404)
    f = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512)[None]) * 512
    spectrum = np.fft.fft2(rng.standard_normal((512, 512)))
    banks = []
    for power, low in ((1.5, 4), (0.9, 20)):
        field = np.fft.ifft2(spectrum * np.where(f < low, 0, np.maximum(f, 1) ** -power)).real
        banks.append((field / field.std()).astype(np.float32))
    return banks[0], banks[1], rng.standard_normal((3, 512, 512)).astype(np.float32)


def patch(field, y, x, h, w, zoom):
    """An (h, w) window of a tiling field, `zoom` field pixels per picture pixel."""
    rows = (np.arange(h) * zoom + y).astype(int) & 511
    columns = (np.arange(w) * zoom + x).astype(int) & 511
    return field[..., rows[:, None], columns]


class Canvas:
    """One picture in the making: image (3, H, W) float32 in [0, 1], parts (H, W) uint8, light."""

    def __init__(self, image, scene):
        self.image, self.parts = image, np.zeros(image.shape[1:], np.uint8)
        self.H, self.W = image.shape[1:]
        self.light, self.ambient = scene["light"], scene["ambient"]

    def window(self, low, high):
        """Bounding box in px → rows, columns, x (1, w), y (h, 1); outside of it w or h is 0."""
        x0, y0 = max(0, int(low[0] - 1.5)), max(0, int(low[1] - 1.5))
        x1, y1 = max(x0, min(self.W, int(high[0] + 2.5))), max(y0, min(self.H, int(high[1] + 2.5)))
        x = np.arange(x0, x1, dtype=np.float32)[None]
        y = np.arange(y0, y1, dtype=np.float32)[:, None]
        return slice(y0, y1), slice(x0, x1), x, y

    def shade(self, nx, ny):
        """(h, w) brightness of a surface whose normal (nx, ny, -nz) points towards us."""
        nz = np.sqrt(np.maximum(0, 1 - nx * nx - ny * ny))
        lit = nx * self.light[0] + ny * self.light[1] - nz * self.light[2]
        return (self.ambient + (1.12 - self.ambient) * np.maximum(lit, 0)) * (0.76 + 0.24 * nz)

    def paint(self, rows, columns, distance, colour, part):
        """Blend colour (3, 1 or h, 1 or w) in where the distance (h, w) in px is negative.

        part: value (or map of values) of the part map where half a pixel is covered; None: as is.
        """
        alpha = np.clip(0.5 - distance, 0, 1)
        where = self.image[:, rows, columns]
        where += alpha * (colour - where)
        if part is not None:
            np.copyto(self.parts[rows, columns], part, where=alpha > 0.5)


def segment(x, y, bone):
    """Tapered capsule, bone = (a, b, ra, rb, bump) px: radius ra at a, rb at b, `bump` more midway.

    → distance (h, w) px, u (h, w) 0..1 along, (qx, qy) offset from the axis, radius.
    """
    a, b, ra, rb, bump = bone
    bx, by = float(b[0] - a[0]), float(b[1] - a[1])
    length2 = max(bx * bx + by * by, 1e-6)
    dx, dy = x - np.float32(a[0]), y - np.float32(a[1])
    u = np.clip(dx * np.float32(bx / length2) + dy * np.float32(by / length2), 0, 1)
    qx, qy = dx - u * np.float32(bx), dy - u * np.float32(by)
    far = np.sqrt(qx * qx + qy * qy + np.float32(1e-6))
    r = np.float32(ra) + u * np.float32(rb - ra)
    if bump:
        r = r + np.float32(4 * bump) * u * (1 - u)
    return far - r, u, qx, qy, r


def cloth(along, across, garment, per_metre):
    """Colour (3, h, w) of a garment at places in metres; stripes finer than a pixel fade."""
    rgb, second, pattern, period, origin, denim = garment
    sharp = np.float32(min(3.0, 0.45 * period * per_metre))
    k = np.float32(2 * np.pi / period)
    mix = None
    if pattern == "striped":
        mix = np.clip(0.5 + (np.sin(along * k) - 0.35) * sharp, 0, 1)
    elif pattern == "pinstriped":
        mix = np.clip(0.5 + (np.sin(across * (1.6 * k)) - 0.6) * sharp, 0, 1)
    elif pattern == "checked":
        weft, warp = (np.clip(0.5 + (np.sin(t * k) - 0.2) * sharp, 0, 1) for t in (along, across))
        mix = 0.45 * (weft + warp)
    elif pattern == "dotted":
        mix = np.clip(0.5 + (np.sin(along * k) * np.sin(across * k) - 0.5) * (2 * sharp), 0, 1)
    fractal, fine, _ = texture_bank()
    i = (along * 260 + (origin[0] + 4096)).astype(np.int32) & 511
    j = (across * 420 + (origin[1] + 4096)).astype(np.int32) & 511
    folds = 1 + 0.06 * fractal[i, j]
    if denim:
        folds = folds + 0.05 * fine[j, i]
    out = rgb[:, None, None] * folds
    if mix is not None:
        out = out + (mix * folds) * (second - rgb)[:, None, None]
    return out


def limb(c, bone, colour, part, s, cover=(0.0, 1.0)):
    """Draw a capsule, bone = (a, b, ra, rb) or (a, b, ra, rb, bump): ends in px, radii in metres.

    colour: an RGB (3,), or a garment tuple for `cloth`. s: px per metre. cover: how many metres
    down the limb its texture starts, and the covered share of the way (a sleeve).
    """
    a, b, ra, rb, bump = (*bone, 0.0)[:5]
    along0, end = cover
    ra, rb, bump = ra * s, rb * s, bump * s
    if end < 1:
        b, rb = a + (b - a) * end, ra + (rb - ra) * end
    r = max(ra, rb) + bump
    rows, columns, x, y = c.window(np.minimum(a, b) - r, np.maximum(a, b) + r)
    d, u, qx, qy, r = segment(x, y, (a, b, ra, rb, bump))
    bx, by = b - a
    length = max(np.hypot(bx, by), 1e-3)
    side = np.float32(by / length), np.float32(-bx / length)  # unit vector across the limb
    across = qx * side[0] + qy * side[1]
    # Shaded across the limb only: round ends would cut elbows and knees into sausages.
    roll = np.clip(across / r, -1, 1)
    light = c.shade(roll * side[0], roll * side[1])
    if isinstance(colour, tuple):
        along = u * np.float32(length / s) + np.float32(along0)
        rgb = cloth(along, across / np.float32(s), colour, s) * light
    else:
        rgb = colour[:, None, None] * light
    c.paint(rows, columns, d, rgb, part)


def body_shape(c, segments, per_metre, blend=0.012):
    """Smooth union of capsules (a, b px; ra, rb, bump m) → rows, columns, x, y, distance, shade."""
    points = np.array([p for s in segments for p in s[:2]])
    r = max(max(s[2], s[3]) for s in segments) * per_metre + 1
    rows, columns, x, y = c.window(points.min(0) - r, points.max(0) + r)
    k = np.float32(blend * per_metre)
    total = 0.0
    for a, b, ra, rb, bump in segments:
        d = segment(x, y, (a, b, ra * per_metre, rb * per_metre, bump * per_metre))[0]
        total = total + np.exp(np.clip(d * (-1 / k), -60, 60))
    d = -k * np.log(total)
    nx, ny = np.zeros_like(d), np.zeros_like(d)
    nx[:, 1:-1], ny[1:-1] = (d[:, 2:] - d[:, :-2]) / 2, (d[2:] - d[:-2]) / 2
    # 0 in the flat middle, 1 at the border.
    swell = np.clip(1 + d / np.float32(0.11 * per_metre), 0, 1)
    return rows, columns, x, y, d, c.shade(nx * swell, ny * swell)


def ellipsoid(c, centre, frame, semi, per_metre):
    """Ellipsoid with half-axes `semi` (m) along frame's rows: a face that is seen from any side.

    → rows, columns, distance, point on the unit sphere (left, up, front; each (h, w)), shade.
    """
    r = max(semi) * per_metre
    rows, columns, x, y = c.window(centre - r, centre + r)
    qx = (x - np.float32(centre[0])) / np.float32(per_metre)
    qy = (y - np.float32(centre[1])) / np.float32(per_metre)
    m = (frame / np.array(semi)[:, None]).astype(np.float32)
    q = [m[i, 0] * qx + m[i, 1] * qy for i in range(3)]
    a = (m[:, 2] ** 2).sum()
    b = q[0] * m[0, 2] + q[1] * m[1, 2] + q[2] * m[2, 2]
    outline = q[0] * q[0] + q[1] * q[1] + q[2] * q[2] - b * b / a  # 1 on the silhouette
    z = (-b - np.sqrt(np.maximum(0, a * (1 - outline)))) / a
    n = [q[i] + z * m[i, 2] for i in range(3)]
    f = frame.astype(np.float32)
    nx = n[0] * f[0, 0] + n[1] * f[1, 0] + n[2] * f[2, 0]
    ny = n[0] * f[0, 1] + n[1] * f[1, 1] + n[2] * f[2, 1]
    # px from the silhouette: value over gradient
    grad = [sum((q[i] - b / a * m[i, 2]) * m[i, axis] for i in range(3)) for axis in (0, 1)]
    root = np.sqrt(outline + 1e-6)
    d = (root - 1) * root / (np.sqrt(grad[0] ** 2 + grad[1] ** 2) + 1e-6) * np.float32(per_metre)
    return rows, columns, d, n[0], -n[1], -n[2], c.shade(np.clip(nx, -1, 1), np.clip(ny, -1, 1))


def mixed(a, b, weight):
    """(3,) or (3, h, w) colours blended by an (h, w) weight."""
    a = a[:, None, None] if a.ndim == 1 else a
    return a + weight * ((b[:, None, None] if b.ndim == 1 else b) - a)
