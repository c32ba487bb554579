"""Who is drawn: a person's looks, the attributes and the sentence that tell of them; the picture.

    people = sample_identities(seed, keys)    attributes(person)    sentence(person, rng)
    out = render(poses, people, scenes, (H, W))     image, keypoints, parts, joints3d, boxes

Legend: B pictures · J = 26 body points (17 COCO joints first) · H, W picture. Frame: body.py.
Every picture is a function of its own pose, person and scene only: pictures are drawn one by one (a
128 × 64 canvas stays in the processor's cache, a batch of them does not), each shape only inside
its own bounding box.
"""

import numpy as np

from plumbing.seeds import PERSON, rng_of
from puppet.body import LIMITS, choose, project
from puppet.canvas import Canvas
from puppet.person import Body, draw_person, visibility
from puppet.scene import draw_background, draw_ground, draw_occluder, expose

# ----------------------------------------------------------------------------------------- identity

# fmt: off
COLOURS = dict(
    black=(0.09, 0.09, 0.10), white=(0.94, 0.94, 0.93), gray=(0.52, 0.53, 0.54),
    red=(0.76, 0.10, 0.12), blue=(0.12, 0.27, 0.66), green=(0.15, 0.48, 0.22),
    yellow=(0.93, 0.79, 0.16), brown=(0.41, 0.26, 0.15), purple=(0.43, 0.18, 0.56),
    pink=(0.94, 0.55, 0.69), orange=(0.93, 0.46, 0.10), denim=(0.19, 0.30, 0.50),
)
HAIRS = dict(
    black=(0.07, 0.06, 0.06), brown=(0.28, 0.17, 0.10), blonde=(0.78, 0.62, 0.34),
    gray=(0.60, 0.60, 0.60), red=(0.52, 0.22, 0.09),
)
SKINS = {
    (0.96, 0.80, 0.69): 24, (0.90, 0.71, 0.57): 28, (0.80, 0.59, 0.44): 20, (0.62, 0.42, 0.29): 12,
    (0.46, 0.30, 0.21): 8, (0.36, 0.24, 0.18): 8,
}
# Frequencies are ours: every attribute common enough to be learned, clothes that go together.
UPPERS = {"t-shirt": 36, "shirt": 15, "sweater": 14, "jacket": 15, "coat": 5, "hoodie": 11}
LOWERS = (  # of men, of women
    dict(trousers=38, jeans=36, shorts=26),
    dict(trousers=20, jeans=26, leggings=16, shorts=14, skirt=24),
)
UP_COLOURS = dict(black=15, white=15, gray=10, red=11, blue=11, green=8, yellow=7, brown=6)
UP_COLOURS |= dict(purple=5, pink=6, orange=6)
DOWN_COLOURS = dict(black=24, white=12, gray=15, blue=12, green=8, brown=10, red=7, pink=5)
DOWN_COLOURS |= dict(yellow=3, purple=4)
PATTERNS = dict(plain=48, striped=16, checked=11, dotted=7, logo=12, pinstriped=6)
# fmt: on


def colour_of(rng, name, table=COLOURS):
    """Jittered float32 (3,) RGB in [0, 1] of a palette name: lightness varies, hue stays."""
    rgb = np.array(table[name])
    rgb = rgb + rng.uniform(0, 0.22) * (rgb.mean() - rgb) if np.ptp(rgb) > 0.1 else rgb
    rgb = rgb * rng.uniform(0.82, 1.08) + rng.normal(0, 0.01, 3)
    return np.clip(rgb, 0.03, 0.97).astype(np.float32)


def sample_identities(seed, keys):
    """keys (B, …) whole numbers → B people; person i depends on (seed, keys[i]) only."""
    return [sample_person(rng_of(PERSON, seed, *np.atleast_1d(key))) for key in keys]


