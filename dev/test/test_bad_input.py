#!/usr/bin/env python3
"""Whatever is wrong with what the trainer is given: exit code 1, one clear line, nothing written.
TRAINER=build/train_gpt_moe python3 dev/test/test_bad_input.py; TRAINER_FUZZ=n tries n random damages of every kind of
file (default 10; several hundred are for a build with GPT_MOE_SANITIZE)."""

import json
import os
import random
import shutil
import struct
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from trainer import EOT, Safetensors, TrainerTest, shard_bytes, text  # noqa: E402

HUGE = 2**63 - 1
OPTIONS = [  # options, words of the complaint
    # what CLI11 finds
    ("--no-such-option 1", "--no-such-option"), ("stray", "stray"), ("--steps", "--steps"), ("--steps three", "three"), ("--steps 1e3", "1e3"),
    ("--steps 3.5", "3.5"), ("--lr fast", "fast"), ("--seed -1", "--seed"), ("--seed 18446744073709551616", "--seed"), ("--steps 9223372036854775808", "--steps"),
    ("--tied perhaps", "--tied"), ("--dense-layers x", "--dense-layers"), ("--lr 1 --lr 2", "--lr"), ("--resume=sometimes", "--resume"),
    # model
    ("--preset huge", "--preset 'huge'"), ("--n-layer 0", "--n-layer"), ("--n-layer -1", "--n-layer"), ("--n-layer 16777216", "--n-layer"),
    ("--d-model 0", "--d-model"), ("--d-model -32", "--d-model"), ("--d-model 16777217", "--d-model"), (f"--d-model {HUGE}", "--d-model"),
    ("--n-head 0", "--n-head"), ("--n-head 3 --n-kv-head 2", "--n-head 3"), ("--n-kv-head 0", "--n-kv-head"), ("--head-dim 0", "--head-dim"),
    ("--head-dim 15", "--head-dim 15"), ("--head-dim 4096", "--head-dim 4096"), ("--vocab-size 0", "--vocab-size"), ("--vocab-size 256", "257"),
    ("--n-expert 0", "--n-expert"), ("--n-expert 1", "--top-k 2"), ("--n-expert 513", "512"), ("--top-k 0", "--top-k"), ("--top-k 5", "--top-k 5"),
    ("--n-expert 64 --top-k 17", "--top-k 17"), ("--d-expert 0", "--d-expert"), ("--d-expert 12", "--d-expert 12"), ("--d-shared 4", "--d-shared 4"),
    ("--d-shared -8", "--d-shared"), ("--d-dense 3", "--d-dense 3"), ("--dense-layers 0", "--d-dense"), ("--dense-layers 1 --d-dense 8", "--dense-layers"),
    ("--dense-layers -1 --d-dense 8", "--dense-layers"), ("--rope-theta 1", "--rope-theta"), ("--rope-theta inf", "--rope-theta"),
    ("--rms-norm-eps 0", "--rms-norm-eps"), ("--rms-norm-eps nan", "--rms-norm-eps"), ("--rms-norm-eps inf", "--rms-norm-eps"),
    ("--n-layer 1000 --d-model 16777216 --d-expert 16777208 --n-expert 512", "absurd"), ("--d-model 16777216 --n-expert 512 --d-expert 8000", ""),
    # router and balance
    ("--gate hard", "--gate 'hard'"), ("--route-scale 2", "--route-scale"), ("--gate sigmoid --route-scale 0", "--route-scale"),
    ("--gate sigmoid --route-scale nan", "--route-scale"), ("--gate sigmoid --route-scale inf", "--route-scale"), ("--balance luck", "--balance 'luck'"),
    ("--balance bias", "--balance bias"), ("--balance-scope galaxy", "--balance-scope 'galaxy'"), ("--aux-coef -1", "--aux-coef"), ("--aux-coef nan", "--aux-coef"),
    ("--z-coef -0.1", "--z-coef"), ("--z-coef inf", "--z-coef"), ("--bias-rate -1", "--bias-rate"), ("--capacity-factor -1", "--capacity-factor"),
    ("--capacity-factor nan", "--capacity-factor"),
    # data and batches
    ("--batch-size 0", "--batch-size"), ("--batch-size -2", "--batch-size"), (f"--batch-size {2**40} --seq-len {2**40}", "--batch-size"),
    (f"--batch-size {HUGE}", "--batch-size"), ("--batch-size 1048576 --seq-len 1024", "2^31"), ("--seq-len 0", "--seq-len"), ("--seq-len 100000", "--seq-len"),
    ("--total-batch-tokens 63", "--total-batch-tokens 63"), ("--total-batch-tokens -64", "--total-batch-tokens"), ("--total-batch-tokens 32", "--total-batch-tokens 32"),
    (f"--total-batch-tokens {HUGE}", "--total-batch-tokens"), ("--train-data=", "--train-data"), ("--train-data none*.bin", "none*.bin"), ("--val-data none.bin", "none.bin"),
    ("--train-data .", "."), ("--sample-every 1 --prompt x --tokenizer-ranks none --train-data gpt2.bin", "none"),
    # training
    ("--steps -1", "--steps"), (f"--steps {HUGE}", "--steps"), ("--epochs 0 --steps 0", "--epochs"), ("--epochs nan", "--epochs"), ("--epochs 1e300", "--epochs"), ("--epochs inf", "--epochs"),
    ("--stop-after -1", "--stop-after"), ("--lr -1", "learning rate"), ("--lr nan", "learning rate"), ("--lr inf", "learning rate"), ("--schedule steep", "steep"),
    ("--warmup-steps -1", "warm-up"), ("--final-lr-fraction 2", "fraction"), ("--final-lr-fraction nan", "fraction"), ("--wsd-decay-fraction -1", "wsd"),
    ("--beta1 1", "--beta1"), ("--beta1 -0.1", "--beta1"), ("--beta2 1", "--beta2"), ("--beta2 nan", "--beta2"), ("--adam-eps 0", "--adam-eps"), ("--adam-eps inf", "--adam-eps"),
    ("--weight-decay -1", "--weight-decay"), ("--weight-decay inf", "--weight-decay"), ("--clip -1", "--clip"), ("--clip nan", "--clip"), ("--skip-loss-z -1", "--skip-loss-z"),
    ("--skip-norm-z nan", "--skip-norm-z"), ("--device tpu", "--device 'tpu'"), ("--experts none", "--experts 'none'"), ("--device cpu --experts hopper", "--experts hopper"), ("--dtype fp8", "--dtype 'fp8'"), ("--grad-dtype fp64", "--grad-dtype"),
    ("--dtype bf16 --grad-dtype bf16 --total-batch-tokens 128", "--grad-dtype bf16"),
    # evaluation, checkpoints, memory
    ("--eval-every -1", "--eval-every"), ("--sample-every -1", "--sample-every"), ("--checkpoint-every -1", "--checkpoint-every"), ("--keep -1", "--keep"), ("--out=", "--out"),
    ("--resume", "run"), ("--resume --init-from x", "--init-from"), ("--init-from nowhere", "nowhere"), ("--recompute all", "--recompute 'all'"),
    ("--memory-budget -1", "--memory-budget"), ("--memory-budget nan", "--memory-budget"), ("--memory-budget inf", "--memory-budget"), ("--memory-budget 1e-6", "--memory-budget"),
    ("--recompute auto --memory-budget 1e-6", "--recompute auto"), ("--dispatch pigeon", "--dispatch 'pigeon'"), ("--arena coliseum", "--arena 'coliseum'"),
    ("--record-routing a --replay-routing b", "--replay-routing"), ("--replay-routing none", "none"), ("--record-routing none/r", "none/r"),
    # generation and export
    ("--generate", "--checkpoint"), ("--generate --checkpoint nowhere", "nowhere"), ("--generate --checkpoint .", "."), ("--generate --checkpoint train.bin", "train.bin"),
    ("--export onnx", "--export 'onnx'"), ("--export hf", "--checkpoint"), ("--export hf --checkpoint nowhere", "nowhere"), ("--generate --export hf --checkpoint x", "exclude"),
    ("--logits x", "--checkpoint"), ("--logits x --checkpoint nowhere --val-data val.bin", "nowhere"), ("--logits x --generate --checkpoint x", "exclude"),
    ("--hellaswag none.bin", "none.bin"), ("--hellaswag train.bin", "train.bin"), ("--hellaswag x --export hf --checkpoint x", "--hellaswag"), ("--checkpoint nowhere --dry-run", "--dry-run"),
    ("--max-new-tokens 0", "--max-new-tokens"), ("--context -1", "--context"), ("--temperature -1", "temperature"), ("--temperature nan", "temperature"),
    ("--top-k-sampling -1", "top-k"), ("--top-p 0", "top-p"), ("--top-p 1.5", "top-p"), ("--top-p nan", "top-p"),
    # processes
    ("--dp 2", "--dp 2"), ("--ep 0", "--ep"), ("--etp 2", "--etp"), ("--tp -1", "--tp"), ("--pp 4", "--pp 4"),
    ("--config none.toml", "none.toml"),
]


