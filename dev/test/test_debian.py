#!/usr/bin/env python3
"""Tests of data/debian.py and data/clean_text.py, on packages made here and an apt that only has those:
python3 dev/test/test_debian.py. Standard library only; needs dpkg-deb."""

import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.dont_write_bytecode = True
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "dev" / "test")]
import clean_text  # noqa: E402
import debian  # noqa: E402
from test_data_scripts import InFolder, read_shard  # noqa: E402

# Runs data/debian.py with a list of packages and a size of our own.
RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import debian
debian.PACKAGES, debian.PACKAGE_BYTES = sys.argv.pop(1), int(sys.argv.pop(1))
sys.argv[0] = "debian.py"
debian.main()
"""

# An apt whose only source is the folder $REPOSITORY.
APT = """#!/usr/bin/env python3
import os, shutil, sys
from pathlib import Path
files = {tuple(p.name.split("_")[:2]): p for p in Path(os.environ["REPOSITORY"]).glob("*.deb")}
command = next(a for a in sys.argv[1:] if a in ("update", "madison", "download"))
arguments = sys.argv[sys.argv.index(command) + 1:]
with open(os.environ["REPOSITORY"] + "/calls", "a") as calls:
    print(command, *arguments, file=calls)
if command == "update" and not files:
    print("W: Failed to fetch the index: could not resolve the host", file=sys.stderr)
if command == "madison":
    for name, version in sorted(files):
        if name in arguments:
            print(f" {name} | {version.replace('%3a', ':')} | some/main amd64 Packages")
if command == "download":
    for argument in arguments:
        name, version = argument.replace(":", "%3a").split("=")
        if name == "unreachable":
            sys.exit("E: Failed to fetch unreachable: connection reset")
        shutil.copy(files[name, version], ".")