def sample_person(rng):
    """One appearance: names for the words, `*_rgb` float32 (3,) and shape for the picture."""
    p = dict(female=bool(rng.random() < 0.5))
    women = p["female"]
    p["stout"] = float(np.clip(rng.normal(0.94 if women else 1.0, 0.1), 0.78, 1.3))
    skin = np.array(choose(rng, SKINS)) + rng.normal(0, 0.02, 3)
    p["skin"] = np.clip(skin, 0, 1).astype(np.float32)
    p["hair"] = choose(rng, dict(long=72, short=28) if women else dict(long=8, short=80, bald=12))
    p["hair_colour"] = choose(rng, dict(black=40, brown=30, blonde=14, gray=10, red=6))
    p["beard"] = bool(not women and rng.random() < 0.25)
    p["glasses"] = choose(rng, dict(none=76, glasses=16, sunglasses=8))
    p["hat"] = choose(rng, {"none": 76, "cap": 12, "beanie": 7, "sun hat": 5})
    p["hat_colour"] = choose(rng, UP_COLOURS)
    p["upper"] = choose(rng, UPPERS | dict(blouse=8 * women))
    p["sleeves"] = "short" if p["upper"] == "t-shirt" else "long"
    if p["upper"] in ("shirt", "blouse") and rng.random() < 0.5:
        p["sleeves"] = "short"
    p["upper_colour"] = choose(rng, UP_COLOURS)
    p["upper_pattern"] = "plain" if p["upper"] == "coat" else choose(rng, PATTERNS)
    second = dict(white=3, black=2, gray=1, blue=2, red=2)
    p["upper_second"] = choose(rng, second | {p["upper_colour"]: 0})
    p["open_front"] = bool(p["upper"] in ("jacket", "coat") and rng.random() < 0.5)
    p["inner"] = choose(rng, dict(white=1, gray=1, black=1))
    p["lower"] = choose(rng, LOWERS[women])
    jeans = dict(blue=70, black=20, gray=10)
    p["lower_colour"] = choose(rng, jeans if p["lower"] == "jeans" else DOWN_COLOURS)
    skirt = p["lower"] == "skirt"
    patterns = dict(plain=55, checked=20, striped=15, dotted=10)
    p["lower_pattern"] = choose(rng, patterns) if skirt else "plain"
    p["lower_second"] = "black" if p["lower_colour"] == "white" else "white"
    p["lower_long"] = bool(rng.random() < 0.35) if skirt else p["lower"] != "shorts"
    p["shoes"] = choose(rng, dict(black=34, white=28, brown=14, gray=10, red=7, blue=7))
    p["backpack"] = bool(rng.random() < 0.22)
    bags = {"none": 66, "shoulder bag": 20, "handbag": 14}
    p["bag"] = "none" if p["backpack"] else choose(rng, bags)
    p["bag_colour"], p["bag_left"] = choose(rng, UP_COLOURS), bool(rng.random() < 0.5)
    p |= shades(p, rng)
    # The period of stripes in metres; where in the texture the folds begin.
    p["period"], p["texture"] = float(rng.uniform(0.07, 0.13)), rng.integers(0, 4096, 3)
    light = p["upper"] in ("shirt", "t-shirt", "blouse")
    p["tucked"] = bool(skirt or (light and rng.random() < 0.35))
    # Air under the clothes in metres; the hair's length.
    p["loose"], p["mane"] = float(rng.uniform(0, 0.022)), float(rng.random())
    return p


def shades(person, rng):
    """Each colour that a person's words name, as the RGB of this one piece. → {…_rgb: (3,)}"""
    p, out = person, {}
    coloured = "hat_colour upper_colour upper_second inner lower_colour lower_second shoes"
    for key in [*coloured.split(), "bag_colour"]:
        denim = key == "lower_colour" and p["lower"] == "jeans" and p[key] == "blue"
        out[key.removesuffix("_colour") + "_rgb"] = colour_of(rng, "denim" if denim else p[key])
    return out | {"hair_rgb": colour_of(rng, p["hair_colour"], HAIRS)}


# What neither `attributes` nor a sentence tells: build, skin, cut.
UNTOLD = "stout skin period texture loose mane bag_left".split()


def another_like(person, rng):
    """Another person of the same description: attributes and any sentence are true of both, but
    build, skin and the shades of the colours are his own."""
    other = sample_person(rng)
    p = person | {name: other[name] for name in UNTOLD}
    return p | shades(p, rng)


def attributes(person):
    """Binary attributes of one person, Market-1501 style names → dict[str, int]."""
    p = person
    out = dict(female=p["female"], hat=p["hat"] != "none", glasses=p["glasses"] != "none")
    out |= dict(backpack=p["backpack"], bag=p["bag"] == "shoulder bag")
    out |= dict(handbag=p["bag"] == "handbag", long_hair=p["hair"] == "long")
    out |= dict(short_sleeves=p["sleeves"] == "short")
    out |= dict(short_lower=not p["lower_long"], skirt=p["lower"] == "skirt")
    out |= dict(pattern=p["upper_pattern"] != "plain")
    out |= {f"up_{c}": p["upper_colour"] == c for c in UP_COLOURS}
    out |= {f"down_{c}": p["lower_colour"] == c for c in DOWN_COLOURS}
    return {name: int(value) for name, value in out.items()}