class Options(TrainerTest):
    def setUp(self):
        super().setUp()
        self.path("gpt2.bin").write_bytes(shard_bytes([1] * 500, tokenizer=0))

    def test_options(self):
        for options, *expected in OPTIONS:
            with self.subTest(options):
                self.refused(self.training(*self.words(options)), *expected)

    @staticmethod
    def words(options):
        words = options.split()
        if words[0] in ("--train-data=", "--out="):  # an empty value
            return [words[0][:-1], ""]
        return words

    def test_no_gpu(self):
        self.refused(self.training("--device", "cuda", "--steps", 1), "--device cuda", "--device cpu")
        self.assertIn("saved", self.ok(*self.training("--device", "auto", "--steps", 1)))  # goes on without one

    def test_places_that_cannot_be_written(self):
        for out in (self.train, self.train / "run", "/proc/run", "/dev/null/run"):
            self.refused(self.training("--steps", 1, out=out), out)
        checkpoint = self.trained("--steps", 1, out="good")
        for out in (self.train, self.train / "run", "/proc/run"):
            self.refused(["--export", "hf", "--checkpoint", checkpoint, "--out", out], out)

    def test_context_beyond_memory(self):
        run = self.trained("--steps", 1)
        for context in (10**9, 10**12):
            self.refused(["--generate", "--checkpoint", run, "--context", context], "needs")
        self.refused(["--generate", "--checkpoint", run, "--n-layer", 1], "--n-layer")


