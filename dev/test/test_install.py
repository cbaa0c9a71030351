"""cmake --install into an empty prefix: the trainer runs from there, and examples/moe_layer, configured out of the tree
against the installed package alone, builds, runs and agrees with finite differences. The build folder is that of $TRAINER."""

import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from trainer import ENV, TRAINER

ROOT = Path(__file__).resolve().parents[2]
BUILD = TRAINER.parent


def run(*command, **options):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENV, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


class Installed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.prefix = cls.folder / "prefix"
        run("cmake", "--install", BUILD, "--prefix", cls.prefix)

    def found(self, pattern):
        files = [p for p in self.prefix.rglob(pattern)]
        self.assertTrue(files, f"no {pattern} was installed")
        return files

    def test_what_is_there(self):
        files = {p.name for p in self.prefix.rglob("*") if not p.is_dir()}
        self.assertEqual({f for f in files if not f.startswith(("libgpt_moe.so", "gpt_moe-targets"))},
                         {"train_gpt_moe", "gpt_moe.h", "gpt_moe-config.cmake", "gpt_moe-config-version.cmake"})
        for file in self.found("*.cmake"):
            for place in (ROOT, BUILD):
                self.assertNotIn(str(place), file.read_text(), f"{file.name} names a place that another machine does not have")

    def test_the_trainer(self):
        self.assertIn("--preset", run(self.found("train_gpt_moe")[0], "--help"))
        report = run(self.found("train_gpt_moe")[0], "--dry-run", "--memory-report", "--device", "cpu", cwd=self.folder)
        self.assertIn("memory plan: ", report)

    def test_nothing_but_the_layer_is_visible(self):
        if not shutil.which("nm"):
            self.fail("nm is missing: it comes with the compiler (binutils)")
        symbols = run("nm", "-D", "-C", "--defined-only", self.found("libgpt_moe.so")[0]).splitlines()
        self.assertTrue(any("moe::Layer::forward" in s for s in symbols))
        self.assertEqual([s for s in symbols if not re.search(r" (vtable for |typeinfo (name )?for )?moe::", s)], [])

    def test_the_example(self):
        source, build = self.folder / "example", self.folder / "example-build"
        shutil.copytree(ROOT / "examples" / "moe_layer", source)
        run("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={self.prefix}")
        run("cmake", "--build", build)
        lines = run(build / "moe_layer").splitlines()
        self.assertEqual(lines[-1], "good")
        values = {m[1]: (float(m[2]), float(m[3])) for m in (re.match(r"(.+?) +(\S+) +(\S+)  error", line) for line in lines) if m}
        for name in ("d x", "d router", "d w13", "d w2"):
            ours, finite_difference = values.pop(name)
            self.assertGreater(abs(ours), 1)
            self.assertAlmostEqual(ours, finite_difference, delta=1e-6 * abs(ours))
        for name, (gpu, cpu) in values.items():  # with CUDA and a GPU
            self.assertTrue(name.startswith("GPU "))
            self.assertAlmostEqual(gpu, cpu, delta=0.02 * cpu)
        saved, workspace = map(int, re.match(r"saved (\d+) bytes, workspace (\d+) bytes", lines[0]).groups())
        N, F, K = 96, 48, 2
        self.assertGreaterEqual(saved, 8 * N * K * 2 * F)  # H in double
        self.assertLess(saved, 8 * N * K * 2 * F * 1.1)
        self.assertGreater(workspace, saved)

    def test_another_version_is_refused(self):
        source = self.folder / "newer"
        source.mkdir()
        (source / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.22)\nproject(newer LANGUAGES CXX)\nfind_package(gpt_moe 9.0 REQUIRED)\n")
        result = subprocess.run(["cmake", "-S", source, "-B", self.folder / "newer-build", f"-DCMAKE_PREFIX_PATH={self.prefix}"],
                                capture_output=True, text=True, env=ENV)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("9.0", result.stderr)


class Recipes(unittest.TestCase):
    """The container and the workflow, which do not run here, name what exists."""

    def test_one_image(self):
        image = re.search(r"^ARG IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)[1]
        self.assertRegex(image, r"^nvidia/cuda:[0-9.]+-devel-ubuntu[0-9.]+$")  # of Docker Hub, no other registry
        for file in ("scripts/launch/container.sh", ".github/workflows/test.yml"):
            self.assertEqual(set(re.findall(r"nvidia/cuda:[\w.-]+", (ROOT / file).read_text())), {image}, file)

    def test_they_run_scripts_that_are_there(self):
        for file in (".github/workflows/test.yml", "Dockerfile"):
            scripts = set(re.findall(r"scripts/[\w/.]+\.sh", (ROOT / file).read_text()))
            self.assertTrue(scripts, file)
            for script in scripts:
                self.assertTrue((ROOT / script).is_file(), f"{file}: {script}")
        self.assertIn("scripts/test.sh", (ROOT / ".github/workflows/test.yml").read_text())


if __name__ == "__main__":
    unittest.main()
