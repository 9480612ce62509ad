"""One rank of test_distributed: restructure with this rank's share of the calibration batches."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.zoo import CASES

from sigmab_plugin import SigmaBPruner, save

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, repair, folder, rank, world = *sys.argv[1:3], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    case = next(case for case in CASES if case.name == name)
    batches = case.batches(6)
    # Ranks hold consecutive parts, so that gathered samples are in the order in which one process reads them.
    share = len(batches) // world
    pruner = SigmaBPruner(
        case.model(),
        batches[0],
        config=case.config.replace(repair=repair),
        calibration_data=batches[rank * share : (rank + 1) * share],
    )
    save(pruner.step(), folder / f"{world}-{rank}")
    torch.save(pruner.static_twin().state_dict(), folder / f"twin-{world}-{rank}")
    if world > 1:
        dist.destroy_process_group()
