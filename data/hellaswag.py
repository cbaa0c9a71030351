#!/usr/bin/env python3
"""HellaSwag (Zellers et al. 2019) as multiple-choice questions for `train_gpt_moe --hellaswag`, in llm.c's format.

    data/hellaswag.py                            downloads the validation split (10,042 questions) and writes
                                                 data/hellaswag/hellaswag_val.bin in GPT-2 tokens
    data/hellaswag.py --jsonl hellaswag_val.jsonl --out data/hellaswag/hellaswag_val.bin
                                                 from a file that is here already; --tokenizer bytes for byte models

A line of the JSONL has "ctx", "endings" (four) and "label"; lines of the test split, which has no labels, are refused. An
ending follows its context after a space. The format is described in llmc/multiple_choice.h.
"""

import argparse
import array
import json
import sys

import download
import shards

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
LIMIT = 2**16  # what an uint16 counts to


def ids_of(tok, text):
    """Text -> ids."""
    packed = array.array("H", tok.encode(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()))
    if sys.byteorder == "big":
        packed.byteswap()
    return list(packed)


def questions(path):
    """Yields (where, context, endings, label) of every line."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    value = json.loads(line)
                except ValueError:
                    shards.fail(f"{where}: not JSON: expected one object a line")
                if not isinstance(value, dict) or not isinstance(value.get("ctx"), str) or not value["ctx"]:
                    shards.fail(f"{where}: no text in field 'ctx': is this HellaSwag?")
                endings, label = value.get("endings"), value.get("label")
                if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) for e in endings):
                    shards.fail(f"{where}: field 'endings' is not a list of four texts")
                if not isinstance(label, int) or not 0 <= label < 4:
                    shards.fail(f"{where}: field 'label' is not 0 to 3: the test split has none, take the validation split")
                yield where, value["ctx"], endings, label
    except OSError as error:
        shards.fail(f"cannot read {path}: {error.strerror}")


def example(tok, index, where, context, endings, label):
    """One example as a list of uint16."""
    lists = [ids_of(tok, context), *(ids_of(tok, " " + ending) for ending in endings)]
    stream = [LIMIT - 1, 0, index, label, len(endings)]
    for ids in lists:
        stream += [len(ids), *ids]
    stream[1] = 2 * len(stream)
    if stream[1] >= LIMIT:
        shards.fail(f"{where}: {stream[1]} bytes of tokens; the format ends at {LIMIT - 1}")
    return stream


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl", metavar="FILE", help="the questions (default: downloaded to data/hellaswag/)")
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], default="gpt2")
    parser.add_argument("--out", type=shards.Path, default=shards.DATA / "hellaswag" / "hellaswag_val.bin", help="file to write")
    args = parser.parse_args()

    tok = shards.tokenizer(args.tokenizer)
    path = args.jsonl or download.fetch(URL, shards.DATA / "hellaswag" / "hellaswag_val.jsonl")
    examples = [example(tok, index, *question) for index, question in enumerate(questions(path))]
    if not 0 < len(examples) < LIMIT:
        shards.fail(f"{path}: {len(examples)} questions; a file holds 1 to {LIMIT - 1}")
    header = array.array("i", [20240522, 1, len(examples), 2 * max(map(len, examples)), tok.id] + [0] * 251)
    if sys.byteorder == "big":
        header.byteswap()
    shards.write_file(args.out, header.tobytes(), *map(shards.uint16, examples))
    print(f"{args.out}: {len(examples):,} questions of at most {max(longest(e) for e in examples)} tokens ({tok.name})")


def longest(stream):
    """Tokens of the context and the longest of the endings."""
    lengths, at = [], 5
    while at < len(stream):
        lengths.append(stream[at])
        at += 1 + stream[at]
    return lengths[0] + max(lengths[1:])


if __name__ == "__main__":
    main()