class Shards(TrainerTest):
    def test_shards(self):
        ids = [EOT, *text(300)]
        good = shard_bytes(ids)
        bad = [("empty", b""), ("truncated", good[:-1]), ("truncated", good[:1023]), ("truncated", good[:1024]), ("not a token shard", good[:4]), ("not a token shard", b"X" + good[1:]),
               ("not a token shard", b"In the beginning " * 100), ("damaged", good + b"\0"), ("not a token shard", shard_bytes(ids, version=2)),
               ("not a token shard", shard_bytes(ids, magic=20240801)), ("0 tokens", shard_bytes([])), ("-5 tokens", shard_bytes(ids, count=-5)),
               ("truncated", shard_bytes(ids, count=2**31 - 1)), ("tokenizer 7", shard_bytes(ids, tokenizer=7)), ("257", shard_bytes([*ids, 257])),
               ("400", shard_bytes([*ids, 400], tokenizer=0)), ("4294967295", shard_bytes([*ids, 2**32 - 1], magic=20240801, version=7)), ("truncated", struct.pack("<2i", 20240520, 1))]
        for expected, data in bad:
            if expected == "empty":
                expected = "not a token shard"
            for option, name in (("--train-data", self.train), ("--val-data", self.val)):
                with self.subTest(expected, option=option):
                    path = self.path("bad.bin")
                    path.write_bytes(data)
                    self.refused(self.training("--steps", 1, option, path), path, expected)
                    self.refused(self.training("--steps", 1, option, self.path("bad*.bin")), path, expected)
        self.path("bad.bin").unlink()

    def test_tokenizers(self):
        other = self.path("other.bin")
        other.write_bytes(shard_bytes([1] * 500, tokenizer=0))
        self.refused(self.training("--steps", 1, "--val-data", other), other)
        self.refused(self.training("--steps", 1, "--train-data", self.path("*.bin")), "tokenizer")
        self.trained("--steps", 1, "--train-data", other, "--vocab-size", 300, out="gpt2")
        self.refused(self.training("--steps", 1, "--init-from", self.path("gpt2"), model=[]), self.train, "tokenizer 1")  # was not trained on bytes
        bytes_model = self.trained("--steps", 1, out="bytes")
        again = self.trained("--steps", 1, "--train-data", other, "--init-from", bytes_model, out="again")  # a shard of unknown origin fits
        self.assertEqual(json.loads((self.checkpoint(again) / "config.json").read_text())["gpt_moe"]["tokenizer_id"], 1)

    def test_too_short(self):
        self.train.write_bytes(shard_bytes([EOT] * 32))
        self.refused(self.training("--steps", 1), self.train, "--seq-len")
        self.val.write_bytes(shard_bytes([EOT]))
        self.train.write_bytes(shard_bytes([EOT] * 33))
        self.refused(self.training("--steps", 1, "--val-data", self.val), self.val)
        self.trained("--steps", 2)  # one window is enough

    def test_large_ids(self):
        self.train.write_bytes(shard_bytes([EOT, *text(200)], magic=20240801, version=7))
        wide = self.losses(self.trained("--steps", 2, out="wide"))
        self.train.write_bytes(shard_bytes([EOT, *text(200)]))
        self.assertEqual(self.losses(self.trained("--steps", 2)), wide)


