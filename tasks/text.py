"""Text-to-image retrieval: words or frozen BERT, pairs of picture and sentence, the ranking loss,
retrieval metrics.

Legend: B pairs on this rank · M pairs of all ranks · N pictures · C captions · T tokens of a
sentence, padding included · U width of a word's vector · E width of the shared space · v, t
features of picture and text · H, W picture.
"""

import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchvision.transforms import v2

from losses import full_precision, gather_rows_of, gather_with_gradient, no_autocast, world_size
from plumbing.errors import UserError
from plumbing.pictures import load_picture
from plumbing.seeds import SAMPLE, seed_all
from tasks.features import resized
from tasks.ranking import evaluate_features

# ------------------------------------------------------------------------------------ text → tokens


def not_learned(text, sentence):
    """The words of a sentence that were not learned. UserError where all are such: then all
    sentences have the same feature."""
    if not isinstance(text, Words):  # BERT reads words in pieces
        return []
    words = split_words(sentence)
    unknown = [word for word in words if word not in text.ids]
    if len(unknown) == len(words):
        few = ", ".join(text.words[:8])
        raise UserError(f'no word of "{sentence}" was in the training captions, which have {few} …')
    return list(dict.fromkeys(unknown))


class Words:
    """A vocabulary from the training captions: lower-case words. Id 0 pads, 1 is any other word."""

    width = None  # the model learns the vectors

    def __init__(self, words):
        self.words = list(words)
        self.ids = {word: i + 2 for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts, min_count):
        """Words that occur min_count times or more, most frequent first, else by alphabet."""
        counts = Counter(word for text in texts for word in split_words(text))
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [word for word, n in ordered if n >= min_count]
        if not kept:
            many = f"{min_count} times in the training captions"
            raise UserError(f"no word occurs {many}; lower min_count")
        return cls(kept)

    def __len__(self):
        return len(self.words) + 2

    def tokens(self, text, longest):
        """A sentence → ids of its first `longest` words; at least one id."""
        return [self.ids.get(word, 1) for word in split_words(text)[:longest]] or [1]

    def vectors(self, tokens, lengths):
        """The ids themselves: the model looks its vectors up."""
        return tokens


def split_words(text):
    return re.findall(r"\w+(?:'\w+)?", text.lower())


