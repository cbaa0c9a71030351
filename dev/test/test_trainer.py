#!/usr/bin/env python3
"""Tests of the whole program: TRAINER=build/train_gpt_moe python3 dev/test/test_trainer.py"""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import BATCH, DEVICE, ENV, EOT, MODEL, TRAINER, Safetensors, TrainerTest, shard_bytes, text  # noqa: E402

AUTO_BUDGET = "0.05" if DEVICE == "cuda" else "0.01"  # GiB; the library's workspace on a GPU is 32 MiB

SIGMOID = ["--gate", "sigmoid", "--balance", "bias", "--route-scale", "1.5"]
TWO_MICRO_BATCHES = ["--total-batch-tokens", "128"]


class Resume(TrainerTest):
    def check(self, *options, steps=20, stop=10):
        common = [*options, "--steps", steps, "--eval-every", 5, "--val-data", self.val]
        whole = self.trained(*common, out="whole")
        self.trained(*common, "--stop-after", stop, out="halves")
        self.assertEqual(self.checkpoint(self.path("halves")).name, f"step_{stop:08}")
        self.assertIn("resumed from", self.ok(*self.training(*common, "--resume", out="halves")))
        self.assert_same_run(whole, self.path("halves"))
        return whole

    def test_fp32(self):
        self.check("--dtype", "fp32")

    def test_bf16(self):
        run = self.check("--dtype", "bf16")
        self.assertEqual({t[0] for t in Safetensors(self.checkpoint(run) / "model.safetensors").tensors.values()}, {"BF16"})
        self.assertIn("master.lm_head.weight" if "--tied" in MODEL else "master.model.embed_tokens.weight", Safetensors(self.checkpoint(run) / "optimizer.safetensors").tensors)

    def test_fp64(self):
        self.check("--dtype", "fp64")

    def test_accumulation(self):
        for dtype in ("fp32", "bf16"):
            with self.subTest(dtype):
                self.check(*TWO_MICRO_BATCHES, "--dtype", dtype)
                shutil.rmtree(self.path("whole")), shutil.rmtree(self.path("halves"))

    def test_selection_bias(self):
        run = self.check(*SIGMOID, "--bias-rate", "0.01")
        bias = Safetensors(self.checkpoint(run) / "model.safetensors").tensors["model.layers.0.mlp.gate.e_score_correction_bias"]
        self.assertTrue(any(struct.unpack("<4f", bias[2])))

    def test_keeps_the_balance_options_of_the_run(self):
        """A resumed run that leaves them out goes on with those it began with, not with the defaults."""
        balance = ["--aux-coef", 0.5, "--z-coef", 0.25, "--balance-scope", "sequence"]
        whole = self.trained("--steps", 20, *balance, out="whole")
        self.trained("--steps", 20, *balance, "--stop-after", 10, out="halves")
        self.ok(*self.training("--steps", 20, "--resume", out="halves"))
        self.assert_same_run(whole, self.path("halves"))

    def test_every_other_part(self):
        self.check("--n-layer", 2, "--dense-layers", 0, "--d-dense", 32, "--d-shared", 16, "--capacity-factor", 0.8, "--tied", "false", "--qk-norm", "false", "--schedule", "wsd")

    def test_outlier_detector(self):
        run = self.check("--skip-norm-z", 1, "--skip-loss-z", 2, steps=150, stop=135)
        skipped = [r["step"] for r in self.records(run) if "skipped" in r]
        self.assertTrue([s for s in skipped if s > 135], skipped)  # with the window of before the stop
        self.assertTrue(all(s > 128 for s in skipped), skipped)

    def test_lost_steps_after_the_last_checkpoint(self):
        common = ["--steps", 20, "--val-data", self.val, "--eval-every", 6]
        whole = self.trained(*common, out="whole")
        crashed = self.trained(*common, "--checkpoint-every", 10, "--stop-after", 15, out="crashed")
        shutil.rmtree(crashed / "step_00000015")
        (crashed / "latest").write_text("step_00000010\n")
        for name in ("main.log", "log.jsonl"):  # the line at which it was cut
            with open(crashed / name, "a") as log:
                log.write('{"step":16,"lo')
        self.ok(*self.training(*common, "--resume", out="crashed"))
        (crashed / "main.log").write_text(re.sub("s:15 tel.*\n", "", (crashed / "main.log").read_text()))
        self.assert_same_run(whole, crashed)

    def test_in_several_epochs_and_with_nothing_left(self):
        self.train.write_bytes(shard_bytes([EOT, *text(70)]))
        self.assertIn(" training windows", self.ok(*self.training("--epochs", 3, out="whole")))
        self.trained("--epochs", 3, "--stop-after", 7, out="halves")
        self.ok(*self.training("--epochs", 3, "--resume", out="halves"))
        self.assert_same_run(self.path("whole"), self.path("halves"))
        self.assertIn("nothing to do", self.ok(*self.training("--epochs", 3, "--resume", out="halves")))
        self.assert_same_run(self.path("whole"), self.path("halves"))

    def test_another_run_is_refused(self):
        self.trained("--steps", 10, "--stop-after", 5)
        resume = lambda *more, **options: self.training("--steps", 10, "--resume", *more, **options)
        self.refused(resume("--seed", 7), "--seed 7", "42")
        self.refused(resume("--seq-len", 16), "--seq-len 16", "32")
        self.refused(resume("--n-expert", 8), "--n-expert", "config.json")
        self.refused(resume("--record-routing", self.path("routing")), "--record-routing")
        self.refused(resume("--init-from", self.path("run")), "--init-from")
        self.refused(resume(out="nowhere"), "nowhere")
        self.refused(self.training("--steps", 10), "already holds a run", "--resume")


