"""From a trained ResNet to a routed tree with Torch-Pruning, on scikit-learn's digits.

    python examples/quickstart_torch_pruning.py --out runs/quickstart

Needs scikit-learn. Takes about half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import save_file

from sigmab_plugin import finetune, save
from sigmab_plugin.data import Loader, digits
from sigmab_plugin.models import BasicBlock, ResNet
from sigmab_plugin.tuning import TrainRecipe, evaluate


def small_resnet() -> ResNet:
    """A residual network for 8x8 images; ``hard_routing.py`` builds the same one."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, stem="cifar", width=0.25, in_channels=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # layers this small gain nothing from more

    train = Loader(digits("train"), batch_size=64, shuffle=True)
    validation = Loader(digits("val"), batch_size=256)
    test = Loader(digits("test"), batch_size=256)

    # 1. A dense network, trained as usual.
    dense = small_resnet()
    recipe = TrainRecipe(lr=0.05, batch_size=64, warmup_epochs=1.0, label_smoothing=0.0)
    finetune(dense, train, epochs=args.epochs, recipe=recipe)

    # 2. Restructure. `tp.pruner.SigmaBPruner` is there because the package is installed; nothing of ours is imported.
    pruner = tp.pruner.SigmaBPruner(
        dense,
        torch.zeros(1, 1, 8, 8),
        calibration_data=train,
        levels=["layer3", "layer4"],
        head="fc",
        projection_dim=32,
    )
    net = pruner.step()

    # 3. Fine-tune with the dense network as teacher, then compare on digits that nobody has seen.
    finetune(
        net,
        train,
        epochs=args.epochs,
        recipe=recipe.replace(lr=0.02, distillation_weight=1.0),
        teacher=dense,
        val_loader=validation,
    )
    before, after = evaluate(dense, test), evaluate(net, test)
    counts = net.parameter_counts()
    dense_parameters = sum(p.numel() for p in dense.parameters())
    print(f"dense   {before.accuracy:.2%}  {dense_parameters:,} parameters, all of them active")
    print(f"SigmaB  {after.accuracy:.2%}  {counts.active:,} active of {counts.total:,} stored")
    print(
        "leaves  "
        + "  ".join(f"{leaf} {share:.0%}" for leaf, share in zip(net.leaves, after.leaf_shares, strict=True))
    )

    # 4. Save: plan.json and model.safetensors for the tree, plain weights for the dense network.
    save(net, args.out)
    save_file(dense.state_dict(), args.out / "dense.safetensors")
    print(f"saved   {args.out}")


if __name__ == "__main__":
    main()
