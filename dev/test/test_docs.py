"""The documentation does what it says: its commands run, its printed output is what comes out, its links lead somewhere, and
its tables have every option.

Every fenced block of the pages names its language. A block of `sh` is run, as written, in a scratch copy of the repository
with the trainer of $TRAINER in it and the corpus of data/kjv.py (4096 tokens of its validation text), unless a comment
before it says otherwise:

    <!-- example: with --steps 4 --eval-every 2 -->   these options get these values, wherever the block gives them others
    <!-- example: not run: REASON -->                 the reason is one of REASONS; the block is listed by name
    <!-- example: output -->                          before a block of `text`: the commands before it print these lines, in
                                                      this order; `...` stands for any. `output but total, loss`: not
                                                      compared are lines that begin so

Standard library only."""

import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from trainer import ENV, TRAINER

ROOT = Path(__file__).resolve().parents[2]
PAGES = [p for pattern in ("README.md", "docs/**/*.md", "data/*.md", "moe/*.md", "dev/README.md", "scripts/*.md", "examples/**/*.md", "library/*.md")
         for p in sorted(ROOT.glob(pattern))]
LANGUAGES = ("sh", "text", "cpp", "cmake", "python", "toml", "json", "yaml")
REASONS = ("needs a GPU", "needs the network", "needs several machines", "needs PyTorch", "takes longer than a minute", "ctest runs",
           ".github/workflows/test.yml runs it", "dev/test/test_install.py does it")
SECONDS = 120  # of a block, on a machine that does other things too


class Block:
    def __init__(self, page, line, language, marker, text):
        self.name = f"{page.relative_to(ROOT)}:{line}"
        self.page, self.language, self.marker, self.text = page, language, marker, text

    def option(self, kind):
        return self.marker[len(kind):].strip() if self.marker and self.marker.startswith(kind) else None


def blocks_of(page):
    """The fenced blocks of a page, and what is wrong with how it is written."""
    blocks, faults = [], []
    fence, marker, marker_line, language, first, lines = None, None, 0, "", 0, []
    for n, line in enumerate(page.read_text().splitlines(), 1):
        start = re.match(r"( *)(```+)(.*)$", line)
        if fence is None and start:
            fence, language, first, lines = start[2], start[3].strip(), n, []
        elif fence is not None and line.strip() == fence:
            if language not in LANGUAGES:
                faults.append(f"{page.relative_to(ROOT)}:{first}: the block's language is '{language}', not one of {', '.join(LANGUAGES)}")
            blocks.append(Block(page, first, language, marker, "\n".join(lines) + "\n"))
            fence, marker = None, None
        elif fence is not None:
            lines.append(line)
        elif comment := re.match(r"\s*<!-- example: (.*?) -->\s*$", line):
            marker, marker_line = comment[1], n
        elif line.strip() and marker:
            faults.append(f"{page.relative_to(ROOT)}:{marker_line}: no block follows this marker")
            marker = None
        elif re.match(r" {4,}(\./|(\w+/)+\w|make |cmake |python3? |pip |docker |git )", line) and not re.match(r" {4,}\S+ \(", line):
            previous = page.read_text().splitlines()[n - 2]
            if not previous.strip():
                faults.append(f"{page.relative_to(ROOT)}:{n}: a command that is indented, not in a block of its own (```sh)")
    return blocks, faults


BLOCKS, FAULTS = [], []
for page in PAGES:
    found, faults = blocks_of(page)
    BLOCKS += found
    FAULTS += faults


def scaled(commands, options):
    """The commands with other values of these options, and the options that are nowhere in them."""
    words, missing = shlex.split(options), []
    for option, value in zip(words[::2], words[1::2]):
        commands, n = re.subn(rf"(?<=\s){option}(\s+)\S+", rf"{option}\g<1>{value}", commands)
        if n == 0:
            missing.append(option)
    return commands, missing


class Pages(unittest.TestCase):
    def test_how_blocks_are_written(self):
        self.assertEqual(FAULTS, [])
        self.assertGreater(len(BLOCKS), 10)
        for block in BLOCKS:
            with self.subTest(block.name):
                if block.marker is None:
                    continue
                if block.language == "text":
                    self.assertRegex(block.marker, "^output( but .+)?$")
                    continue
                self.assertEqual(block.language, "sh", "only commands are examples")
                reason, values = block.option("not run:"), block.option("with ")
                self.assertTrue((reason or "").startswith(REASONS) or values, f"'{block.marker}'")
                if reason and reason.startswith(".github"):
                    self.assertIn(f"- run: {block.text.strip()}\n", (ROOT / ".github/workflows/test.yml").read_text())
                if values:
                    self.assertEqual(scaled(block.text, values)[1], [], "options that no command of the block has")

    def test_links(self):
        for page in PAGES:
            text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
            titles = {re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in re.findall(r"(?m)^#+ (.*)$", text)}
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                if target.startswith(("http://", "https://")):
                    continue
                path, _, title = target.partition("#")
                self.assertTrue((page.parent / path).exists() if path else title in titles, f"{page.relative_to(ROOT)}: {target} leads nowhere")


