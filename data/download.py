"""Downloads that can be interrupted: shared by the scripts of this folder that fetch data. Standard library only."""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import shards

ATTEMPTS = 4  # of which each goes on where the last one stopped
CHUNK = 1 << 20


class Interrupted(Exception):
    pass


def fetch(url, path, sha256=None, check=None):
    """Downloads url to path, unless path exists: what is there was complete and checked when it got its name.

    The bytes collect in path + ".part" and a later call goes on from there. When all have come (the server says how
    many there are), sha256 and check(partial path) decide; check returns what is wrong, or None. Then the file gets its
    name. Ends the script with one line where that fails."""
    path = shards.Path(path)
    if path.exists():
        print(f"{path} is there")
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _append(url, part, path.name)
                break
            except (Interrupted, http.client.HTTPException, OSError) as error:  # URLError is an OSError
                if _is_local(error):
                    raise
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    shards.fail(f"{url}: the server says {error.code} {error.reason}")
                if attempt == ATTEMPTS:
                    have = part.stat().st_size if part.exists() else 0
                    kept = f"; {have:,} bytes are kept, run it again to go on" if have else ""
                    reason = getattr(error, "reason", error)
                    shards.fail(f"cannot download from {urllib.parse.urlsplit(url).hostname}: {reason} (no network?){kept}")
                time.sleep(attempt)
        wrong = "its sha256 is not the expected one" if sha256 and sha256_of(part) != sha256 else None
        wrong = wrong or (check(part) if check else None)
        if wrong:
            part.unlink()
            shards.fail(f"{url}: the download is damaged ({wrong}) and was removed: run it again")
        os.replace(part, path)
        print(f"{path}: {path.stat().st_size:,} bytes")
    except OSError as error:
        shards.fail(f"cannot write {path}: {error.strerror or error}")
    return path


def _is_local(error):
    """Whether an OSError is the disk's (full, forbidden) rather than the network's: only the disk's names a file."""
    return isinstance(error, OSError) and error.filename is not None and not isinstance(error, urllib.error.URLError)


def _append(url, part, name):
    """One connection: appends to `part` what is missing. Raises Interrupted if it ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "gpt-moe.cu", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left from there on: complete, or another file than the one begun
            raise
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if total == str(have):
            return
        part.unlink()
        raise Interrupted(f"{name} changed on the server") from None
    with response:
        resumed = response.status == 206
        if resumed:  # Content-Range: bytes first-last/total
            span, _, total = response.headers.get("Content-Range", "").rpartition("/")
            if not span.startswith(f"bytes {have}-"):
                raise Interrupted("the server sent another range than asked for")
        else:
            total, have = response.headers.get("Content-Length"), 0
        total = int(total) if total and total.isdigit() else None
        with open(part, "ab" if resumed else "wb", buffering=0) as file:
            while True:
                chunk = response.read(CHUNK)
                if not chunk:
                    break
                _write(file, chunk, part)
                have += len(chunk)
                _progress(name, have, total)
        if sys.stderr.isatty():
            print(file=sys.stderr)
    if total is not None and have != total:
        raise Interrupted(f"{name} stopped at {have:,} of {total:,} bytes")


def _write(file, chunk, part):
    try:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view):]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(part)) from None  # with a name: see _is_local


def _progress(name, have, total):
    if sys.stderr.isatty():
        of = f" of {total / 1e6:,.0f}" if total else ""
        print(f"\r{name}: {have / 1e6:,.0f}{of} MB ", end="", file=sys.stderr, flush=True)


def sha256_of(path):
    """In hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()