class Routing(TrainerTest):
    def test_replay(self):
        record = self.path("run") / "routing"  # the run makes its directory
        for options in ([], TWO_MICRO_BATCHES, ["--n-layer", 3, "--dense-layers", 1, "--d-dense", 16, "--dtype", "bf16"], ["--n-expert", 300, "--top-k", 3]):
            with self.subTest(options):
                common = ["--steps", 6, *options]
                run = self.trained(*common, "--record-routing", record)
                again = self.trained(*common, "--replay-routing", record, out="again")
                self.assert_same_run(run, again)
                shutil.rmtree(run), shutil.rmtree(again)

    def test_choices_are_taken_from_the_file(self):
        common = ["--steps", 3]
        record = self.path("routing")
        self.trained(*common, "--record-routing", record)
        raw = record.read_bytes()
        self.assertEqual(struct.unpack("<8s5i", raw[:28]), (b"GPTMOERT", 1, 4, 2, 64, 1))
        self.assertEqual(len(raw), 28 + 3 * 64 * 2)
        loads = [[raw[28 + 128 * s:28 + 128 * (s + 1)].count(e) for e in range(4)] for s in range(3)]
        self.assertEqual([[l] for l in loads], [r[0] for r in self.records(self.path("run"), "expert_load")])
        record.write_bytes(raw[:28] + bytes([3, 1]) * 64 * 3)
        run = self.trained(*common, "--replay-routing", record, out="again")
        self.assertEqual(self.records(run, "expert_load"), [[[[0, 64, 0, 64]]]] * 3)

    def test_refused(self):
        record = self.path("routing")
        self.trained("--steps", 4, "--record-routing", record, out="first")
        replay = lambda *more: self.training("--steps", 4, *more, "--replay-routing", record)
        for more in (["--n-expert", 8], ["--top-k", 1], ["--batch-size", 1], ["--n-layer", 2]):
            self.refused(replay(*more), "routing", "recorded with")
        self.refused(self.training("--steps", 5, "--replay-routing", record), "routing", "4 micro-steps")
        self.refused(replay(*TWO_MICRO_BATCHES), "routing", "4 micro-steps")
        self.refused(replay("--record-routing", self.path("new")), "--record-routing")
        self.refused(replay("--dense-layers", 0, "--d-dense", 16), "no MoE layer")
        raw = record.read_bytes()
        for bad in (b"", raw[:7], raw[:20], raw[:-1], b"X" + raw[1:], raw[:8] + b"\2" + raw[9:], self.train.read_bytes()):
            record.write_bytes(bad)
            self.refused(replay(), "routing")
        record.write_bytes(raw[:28] + b"\4" + raw[29:])
        self.refused(replay(), "routing", "expert 4 of 4")
        self.refused(self.training("--replay-routing", self.path("none")), "none")
        self.refused(self.training("--record-routing", self.path("none/routing")), "none/routing")
        self.refused(self.training("--record-routing", self.folder), "directory")
        self.refused(self.training("--dense-layers", 0, "--d-dense", 16, "--record-routing", self.path("new")), "no MoE layer")
        self.refused(self.training("--record-routing", self.path("new"), "--train-data", self.path("no.bin")), "no.bin")  # the record comes last