class Examples(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.copy = cls.folder / "copy"

        def left_out(folder, names):
            here = Path(folder)
            return [n for n in names if n in ("runs", ".git", "shared", "__pycache__", "train_gpt_moe", ".cache", ".venv") or n.startswith("build")
                    or (here == ROOT / "data" and (here / n).is_dir())]

        shutil.copytree(ROOT, cls.copy, ignore=left_out, symlinks=True)
        (cls.copy / "train_gpt_moe").symlink_to(TRAINER)
        cls.run_commands("data/kjv.py")  # the corpus that scripts/quickstart.sh makes first
        validation = cls.copy / "data/kjv/kjv_val.bin"  # all of which is evaluated at the end of every run
        shard = validation.read_bytes()
        header = struct.unpack("<256i", shard[:1024])
        validation.write_bytes(struct.pack("<256i", *header[:2], 4096, *header[3:]) + shard[1024:1024 + 2 * 4096])

    @classmethod
    def run_commands(cls, commands):
        # a rank a processor or not, as root or not: what mpirun asks for before it starts
        env = {**ENV, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "HOME": str(cls.folder)}
        result = subprocess.run(["bash", "-e", "-u", "-o", "pipefail", "-c", commands], cwd=cls.copy, env=env, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=SECONDS)
        if result.returncode:
            raise AssertionError(f"exit code {result.returncode} of\n{commands}\n{result.stdout[-3000:]}")
        return result.stdout

    def test_all(self):
        printed, ran, left = None, 0, []
        for block in BLOCKS:
            with self.subTest(block.name):
                if block.language == "text" and block.marker:
                    self.assertIsNotNone(printed, "no commands were run before this output")
                    differing = tuple((block.option("output but ") or "...").split(", "))
                    rest = iter(re.sub(r"[ \t]+", " ", line).strip() for line in printed.splitlines())
                    for line in block.text.splitlines():
                        line = re.sub(r"[ \t]+", " ", line).strip()
                        if line and not line.startswith(("...", *differing)):
                            self.assertIn(line, rest, f"not printed, or not here: '{line}'")
                if block.language != "sh":
                    continue
                if reason := block.option("not run:"):
                    printed = None
                    left.append(f"{block.name} ({reason}): {block.text.strip().splitlines()[0]}")
                    continue
                begin = time.monotonic()
                printed = self.run_commands(scaled(block.text, block.option("with ") or "")[0])
                ran += 1
                print(f"ran {block.name} in {time.monotonic() - begin:.1f} s", file=sys.stderr)
        for line in left:
            print("not run:", line, file=sys.stderr)
        self.assertGreaterEqual(ran, 5)


class Options(unittest.TestCase):
    """--help: every option is in a group, has a default or says that it has none, and stands in a table of the pages."""

    @classmethod
    def setUpClass(cls):
        lines = subprocess.run([TRAINER, "--help"], capture_output=True, text=True, env=ENV, check=True).stdout.splitlines()
        cls.options, group = {}, None  # name: (group, its lines)
        for line in lines:
            if re.match(r"\S.*:$", line):
                group = line[:-1]
            elif option := re.match(r"  (?:-\w,)?(--[\w-]+)(.*)", line):
                name = option[1]
                cls.options[name] = (group, option[2])
            elif line.startswith("   ") and cls.options:
                cls.options[name] = (cls.options[name][0], cls.options[name][1] + line)

    def test_groups(self):
        self.assertGreater(len(self.options), 60)
        groups = {group for group, _ in self.options.values()}
        self.assertGreater(len(groups), 8)
        self.assertEqual([name for name, (group, _) in self.options.items() if group in (None, "Options", "OPTIONS")], [])

    def test_defaults(self):
        takes_value = {name: text for name, (_, text) in self.options.items() if re.match(r" (TEXT|INT|UINT|FLOAT|BOOLEAN)", text)}
        self.assertGreater(len(takes_value), 50)
        self.assertEqual([name for name, text in takes_value.items() if not re.match(r" [A-Z]+=\S", text)], [])

    def test_words(self):
        self.assertEqual([name for name, (_, text) in self.options.items() if not re.search(r"[a-z]{2}", re.sub(r"^ [A-Z]+=\S+", "", text))], [])

    def test_the_tables(self):
        cells = " ".join(line for page in PAGES for line in page.read_text().splitlines() if line.startswith("|"))
        named = set(re.findall(r"--[a-z][\w-]*", cells))
        self.assertEqual(sorted(set(self.options) - {"--help"} - named), [], "in no table of the pages")
        unknown = {n for n in named if n not in self.options}
        others = set()  # of scripts, whose tables name their own
        for script in [*ROOT.glob("data/*.py"), *ROOT.glob("scripts/*"), *ROOT.glob("dev/**/*.py"), *ROOT.glob("dev/*.h"), *ROOT.glob("dev/*/*.cu")]:
            if script.is_file():
                others |= set(re.findall(r"--[a-z][\w-]*", script.read_text(errors="replace")))
        self.assertEqual(sorted(unknown - others), [], "no program has these")


if __name__ == "__main__":
    unittest.main()
