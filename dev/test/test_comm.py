#!/usr/bin/env python3
"""Collectives between processes: test_comm under mpirun and over TCP, and jobs of which a rank breaks off.
TEST_COMM=build/test_comm python3 dev/test/test_comm.py. Standard library only."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ports import free_port  # noqa: E402

PROGRAM = Path(os.environ.get("TEST_COMM", "build/test_comm")).resolve()
MPIRUN = shutil.which("mpirun")
CLEAN = {k: v for k, v in os.environ.items() if not re.match("OMPI_|PMI|SLURM_|RANK$|WORLD_SIZE$|MASTER_", k)}
ENV = {**CLEAN, "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0", "COMM_TIMEOUT": "120"}
PATIENCE = 20  # seconds within which a job that lost a rank must have ended, on a busy machine


def with_mpi():
    if not MPIRUN:
        return "mpirun is not installed"
    result = subprocess.run([PROGRAM, "--gtest_filter=none"], env={**ENV, "OMPI_COMM_WORLD_SIZE": "1"}, capture_output=True, text=True)
    return "built without MPI" if "built without MPI" in result.stderr else ""


NO_MPI = with_mpi()


class Job:
    """n processes of the program: status of each (of mpirun), stdout, and the lines of ours on stderr."""

    def __init__(self, launcher, n, *args, **variables):
        env, start = {**ENV, **variables}, time.monotonic()
        if launcher == "mpi":
            command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(n), PROGRAM, *args]
            processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)]
        else:
            env.update(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
            processes = [subprocess.Popen([PROGRAM, *args], env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                         for r in range(n)]
        try:
            texts = [p.communicate(timeout=200) for p in processes]
        finally:
            for p in processes:
                p.kill()
        self.seconds = time.monotonic() - start
        self.statuses = [p.returncode for p in processes]
        self.out = "".join(out for out, _ in texts)
        self.error = "".join(error for _, error in texts)
        self.lines = [line for line in self.error.splitlines() if line.startswith("rank ")]


class Launcher:
    def digest(self, n):
        job = Job(self.launcher, n)
        self.assertEqual(set(job.statuses), {0}, job.out + job.error)
        found = re.search(rf"^{n} ranks by (\w+), digest (\w+), status 0$", job.out, re.M)
        self.assertEqual(found and found[1], self.launcher, job.out)
        return found[2]

    # The job ends soon, each process with a status that is not 0, with this one line.
    def ends(self, n, how, rank, line, most=PATIENCE, least=0, others=False, **variables):
        with self.subTest(how=how, rank=rank, n=n):
            job = Job(self.launcher, n, "--fail", how, str(rank), **variables)
            self.assertNotIn(0, job.statuses, job.error)
            self.assertGreaterEqual(job.seconds, least)
            self.assertLess(job.seconds, most, job.error)
            if not others:  # which may say that the rank is gone
                self.assertEqual(len(job.lines), 1, job.error)
            self.assertTrue(any(re.search(line, said) for said in job.lines), job.error)

    def test_a_rank_exits(self):
        for how, rank in (("exit", 2), ("exit", 0), ("exit0", 1)):
            self.ends(4, how, rank, rf'^rank {rank}: exit in the middle of the job \(the last operation was all_reduce "before"\)$')

    def test_a_rank_is_killed(self):
        for n, rank in ((4, 2), (4, 0), (2, 1), (8, 7)):
            self.ends(n, "kill", rank, rf'^rank {int(rank == 0)}: all_reduce "gradients": rank {rank} is gone \(group of ranks 0 1.*\)$')

    def test_a_rank_does_not_come(self):
        for rank in (3, 0):
            self.ends(4, "sleep", rank, rf'^rank {int(rank == 0)}: all_reduce "gradients" waited 2 s for its group \(ranks 0 1 2 3\): is a rank gone\? \(--comm-timeout\)$',
                      least=2, COMM_TIMEOUT="2")

    def test_an_error(self):
        self.ends(3, "error", 2, "^rank 2: shard x: truncated$")
        self.ends(4, "everyone", 0, "^rank 0: all ranks see this$")
        self.ends(3, "begun", 1, "^rank 1: shard x: truncated$", others=True)
        self.ends(3, "size", 1, r'^rank \d: all_reduce "gradients": a message of rank \d (has \d+ bytes where \d+ were|is larger than the \d+ bytes that were) expected$')
        self.ends(3, "finish", 1, r'^rank \d: (all_reduce "gradients"|closing the job) waited 2 s', COMM_TIMEOUT="2")

    def test_every_collective(self):
        for n in self.sizes:
            with self.subTest(n=n):
                self.assertEqual(self.digest(n), self.digest(n))  # the same bits in every run


# The same over TCP, below, runs everywhere; MPI is an optional package.
@unittest.skipIf(NO_MPI, f"MPI: {NO_MPI}")
class Mpi(Launcher, unittest.TestCase):
    launcher, sizes = "mpi", (1, 2, 3, 4, 8)

    def test_the_same_bits_over_tcp(self):
        for n in (2, 3):
            self.assertEqual(self.digest(n), Tcp("test_an_error").digest(n))

    def test_the_launcher_is_stopped(self):
        command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-np", "3", PROGRAM, "--fail", "sleep", "1"]
        job = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(3)
        job.send_signal(signal.SIGTERM)
        self.assertNotEqual(job.wait(timeout=PATIENCE), 0)


class Tcp(Launcher, unittest.TestCase):
    launcher, sizes = "tcp", (2, 3, 4)


class Start(unittest.TestCase):
    def line(self, expected, **variables):
        with self.subTest(variables):
            start = time.monotonic()
            result = subprocess.run([PROGRAM], env={**ENV, **variables}, capture_output=True, text=True, timeout=60)
            self.assertEqual(result.returncode, 1, result.stdout)
            self.assertEqual(result.stdout, "")
            self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
            self.assertRegex(result.stderr, expected)
            self.assertLess(time.monotonic() - start, PATIENCE)

    def test_one_process(self):
        for variables in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
            result = subprocess.run([PROGRAM], env={**ENV, **variables}, capture_output=True, text=True)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
            self.assertIn("1 ranks by single", result.stdout)

    def test_wrong_variables(self):
        self.line("^RANK is set but WORLD_SIZE is not: a job needs both$", RANK="0")
        self.line("^WORLD_SIZE is set but RANK is not: a job needs both$", WORLD_SIZE="2")
        self.line("^RANK=2: must be a number from 0 to 1$", RANK="2", WORLD_SIZE="2")
        self.line("^RANK=x: must be a number", RANK="x", WORLD_SIZE="2")
        self.line("^WORLD_SIZE=0: must be a number from 1", RANK="0", WORLD_SIZE="0")
        self.line("^WORLD_SIZE=2, but MASTER_ADDR is not set", RANK="0", WORLD_SIZE="2")
        self.line("^WORLD_SIZE=2, but MASTER_PORT is not set", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        self.line("^MASTER_PORT=70000: must be a number from 1 to 65535$", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="70000")
        self.line("^MASTER_ADDR=no.such.host.invalid: no such host", RANK="1", WORLD_SIZE="2", MASTER_ADDR="no.such.host.invalid", MASTER_PORT="29501")
        self.line("^SLURM_STEP_NUM_TASKS=4, but MASTER_ADDR is not set", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="4")

    def test_the_others_do_not_come(self):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = str(held.getsockname()[1])
        common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, COMM_TIMEOUT="1")
        self.line("^rank 0 waited 1 s for the other ranks: are all 2 there?", RANK="0", **common)
        self.line("^rank 1 waited 1 s for rank 0 to answer", RANK="1", **common)


if __name__ == "__main__":
    unittest.main()