def sentence(person, rng):
    """A true English sentence about one person; wording and what is mentioned vary with `rng`."""
    p = person
    pick = lambda *options: options[int(rng.integers(len(options)))]  # noqa: E731
    who = pick("woman", "lady", "young woman") if p["female"] else pick("man", "guy", "young man")
    he, his = ("She", "Her") if p["female"] else ("He", "His")
    light = p["upper"] in ("t-shirt", "shirt", "blouse")
    sleeves = pick("", p["sleeves"] + "-sleeved ") if light else ""
    pattern = "" if p["upper_pattern"] in ("plain", "logo") else p["upper_pattern"] + " "
    upper = article(f"{sleeves}{pattern}{p['upper_colour']} {p['upper']}")
    upper += " with a logo on the chest" if p["upper_pattern"] == "logo" else ""
    pattern = "" if p["lower_pattern"] == "plain" else p["lower_pattern"] + " "
    lower = f"{pattern}{p['lower_colour']} {p['lower']}"
    if p["lower"] == "skirt":
        lower = article(("long " if p["lower_long"] else "short ") + lower)
    shoes = f"{p['shoes']} {pick('shoes', 'sneakers')}"
    extras = []
    if p["hat"] != "none":
        extras.append(f"wears {article(p['hat_colour'] + ' ' + p['hat'])}")
    if p["backpack"] or p["bag"] != "none":
        bag = "backpack" if p["backpack"] else p["bag"]
        extras.append(f"{pick('carries', 'has')} {article(p['bag_colour'] + ' ' + bag)}")
    if p["glasses"] != "none" and rng.random() < 0.7:
        extras.append(f"wears {p['glasses']}")
    if rng.random() < 0.6 or not extras:
        hair = f"has {p['hair']} {p['hair_colour']} hair"
        extras.append("is bald" if p["hair"] == "bald" else hair)
    extra = " and ".join(extras[i] for i in rng.permutation(len(extras)))
    return pick(
        f"A {who} wears {upper}, {lower} and {shoes}. {he} {extra}.",
        f"This {who} is dressed in {upper} and {lower}, and {extra}.",
        f"{he} {extra}. {his} clothes are {upper}, {lower} and {shoes}.",
        f"The {who} in {upper} with {lower} {extra}.",
        f"A {who} who {extra}, in {upper} and {lower}.",
    )


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def render(poses, people, scenes, size=(128, 64)):
    """Draw B pictures. people: of sample_person; scenes: of sample_scene. → dict of

    image uint8 (B, H, W, 3); keypoints float32 (B, 17, 3): px (pixel centres are whole numbers),
    visibility 2 visible, 1 hidden (behind the own body or an occluder) or completed by
    `poses_from_keypoints`, 0 outside (x = y = 0);
    parts uint8 (B, H, W): index in PARTS, hair, hat and neck are head, bags torso, an occluder is
    background;
    joints3d float32 (B, 17, 3): camera frame, metres; boxes float32 (B, 4): xywh of the person in
    the picture, before occlusion (zeros if the person is outside).
    """
    (H, W), B = size, len(poses.points)
    xy, ppm = project(poses, size)
    out = dict(image=np.zeros((B, H, W, 3), np.uint8), parts=np.zeros((B, H, W), np.uint8))
    out |= dict(keypoints=np.zeros((B, 17, 3), np.float32), boxes=np.zeros((B, 4), np.float32))
    out["joints3d"] = poses.points[:, :17].astype(np.float32)
    hips = [list(LIMITS).index(name) for name in ("l_hip", "r_hip")]
    for i in range(B):
        scene, z = scenes[i], poses.points[i, :, 2]
        c = Canvas(draw_background(scene, H, W), scene)
        draw_ground(c, scene, xy[i], ppm[i], bool((poses.angles[i, hips] > 60).all()))
        draw_person(c, Body(xy[i], ppm[i], z, poses.head[i], poses.chest[i], people[i]))
        rows, columns = np.flatnonzero(c.parts.any(1)), np.flatnonzero(c.parts.any(0))
        if len(rows):
            width, height = columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
            out["boxes"][i] = columns[0], rows[0], width, height
        if scene["occluder"]:
            draw_occluder(c, scene)
        out["image"][i], out["parts"][i] = expose(c, scene), c.parts
        v = visibility(c, xy[i], z, poses.head[i], poses.given[i])
        out["keypoints"][i] = np.concatenate([xy[i, :17] * (v > 0)[:, None], v[:, None]], 1)
    return out
