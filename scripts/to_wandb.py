#!/usr/bin/env python3
"""Sends what a run wrote with --tensorboard DIR to Weights & Biases: scripts/to_wandb.py DIR [--project NAME] [--name NAME].
Needs `pip install wandb tensorboard`, and `wandb login` or WANDB_MODE=offline."""
import argparse
import sys

parser = argparse.ArgumentParser(description="Sends event files of --tensorboard to Weights & Biases.")
parser.add_argument("events", metavar="DIR")
parser.add_argument("--project", default="gpt-moe")
parser.add_argument("--name", help="of the run there")
o = parser.parse_args()
try:
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    sys.exit(f"to_wandb: {error}; pip install wandb tensorboard")

events = EventAccumulator(o.events, size_guidance={"scalars": 0}).Reload()
steps = {}
for tag in events.Tags()["scalars"]:
    for scalar in events.Scalars(tag):
        steps.setdefault(scalar.step, {})[tag] = scalar.value
if not steps:
    sys.exit(f"to_wandb: {o.events}: no event files with scalars there")
with wandb.init(project=o.project, name=o.name) as run:
    for step in sorted(steps):
        run.log(steps[step], step=step)
