#!/usr/bin/env python3
"""Tiny Shakespeare (1.1 MB, from the char-rnn repository) as token shards.

    data/tinyshakespeare.py [--tokenizer gpt2|bytes]

writes data/tinyshakespeare/tiny_shakespeare_{train,val}.bin. As in llm.c, every speech is a document, and with gpt2
the first 32,768 ids are for validation and 305,260 for training: the same shards. With bytes it is the first tenth.
"""

import argparse

import download
import shards

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    args = parser.parse_args()

    tok = shards.tokenizer(args.tokenizer)
    folder = shards.DATA / "tinyshakespeare"
    text = download.fetch(URL, folder / "tiny_shakespeare.txt", sha256=SHA256).read_bytes()
    speeches = text.split(b"\n\n")
    speeches = [speech + b"\n\n" for speech in speeches[:-1]] + speeches[-1:]
    ids = b"".join(shards.encode_document(tok, speech, "the text") for speech in speeches)
    val = 2 * (32768 if tok.name == "gpt2" else len(ids) // 20)  # ids are two bytes each
    shards.write_shard(folder / "tiny_shakespeare_val.bin", tok, ids[:val])
    shards.write_shard(folder / "tiny_shakespeare_train.bin", tok, ids[val:])


if __name__ == "__main__":
    main()