class Bert:
    """Frozen BERT: token ids → last hidden states. It is no part of the model that is trained.

    deviates from HAP: it stays in evaluation mode. HAP's train() after the first test switches its
    dropout on.
    deviates from HAP: [CLS] and [SEP] stand around every sentence. HAP leaves them out of the
    training sentences of CUHK-PEDES alone; those of its test, of ICFG-PEDES and of LGUR have them.
    """

    def __init__(self, tokenizer, model, device="cpu"):
        self.tokenizer, self.model = tokenizer, model.requires_grad_(False).to(device)
        self.width = model.config.hidden_size
        self.longest = model.config.max_position_embeddings

    def tokens(self, text, longest):
        longest = min(longest, self.longest)
        return self.tokenizer(text, truncation=True, max_length=longest)["input_ids"]

    @torch.no_grad()
    def vectors(self, tokens, lengths):
        """(B, T) ids, (B,) lengths → (B, T, U) float32; padding is masked."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state


def pad_tokens(rows):
    """Lists of token ids → (B, T) int64 padded with 0, (B,) lengths."""
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


# ----------------------------------------------------------------------------------------- pictures


class Pairs(Dataset):
    """Item (epoch, caption index) → picture uint8 (3, H, W), token ids, person, index: f(seed, …).

    tokens: C lists of ids. Pictures [HAP]: bicubic resize, a black border of `pad` px and a crop of
    the old size, mirrored with probability `flip`.
    """

    def __init__(self, split, tokens, size, pad, flip, seed):
        self.split, self.tokens, self.size, self.seed = split, tokens, size, seed
        self.augment = v2.Compose([v2.RandomCrop(size, pad), v2.RandomHorizontalFlip(flip)])

    def __getitem__(self, item):
        epoch, index = item
        seed_all(SAMPLE, self.seed, epoch, index)
        row = int(self.split.picture[index])
        picture = self.augment(picture_of(self.split.files[row], self.size)).contiguous()
        return picture, self.tokens[index], int(self.split.ids[row]), index

    def __len__(self):
        return len(self.split.picture)

    def name(self, index):
        return self.split.files[self.split.picture[index]]

    @staticmethod
    def collate(items):
        images, tokens, persons, index = zip(*items)
        return (torch.stack(images), *pad_tokens(tokens), torch.tensor(persons), list(index))


def picture_of(file, size):
    pixels = resized(load_picture("", file), size)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


# ------------------------------------------------------------------------------------------- L_rank


def ranking_loss(v, t, person, noise, margin=0.2):
    """L_rank [HAP]: each picture against a random semi-hard text, each text against such a picture.

    v, t (B, E) features (normalised here), row i of both is one pair; person (B,) int64; noise
    (2, B, M) uniform [0, 1): this rank's rows of the draw for the global batch. Columns are the
    pairs of all ranks, with gradient.
    Semi-hard for anchor i: another person's j, less alike than the own partner, but within the
    margin: s_ii − margin < s_ij < s_ii. Anchors without one count 0.
    deviates from HAP: where no anchor of the batch has one, HAP takes the last anchor's first other
    person.
    → (scalar: this rank's share of the sum over all anchors, share of anchors with a negative).
    The sum [HAP], not the mean: beside the cross-entropies the term grows with the batch.
    """
    with no_autocast(v):
        v, t = (F.normalize(x, dim=1) for x in full_precision(v, t))
        other = person[:, None] != gather_rows_of(person)  # (B, M)
        own = (v * t).sum(1, keepdim=True)  # s_ii (B, 1)
        picture_to_text = v @ gather_with_gradient(t).T  # s_ij (B, M)
        text_to_picture = t @ gather_with_gradient(v).T
        loss, found = 0.0, 0.0
        for similarity, u in ((picture_to_text, noise[0]), (text_to_picture, noise[1])):
            excess = similarity - own + margin  # (B, M)
            semi_hard = other & (excess > 0) & (similarity < own)
            # The largest of uniform numbers: one of the candidates, each equally likely.
            pick = u.masked_fill(~semi_hard, -1.0).argmax(1, keepdim=True)
            has = semi_hard.gather(1, pick)
            # L_rank = Σ_i [m − s(v_i, t_i) + s(v_i, t_j)]_+ + [m − s(t_i, v_i) + s(t_i, v_k)]_+
            # The mean of the ranks' shares is the global sum: hence a rank's sum × their number.
            loss = loss + (excess.gather(1, pick) * has).sum() * world_size()
            found = found + has.float().mean() / 2
        return loss, found


# ------------------------------------------------------------------------------------------ metrics


def retrieval_metrics(v, t, image_ids, text_ids):
    """R@1, R@5, R@10 and mAP both ways; an answer is right if it is of the same person.

    AP by rank, as in ReID (ranking.ranking_metrics). HAP's and LGUR's code takes the area under the
    precision-recall curve by trapezia, which is never larger: compare R@k with theirs, not mAP.

    v (N, E), t (C, E) float32 of length 1; ids (N,), (C,) whole numbers. → dict of fractions
    `t2i_R1` … `i2t_mAP`, and "ap" (C,), the average precision of each caption. A query without an
    answer is left out of all means (its ap is NaN); UserError where none has one.
    """
    # ReID gives the ids 0 and −1 a meaning of their own: here people are counted from 1.
    both = np.concatenate([image_ids, text_ids])
    dense = np.unique(both, return_inverse=True)[1].reshape(-1) + 1
    image_ids, text_ids = dense[: len(image_ids)], dense[len(image_ids) :]
    sides = {"t2i": (t, text_ids, v, image_ids), "i2t": (v, image_ids, t, text_ids)}
    out = {}
    for name, (query, query_ids, found, found_ids) in sides.items():
        # ReID drops answers by the query's own camera: queries and answers have different ones.
        cameras = np.zeros(len(query_ids), int), np.ones(len(found_ids), int)
        result = evaluate_features(query, query_ids, cameras[0], found, found_ids, cameras[1])
        out |= {f"{name}_R{k}": float(result["cmc"][min(k, len(found)) - 1]) for k in (1, 5, 10)}
        out[f"{name}_mAP"] = result["mAP"]
        out.setdefault("ap", result["ap"])
    return out
