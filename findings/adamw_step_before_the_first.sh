#!/usr/bin/env bash
# Asking for the optimizer's state before the first step changes AdamW's first step.
#
# torch.distributed.checkpoint.state_dict.get_optimizer_state_dict is what a training loop calls to save itself. Expected:
# asking changes nothing. Seen with torch 2.13.0: for an optimizer that has made no step yet, the call makes one with a
# gradient of zeros and rate 0, to have a state to return, and leaves AdamW's step counter at 1. Weights stay as they are,
# but the bias correction of the first true step is then that of the second: with betas (0.9, 0.95), rate 0.1 and a gradient
# of 1, weights move by 0.0735 where they move by 0.1 without the call. A run that saved a checkpoint before its first step
# and one that did not part there. What follows: save nothing before the first step, or make a fresh optimizer after it.
#
# Output seen:
#   counter after asking: 1
#   first step without asking: -0.1000
#   first step after asking: -0.0735
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_step(ask):
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    if ask:
        get_optimizer_state_dict(layer, optimizer)
        counter = optimizer.state[layer.weight]["step"]
        print(f"counter after asking: {counter:.0f}")
        assert counter == 1 and layer.weight == 0, "asking changes the counter alone"
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    return layer.weight.item()


moved = first_step(True)
plain = first_step(False)
print(f"first step without asking: {plain:.4f}\nfirst step after asking: {moved:.4f}")
assert abs(plain + 0.1) < 1e-4 and abs(moved + 0.0735) < 1e-4
PYTHON
