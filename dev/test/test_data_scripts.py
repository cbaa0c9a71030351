#!/usr/bin/env python3
"""Tests of the scripts in data/: python3 dev/test/test_data_scripts.py. Standard library only; what needs `bible`,
tiktoken or the GPT-2 ranks is skipped where they are missing."""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "data"))
import download  # noqa: E402
import fineweb_edu  # noqa: E402
import shards  # noqa: E402

GPT2 = bool(importlib.util.find_spec("tiktoken")) and shards.RANKS.exists()


def run(script, *args):
    return subprocess.run([sys.executable, str(ROOT / "data" / script), *map(str, args)], capture_output=True, text=True)


def read_shard(path):
    """(tokenizer id, ids) of a shard, after checking its header against its size."""
    raw = Path(path).read_bytes()
    magic, version, count, tokenizer = struct.unpack("<4i", raw[:16])
    assert (magic, version) == (20240520, 1) and len(raw) == 1024 + 2 * count, path
    return tokenizer, list(struct.unpack(f"<{count}H", raw[1024:]))


class InFolder(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def refused(self, result, *texts):
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        for text in texts:
            self.assertIn(str(text), result.stderr)


class TextToShards(InFolder):
    def write(self, name, data):
        (self.folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return self.folder / name

    def shards(self, *args):
        """Runs the script; returns {"train": ids, "val": ids}, the shards of each joined."""
        result = run("text_to_shards.py", "--out", self.folder / "out" / "x", *args)
        self.assertEqual(result.returncode, 0, result.stderr)
        joined = {}
        for split in ("train", "val"):
            files = sorted((self.folder / "out").glob(f"x_{split}_*.bin"))
            self.assertEqual([f.name for f in files], [f"x_{split}_{i:06d}.bin" for i in range(len(files))])
            joined[split] = sum((read_shard(f)[1] for f in files), [])
        return joined

    def test_one_file_is_one_document_cut_at_the_fraction(self):
        text = "".join(chr(65 + i % 26) for i in range(1000)).encode()
        got = self.shards(self.write("a.txt", text))
        self.assertEqual(got["train"], [256, *text[:950]])
        self.assertEqual(got["val"], [256, *text[950:]])

    def test_cut_never_splits_a_character(self):
        text = ("x" + "€" * 333).encode()
        got = self.shards("--val-fraction", 0.5, self.write("a.txt", text))
        for split in got.values():
            bytes(split[1:]).decode()
        self.assertEqual(bytes(got["train"][1:] + got["val"][1:]), text)

    def test_any_bytes_with_the_byte_tokenizer(self):
        text = bytes(range(256)) * 4
        got = self.shards("--val-fraction", 0, self.write("a.bin", text))
        self.assertEqual(got, {"train": [256, *text], "val": []})

    def test_jsonl_documents_and_shard_size(self):
        rows = [f"document {i} \N{SNOWMAN}" for i in range(100)]
        path = self.write("a.jsonl", "\n".join(json.dumps({"body": r, "n": 1}) for r in rows) + "\n\n")
        got = self.shards("--field", "body", "--val-fraction", 0.1, "--shard-tokens", 100, path)
        documents = bytes(i if i < 256 else 0 for i in got["train"] + got["val"]).decode().split("\0")[1:]
        self.assertEqual(documents, rows)
        self.assertAlmostEqual(got["val"].count(256), 10, delta=1)
        sizes = [len(read_shard(f)[1]) for f in sorted((self.folder / "out").glob("x_train_*.bin"))]
        self.assertTrue(all(s == 100 for s in sizes[:-1]) and 0 < sizes[-1] <= 100, sizes)

    def test_separator(self):
        path = self.write("a.txt", "one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n<|endoftext|>\nfour")
        got = self.shards("--separator", "<|endoftext|>", "--val-fraction", 0.1, path)
        self.assertEqual(got, {"train": [256, *b"one\ntwo", 256, *b"three"], "val": [256, *b"four"]})

    @unittest.skipUnless(GPT2, "needs tiktoken and data/gpt2.tiktoken")
    def test_gpt2(self):
        rows = json.loads((ROOT / "dev/test/fixtures/gpt2_strings.json").read_text())
        rows = [row for row in rows if row["text"]]
        path = self.write("a.jsonl", "\n".join(json.dumps({"text": row["text"]}) for row in rows))
        got = self.shards("--tokenizer", "gpt2", "--val-fraction", 0, path)
        self.assertEqual(got["train"], sum(([50256, *row["ids"]] for row in rows), []))
        self.refused(run("text_to_shards.py", "--out", self.folder / "y", "--tokenizer", "gpt2",
                         self.write("b.txt", b"ab\xff")), "b.txt", "UTF-8 at byte 2")

    def test_half_a_surrogate_pair_becomes_a_replacement_character(self):
        got = self.shards("--val-fraction", 0, self.write("a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}'))
        self.assertEqual(bytes(got["train"][1:]).decode(), "a\ufffdb \U0001f600")

    def test_refusals(self):
        good, out = self.write("a.txt", "text"), self.folder / "z"
        self.refused(run("text_to_shards.py", "--out", out, self.folder / "none.txt"), "none.txt")
        self.refused(run("text_to_shards.py", "--out", out, self.folder), self.folder)
        self.refused(run("text_to_shards.py", "--out", out, self.write("e.txt", "")), "no text")
        self.refused(run("text_to_shards.py", "--out", out, "--val-fraction", 1, good), "--val-fraction")
        self.refused(run("text_to_shards.py", "--out", out, "--shard-tokens", 2**31, good), "--shard-tokens")
        for line in "{", "[]", '{"text": 3}', '{"body": "x"}', b"\xff\xfe":
            first = b'{"text": "fine"}\n'
            path = self.write("b.jsonl", first + (line if isinstance(line, bytes) else line.encode()))
            self.refused(run("text_to_shards.py", "--out", out, path), "b.jsonl line 2")
        self.assertEqual(list(self.folder.glob("z*")), [])  # nothing was written
        self.shards(good)
        self.refused(run("text_to_shards.py", "--out", self.folder / "out" / "x", good), "x_train_000000.bin exists")


class Kjv(InFolder):
    @unittest.skipUnless(shutil.which("bible"), "needs Debian's bible-kjv")
    def test_shards_are_the_text(self):
        for _ in range(2):  # the second time over the first's files
            self.assertEqual(run("kjv.py", "--out", self.folder).returncode, 0)
        self.assertEqual(sorted(os.listdir(self.folder)), ["kjv_train.bin", "kjv_train.txt", "kjv_val.bin"])
        (id_train, train), (id_val, val) = read_shard(self.folder / "kjv_train.bin"), read_shard(self.folder / "kjv_val.bin")
        self.assertEqual((id_train, id_val, train[0], val[0]), (1, 1, 256, 256))
        text = bytes(train[1:] + val[1:])
        self.assertEqual(bytes(train[1:]), (self.folder / "kjv_train.txt").read_bytes())
        self.assertTrue(text.startswith(b"In the beginning God created the heaven and the earth.\nAnd the earth was"))
        self.assertTrue(text.rstrip().endswith(b"Amen."))
        self.assertEqual(len(val) - 1, len(text) // 20)
        self.assertGreater(len(text), 4_000_000)

    def test_without_bible(self):
        env = dict(os.environ, PATH=str(self.folder))
        result = subprocess.run([sys.executable, str(ROOT / "data/kjv.py"), "--out", str(self.folder)],
                                capture_output=True, text=True, env=env)
        self.refused(result, "scripts/setup.sh")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body with ranges; server.cut: bytes after which the next connections break, one each."""

    def do_GET(self):
        server, body = self.server, self.server.body
        server.requests.append(self.headers.get("Range"))
        if self.path == "/missing":
            return self.send_error(404)
        first = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and server.ranges else 0
        if first and first >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first:first + server.cut.pop(0)] if server.cut else body[first:])

    def log_message(self, *args):
        pass


class Download(InFolder):
    def setUp(self):
        super().setUp()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.body, self.server.cut, self.server.ranges, self.server.requests = os.urandom(3_000_000), [], True, []
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file"
        self.path, self.part = self.folder / "sub" / "file", self.folder / "sub" / "file.part"
        self.sleep, download.time.sleep = download.time.sleep, lambda seconds: None
        self.addCleanup(lambda: setattr(download.time, "sleep", self.sleep))
        os.environ["no_proxy"] = "127.0.0.1"

    def fetch(self, **how):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            download.fetch(self.url, self.path, **how)
        self.assertEqual(self.path.read_bytes(), self.server.body)
        self.assertFalse(self.part.exists())

    def fails(self, *texts, **how):
        with self.assertRaises(SystemExit) as caught:
            self.fetch(**how)
        for text in texts:
            self.assertIn(text, str(caught.exception.code))
        self.assertNotIn("\n", str(caught.exception.code))
        self.assertFalse(self.path.exists())

    def test_whole_and_again(self):
        self.fetch(sha256=hashlib.sha256(self.server.body).hexdigest(), check=lambda path: None)
        self.fetch()
        self.assertEqual(self.server.requests, [None])  # the second call asked for nothing

    def test_goes_on_where_it_was_cut(self):
        self.server.cut = [1_000_000, 500_000]
        self.fetch(sha256=hashlib.sha256(self.server.body).hexdigest())
        self.assertEqual(self.server.requests, [None, "bytes=1000000-", "bytes=1500000-"])

    def test_goes_on_in_a_later_run(self):
        self.server.cut = [100_000] * download.ATTEMPTS
        self.fails("400,000 bytes are kept", "run it again")
        self.assertEqual(self.part.stat().st_size, 400_000)
        self.fetch()
        self.assertEqual(self.server.requests[-1], "bytes=400000-")

    def test_server_without_ranges(self):
        self.server.cut, self.server.ranges = [1_000_000], False
        self.fetch()

    def test_a_part_that_is_complete(self):
        self.part.parent.mkdir()
        self.part.write_bytes(self.server.body)
        self.fetch()

    def test_a_part_of_a_longer_file_is_dropped(self):
        self.part.parent.mkdir()
        self.part.write_bytes(self.server.body + b"x")
        self.fetch()

    def test_damage_is_refused_and_removed(self):
        self.part.parent.mkdir()
        self.part.write_bytes(b"other bytes")
        self.fails("sha256", sha256=hashlib.sha256(self.server.body).hexdigest())
        self.assertFalse(self.part.exists())
        self.fails("odd contents", check=lambda path: "odd contents")
        self.fetch()

    def test_missing_on_the_server(self):
        self.url = self.url.replace("/file", "/missing")
        self.fails("404")

    def test_no_network(self):
        self.url = "http://127.0.0.1:1/file"
        self.fails("127.0.0.1", "no network?")

    def test_cannot_write(self):
        (self.folder / "sub").write_text("a file where the folder should be")
        self.fails("cannot write", "sub")

    def test_fineweb_check(self):
        path = self.folder / "x.bin"
        for data, good in ((shards.header(shards.ByteTokenizer, 3) + b"123456", False), (b"<html>" * 300, False), (b"", False),
                           (struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"123456", True),
                           (struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"12345", False)):
            path.write_bytes(data)
            self.assertEqual(fineweb_edu.is_shard(path) is None, good)


if __name__ == "__main__":
    unittest.main()