"""


def prose(seed, paragraphs=8):
    choose = random.Random(seed)
    words = "the record of a routed token names its expert and slot which every kernel reads while it loads tiles".split()
    return "\n\n".join(" ".join(choose.choices(words, k=30)) for _ in range(paragraphs)) + "\n"


@unittest.skipUnless(shutil.which("dpkg-deb"), "needs dpkg-deb")
class Debian(InFolder):
    def setUp(self):
        super().setUp()
        self.repository, self.out, self.bin = self.folder / "repository", self.folder / "out", self.folder / "bin"
        self.repository.mkdir(), self.bin.mkdir()
        for name in "apt-get", "apt-cache":
            (self.bin / name).write_text(APT)
            (self.bin / name).chmod(0o755)

    def package(self, name, files, version="1:2.0-1"):
        """files: path under usr/share -> text or bytes."""
        tree = self.folder / "tree" / name
        for path, content in files.items():
            path = tree / "usr" / "share" / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
                                                 "Maintainer: nobody <nobody@localhost>\nDescription: of a test\n")
        deb = self.repository / f"{name}_{version.replace(':', '%3a')}_all.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(deb)], check=True, capture_output=True)
        shutil.rmtree(tree)
        return deb

    def run_on(self, packages, *args, package_bytes=10**9, path=None):
        environment = dict(os.environ, REPOSITORY=str(self.repository), PATH=path or f"{self.bin}:{os.environ['PATH']}")
        listed = "".join(f"{name} {version}\n" for name, version in packages)
        return subprocess.run([sys.executable, "-c", RUN, str(ROOT / "data"), listed, str(package_bytes), "--tokenizer", "bytes",
                               "--out", str(self.out), "--min-tokens", "1000", "--val-fraction", "0.3", *map(str, args)],
                              capture_output=True, text=True, env=environment)

    def documents(self):
        """split -> texts, from the shards."""
        found = {}
        for split in "train", "val":
            tokenizer, ids = read_shard(self.out / f"debian_{split}_000000.bin")
            self.assertEqual((tokenizer, ids[0]), (1, 256))
            texts, begin = [], 1
            for i, token in enumerate(ids + [256]):
                if token == 256 and i:
                    texts.append(bytes(ids[begin:i]).decode())
                    begin = i + 1
            found[split] = texts
        return found

    def test_corpus(self):
        notes = {f"notes/{i}.txt": prose(i) for i in range(20)}
        self.package("notes", {**notes, "notes/copyright": prose(50), "notes/changelog.md": prose(51), "notes/table.txt": "17 42\n" * 200,
                               "notes/packed.rst.gz": gzip.compress(prose(60).encode())})
        source = io.BytesIO()
        with tarfile.open(fileobj=source, mode="w:xz") as tar:
            entry = tarfile.TarInfo("program/main.c")
            code = ("/* Copyright (c) 2001 Somebody.\n   All rights reserved. */\n\n" + "int main(void) { return walk_the_tree(); }\n" * 20).encode()
            entry.size = len(code)
            tar.addfile(entry, io.BytesIO(code))
        self.package("program", {"src/program.tar.xz": source.getvalue(), "doc/copy.txt": prose(3).upper()}, "2.5")
        packages = [("notes", "1:2.0-1"), ("program", "2.5")]
        result = self.run_on(packages)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("2 of 2 packages, 0 in other versions; 22 documents", result.stdout)
        found = self.documents()
        self.assertEqual(sorted(found["train"] + found["val"]),
                         sorted([*notes.values(), prose(60), "int main(void) { return walk_the_tree(); }\n" * 20]))
        self.assertTrue(found["train"] and found["val"])
        manifest = json.loads((self.out / "manifest.json").read_text())
        self.assertEqual([(row["package"], row["version"], row["documents"]) for row in manifest["packages"]],
                         [("notes", "1:2.0-1", 21), ("program", "2.5", 1)])
        for split in "train", "val":
            tokens = sum(len(text) + 1 for text in found[split])
            self.assertEqual((manifest[split]["tokens"], manifest[split]["documents"]), (tokens, len(found[split])))
            self.assertIn(manifest[split]["shards"][f"debian_{split}_000000.bin"], result.stdout)

        # Again: the same bytes, and nothing is asked of apt.
        before, calls = (self.out / "debian_train_000000.bin").read_bytes(), (self.repository / "calls").read_text()
        self.assertEqual(self.run_on(packages).returncode, 0)
        self.assertEqual((self.out / "debian_train_000000.bin").read_bytes(), before)
        self.assertEqual((self.repository / "calls").read_text(), calls)

        # A part of a package, the same one each time.
        result = self.run_on(packages, package_bytes=8 * len(prose(1)))
        self.assertEqual(result.returncode, 0, result.stderr)
        size = json.loads((self.out / "manifest.json").read_text())["packages"][0]["bytes"]
        self.assertTrue(6 * len(prose(1)) < size <= 8 * len(prose(1)), size)

    def test_other_versions_and_missing_packages(self):
        self.package("notes", {f"notes/{i}.txt": prose(i) for i in range(20)}, "3.0")
        self.package("unreachable", {"a.txt": prose(30)}, "1.0")
        result = self.run_on([("notes", "2.0"), ("gone", "1.0"), ("unreachable", "1.0")])
        self.assertEqual(result.returncode, 0, result.stderr)
        for line in ("notes: version 3.0 instead of 2.0", "without gone 1.0: apt does not have it",
                     "unreachable 1.0: not downloaded (E: Failed to fetch unreachable: connection reset)",
                     "1 of 3 packages, 1 in other versions; 20 documents"):
            self.assertIn(line, result.stdout)
        before = (self.out / "debian_train_000000.bin").read_bytes()
        self.refused(self.run_on([("notes", "2.0")], "--min-tokens", 10**6), "1 of 1 packages hold", "1,000,000")
        self.assertEqual((self.out / "debian_train_000000.bin").read_bytes(), before)  # still the corpus before

    def test_refusals(self):
        notes = [("notes", "1:2.0-1")]
        self.refused(self.run_on(notes), "apt knows none of the packages (no network?)", "could not resolve the host")
        self.refused(self.run_on(notes, "--val-fraction", 1), "--val-fraction 1.0")
        deb = self.package("notes", {f"{i}.txt": prose(i) for i in range(20)})
        self.assertEqual(self.run_on(notes).returncode, 0)
        there = self.out / "debs" / deb.name
        for damaged in there.read_bytes()[:1000], b"not a package":
            there.write_bytes(damaged)
            result = self.run_on(notes)
            self.refused(result, "0 of 1 packages")
            self.assertIn(f"without notes 1:2.0-1: {there} is damaged", result.stdout)
        shutil.rmtree(self.out)
        only = self.folder / "only"  # of the commands just those that the test itself needs
        only.mkdir()
        self.refused(self.run_on(notes, path=str(only)), "no dpkg-deb")
        (only / "dpkg-deb").symlink_to(shutil.which("dpkg-deb"))
        self.refused(self.run_on(notes, path=str(only)), "no apt-get", "1 of 1 packages")
        (self.folder / "file").write_text("")
        self.refused(self.run_on(notes, "--out", self.folder / "file"), "cannot write")

    def test_the_list_is_fixed(self):
        packages = debian.fixed_packages()
        self.assertGreater(len(packages), 30)
        self.assertEqual(len(dict(packages)), len(packages))
        for name, version in packages:
            self.assertRegex(version, r"^[0-9][0-9a-zA-Z.+:~-]*$", name)


class CleanText(unittest.TestCase):
    def test_names(self):
        for path in "./usr/share/doc/a/README", "./usr/src/a/main.c", "./a/b/guide.rst", "./usr/include/eigen3/Eigen/Core":
            self.assertTrue(clean_text.is_wanted(path), path)
        for path in ("./usr/share/doc/a/copyright", "./a/LICENSE", "./a/LICENSE.txt", "./a/COPYING.LIB", "./a/changelog.md", "./a/NEWS",
                     "./a/news/1.rst", "./a/licenses/x.txt", "./a/ChangeLog.1", "./a/jquery.min.js", "./a/b_pb2.py", "./a/locale/de/a.py",
                     "./a/picture.png", "./a/binary", "./a/relnotes/1.txt", "./a/po/de.txt", "./a/perl5100delta.pod"):
            self.assertFalse(clean_text.is_wanted(path), path)

    def test_what_is_text(self):
        good = prose(1)
        self.assertEqual(clean_text.clean("a.txt", good.encode()), good)
        self.assertEqual(clean_text.clean("a.txt", good.replace("\n", " \r\n").encode()), good)
        self.assertEqual(clean_text.clean("a.txt", ("\n\n" + good.replace("\n\n", "\n\n\n\n")).encode()), good)
        long = "\n".join(prose(i) for i in range(150))
        self.assertGreater(len(long), clean_text.LONGEST_CODE)
        for path, bad in (("a.txt", b"\xff" + good.encode()), ("a.txt", good.encode("utf-16")), ("a.txt", b"short"),
                          ("a.txt", good.encode() + b"\0"), ("a.txt", b"# Do not edit: generated by a tool\n" + good.encode()),
                          ("a.txt", b"17, 42, 3\n" * 200), ("a.txt", ("Это не по-английски. " * 40).encode()),
                          ("a.txt", good.replace("\n", " ").encode()), ("a.c", long.encode())):
            self.assertIsNone(clean_text.clean(path, bad), bad[:40])
        self.assertIsNotNone(clean_text.clean("a.rst", long.encode()))

    def test_legal_headers(self):
        code = "int f(int x) {\n  return x;\n}\n"
        for header in ("/* Copyright 2001 Somebody\n * Licensed under the Some License. */\n", "// Copyright 2001 Somebody\n// SPDX: some\n\n",
                       "/*\n  This is free software; you may\n\n  redistribute it.\n*/\n", "(* Copyright 2001 *)\n"):
            self.assertEqual(clean_text.without_legal_header(header + code).strip("\n"), code.strip("\n"), header)
        kept = "#!/bin/sh\n# Walks the tree.\n\n"
        self.assertEqual(clean_text.without_legal_header(kept + "# Copyright 2001\n#\n# Redistribution is permitted.\n\nwalk\n"), kept + "walk\n")
        for text in code, "/* Walks. */\n" + code, kept + "walk\n# Copyright of the tree: see there\n":
            self.assertEqual(clean_text.without_legal_header(text), text)

    def test_copies(self):
        copies = clean_text.Copies()
        self.assertTrue(copies.is_new(prose(1)))
        self.assertFalse(copies.is_new(prose(1)))
        self.assertFalse(copies.is_new(prose(1).upper().replace(" ", "  ") + "1.2.3"))  # the same letters
        self.assertFalse(copies.is_new(prose(1) + prose(2, 4)))                          # more than half of its lines
        self.assertTrue(copies.is_new(prose(1, 4) + prose(3)))
        self.assertTrue(copies.is_new(prose(4)))


if __name__ == "__main__":
    unittest.main()
