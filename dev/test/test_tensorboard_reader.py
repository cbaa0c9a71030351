#!/usr/bin/env python3
"""The events of --tensorboard in TensorBoard's own reader, and in its web server. Where Python cannot import tensorboard (pip
install tensorboard) the test is skipped, with exit code 77, which ctest reports by name."""
import json
import socket
import subprocess
import sys
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import TrainerTest  # noqa: E402

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    EventAccumulator, PROBLEM = None, error


@unittest.skipUnless(EventAccumulator, "Python cannot import tensorboard")
class Reader(TrainerTest):
    def resumed_run(self):
        """Twelve steps, of which 5 and 6 were trained twice."""
        args = ["--steps", 12, "--checkpoint-every", 4, "--eval-every", 3, "--val-data", self.val, "--tensorboard", self.path("events/run")]
        run = self.trained("--stop-after", 6, *args)
        (run / "latest").write_text("step_00000004\n")
        self.ok(*self.training("--resume", *args))
        return run

    def test_event_accumulator(self):
        run = self.resumed_run()
        reader = EventAccumulator(str(self.path("events/run")), size_guidance={"scalars": 0, "histograms": 0})
        reader.Reload()
        records = [r for r in self.records(run) if "loss" in r]
        tags = reader.Tags()
        self.assertEqual(set(tags["scalars"]), {"loss", "aux_loss", "z_loss", "lr", "grad_norm", "tokens_per_s", "load_max_over_mean", "val_loss"})
        for tag in set(tags["scalars"]) - {"val_loss", "tokens_per_s"}:
            self.assertEqual([s.step for s in reader.Scalars(tag)], list(range(1, 13)))  # each once
            for scalar, record in zip(reader.Scalars(tag), records):
                self.assertAlmostEqual(scalar.value, record[tag], delta=1e-7 * abs(record[tag]) + 1e-12)
        self.assertEqual([s.step for s in reader.Scalars("val_loss")], [3, 6, 9, 12])
        self.assertEqual(tags["histograms"], ["expert_load/layer_0"])
        for histogram, record in zip(reader.Histograms("expert_load/layer_0"), records):
            load = record["expert_load"][0]
            self.assertEqual([n for n in histogram.histogram_value.bucket if n], [n for n in load if n])
            self.assertEqual(histogram.histogram_value.num, sum(load))

    # What scripts/to_wandb.py says where it cannot begin: without wandb, or without events.
    def test_to_wandb(self):
        script = Path(__file__).resolve().parent.parent.parent / "scripts" / "to_wandb.py"
        self.path("none").mkdir()
        result = subprocess.run([sys.executable, str(script), str(self.path("none"))], capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        line = result.stderr.splitlines()[-1]
        self.assertTrue(line.endswith("none: no event files with scalars there") or line.endswith("pip install wandb tensorboard"), result.stderr)

    # The server itself, with the fast reader that it starts where that is installed.
    def test_server(self):
        run = self.resumed_run()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", str(self.path("events")), "--host", "127.0.0.1", "--port", str(port),
                                   "--reload_interval", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            def get(path, **query):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
                    return json.load(answer)

            deadline, tags = time.time() + 120, {}
            while "run" not in tags or "val_loss" not in tags["run"]:
                self.assertLess(time.time(), deadline, f"the server knows only {tags}")
                self.assertIsNone(server.poll(), "the server has ended")
                time.sleep(1)
                try:
                    tags = get("plugin/scalars/tags")
                except (urllib.error.URLError, ConnectionError):
                    pass
            losses = [r["loss"] for r in self.records(run) if "loss" in r]
            shown = get("plugin/scalars/scalars", run="run", tag="loss")
            self.assertEqual([step for _, step, _ in shown], list(range(1, 13)))
            for (_, _, value), loss in zip(shown, losses):
                self.assertAlmostEqual(value, loss, delta=1e-6)
            histograms = get("plugin/histograms/histograms", run="run", tag="expert_load/layer_0")
            loads = [r["expert_load"][0] for r in self.records(run) if "loss" in r]
            self.assertEqual([step for _, step, _ in histograms], list(range(1, 13)))
            for (_, _, buckets), load in zip(histograms, loads):
                used = [e for e, n in enumerate(load) if n]
                self.assertEqual(buckets, [[e, e + 1, load[e]] for e in range(used[0], used[-1] + 1)])
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    if not EventAccumulator:
        print(f"SKIPPED: TensorBoard's own reader ({PROBLEM}; pip install tensorboard)")
        sys.exit(77)
    unittest.main()
