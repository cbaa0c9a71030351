#!/usr/bin/env python3
"""The page of scripts/plot.py RUN... in a real browser without a window: Chromium (Debian: chromium-headless-shell). Without
one the test is skipped, with exit code 77, which ctest reports by name."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import unittest
from html import unescape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page_test import PageTest, colors_of, step_record  # noqa: E402

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("BROWSER") or next((b for b in BROWSERS if shutil.which(b)), None)

# Runs after the page's own script, moves the pointer, and leaves what it finds in the title.
PROBE = """<script>
const seen = {errors: window.errors, scroll: document.documentElement.scrollWidth - innerWidth};
const tipText = () => document.getElementById("tip").classList.contains("hidden") ? "" : [...document.querySelectorAll("#tip > *")].map(e => e.textContent).join("|");
function point(name, x, y) {  // in the units of the chart
  const svg = document.querySelector(`svg[data-chart="${name}"]`), box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
  const at = {clientX: box.left + x * scale, clientY: box.top + y * scale, bubbles: true};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  return tipText();
}
const c = data.charts.loss;
seen.loss = point("loss", c.left + c.plot / 2, 100);
seen.marks = document.querySelectorAll('svg[data-chart="loss"] .mark').length;
seen.elsewhere = document.querySelectorAll('svg[data-chart="lr"] circle.mark').length;
const box = document.getElementById("tip").getBoundingClientRect();
seen.inside = box.left >= 0 && box.right <= innerWidth;
seen.margin = point("loss", 10, 100);
const load = data.charts["load-0"];
seen.load = load && point("load-0", load.left + 3, load.layers["1"].top + load.tall - 1);
document.querySelector("svg[data-chart=memory] rect[data-tip]")?.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
seen.memory = tipText();
const ink = () => getComputedStyle(document.body).color + " on " + getComputedStyle(document.body).backgroundColor;
seen.colors = [ink()];
document.getElementById("theme").click();
seen.colors.push(ink());
document.querySelector("button[data-run='0']").click();
seen.hidden = [...document.querySelectorAll('g[data-run="0"]')].every(g => getComputedStyle(g).display === "none");
seen.after = point("loss", c.left + c.plot / 2, 100);
seen.shown = data.names.length > 1 && getComputedStyle(document.querySelector('g[data-run="1"]')).display;
seen.text = Math.min(...[...document.querySelectorAll("svg[data-chart] text")].map(t => t.getBoundingClientRect().height).filter(height => height > 0));  // of those not hidden
document.title = JSON.stringify(seen);
</script>"""
EARLY = '<script>window.errors = []; addEventListener("error", e => window.errors.push(e.message));</script>'


def luminance(color):
    channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colors):
    """Of "rgb(..) on rgb(..)", as WCAG has it: 1 to 21."""
    a, b = sorted(luminance(c) for c in colors.split(" on "))
    return (b + 0.05) / (a + 0.05)


@unittest.skipUnless(BROWSER, "no browser: " + ", ".join(BROWSERS))
class Browser(PageTest):
    def browse(self, page, *options, width=1280, height=1400):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={self.folder / 'profile'}", "--virtual-time-budget=4000",
                   "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},{height}", *options, page.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        self.assertEqual(result.returncode, 0, result.stderr[-1000:])
        return result.stdout

    def seen(self, text, **size):
        page = self.folder / "probed.html"
        page.write_text(text.replace("<style>", EARLY + "<style>", 1).replace("</body>", PROBE + "</body>"))
        title = re.search(r"<title>(.*?)</title>", self.browse(page, "--dump-dom", **size), re.S)[1]
        self.assertTrue(title.startswith("{"), f"the script has not come to its end: {title}")
        found = json.loads(unescape(title))
        self.assertEqual((found["errors"], found["inside"], found["hidden"]), ([], True, True))
        self.assertLessEqual(found["scroll"], 0)  # nothing to scroll sideways
        for colors in found["colors"]:
            self.assertGreater(contrast(colors), 10, colors)
        self.assertNotEqual(*found["colors"])
        return found

    def test_values_under_the_pointer(self):
        a = self.run_of("a", [step_record(s) for s in range(1, 11)] + [{"step": 10, "val_loss": 2.5}])
        b = self.run_of("b", [step_record(s, seed=1) for s in range(1, 11)], memory=None)
        found = self.seen(self.drawn(a, b))
        self.assertEqual(found["loss"], "step 5|b3.6|a2.6")
        self.assertEqual((found["marks"], found["elsewhere"], found["margin"], found["shown"]), (3, 2, "", "inline"))
        self.assertEqual(found["load"], "step 1|layer 1, expert 31.43\u00d7 the mean")  # 500 of 200, 300, 400, 500
        self.assertEqual(found["memory"], "weights: 7.8 KiB")
        self.assertEqual(found["after"], "step 5|b3.6")

    def test_one_to_eight_runs_of_many_steps(self):
        runs = [self.long_run(f"run-{i}", 100000 if i == 0 else 2000, i) for i in range(8)]
        for n in (1, 8):
            text = self.drawn(*runs[:n])
            self.assertLess(len(text), 1_500_000)
            for width in (1280, 420):
                found = self.seen(text, width=width)
                self.assertIn("step 50,000|run-0", found["loss"])
                self.assertGreater(found["text"], 9)

    def test_picture(self):
        text = self.drawn(*(self.long_run(f"run-{i}", 400, i) for i in range(3)))
        for theme in ("light", "dark"):
            page, picture = self.folder / f"{theme}.html", self.folder / f"{theme}.png"
            page.write_text(text.replace("<html ", f'<html data-theme="{theme}" ', 1))
            self.browse(page, f"--screenshot={picture}", "--hide-scrollbars")
            self.assertEqual(struct.unpack(">II", picture.read_bytes()[16:24]), (1280, 1400))
            self.assertGreater(colors_of(picture), 100)


if __name__ == "__main__":
    if not BROWSER:
        print("SKIPPED: the page in a browser (none of " + ", ".join(BROWSERS) + " here; Debian: apt-get install chromium-headless-shell)")
        sys.exit(77)
    unittest.main()
