#!/usr/bin/env python3
"""The default corpus: the King James Bible (public domain) out of Debian's packages bible-kjv and bible-kjv-text.

    data/kjv.py [--tokenizer bytes|gpt2] [--out data/kjv]

writes kjv_train.bin (the first 95 % of the text's bytes), kjv_val.bin (the last 5 %) and kjv_train.txt (the training
text, for people and checks). Each shard is one document, so it begins with end-of-text, and every byte of the
validation text is a target. Running it again writes the same bytes.
"""

import argparse
import re
import shutil
import subprocess

import shards


def kjv_text():
    """The whole text, a verse a line, as bytes; `bible` prints `Gen1:1 In the beginning ...`."""
    if not shutil.which("bible"):
        shards.fail("the command `bible` is missing: scripts/setup.sh installs it (Debian packages bible-kjv, bible-kjv-text)")
    run = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], stdin=subprocess.DEVNULL, capture_output=True)
    text = re.sub(rb"(?m)^[0-9A-Za-z]+:[0-9]+ ", b"", run.stdout)
    verses = text.count(b"\n")
    if run.returncode or verses != 31102:  # as many verses as the King James Version has
        shards.fail(f"`bible` printed {verses} verses instead of 31102: install bible-kjv-text again")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], default="bytes")
    parser.add_argument("--out", default=shards.DATA / "kjv", type=shards.Path, help="folder to write to")
    args = parser.parse_args()

    tok = shards.tokenizer(args.tokenizer)
    text = kjv_text()
    cut = len(text) - len(text) // 20
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        shards.write_shard(args.out / f"kjv_{split}.bin", tok, shards.encode_document(tok, part, "the text"))
    shards.write_file(args.out / "kjv_train.txt", text[:cut])


if __name__ == "__main__":
    main()
