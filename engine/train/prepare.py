"""Makes the trainer's data: python3 engine/train/prepare.py CONFIG --corpus DIR... --out DIR

Trains the tokenizer on the books that CONFIG does not hold out, and writes OUT/tokenizer.json,
tokenizer_config.json, train.npy and held.npy (uint16 token ids, an end-of-text token between
books). Takes a few minutes; with --tokenizer, the folder of one that is trained already, seconds.
"""
import argparse
import json
import multiprocessing
import os
import shutil

import numpy as np

import tokenizer

PARAGRAPH = 1000  # the mean paragraph is not longer, in characters


def read(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read()


def unwrap(text):
    """One line a paragraph: the books' own lines are broken at 70 columns, other text is not. Nothing for
    a book whose paragraphs no empty line ends."""
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    paragraphs = [p for p in paragraphs if p]
    return "\n".join(paragraphs) if len(text) < PARAGRAPH * len(paragraphs) else ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--corpus", required=True, nargs="+", metavar="DIR")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokenizer", help="a folder with a tokenizer to be used as it is")
    args = parser.parse_args()
    with open(args.config) as file:
        config = json.load(file)
    os.makedirs(args.out, exist_ok=True)
    books = {
        name[:-4]: read(os.path.join(folder, name))
        for folder in args.corpus
        for name in sorted(os.listdir(folder))
        if name.endswith(".txt")
    }
    held = {name: books.pop(name) for name in config["held_out"]}
    # Both ways in which long text comes: as printed, and one line a paragraph.
    unwrapped = {name + " unwrapped": unwrap(text) for name, text in books.items()}
    books.update({name: text for name, text in unwrapped.items() if text})
    if args.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(os.path.join(args.tokenizer, name), args.out)
    else:
        tokenizer.write(tokenizer.train(books.values(), config["model"]["vocab_size"]), args.out)
    words = tokenizer.Tokenizer.load(args.out)
    for name, texts in [("train", books), ("held", held)]:
        with multiprocessing.Pool() as pool:
            encoded = pool.map(words.encode, texts.values(), chunksize=1)
        ids = [token for part in encoded for token in part + [words.end]]
        np.save(os.path.join(args.out, name + ".npy"), np.array(ids, np.uint16))
        print(
            f"{name}: {len(texts)} texts, {len(ids)} tokens, "
            f"{sum(len(t.encode()) for t in texts.values()) / len(ids):.2f} bytes a token"
        )


if __name__ == "__main__":
    main()
