"""Picture files: their names, the check at the start of a run, one picture as RGB."""

import contextlib
import hashlib
import io
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image

from plumbing import tars
from plumbing.errors import UserError, and_more, in_a_line, reading
from plumbing.files import regular, write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Of palettes, of large pictures: what matters is an error.
warnings.filterwarnings("ignore", module="PIL")


def picture_names(folder, below=False):
    """Sorted names of the picture files in a folder (below: and in its folders and tar files);
    UserError where there are none."""
    if not Path(folder).is_dir():
        if Path(folder).exists():
            raise UserError(f"{folder} is no folder, and no picture ({', '.join(SUFFIXES)})")
        raise UserError(f"no folder {folder}; check the keys that name folders")
    names = names_below(folder) if below else os.listdir(folder)
    shards = [n for n in names if n.lower().endswith(".tar") and not (Path(folder) / n).is_dir()]
    names = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    # With loose pictures beside or below it, a tar is often the download that held them: they would
    # count twice.
    loose = {parent for name in names for parent in Path(name).parents}
    for tar in shards if below else ():
        if Path(tar).parent in loose:
            if os.environ.get("RANK", "0") == "0":
                print(f"{folder}/{tar} is not read: it lies with loose pictures", file=sys.stderr)
        else:
            inside = tars.member_names(os.path.join(folder, tar))
            names += [f"{tar}/{name}" for name in inside if is_picture(name)]
    if not names:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return sorted(names)


def names_below(folder):
    """Everything below a folder, also behind links to folders, each of which is entered once."""
    names, entered = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()  # a link back to where the walk has been
            continue
        entered.add(real)
        base = os.path.relpath(place, folder)
        names += [name if base == "." else f"{base}/{name}" for name in folders + files]
    return names


def is_picture(name):
    """Is a file in a tar a picture to read? A set's maps of body parts lie beside its pictures."""
    return Path(name).suffix.lower() in SUFFIXES and not name.endswith(".parts.png")


def pictures_at(path):
    """A folder of pictures or tars, or one picture → (folder, sorted names of all below it)."""
    if Path(path).is_file() and Path(path).suffix.lower() in SUFFIXES:
        return str(Path(path).parent), [Path(path).name]
    return str(path), picture_names(path, below=True)


def as_bytes(folder, names):
    """File names below `folder` → (N,) bytes; UserError for one that is no UTF-8: no list could
    hold it."""
    try:
        return np.array([name.encode() for name in names], dtype=np.bytes_)
    except UnicodeEncodeError as error:
        name = os.path.join(folder, error.object)
        raise UserError(f"{name!r}: this name is not UTF-8; rename the file") from None


def load_picture(folder, name, size=None):
    """RGB PIL picture; UserError names a file that is missing, damaged or of another size than its
    annotation says."""
    path = os.path.join(folder, name.decode() if isinstance(name, bytes) else name)
    with reading(path, "a picture"), opened(path) as file:
        picture = Image.open(file)
        if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would make all white
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        picture.load()
    if size is not None and picture.size != tuple(size):
        said = tuple(map(int, size))
        raise UserError(f"{path} is {picture.size} but its annotation says {said}")
    return picture


def opened(path):
    """A picture's file, or what a tar holds of it, to read from."""
    inside = tars.split(path)
    return io.BytesIO(tars.read(*inside)) if inside else open(regular(path), "rb")


# ------------------------------------------------------------------ the check at the start of a run


def refuse_bad_pictures(folder, files, source=None, todo="mend or remove it"):
    """UserError names the first missing or damaged picture. See find_bad_pictures."""
    bad = find_bad_pictures(folder, files, source=source)
    if bad:
        name, reason = bad[0]
        what = f"{os.path.join(folder, name)} is {reason}{and_more(bad)}"
        raise UserError(f"{what}; {todo}")


def find_bad_pictures(folder, files, sizes=None, source=None):
    """[(name, reason)] of missing, empty or truncated pictures; with sizes (N, 2) also of those of
    another w, h.

    files: (N,) bytes, paths below `folder`; each is looked at once. All ranks call this: they share
    the work (machines hold the same pictures), and each gets the whole list.
    source: the file that names the pictures. Where its folder can be written, `.NAME.checked.json`
    there keeps what was found: until `source` has another size or time, a start looks again only at
    pictures that were bad. One that goes bad later is named when it is loaded.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first_row = {}
    for row, name in enumerate(files.tolist()):
        first_row.setdefault(name, row)
    memory = read_memory(source) if source else {"checked": {}}
    about = os.path.realpath(folder).encode() + files.tobytes()
    about += b"" if sizes is None else sizes.tobytes()
    key = hashlib.sha256(about).hexdigest()
    # Rank 0's memory counts, so that all share out the same pictures.
    known = on_all_ranks([memory["checked"].get(key)])[0]
    names = [name for name in first_row if known is None or name.decode() in known]

    def look(names):
        faults = []
        for name in names:
            size = None if sizes is None else tuple(sizes[first_row[name]].tolist())
            faults.append((name.decode(), picture_fault(os.path.join(folder, name.decode()), size)))
        return [(name, reason) for name, reason in faults if reason]

    own = [names[i] for i in np.array_split(np.arange(len(names)), world)[rank]]
    with ThreadPoolExecutor(16) as pool:  # pictures not in the cache wait for the disk together
        parts = list(pool.map(look, (own[i : i + 256] for i in range(0, len(own), 256))))
    bad = on_all_ranks([fault for part in parts for fault in part])
    if source and rank == 0 and known is None:
        memory["checked"][key] = [name for name, _ in bad]
        # Where it cannot be written, the next start looks at all of them again.
        with contextlib.suppress(OSError, UserError):
            write_json(memory_path(source), memory)
    return bad


def on_all_ranks(rows):
    """The lists of all ranks as one, in rank order; common.gather_objects. Not for tensors."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def memory_path(source):
    return Path(source).with_name(f".{Path(source).name}.checked.json")


def read_memory(source):
    """What earlier starts found in the pictures of `source`; nothing if the file has changed.

    → {"bytes", "time_ns": of source, "checked": {key of pictures and folder: names of bad ones}}.
    """
    about = os.stat(source)
    fresh = {"bytes": about.st_size, "time_ns": about.st_mtime_ns, "checked": {}}
    try:
        old = json.loads(memory_path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return fresh
    return old if isinstance(old, dict) and fresh == old | {"checked": {}} else fresh


def picture_fault(path, size=None):
    """What is wrong with a picture file, or None. size: (w, h) it must have.

    Only its header and its last bytes are looked at; a file without its end is decoded.
    """
    try:
        with opened(path) as file:
            if not (size_in_bytes := file.seek(0, 2)):
                return "empty"
            picture = Image.open(file)  # from its start
            file.seek(-min(12, size_in_bytes), 2)
            tail = file.read()
            if not (tail.endswith(b"\xff\xd9") or b"IEND" in tail):  # the end of a JPEG or a PNG
                picture.load()
    except Exception as error:  # Pillow and its plug-ins raise many kinds
        if tars.split(path):
            if isinstance(error, UserError):  # of the tar: damage inside is another error
                return f"missing ({error})"
        elif not os.path.exists(path):
            return "missing"
        return f"damaged or truncated ({in_a_line(error)})"
    if size in (None, picture.size):
        return None
    return f"{picture.size} but its annotation says {size}"