class SameNumbers(TrainerTest):
    def test_policies(self):
        for dtype in ("fp32", "bf16"):
            common = ["--steps", 6, "--n-layer", 2, "--d-shared", 16, "--dtype", dtype, "--val-data", self.val]
            expected = self.losses(self.trained(*common, out=dtype))
            for options in (["--recompute", "none"], ["--recompute", "up"], ["--recompute", "block"], ["--dispatch", "materialized"], ["--arena", "separate"],
                            ["--dispatch", "materialized", "--recompute", "block", "--arena", "separate"], ["--recompute", "auto", "--memory-budget", AUTO_BUDGET]):
                with self.subTest(dtype=dtype, options=options):
                    run = self.trained(*common, *options, out=dtype + "".join(options))
                    self.assertEqual(self.losses(run), expected)
                    self.assertEqual(self.records(run)[-1], self.records(self.path(dtype))[-1])  # validation

    def test_batch_split(self):
        whole, split = ["--batch-size", 4, *TWO_MICRO_BATCHES, "--balance-scope", "sequence"], ["--batch-size", 2, *TWO_MICRO_BATCHES, "--balance-scope", "sequence"]
        first = [self.weights(self.trained("--steps", 1, "--lr", 0, *o, out=f"first{i}")) for i, o in enumerate((whole, split))]
        self.assertEqual(first[0], first[1])
        for more in ([], ["--gate", "sigmoid"]):
            a, b = (self.records(self.trained("--steps", 30, *o, *more, out=f"{i}{len(more)}"), "loss", "aux_loss", "z_loss", "grad_norm") for i, o in enumerate((whole, split)))
            self.assertEqual(len(a), 30)
            for step, (x, y) in enumerate(zip(a, b)):
                for p, q in zip(x, y):
                    self.assertLess(abs(p - q), 1e-5 * max(1, abs(p)), f"step {step}: {x} {y}")

    def test_seeds(self):
        runs = [self.trained("--steps", 3, "--seed", s, out=f"run{i}") for i, s in enumerate((42, 43, 42))]
        self.assert_same_run(runs[0], runs[2])
        self.assertNotEqual(self.losses(runs[0]), self.losses(runs[1]))

    def test_overfit_one_batch(self):
        run = self.trained("--overfit-one-batch", "--steps", 400, "--lr", 0.01, "--warmup-steps", 10, "--weight-decay", 0)
        self.assertLess(self.records(run)[-1]["loss"], 0.05)


