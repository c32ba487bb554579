"""Pictures inside tar files: set/images/000012.tar/345_2.png is the member 345_2.png of 000012.tar.

A member is read where it lies, in any order; nothing is unpacked. Where the members lie is found
once, from the tar's headers, and kept: in this process as arrays, and in `.NAME.tar.members.npz`
beside the tar, if its folder can be written, until the tar has another size or time. No tar is kept
open, so threads and loaders, forked or not, share no place in a file.
"""

import contextlib
import os
import tarfile
import threading
import zipfile
from array import array
from typing import NamedTuple

import numpy as np

from plumbing.errors import UserError, reading
from plumbing.files import regular, write_npz

known = {}  # path of a tar → (its size and time, Members)
scanning = {}  # path of a tar → lock: of the threads that meet a new tar, one reads its headers


class Members(NamedTuple):
    """The n regular files of a tar: 16 bytes each and the longest name's length."""

    names: np.ndarray  # (n,) bytes, sorted; of equal names the last one counts, as for tar
    offsets: np.ndarray  # (n,) int64, where the content begins in the tar
    sizes: np.ndarray  # (n,) int64 bytes
    fault: str  # why there may be more of them than could be found, or ""


def split(path):
    """→ (path of the tar, name inside), or None where the path leads through no tar."""
    path, end = os.fspath(path), 0
    while (end := path.lower().find(".tar/", end) + 5) > 4:
        if not os.path.isdir(path[: end - 1]):  # folders may have such names
            return path[: end - 1], path[end:]
    return None


def read(tar, name):
    """The bytes of a member. UserError: no tar is there, it is none, or it holds no such member."""
    found, wanted = members(tar), stored(name)
    row = int(np.searchsorted(found.names, wanted, side="right")) - 1
    if row < 0 or found.names[row] != wanted:
        why = f", which is {found.fault}" if found.fault else ""
        raise UserError(f"no {name} in {tar}{why}")
    with open(tar, "rb") as file:
        file.seek(found.offsets[row])
        return file.read(found.sizes[row])


def member_names(tar):
    """Sorted names of the regular files in a tar; UserError where some may be missing."""
    found = members(tar)
    if found.fault:
        raise UserError(f"{tar} is {found.fault}; copy or make it again")
    return [os.fsdecode(name) for name in found.names.tolist()]


def stored(name):
    """A name as it is compared: `tar cf x.tar .` writes ./a.jpg."""
    return os.fsencode(name.removeprefix("./"))


def members(tar):
    """Where a tar's members lie → Members, from memory wherever the tar is the same."""
    try:
        about = os.stat(tar)
    except OSError as error:
        raise UserError(f"cannot read {tar}: {error.strerror}") from None
    stamp = about.st_size, about.st_mtime_ns
    if known.get(tar, (None,))[0] != stamp:
        with scanning.setdefault(tar, threading.Lock()):
            if known.get(tar, (None,))[0] != stamp:
                known[tar] = stamp, remembered(tar, stamp) or scanned(tar, stamp)
    return known[tar][1]


def memory_path(tar):
    folder, name = os.path.split(tar)
    return os.path.join(folder, f".{name}.members.npz")


def remembered(tar, stamp):
    """What an earlier run found in this tar, or None."""
    missing_or_broken = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    with contextlib.suppress(*missing_or_broken), np.load(memory_path(tar)) as old:
        if tuple(old["stamp"].tolist()) == stamp:
            return Members(old["names"], old["offsets"], old["sizes"], str(old["fault"]))
    return None


def scanned(tar, stamp):
    """Read all headers of a tar, and keep what was found beside it."""
    found = read_headers(tar)
    # Where it cannot be written, the next process reads the headers again.
    with contextlib.suppress(OSError, UserError):
        arrays = dict(stamp=np.array(stamp)) | found._asdict()
        write_npz(memory_path(tar), arrays, durable=False)
    return found


def read_headers(tar):
    names, places, links, fault = [], array("q"), [], ""
    # Members are often shorter than this buffer: then the headers come in one sequential read,
    # which a network's file system needs.
    with reading(tar, "a tar file"), open(regular(tar), "rb", buffering=1 << 18) as file:
        size = os.fstat(file.fileno()).st_size
        headers = tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", encoding="utf-8")
        with headers, contextlib.suppress(tarfile.TarError):  # a broken end: see below
            for member in headers:
                headers.members = []  # else it keeps a kilobyte of each
                if member.islnk():  # a further name of a member
                    links.append((stored(member.name), stored(member.linkname)))
                elif member.isreg() and not member.issparse():
                    if member.offset_data + member.size > size:
                        break
                    names.append(stored(member.name))
                    places.extend((member.offset_data, member.size))
        # A whole tar ends in blocks of zeros. Without them tarfile stops too, and says nothing.
        file.seek(headers.offset)
        if file.read(512) != bytes(512):
            fault = f"cut off or damaged at byte {min(headers.offset, size)}"
    rows = {name: row for row, name in enumerate(names)} if links else {}
    for name, target in links:
        if target in rows:
            names.append(name)
            places.extend(places[2 * rows[target] : 2 * rows[target] + 2])
    names = np.array(names, dtype=np.bytes_)
    order = names.argsort(kind="stable")
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2)[order].T.copy()
    return Members(names[order], offsets, sizes, fault)
