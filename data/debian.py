#!/usr/bin/env python3
"""A corpus of free text out of Debian packages: documentation and source code, some 22 million GPT-2 tokens.

    data/debian.py [--tokenizer gpt2|bytes] [--out data/debian]

writes debian_train_000000.bin, debian_val_000000.bin and manifest.json: every package with its version and checksum, and the
checksums of the shards. The packages are downloaded with apt (not installed: no root needed) to OUT/debs, and what is
there already is used: run it again after an interruption. They are fixed in their versions, those of Debian 12; where apt
offers another version, that is taken, and where it knows none the corpus goes without, and either is said. The same
packages give the same bytes.

Of a package's files those are taken that are text by name and content (clean_text.py): no licences, changelogs, generated
files or tables, each text once; if they are more than PACKAGE_BYTES, a part. Documents come in the order of the checksums
of their texts; those whose checksum is in the lowest --val-fraction of all are for validation.
"""

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib

import clean_text
import download
import shards

PACKAGES = """
python3.11-doc 3.11.2-6+deb12u8
linux-doc-6.1 6.1.176-1
perl-doc 5.36.0-7+deb12u3
vim-runtime 2:9.0.1378-2+deb12u2
llvm-14-doc 1:14.0.6-12
clang-14-doc 1:14.0.6-12
git-doc 1:2.39.5-0+deb12u3
nodejs-doc 18.20.4+dfsg-1~deb12u2
python-sqlalchemy-doc 1.4.46+ds1-1
python-celery-doc 5.2.6-5
nova-doc 2:26.2.2-1~deb12u4
cinder-doc 2:21.3.1-1~deb12u1
keystone-doc 2:22.0.2-0+deb12u3
python-ipython-doc 8.5.0-4
buildbot-doc 3.7.0-2
docutils-doc 0.19+dfsg-6
sphinx-doc 5.3.0-4
debian-policy 4.6.2.0
debian-reference-en 2.100
debian-faq 11.1
developers-reference 12.18
maint-guide 1.2.53
doc-debian 11.3+nmu1
gnu-standards 2022.03.23-0.1
cmake-data 3.25.1-1
perl-modules-5.36 5.36.0-7+deb12u3
emacs-el 1:28.2+1-15+deb12u4
golang-1.19-src 1.19.8-2
rust-src 1.63.0+dfsg1-2
newlib-source 3.3.0-1.3+deb12u1
erlang-src 1:25.2.3+dfsg-1+deb12u4
libeigen3-dev 3.4.0-4
python3-django 3:3.2.25-0+deb12u3
python3-sympy 1.11.1-1
python3-twisted 22.4.0-4+deb12u1
python3-sklearn 1.2.1+dfsg-1
mercurial-common 6.3.2-1+deb12u1
octave-common 7.3.0-2
"""
PACKAGE_BYTES = 3_000_000  # that one package adds at most


class Missing(Exception):
    """A package that cannot be had, and why."""


def fixed_packages():
    """[(name, version)]"""
    return [tuple(line.split()) for line in PACKAGES.split("\n") if line.strip()]


# ---- apt ----


class Apt:
    """apt with lists of its own in `state`, which needs no root, and the machine's sources."""

    def __init__(self, state):
        lists, cache = state / "lists", state / "cache"
        for folder in lists / "partial", cache / "archives" / "partial":
            folder.mkdir(parents=True, exist_ok=True)
        user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        self.options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}", *user]

    def _run(self, *command, folder=None):
        environment = dict(os.environ, LC_ALL="C")
        return subprocess.run([command[0], *self.options, *command[1:]], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)

    def update(self):
        """None, or what was wrong with a source; others may have answered."""
        return last_error(self._run("apt-get", "-q", "update").stderr)

    def versions(self, names):
        """name -> versions that can be downloaded, the newest first."""
        found = {}
        for line in self._run("apt-cache", "madison", *names).stdout.splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) == 3 and cells[2].endswith("Packages"):
                found.setdefault(cells[0], []).append(cells[1])
        return found

    def download(self, chosen, folder):
        """[(name, version)] -> files in folder, as many as can be had. None, or what was wrong."""
        run = self._run("apt-get", "-q", "download", *(f"{name}={version}" for name, version in chosen), folder=folder)
        return last_error(run.stderr)


def last_error(text):
    """The last error or warning that apt printed, or None."""
    found = [line for line in text.splitlines() if line.startswith(("E: ", "W: "))]
    errors = [line for line in found if line.startswith("E: ")]
    return (errors or found or [None])[-1]


def deb_of(folder, name, version=None):
    """The newest file of this package in folder, or None."""
    version = version.replace(":", "%3a") if version else "*"
    return max(folder.glob(f"{name}_{version}_*.deb"), default=None, key=lambda path: path.stat().st_mtime)