class Generate(TrainerTest):
    def setUp(self):
        super().setUp()
        self.run_dir = self.trained("--steps", 60, "--lr", 0.01)

    def generate(self, *more, checkpoint=None):
        result = subprocess.run([str(TRAINER), "--generate", "--checkpoint", str(checkpoint or self.run_dir), *map(str, more)], env=ENV, capture_output=True, timeout=60)
        self.assertEqual((result.returncode, result.stderr), (0, b""))
        return result.stdout

    def test_seed_and_places(self):
        text = self.generate("--prompt", "God said ", "--max-new-tokens", 100)
        self.assertTrue(text.startswith(b"God said "))
        self.assertEqual(text, self.generate("--prompt", "God said ", "--max-new-tokens", 100, checkpoint=self.checkpoint(self.run_dir)))
        self.assertNotEqual(text, self.generate("--prompt", "God said ", "--max-new-tokens", 100, "--seed", 43))
        self.assertTrue(text.startswith(self.generate("--prompt", "God said ", "--max-new-tokens", 20)[:-1]))

    def test_likeliest(self):
        texts = {self.generate("--prompt", "the ", "--temperature", 0, "--seed", s, "--max-new-tokens", 50) for s in (1, 2)}
        texts.add(self.generate("--prompt", "the ", "--top-k-sampling", 1, "--max-new-tokens", 50))
        texts.add(self.generate("--prompt", "the ", "--top-p", 1e-9, "--max-new-tokens", 50))
        self.assertEqual(len(texts), 1)

    def test_longer_than_the_context(self):
        self.assertEqual(len(self.generate("--max-new-tokens", 300, "--temperature", 0.5, "--top-k-sampling", 10)), 301)
        long_prompt = "let there be light and " * 20
        self.assertEqual(len(self.generate("--prompt", long_prompt, "--max-new-tokens", 100, "--temperature", 0)), len(long_prompt) + 101)
        self.assertEqual(len(self.generate("--prompt", "the ", "--max-new-tokens", 50, "--context", 2, "--temperature", 0)), 55)

    def test_unicode(self):
        prompt = "Ça va? 光あれ 🌍 é"
        self.assertTrue(self.generate("--prompt", prompt, "--max-new-tokens", 20).startswith(prompt.encode()))
        self.assertEqual(self.generate("--prompt", prompt, "--max-new-tokens", 20), self.generate("--prompt", prompt, "--max-new-tokens", 20))
        self.assertEqual(self.generate("--prompt", os.fsdecode(b"\xff\xfe"), "--max-new-tokens", 5)[:2], b"\xff\xfe")

    def test_dtypes(self):
        self.assertEqual(*(self.generate("--temperature", 0, "--max-new-tokens", 30, "--dtype", d) for d in ("fp32", "fp64")))
        self.generate("--dtype", "bf16", "--max-new-tokens", 5)

    def test_samples_while_training(self):
        out = self.ok(*self.training("--steps", 4, "--sample-every", 2, "--prompt", "God ", "--max-new-tokens", 10, out="other"))
        self.assertEqual(out.count("--- sample at step"), 2)
        self.assertIn("\nGod ", out)

    def test_ids_that_the_model_lacks(self):
        small = self.hf_directory("qwen3_moe")
        config = json.loads((small / "config.json").read_text())
        file = Safetensors(small / "model.safetensors")
        config["vocab_size"] = 100
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            file.tensors[name] = "F32", [100, 32], file.tensors[name][2][:100 * 32 * 4]
        (small / "config.json").write_text(json.dumps(config))
        file.write(small / "model.safetensors")
        self.train.write_bytes(shard_bytes([i % 100 for i in range(2000)], tokenizer=0))
        run = self.trained("--init-from", small, "--steps", 1, model=[], out="small")
        self.refused(["--generate", "--checkpoint", run], "ranks")
        trained = self.checkpoint(run) / "config.json"
        trained.write_text(trained.read_text().replace('"tokenizer_id": 0', '"tokenizer_id": 1'))
        self.refused(["--generate", "--checkpoint", run, "--prompt", "a"], "256", "99")


