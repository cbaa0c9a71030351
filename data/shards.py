"""Text to token shards: what the scripts of this folder share. Standard library only, but for tiktoken with gpt2.

A shard is a .bin file as llm.c reads it: 256 little-endian int32 (20240520, 1, number of ids, tokenizer, 0, ...), then
the ids as uint16. Tokenizer: 0 GPT-2, 1 bytes. End-of-text precedes each document.
"""

import array
import base64
import glob
import hashlib
import json
import os
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
RANKS = DATA / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
MAX_SHARD_TOKENS = 2**31 - 1  # the count in the header is an int32


def fail(line):
    """Ends the script with one line on stderr and status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: {line}")


class ByteTokenizer:
    name, id, eot = "bytes", 1, 256

    def encode(self, text):
        """bytes -> the ids as little-endian uint16 bytes: every byte is followed by a zero byte."""
        ids = bytearray(2 * len(text))
        ids[0::2] = text
        return bytes(ids)


class Gpt2Tokenizer:
    name, id, eot = "gpt2", 0, 50256
    PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            fail("the gpt2 tokenizer needs tiktoken: pip install tiktoken, or take --tokenizer bytes")
        try:
            lines = RANKS.read_bytes()
        except OSError:
            fail(f"{RANKS} is missing: fetch it with data/get_gpt2_ranks.sh")
        if hashlib.sha256(lines).hexdigest() != RANKS_SHA256:
            fail(f"{RANKS} is damaged: remove it and fetch it again with data/get_gpt2_ranks.sh")
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines.splitlines())}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        """UTF-8 bytes -> the ids as little-endian uint16 bytes. Text that is not UTF-8 raises UnicodeDecodeError."""
        return uint16(self.encoding.encode_ordinary(text.decode("utf-8")))


def tokenizer(name):
    return {"bytes": ByteTokenizer, "gpt2": Gpt2Tokenizer}[name]()


def uint16(ids):
    packed = array.array("H", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def encode_document(tok, text, name):
    """End-of-text and the ids of one document, as uint16 bytes. name is for the error."""
    try:
        return uint16([tok.eot]) + tok.encode(text)
    except UnicodeDecodeError as error:
        fail(f"{name}: not valid UTF-8 at byte {error.start}: convert it (iconv -t UTF-8), or take --tokenizer bytes")


def header(tok, count):
    ints = array.array("i", [20240520, 1, count, tok.id] + [0] * 252)
    if sys.byteorder == "big":
        ints.byteswap()
    return ints.tobytes()


def write_file(path, *parts):
    """Writes a file under a temporary name, then renames it: no reader ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error.strerror}")


def write_shard(path, tok, ids):
    """ids: uint16 bytes, end-of-texts included."""
    count = len(ids) // 2
    if not 0 < count <= MAX_SHARD_TOKENS:
        fail(f"cannot write {path}: a shard holds 1 to {MAX_SHARD_TOKENS} tokens, not {count}")
    write_file(path, header(tok, count), ids)
    print(f"{path}: {count:,} tokens ({tok.name})")


class ShardWriter:
    """Writes a stream of documents to prefix_000000.bin, prefix_000001.bin, ..., each of shard_tokens ids but the last
    (a document may straddle two). Holds one shard in memory. Shards of an earlier run would be read with the new ones:
    they are refused, or removed first."""

    def __init__(self, prefix, tok, shard_tokens, remove_old=False):
        if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
            fail(f"--shard-tokens {shard_tokens}: a shard holds 1 to {MAX_SHARD_TOKENS} tokens")
        old = sorted(glob.glob(glob.escape(str(prefix)) + "_[0-9][0-9][0-9][0-9][0-9][0-9].bin"))
        if remove_old:
            for path in old:
                os.remove(path)
        elif old:
            fail(f"{old[0]} exists ({len(old)} such files): remove them, or give another --out")
        self.prefix, self.tok, self.limit = prefix, tok, 2 * shard_tokens
        self.pending, self.shards = bytearray(), 0

    def add(self, ids):
        self.pending += ids
        while len(self.pending) >= self.limit:
            self._write(self.limit)

    def close(self):
        if self.pending:
            self._write(len(self.pending))

    def _write(self, size):
        write_shard(f"{self.prefix}_{self.shards:06d}.bin", self.tok, self.pending[:size])
        del self.pending[:size]
        self.shards += 1


def documents(path, field=None, separator=None):
    """Yields (offset in the file, text as bytes) of every document that is not empty.

    .jsonl: one object a line, its `field` is the text. Otherwise text: separated by lines that consist of `separator`,
    or, without one, the whole file as one document."""
    try:
        with open(path, "rb") as file:
            if str(path).endswith((".jsonl", ".ndjson")):
                yield from _jsonl(file, path, field or "text")
            elif separator:
                yield from _separated(file, separator.encode())
            else:
                text = file.read()
                if text:
                    yield 0, text
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")


def _jsonl(file, path, field):
    offset = 0
    for number, line in enumerate(file, 1):
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:  # bad JSON and bad UTF-8 alike
            fail(f"{path} line {number}: not JSON: expected one object a line")
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            fail(f"{path} line {number}: no text in field {field!r}: name the right one with --field")
        # JSON can spell half of a surrogate pair, which UTF-8 cannot: it becomes U+FFFD, as tiktoken has it.
        text = value[field].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
        if text:
            yield start, text


def _separated(file, separator):
    start = offset = 0
    lines = []
    for line in file:
        offset += len(line)
        if line.strip() == separator:
            text = b"".join(lines).strip()
            if text:
                yield start, text
            lines, start = [], offset
        else:
            lines.append(line)
    text = b"".join(lines).strip()
    if text:
        yield start, text
