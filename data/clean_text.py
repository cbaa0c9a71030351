"""Which files of a software package are text that people wrote, and what of it is worth training on. Shared by the
scripts of this folder that take text from packages. Standard library only."""

import hashlib
import re

PROSE = set("txt text rst md pod texi texinfo org adoc asciidoc".split())
CODE = set("c h cc cpp hpp inc py pyx pl pm t el go rs js ts java lua vim rb tcl hs ml mli erl hrl lisp scm rkt scrbl m R sh cmake pas "
           "pp awk".split())
BARE_CODE = re.compile(r"/include/|/Eigen/")  # headers without an extension

# By path: licences and records of changes, text of other languages, data that only looks like text.
UNWANTED = re.compile(
    r"(?i)/(copyright|licen[cs]e|copying|changelog|changes|news|authors|credits|thanks|contributors|relnotes|releases?|"
    r"history|acknowledge?ments|maintainers|locales?|i18n|l10n|po|lang|testdata|fixtures|vendor|unicore|unicode|zoneinfo|_static)"
    r"([._-][^/]*|s)?(/|$)|\.min\.|_pb2\.|/perl[0-9]*delta|/[^/]*(unicode|charset|changelog|licen[cs]e)[^/]*$")
GENERATED = re.compile(
    r"(?i)do not (edit|modify|change)|(auto(matically)?|machine)[ -]?generated|generated (automatically|by|from|using|with)\b|"
    r"created by (a |an )?(script|tool|program)|@generated")
LEGAL = re.compile(r"(?i)copyright|\(c\) *[12]|©|licen[cs]ed? |spdx|all rights reserved|is free software|redistribut|warrant(y|ies)")
BLOCK_COMMENT = re.compile(r"\s*(/\*.*?\*/|\(\*.*?\*\))[^\S\n]*\n", re.DOTALL)
COMMENT_LINE = re.compile(r"""(#|//|;|--|%|"|\.\.|dnl\b|\s+\S)""")  # indented lines go on with the comment of an .rst
BARE_LINE = re.compile(r"""[#/;\-%"*=]*$""")

# Characters of a document: less says little, more is mostly data.
SHORTEST, LONGEST_PROSE, LONGEST_CODE = 400, 1_000_000, 150_000
LINE = 30  # characters of a line that is long enough to recognise a copy by


def is_wanted(path):
    """By its path in the package ("./usr/share/...") alone; of foo.gz ask for foo."""
    if UNWANTED.search(path):
        return False
    name = path.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    if dot and stem:
        return ending in PROSE or ending in CODE
    return name.isupper() and name.isalpha() or bool(BARE_CODE.search(path) and name.isalpha())


def without_legal_header(text):
    """Without what the comments that a file begins with say about copyright and licence."""
    block = BLOCK_COMMENT.match(text)
    if block and LEGAL.search(block[0]):
        return text[block.end():]
    lines, kept, at = text.split("\n"), [], 0
    while at < min(len(lines), 80):  # a paragraph of the comments at a time
        end = at
        while end < len(lines) and not BARE_LINE.match(lines[end]) and COMMENT_LINE.match(lines[end]):
            end += 1
        if end < len(lines) and BARE_LINE.match(lines[end]):
            end += 1
        if end == at:
            break
        if not LEGAL.search("\n".join(lines[at:end])):
            kept += lines[at:end]
        at = end
    return "\n".join(kept + lines[at:])


def longest(path):
    return LONGEST_PROSE if path.rpartition(".")[2] in PROSE else LONGEST_CODE


def clean(path, raw):
    """The bytes of a file -> its text, or None where it is not text in UTF-8, not (mostly) English or a program, of
    unusual length, or made by a program."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\f", "")
    if not SHORTEST <= len(text) <= longest(path) or re.search(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", text) or GENERATED.search(text[:4000]):
        return None
    text = without_legal_header("\n".join(line.rstrip() for line in text.split("\n")))
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    if len(text) < SHORTEST:
        return None
    words = len(re.findall(r"[A-Za-z \n\t]", text))
    digits = len(re.findall(r"[0-9]", text))
    if len(text.encode()) > 1.03 * len(text) or words < 0.65 * len(text) or digits > 0.1 * len(text):
        return None
    return text + "\n" if max(map(len, text.split("\n"))) <= 1000 else None


class Copies:
    """Knows the documents so far, to tell copies from new ones."""

    def __init__(self):
        self.documents, self.lines = set(), set()

    def is_new(self, text):
        """False where a document so far has the same letters, or where half of this one's longer lines, by their length,
        stood in documents so far. What is new is remembered."""
        letters = hashlib.sha256(re.sub(r"[^a-z]", "", text.lower()).encode()).digest()[:8]
        if letters in self.documents:
            return False
        long_lines = [line for line in map(str.strip, text.split("\n")) if len(line) >= LINE]
        marks = [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in long_lines]
        known = sum(len(line) for line, mark in zip(long_lines, marks) if mark in self.lines)
        if 2 * known > sum(map(len, long_lines)):
            return False
        self.documents.add(letters)
        self.lines.update(marks)
        return True
