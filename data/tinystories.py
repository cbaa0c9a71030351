#!/usr/bin/env python3
"""TinyStories (the GPT-4 stories, 2.2 GB of text, from the Hugging Face data set roneneldan/TinyStories) as shards.

    data/tinystories.py [--tokenizer gpt2|bytes]

writes data/tinystories/TinyStories_train_000000.bin, ... and data/tinystories/TinyStories_val_000000.bin: the data
set's own two parts, every story a document. Run it again after an interruption: the download goes on.
"""

import argparse

import download
import shards

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
PARTS = {"val": "TinyStoriesV2-GPT4-valid.txt", "train": "TinyStoriesV2-GPT4-train.txt"}
SEPARATOR = "<|endoftext|>"  # a line of its own between two stories


def looks_like_stories(path):
    with open(path, "rb") as file:
        begin = file.read(1 << 20)
    return None if b"\n" + SEPARATOR.encode() in begin else f"no {SEPARATOR} in its first megabyte"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    args = parser.parse_args()

    tok = shards.tokenizer(args.tokenizer)
    folder = shards.DATA / "tinystories"
    for split, name in PARTS.items():
        text = download.fetch(URL + name, folder / name, check=looks_like_stories)
        writer = shards.ShardWriter(folder / f"TinyStories_{split}", tok, 100_000_000, remove_old=True)
        for _, story in shards.documents(text, separator=SEPARATOR):
            writer.add(shards.encode_document(tok, story, text))
        writer.close()


if __name__ == "__main__":
    main()
