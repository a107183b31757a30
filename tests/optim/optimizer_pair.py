"""What two processes do for ``test_distributed.py``: train by halves of the batches."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from test_distributed import BATCHES, CASES, STEPS, build, learn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from smallfry.errors import UsageError
from smallfry.optim import KFAC, ExactNG, TwoLevel

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
dist.init_process_group("gloo")
half = slice(8 * rank, 8 * rank + 8)
wire = Counter()


def counted(name):
    send = getattr(dist, name)

    def counting(tensor, *arguments, **keywords):
        if not (name == "broadcast" and keywords.get("src") is not None):
            wire[name] += tensor.nbytes
        return send(tensor, *arguments, **keywords)

    setattr(dist, name, counting)


for case in CASES:
    model, optimizer = build(case)
    losses = learn(DistributedDataParallel(model), optimizer, half, STEPS)
    kept = {"weights": model.state_dict(), "state": optimizer.state_dict(), "losses": losses}
    torch.save(kept, folder / f"{case}-{rank}.pt")

# what one process saved, gone on with by two; DDP is there before the optimizer
model, _ = build("kfac")
wrapped = DistributedDataParallel(model)
optimizer = KFAC(wrapped, 0.05, **{**CASES["kfac"][1]})
saved = torch.load(folder / "alone.pt", weights_only=True)
model.load_state_dict(saved["weights"])
optimizer.load_state_dict(saved["state"])
learn(wrapped, optimizer, half, 2 * STEPS, STEPS)
torch.save(model.state_dict(), folder / f"continued-{rank}.pt")

# each process trains a model of its own
model, optimizer = build("kfac", process_group=False)
learn(model, optimizer, slice(0, 16), STEPS)
torch.save(model.state_dict(), folder / f"apart-{rank}.pt")

# bytes as they are handed to torch.distributed, and as the optimizer counts them
for name in ("all_reduce", "reduce", "broadcast", "isend"):
    counted(name)
for case in ("kfac", "kfac, rank", "kpsvd", "ekfac"):
    model, optimizer = build(case, check="off")
    steps = 2 if case == "ekfac" else 1  # whose first refresh has no moments yet to carry over
    learn(model, optimizer, half, steps - 1)  # without DDP: only the optimizer sends
    wire.clear()
    learn(model, optimizer, half, steps, steps - 1)
    costs = optimizer.costs(rows=8)
    facts = {"wire": dict(wire), "counted": optimizer.distribution().sent}
    facts["foretold"] = {name: tuple(cost.traffic) for name, cost in costs.items()}
    facts["owners"] = optimizer.owners
    torch.save(facts, folder / f"bytes {case}-{rank}.pt")

for kind in (ExactNG, TwoLevel):
    try:
        kind(build("kfac", process_group=False)[0])
    except UsageError as error:
        (folder / f"{kind.__name__}-{rank}.txt").write_text(str(error))

# an error in one process is one in both
model, optimizer = build("kfac")
x, y = BATCHES[0]
try:
    wrapped = DistributedDataParallel(model)
    loss = torch.nn.functional.cross_entropy(wrapped(x[half]), y[half]) * (8.0 if rank else 1.0)
    loss.backward()
    optimizer.step()
except UsageError as error:
    (folder / f"scale-{rank}.txt").write_text(str(error))

# no DDP, and in the first process gradients that are as small as rounding
model, optimizer = build("kfac")
loss = torch.nn.functional.cross_entropy(model(x[half]), y[half]) * (1.0 if rank else 1e-12)
loss.backward()
try:
    optimizer.step()
except UsageError as error:
    (folder / f"apart-{rank}.txt").write_text(str(error))

# an input overwritten after its call, in one process and one layer alone
for check in ("error", "off"):
    model, optimizer = build("kfac", check=check)
    wrapped = DistributedDataParallel(model)
    inputs = x[half].clone()
    loss = torch.nn.functional.cross_entropy(wrapped(inputs), y[half])
    loss.backward()
    if rank:
        inputs.zero_()
    try:
        optimizer.step()
    except UsageError as error:
        (folder / f"overwritten {check}-{rank}.txt").write_text(str(error))
# what still uses the group keeps its threads, and one that meets Python's end aborts the process
del model, wrapped, optimizer, loss
gc.collect()
dist.barrier()  # one that ends early takes connections with it
dist.destroy_process_group()