class ConfigFile(TrainerTest):
    def test_toml_and_ini(self):
        expected = self.losses(self.trained("--steps", 3, "--lr", 0.002, "--tied", "false"))
        lines = {k[2:]: v for k, v in zip(MODEL[::2] + BATCH[::2], MODEL[1::2] + BATCH[1::2])}
        lines.update({"steps": 9, "lr": 0.002, "tied": "false"})
        toml = self.path("options.toml")
        toml.write_text("# a comment\n" + "".join(f"{k} = {v}\n" for k, v in lines.items()) + f'train-data = "{self.train}"\nval-data = ""\n')
        ini = self.path("options.ini")
        ini.write_text("; a comment\n" + "".join(f"{k}={v}\n" for k, v in lines.items()) + f"train-data={self.train}\nval-data=\"\"\n")
        for file in (toml, ini):
            out = self.path("run-" + file.name)
            self.ok("--config", file, "--steps", 3, "--out", out)  # the command line wins
            self.assertEqual(self.losses(out), expected)
            self.refused(["--config", file, "--out", self.path("new"), "--n-expert", 1], "--top-k 2")

    def test_preset_in_a_file(self):
        file = self.path("options.toml")
        file.write_text('preset = "olmoe-1b-7b-size"\nmemory-report = true\ndry-run = true\n')
        self.assertIn("layer 15 moe saved", self.ok("--config", file))
        self.assertNotIn("layer 4 moe", self.ok("--config", file, "--preset", "tiny"))

    def test_refused(self):
        file = self.path("options.toml")
        for content, expected in (("stepz = 3\n", "stepz"), ("steps = three\n", "three"), ("steps = -1\n", "--steps"), ("gate = 'neither'\n", "neither"),
                                  ("[section]\nsteps = 3\n", "section"), ("preset = 'none'\n", "none"), ("top-k = [1, 2]\n", "top-k"), ("= = =\n", "")):
            file.write_text(content)
            self.refused(self.training("--config", file), expected)
        file.write_bytes(bytes(random.Random(1).randrange(256) for _ in range(500)))
        self.refused(self.training("--config", file))
        self.refused(self.training("--config", self.path("none.toml")), "none.toml")
        self.refused(self.training("--config", self.folder))