def fetch(packages, folder):
    """Sees to it that folder has as many of these packages as can be had: [(name, version)]."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(name, version) for name, version in packages if not deb_of(folder, name, version)]
    if not wanted:
        return
    if not shutil.which("apt-get"):
        shards.fail(f"there is no apt-get here, and {len(wanted)} of {len(packages)} packages are not in {folder}: "
                    "make the corpus on Debian or Ubuntu")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".apt") as temporary:
        state = shards.Path(temporary)
        apt = Apt(state)
        print(f"{folder}: {len(wanted)} packages to download")
        problem = apt.update()
        offered = apt.versions([name for name, _ in wanted])
        if not offered:
            shards.fail(f"apt knows none of the packages (no network?): {problem or 'its sources have none of them'}")
        chosen = [(name, version if version in offered[name] else offered[name][0]) for name, version in wanted if name in offered]
        problem = apt.download(chosen, state)
        for name, version in chosen:
            path = deb_of(state, name, version)
            if path:
                os.replace(path, folder / path.name)
            else:
                print(f"{name} {version}: not downloaded ({problem or 'apt does not say why'})")


# ---- files ----


def files_of(deb):
    """(path, bytes) of every file of a package that is wanted by its name; gzipped ones are unpacked."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield from members(tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise Missing(f"{deb} is damaged ({error}): remove it and run this again") from None
    finally:
        process.stdout.close()
        status = process.wait()
    if status:
        raise Missing(f"{deb} is damaged (dpkg-deb says so): remove it and run this again")


def members(tar):
    for member in tar:
        if not member.isfile():
            continue
        path = member.name
        if path.endswith((".tar.xz", ".tar.gz", ".tar.bz2")):  # the source of a program, as one file
            with tarfile.open(fileobj=io.BytesIO(tar.extractfile(member).read()), mode="r:*") as inner:
                for inner_path, raw in members(inner):
                    yield f"{path}/{inner_path}", raw
        elif clean_text.is_wanted(path.removesuffix(".gz")) and member.size <= 2 * clean_text.LONGEST_PROSE:
            raw = tar.extractfile(member).read()
            yield path.removesuffix(".gz"), gzip.decompress(raw) if path.endswith(".gz") else raw


def documents_of(deb, copies):
    """(checksum, text) of documents of a package that are no copies, at most PACKAGE_BYTES. Which files those are, where
    there are more, is a matter of the checksums of their paths."""
    found, size = [], 0
    for path, raw in sorted(files_of(deb), key=lambda file: hashlib.sha256(file[0].encode("utf-8", "surrogateescape")).digest()):
        text = clean_text.clean(path, raw)
        if text and size + len(text) <= PACKAGE_BYTES and copies.is_new(text):
            text = text.encode()
            found.append((hashlib.sha256(text).digest(), text))
            size += len(text)
        if size > 0.99 * PACKAGE_BYTES:
            break
    return found


# ---- the corpus ----


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    parser.add_argument("--out", default=shards.DATA / "debian", type=shards.Path, help="folder to write to (default: data/debian)")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="X", help="of the documents, in (0, 1) (default: 0.02)")
    parser.add_argument("--min-tokens", type=int, default=20_000_000, metavar="N", help="fail with fewer for training (default: 2e7)")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        shards.fail(f"--val-fraction {args.val_fraction}: it must be in (0, 1)")
    if not shutil.which("dpkg-deb"):
        shards.fail("there is no dpkg-deb here, which unpacks the packages: make the corpus on Debian or Ubuntu")
    tok = shards.tokenizer(args.tokenizer)  # before the download: it may be missing
    packages = fixed_packages()
    try:
        fetch(packages, args.out / "debs")
    except OSError as error:
        shards.fail(f"cannot write {args.out}: {error.strerror or error}")

    copies, documents, rows = clean_text.Copies(), [], []
    for name, version in packages:
        deb = deb_of(args.out / "debs", name, version) or deb_of(args.out / "debs", name)
        try:
            if not deb:
                raise Missing("apt does not have it")
            found = documents_of(deb, copies)
        except Missing as reason:
            print(f"without {name} {version}: {reason}")
            continue
        got = deb.name.split("_")[1].replace("%3a", ":")
        if got != version:
            print(f"{name}: version {got} instead of {version}")
        documents += found
        rows.append({"package": name, "version": got, "sha256": download.sha256_of(deb), "documents": len(found),
                     "bytes": sum(len(text) for _, text in found)})
    documents.sort()

    # Counted before anything of an earlier corpus is replaced.
    encoded = {"train": [], "val": []}
    sizes = {"train": 0, "val": 0}
    for checksum, text in documents:
        split = "val" if int.from_bytes(checksum[:8], "big") < args.val_fraction * 2**64 else "train"
        encoded[split].append(shards.encode_document(tok, text, "a document"))
        sizes[split] += len(text)
    tokens = {split: sum(map(len, ids)) // 2 for split, ids in encoded.items()}
    if tokens["train"] < args.min_tokens or not tokens["val"]:
        shards.fail(f"{len(rows)} of {len(packages)} packages hold {tokens['train']:,} tokens for training and {tokens['val']:,} for "
                    f"validation; {args.min_tokens:,} and one are wanted (--min-tokens)")
    manifest = {"tokenizer": tok.name, "packages": rows}
    for split, ids in encoded.items():
        writer = shards.ShardWriter(args.out / f"debian_{split}", tok, 100_000_000, remove_old=True)
        for document in ids:
            writer.add(document)
        writer.close()
        names = [f"debian_{split}_{i:06d}.bin" for i in range(writer.shards)]
        manifest[split] = {"documents": len(ids), "bytes": sizes[split], "tokens": tokens[split],
                           "shards": {name: download.sha256_of(args.out / name) for name in names}}
    shards.write_file(args.out / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    changed = sum((row["package"], row["version"]) not in packages for row in rows)
    print(f"{len(rows)} of {len(packages)} packages, {changed} in other versions; {len(documents):,} documents, "
          f"{sum(sizes.values()):,} bytes; {tokens['train']:,} tokens for training, {tokens['val']:,} for validation")
    for split in encoded:
        for name, sha256 in manifest[split]["shards"].items():
            print(f"{sha256}  {name}")


if __name__ == "__main__":
    main()
