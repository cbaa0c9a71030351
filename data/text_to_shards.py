#!/usr/bin/env python3
"""Turns text or JSONL files into token shards.

    data/text_to_shards.py --out data/mine/mine book.txt more.txt            one document a file
    data/text_to_shards.py --out data/web/web --field body pages*.jsonl      one document a line
    data/text_to_shards.py --out data/s/s --separator '<|endoftext|>' s.txt  documents divided by such lines

writes OUT_train_000000.bin, OUT_train_000001.bin, ... and OUT_val_000000.bin, .... The last --val-fraction of the input
(by bytes, in the order of the files given) is for validation: a document belongs where it begins, except that a file
that is one document is cut there. End-of-text precedes each document.
"""

import argparse
import os

import shards


def cut_text(text, at):
    """Cuts bytes at `at`, or up to three bytes before: never inside a UTF-8 character."""
    for cut in range(at, max(at - 4, -1), -1):
        if cut == len(text) or text[cut] & 0xC0 != 0x80:
            return text[:cut], text[cut:]
    return text[:at], text[at:]  # not UTF-8


def split_documents(args):
    """Yields (split, name, text) of every document."""
    sizes = []
    for path in args.files:
        try:
            sizes.append(os.path.getsize(path))
        except OSError as error:
            shards.fail(f"cannot read {path}: {error.strerror}")
    train_bytes = sum(sizes) - int(sum(sizes) * args.val_fraction)
    before = 0  # bytes in the files so far
    for path, size in zip(args.files, sizes):
        whole = not path.endswith((".jsonl", ".ndjson")) and not args.separator
        for offset, text in shards.documents(path, args.field, args.separator):
            at = train_bytes - before - offset  # the cut, counted from the document's first byte
            if whole and 0 < at < len(text):
                head, tail = cut_text(text, at)
                parts = ("train", head), ("val", tail)
            else:
                parts = (("train" if at > 0 else "val", text),)
            for split, part in parts:
                if part:
                    yield split, path, part
        before += size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, or .jsonl / .ndjson")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="what the shards' paths begin with")
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], default="bytes")
    parser.add_argument("--field", default="text", help="key of the text in JSONL (default: text)")
    parser.add_argument("--separator", metavar="LINE", help="the line between two documents of a text file")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="ids a shard (default: 1e8)")
    parser.add_argument("--val-fraction", type=float, default=0.05, metavar="X", help="in [0, 1) (default: 0.05)")
    args = parser.parse_args()
    if not 0 <= args.val_fraction < 1:
        shards.fail(f"--val-fraction {args.val_fraction}: it must be in [0, 1)")

    tok = shards.tokenizer(args.tokenizer)
    writers = {split: shards.ShardWriter(f"{args.out}_{split}", tok, args.shard_tokens) for split in ("train", "val")}
    for split, name, text in split_documents(args):
        writers[split].add(shards.encode_document(tok, text, name))
    for writer in writers.values():
        writer.close()
    if writers["train"].shards + writers["val"].shards == 0:
        shards.fail("no text in " + ", ".join(args.files))


if __name__ == "__main__":
    main()