class Weights(TrainerTest):
    def test_from_a_checkpoint(self):
        for dtype in ("fp32", "bf16", "fp64"):
            source = self.trained("--steps", 3, "--dtype", dtype, out=dtype)
            for other in ("fp32", "bf16", "fp64"):
                run = self.trained("--steps", 1, "--lr", 0, "--dtype", other, "--init-from", self.checkpoint(source), out=f"{dtype}-{other}")
                self.assertEqual(self.weights(run) == self.weights(source), dtype == other)
                self.assertLess(self.records(run)[0]["loss"], self.records(source)[0]["loss"])
        again = self.trained("--steps", 1, "--lr", 0, "--init-from", source, model=[], out="again")  # a run's directory; the model is the file's
        self.assertEqual(self.records(again, "loss"), self.records(self.path("fp64-fp32"), "loss"))

    def test_from_transformers(self):
        for kind in ("qwen3_moe", "mixtral"):
            for dtype, option in (("F32", "fp32"), ("BF16", "bf16")):
                with self.subTest(kind=kind, dtype=dtype):
                    source = self.hf_directory(kind, dtype)
                    run = self.trained("--steps", 1, "--lr", 0, "--init-from", source, "--dtype", option, model=[], out=f"same-{kind}-{dtype}")
                    self.assertEqual(Safetensors(self.checkpoint(run) / "model.safetensors").tensors, Safetensors(source / "model.safetensors").tensors)
                    self.assertEqual(json.loads((self.checkpoint(run) / "config.json").read_text())["model_type"], kind)
                    run = self.trained("--steps", 20, "--init-from", source, "--dtype", option, "--lr", 0.01, model=[], out=f"{kind}-{dtype}")
                    losses = [r[0] for r in self.records(run, "loss")]
                    self.assertLess(losses[-1], losses[0] - 1)

    def test_refused(self):
        source = self.hf_directory("qwen3_moe")
        training = lambda *more: self.training("--steps", 1, "--init-from", source, *more, model=[])
        self.refused(training("--n-layer", 1), "--n-layer", "config.json")
        good_config, good = json.loads((source / "config.json").read_text()), Safetensors(source / "model.safetensors")
        for key, value in (("hidden_size", 64), ("num_experts", 8), ("num_hidden_layers", 2), ("moe_intermediate_size", 32), ("head_dim", 32), ("vocab_size", 300),
                           ("num_attention_heads", 3), ("num_experts_per_tok", 9), ("num_experts", 0), ("rope_theta", 0), ("rms_norm_eps", "small"),
                           ("hidden_size", None), ("hidden_size", 1e300), ("hidden_size", 2**63), ("num_hidden_layers", 10**7), ("model_type", "llama"), ("model_type", 3),
                           ("mlp_only_layers", [5]), ("mlp_only_layers", "x"), ("decoder_sparse_step", 2), ("rope_scaling", {"type": "linear"}), ("rope_parameters", {"rope_type": "yarn"}),
                           ("norm_topk_prob", "yes"), ("tie_word_embeddings", 3.5), ("router_aux_loss_coef", "x"), ("router_aux_loss_coef", -1), ("hidden_act", "gelu"), ("use_sliding_window", True)):
            with self.subTest(key=key, value=value):
                (source / "config.json").write_text(json.dumps({**good_config, key: value}))
                self.refused(training(), source)
        (source / "config.json").write_text(json.dumps(good_config))
        for name in ("model.norm.weight", "model.layers.0.mlp.experts.3.down_proj.weight", "lm_head.weight"):
            dtype, shape, data = good.tensors[name]
            for change in (None, (dtype, shape[::-1] + [1], data), ("I32", shape, data), ("U8", [len(data)], data), (dtype, [shape[0] - 1, *shape[1:]], data[:len(data) - len(data) // shape[0]])):
                bad = Safetensors()
                bad.tensors = {**good.tensors, name: change}
                if change is None:
                    del bad.tensors[name]
                bad.write(source / "model.safetensors")
                self.refused(training(), name)
        bad = Safetensors()
        bad.tensors = {**good.tensors, "model.layers.0.self_attn.q_proj.bias": good.tensors["model.norm.weight"]}
        bad.write(source / "model.safetensors")
        self.refused(training(), "q_proj.bias")
        good.write(source / "model.safetensors")
        good.write(source / "model-2.safetensors")
        self.refused(training(), "also in")
        (source / "model-2.safetensors").unlink()
        self.refused(self.training("--init-from", self.path("nowhere")), "nowhere")
        self.refused(self.training("--init-from", self.folder), self.folder)

    def test_export(self):
        for kind, options in (("qwen3_moe", []), ("mixtral", ["--qk-norm", "false", "--tied", "false"])):
            run = self.trained("--steps", 3, *options, out=kind)
            target = self.path("export-" + kind)
            self.assertIn(kind, self.ok("--export", "hf", "--checkpoint", run, "--out", target))
            self.assertEqual(sorted(p.name for p in target.iterdir()), ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
            self.assertEqual((target / "model.safetensors").read_bytes(), self.weights(run))
            self.assertEqual((target / "config.json").read_bytes(), (self.checkpoint(run) / "config.json").read_bytes())
            config = json.loads((target / "config.json").read_text())
            self.assertEqual(config["model_type"], kind)
            del config["gpt_moe"]  # as another program would write it
            (target / "config.json").write_text(json.dumps(config))
            back = self.trained("--steps", 1, "--lr", 0, "--init-from", target, model=[], out="back-" + kind)
            self.assertEqual(self.weights(back), self.weights(run))
            self.refused(["--export", "hf", "--checkpoint", run, "--out", target], target)
            self.refused(["--export", "hf", "--checkpoint", run, "--out", run], run)

    def test_export_refused(self):
        for options, name in ((SIGMOID, "--gate sigmoid"), (["--d-shared", 16], "--d-shared"), (["--capacity-factor", 1.5], "--capacity-factor"),
                              (["--qk-norm", "false", "--norm-topk-prob", "false"], "--norm-topk-prob")):
            run = self.trained("--steps", 1, *options, out=name)
            self.refused(["--export", "hf", "--checkpoint", run, "--out", self.path("new")], name)
            self.assertEqual(json.loads((self.checkpoint(run) / "config.json").read_text())["model_type"], "gpt_moe")

    def test_selection_bias_survives(self):
        run = self.trained("--steps", 30, *SIGMOID, "--bias-rate", 0.5)  # large enough to decide every choice
        same = self.trained("--steps", 1, "--lr", 0, *SIGMOID, "--bias-rate", 0, "--init-from", run, out="same")
        self.assertEqual(self.weights(same), self.weights(run))
        text = self.ok("--generate", "--checkpoint", run, "--temperature", 0, "--prompt", "the ", "--max-new-tokens", 40)
        self.assertEqual(self.ok("--generate", "--checkpoint", same, "--temperature", 0, "--prompt", "the ", "--max-new-tokens", 40), text)


class NotFinite(TrainerTest):
    def test_weight(self):
        source = self.hf_directory("qwen3_moe")
        file = Safetensors(source / "model.safetensors")
        file.change("model.layers.0.self_attn.o_proj.weight", lambda v: [float("nan"), *v[1:]])
        file.write(source / "model.safetensors")
        self.check(source, "loss", "model.layers.0.self_attn.o_proj.weight", None)

    def test_gradient(self):
        source = self.hf_directory("qwen3_moe")
        file = Safetensors(source / "model.safetensors")  # the logits are ordinary, the gradient of the norm's weight is not
        file.change("model.norm.weight", lambda v: [x * 1e-25 for x in v])
        file.change("lm_head.weight", lambda v: [x * 1e25 for x in v])
        file.write(source / "model.safetensors")
        self.check(source, "gradient", "model.norm.weight", 10)

    def check(self, source, what, tensor, largest_loss):
        out = self.ok(*self.training("--init-from", source, "--steps", 3, "--sample-every", 3, "--val-data", self.val, model=[]))
        for step in (1, 2, 3):
            line = re.search(rf"step +{step}/3 .*update skipped: (.*)", out)[1]
            self.assertIn(what, line)
            self.assertIn(tensor, line)
        if largest_loss is None:
            self.assertIn("no sample", out)
        for record in self.records(self.path("run"))[:3]:
            self.assertIn(tensor, record["skipped"])
            self.assertTrue(record["loss"] is None if largest_loss is None else record["loss"] < largest_loss, record)
        self.assertEqual(Safetensors(self.checkpoint(self.path("run")) / "model.safetensors").tensors, Safetensors(source / "model.safetensors").tensors)
        for name, (_, _, data) in Safetensors(self.checkpoint(self.path("run")) / "optimizer.safetensors").tensors.items():
            if name.startswith(("m.", "v.")):
                self.assertFalse(any(data), name)


class Logs(TrainerTest):
    def test_format(self):
        run = self.trained("--steps", 6, "--eval-every", 3, "--val-data", self.val, "--n-layer", 2, "--dense-layers", 1, "--d-dense", 16)
        lines = (run / "main.log").read_text().splitlines()
        self.assertEqual([line.split()[0] for line in lines], [f"s:{s}" for s in (1, 2, 3, 3, 4, 5, 6, 6)])
        for line in lines:
            self.assertRegex(line, r"^s:\d+ (trl:\d+\.\d{4} lr:\d+\.\d{6} norm:\d+\.\d\d|tel:\d+\.\d{4})$")
        records = self.records(run)
        self.assertEqual([r["step"] for r in records], [1, 2, 3, 3, 4, 5, 6, 6])
        for record, line in zip(records, lines):
            if "val_loss" in record:
                self.assertEqual((set(record), f"{record['val_loss']:.4f}"), ({"step", "val_loss", "val_bits_per_byte"}, line.split("tel:")[1]))
                continue
            self.assertLessEqual({"step", "loss", "aux_loss", "z_loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu", "expert_load"}, set(record))
            self.assertEqual(line, f"s:{record['step']} trl:{record['loss']:.4f} lr:{record['lr']:.6f} norm:{record['grad_norm']:.2f}")
            self.assertEqual([sum(layer) for layer in record["expert_load"]], [128, 0])
            self.assertTrue(record["ms"] > 0 and record["tokens_per_s"] > 0 and record["mfu"] > 0, record)
        digits = re.findall(r'"(?:loss|aux_loss|z_loss|val_loss|lr|grad_norm)":([^,}]+)', (run / "log.jsonl").read_text())
        self.assertEqual(len(digits), 6 * 5 + 2)
        for number in digits:
            self.assertEqual(number, f"{float(number):.9g}")
        self.assertGreater(sum(len(n.replace(".", "").lstrip("0")) >= 8 for n in digits), 20)

    def test_help(self):
        out = self.ok("--help")
        for word in ("--n-layer", "Router and balance", "--record-routing", "--pp", "--config"):
            self.assertIn(word, out)


class MemoryReport(TrainerTest):
    def report(self, *args):
        out = self.ok("--memory-report", "--dry-run", *args)
        table = {m[1].strip(): (int(m[2]), int(m[3])) for m in re.finditer(r"^([a-z ]+?) +(\d+) +[\d.]+ [KMGT]?i?B +(\d+)$", out, re.M)}
        self.assertEqual(len(table), 7, out)
        for column in (0, 1):
            self.assertEqual(sum(v[column] for k, v in table.items() if k != "total"), table["total"][column])
        return out, table

    def test_presets(self):
        for name in ("tiny", "gpt124-8x2", "olmoe-1b-7b-size", "qwen3-30b-a3b", "mixtral-8x7b"):
            for dtype in ("bf16", "fp32"):
                out, table = self.report("--preset", name, "--dtype", dtype)
                saved = [int(n) for n in re.findall(r"^layer \d+ \w+ saved (\d+)", out, re.M)]
                self.assertLessEqual(sum(saved), table["saved"][0])
                self.assertGreater(table["saved"][1], table["saved"][0])  # materialized keeps more
        self.assertEqual(list(self.folder.glob("runs*")), [])

    def test_the_formula(self):
        begin = time.time()
        out, _ = self.report("--preset", "qwen3-30b-a3b", "--dtype", "bf16", "--batch-size", 1, "--seq-len", 4096)
        self.assertLess(time.time() - begin, 5)
        self.assertRegex(out, r"(?m)^layer 0 moe saved 117440512 metadata \d+$")
        self.assertIn("2NC + 4NKF = 117440512", out)

    def test_automatic_recompute(self):
        model = "--n-layer 6 --d-model 64 --n-head 2 --n-kv-head 1 --head-dim 32 --n-expert 4 --d-expert 64 --batch-size 4 --seq-len 128".split()
        total = {p: self.report(*model, "--recompute", p)[1]["total"][0] for p in ("none", "act", "up", "block")}
        self.assertTrue(total["none"] > total["act"] > total["up"] > total["block"], total)
        GiB = 2**30
        costs = []
        for i in range(13):
            budget = total["block"] + (total["none"] - total["block"]) * i // 12
            out = self.ok(*model, "--dry-run", "--recompute", "auto", "--memory-budget", f"{(budget + 1) / GiB:.15f}")
            chosen = dict(re.findall(r"(none|act|up|block) x (\d+)", out))
            self.assertEqual(sum(map(int, chosen.values())), 6)
            costs.append(sum(["none", "act", "up", "block"].index(p) * int(n) for p, n in chosen.items()))
        self.assertEqual(costs, sorted(costs, reverse=True))
        self.assertGreaterEqual(costs[0], 17)  # the last layer may need no less than with `up`
        self.assertEqual(costs[-1], 0)
        self.assertGreater(len(set(costs)), 4)
        small = f"{(total['block'] - 4096) / GiB:.15f}"
        self.refused(["--dry-run", *model, "--recompute", "auto", "--memory-budget", small], "--recompute auto")
        training = ["--train-data", self.train, "--val-data", "", "--out", self.path("run"), *model]
        self.refused([*training, "--recompute", "none", "--memory-budget", f"{total['act'] / GiB:.15f}"], "--memory-budget", "would fit")
        self.refused([*training, "--memory-budget", 1e-12], "--memory-budget")

    def test_what_is_allocated(self):
        _, table = self.report(*MODEL, *BATCH, "--val-data", "")
        run = self.trained("--steps", 1)
        self.assertEqual(self.records(run)[0]["memory_bytes"], table["total"][0])


if __name__ == "__main__":
    unittest.main()
