#!/usr/bin/env python3
"""FineWeb-Edu, 100 billion tokens in GPT-2's ids, as the ready-made shards that llm.c trains on (200 MB each, from the
Hugging Face data set karpathy/fineweb-edu-100B-gpt2-token-shards).

    data/fineweb_edu.py [SHARDS]        how many training shards of 100 million tokens, 1 to 1001 (default 10)

writes data/fineweb_edu/edu_fineweb_val_000000.bin and data/fineweb_edu/edu_fineweb_train_000001.bin, .... Run it again
after an interruption, or with a larger number: it goes on.
"""

import argparse
import struct

import download
import shards

URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"


def is_shard(path):
    """None if the header is a GPT-2 shard's and the size fits its count."""
    with open(path, "rb") as file:
        begin = file.read(1024)
        size = file.seek(0, 2)
    if len(begin) < 1024:
        return f"{size} bytes"
    magic, version, count, tokenizer = struct.unpack("<4i", begin[:16])
    if (magic, version, tokenizer) != (20240520, 1, 0):
        return "not a GPT-2 token shard"
    return None if size == 1024 + 2 * count else f"{size} bytes for {count} tokens"


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("shards", nargs="?", type=int, default=10, help="training shards, 1 to 1001 (default 10)")
    args = parser.parse_args()
    if not 1 <= args.shards <= 1001:
        shards.fail(f"{args.shards} training shards: there are 1 to 1001")
    names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in range(1, args.shards + 1)]
    for name in names:
        download.fetch(URL + name, shards.DATA / "fineweb_edu" / name, check=is_shard)


if __name__ == "__main__":
    main()