class DamagedCheckpoint(TrainerTest):
    def test_half_a_checkpoint(self):
        run = self.trained("--steps", 4, "--val-data", self.val)
        whole = self.checkpoint(run)
        keep = self.path("keep")
        shutil.copytree(whole, keep)
        resume, generate = self.training("--steps", 4, "--resume"), ["--generate", "--checkpoint", whole]
        for name in ("config.json", "trainer.json", "model.safetensors", "optimizer.safetensors"):
            size = (keep / name).stat().st_size
            for length in (None, 0, 1, 7, 8, size // 2, size - 1):
                with self.subTest(name=name, length=length):
                    shutil.rmtree(whole), shutil.copytree(keep, whole)
                    if length is None:
                        (whole / name).unlink()
                    else:
                        os.truncate(whole / name, length)
                    if name.endswith("json") and length == size - 1:  # the line's end
                        continue
                    lost = length is None and name != "optimizer.safetensors"  # then it is no checkpoint at all
                    self.refused(resume, run if lost else whole)
                    if name in ("config.json", "model.safetensors"):
                        self.refused(generate, whole)
                        self.refused(self.training("--init-from", whole, out="other"), whole)

    def test_falls_back_to_the_checkpoint_before(self):
        run = self.trained("--steps", 4, "--checkpoint-every", 2)
        (run / "step_00000004" / "trainer.json").unlink()
        self.assertIn("resumed from " + str(run / "step_00000002"), self.ok(*self.training("--steps", 4, "--resume")))
        (run / "latest").write_bytes(b"\xff../../etc\n")
        self.assertIn("nothing to do", self.ok(*self.training("--steps", 4, "--resume")))

    def test_trainer_state(self):
        run = self.trained("--steps", 4, "--stop-after", 2)
        path = self.checkpoint(run) / "trainer.json"
        good = json.loads(path.read_text())
        for key in ("step", "next_sample", "seed", "total_steps", "total_batch_tokens", "seq_len"):
            for value in (None, -1, "2", 2.5, [2], 2**63, 2**64, 1e30, True):
                if key == "seed" and value == 2**63:
                    continue
                with self.subTest(key=key, value=value):
                    path.write_text(json.dumps({**good, key: value}))
                    self.refused(self.training("--steps", 4, "--resume"), path, key)
            path.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
            self.refused(self.training("--steps", 4, "--resume"), path, key)
        for content in ("", "[]", "null", "{", "3", '{"step":' * 1000):
            path.write_text(content)
            self.refused(self.training("--steps", 4, "--resume"), path)

    def test_model_config(self):
        run = self.trained("--steps", 4, "--stop-after", 2)
        path = self.checkpoint(run) / "config.json"
        good = json.loads(path.read_text())
        for key in good["gpt_moe"]:
            number = isinstance(good["gpt_moe"][key], float)
            for value in (None, "x", [1.5], {}, True, -3, *([] if number else [2**70])):
                if value is True and isinstance(good["gpt_moe"][key], bool):
                    continue
                with self.subTest(key=key, value=value):
                    path.write_text(json.dumps({**good, "gpt_moe": {**good["gpt_moe"], key: value}}))
                    self.refused(["--generate", "--checkpoint", run], path, "" if value == -3 else key.split("_")[0])
        for key, value in (("d_model", 2**24), ("vocab_size", 2**24), ("n_layer", 100), ("head_dim", 8), ("n_head", 4), ("d_expert", 2**23), ("n_expert", 500), ("tokenizer_id", 2),
                           ("qk_norm", False), ("tied", False), ("d_shared", 8)):
            path.write_text(json.dumps({**good, "gpt_moe": {**good["gpt_moe"], key: value}}))
            self.refused(["--generate", "--checkpoint", run], run)
            self.refused(self.training("--steps", 4, "--resume", model=[]))

    def test_random_damage(self):
        run = self.trained("--steps", 8, "--stop-after", 5, *"--gate sigmoid --balance bias".split())
        record = self.path("routing")
        self.trained("--steps", 4, "--record-routing", record, out="recorded")
        shutil.rmtree(self.path("recorded"))
        config = self.path("options.toml")
        config.write_text("steps = 8\nlr = 0.001\nschedule = 'wsd'\ndense-layers = []\n".replace("dense-layers = []\n", "skip-norm-z = 5\n"))
        resume = self.training("--steps", 8, "--resume", model=[])
        generate = ["--generate", "--checkpoint", run, "--max-new-tokens", 4]
        initial = self.training("--steps", 2, "--init-from", run, model=[], out="new")
        step = self.checkpoint(run)
        targets = [(step / "config.json", resume), (step / "config.json", generate), (step / "trainer.json", resume), (step / "model.safetensors", generate),
                   (step / "model.safetensors", initial), (step / "optimizer.safetensors", resume), (run / "latest", resume), (run / "log.jsonl", resume), (run / "main.log", resume),
                   (self.train, self.training("--steps", 2, out="new")), (record, self.training("--steps", 4, "--replay-routing", record, out="new")),
                   (config, ["--config", config, *self.training(out="new")])]
        keep = self.path("keep")
        shutil.copytree(run, keep / "run")
        files = {path: path.read_bytes() for path, _ in targets}
        number = random.Random(7)
        for i in range(len(targets) * int(os.environ.get("TRAINER_FUZZ", 10))):
            path, args = targets[i % len(targets)]
            data = self.damage(files[path], number)
            with self.subTest(file=path.name, args=args[:1], damage=i):
                path.write_bytes(data)
                before = self.files()
                result = self.execute(*args)
                if result.returncode:
                    self.one_line(result)
                    self.assertEqual(self.files(), before)
            if self.path("new").exists():
                shutil.rmtree(self.path("new"))
            shutil.rmtree(run), shutil.copytree(keep / "run", run)
            path.write_bytes(files[path])

    @staticmethod
    def damage(data, number):
        """One of: cut, random bytes in place of some, some inserted or removed, digits changed, all random. Mostly near the start."""
        data = bytearray(data)
        noise = lambda n: bytes(number.randrange(256) for _ in range(n))
        at = min(int(len(data) * number.random() ** number.choice((1, 4))), len(data) - 1)
        kind = number.randrange(7)
        if kind == 0:
            return bytes(data[:at])
        if kind == 1:
            data[at:at + number.randrange(1, 9)] = noise(number.randrange(0, 9))
        elif kind == 2:
            data[at] ^= 1 << number.randrange(8)
        elif kind == 3:
            digits = [i for i, c in enumerate(data[:8000]) if chr(c).isdigit()]
            if digits:
                at = number.choice(digits)
                data[at:at + 1] = number.choice((b"9", b"-1", b"0", b"99999999", b"1e9", b"7777777777777777777777", b"null"))
        elif kind == 4:
            end = at + number.randrange(1, 100)
            data[at:at] = data[at:end]
        elif kind == 5:
            return noise(number.randrange(1, 300))
        else:
            for _ in range(number.randrange(1, 20)):
                data[min(int(len(data) * number.random() ** 3), len(data) - 1)] = number.randrange(256)
        return bytes(data)


if __name__ == "__main__":
    unittest.main()
