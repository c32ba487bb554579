"""Market-1501's attributes as downloaded → CSV files, which finetune_par.py reads.

  python formats/market_attributes.py mat=market_attribute.mat \\
         data=Market-1501-v15.09.15 out=market_attributes

Inputs   mat: market_attribute.mat of Lin et al. (vana77/Market-1501_Attribute): struct
         market_attribute of train and test, each with image_index (person, as in the pictures'
         names) and 27 attributes, one value a person. data: the unpacked Market-1501.
Outputs  in `out`: attributes_train.csv, of bounding_box_train, and attributes_test.csv, of
         bounding_box_test as in the authors' evaluation: without queries, distractors and junk.
         Give `data` as images= of finetune_par.py.

The file's 1 and 2 become 0 and 1. 1 is: a bag, backpack, handbag or hat is carried; a colour is
there; gender: female; hair: long; up: short sleeves; down: short; clothes: trousers, not a dress.
age becomes age_young, age_teenager, age_adult and age_old.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
import numpy as np

from formats.market import read_market
from plumbing.config import Key, read_config
from plumbing.errors import UserError, reading, run_stage
from plumbing.files import new_files, read_mat, write_csv

AGES = ("age_young", "age_teenager", "age_adult", "age_old")  # 1, 2, 3, 4
KEYS = dict(
    mat=Key(None, "market_attribute.mat"),
    data=Key(None, "the unpacked Market-1501-v15.09.15"),
    out=Key("market_attributes", "folder to write attributes_train.csv and attributes_test.csv to"),
)


def main():
    cfg = read_config(KEYS, __doc__)
    if not (cfg.mat and cfg.data):
        raise UserError("mat= and data= are both needed: market_attribute.mat and Market-1501")
    files = new_files(cfg.out, ("attributes_train.csv", "attributes_test.csv"), cfg.data)
    names, splits = read_market_attributes(cfg.mat)
    tables = []
    for part, folder in (("train", "bounding_box_train"), ("test", "bounding_box_test")):
        pictures, rows = read_market(Path(cfg.data) / folder), []
        for name, person in zip(pictures.files.tolist(), pictures.ids.tolist()):
            if person > 0:
                if person not in splits[part]:
                    where = f"{cfg.data}/{folder}/{name.decode()}"
                    raise UserError(f"{cfg.mat} has no person {person} in {part}, as in {where}")
                rows.append([f"{folder}/{name.decode()}", *splits[part][person]])
        tables.append(rows)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, rows in zip(files, tables):
        write_csv(file, ["image", *names], rows)
    print(f"{len(names)} attributes of {len(tables[0])} and {len(tables[1])} pictures in", *files)
    print(f"images= of finetune_par.py: {cfg.data}")


def read_market_attributes(path):
    """→ (names of the 30 attributes, {"train", "test": {person: 30 values of 0 or 1}})."""
    names, splits = None, {}
    with reading(path, "Market-1501's attributes") as place:
        document = read_mat(path)["market_attribute"]
        for part in ("train", "test"):
            place.at = part
            columns = {name: np.atleast_1d(column) for name, column in document[part].items()}
            people = [int(person) for person in columns.pop("image_index")]
            # The order of train: test has another one in some copies of the file.
            names = names or [name for name in columns if name != "age"]
            values = np.stack([columns.pop(name) for name in names], 1)
            age = columns.pop("age")
            if columns or len(people) != len(values):
                raise ValueError(f"{len(people)} people, further fields {list(columns)}")
            if not (np.isin(values, (1, 2)).all() and np.isin(age, (1, 2, 3, 4)).all()):
                raise ValueError("values are 1 or 2, of age 1 to 4; others stand there")
            rows = np.concatenate([values - 1, age[:, None] == np.arange(1, 5)], 1).astype(int)
            splits[part] = dict(zip(people, rows.tolist()))
    return [*names, *AGES], splits


if __name__ == "__main__":
    run_stage(main)
