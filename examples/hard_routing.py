"""Load a saved tree and look at what one input runs.

python examples/quickstart_torch_pruning.py --out runs/quickstart
python examples/hard_routing.py runs/quickstart
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from sigmab_plugin import load
from sigmab_plugin.counting import parameter_count
from sigmab_plugin.data import digits
from sigmab_plugin.models import BasicBlock, ResNet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/quickstart"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    # Only the dense architecture is needed, not its weights.
    dense = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, stem="cifar", width=0.25, in_channels=1)
    net = load(args.folder, dense)
    images, labels = digits("test").batch(range(100))

    # In eval() each image runs one path. A batch is grouped by path and put back in order,
    # so the result is that of one image at a time.
    with torch.no_grad():
        logits = net(images)
        alone = torch.cat([net(image[None]) for image in images])
        leaves = net.route(images)
        probabilities = net.leaf_probabilities(images)
    print(f"accuracy {(logits.argmax(1) == labels).float().mean():.0%}")
    print(f"batch against one by one: largest difference {(logits - alone).abs().max():.1e}")

    print("\nfirst five images: digit, leaf, how sure the routers are")
    for label, leaf, row in zip(labels[:5].tolist(), leaves[:5].tolist(), probabilities, strict=False):
        print(f"  {label}  {net.leaves[leaf]}  {row[leaf]:.0%}")

    print("\ndigits per leaf")
    for index, name in enumerate(net.leaves):
        seen = Counter(labels[leaves == index].tolist())
        print(f"  {name}  " + "  ".join(f"{digit}:{count}" for digit, count in sorted(seen.items())))

    leaf = net.leaves[int(leaves[0])]
    print(f"\nwhat the first image reads (path {leaf})")
    for name, module in net.path_modules(leaf):
        print(f"  {name:<20} {parameter_count(module):>8,} parameters")
    print(f"  {'stored in all':<20} {net.parameter_counts().total:>8,} parameters")


if __name__ == "__main__":
    main()
