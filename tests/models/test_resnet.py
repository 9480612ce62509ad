from __future__ import annotations

import pytest
import torch

from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.errors import ConfigError
from sigmab_plugin.models import ResNet, cifar_resnet18, cifar_resnet50, imagenet_resnet50
from sigmab_plugin.models.resnet import Bottleneck


@pytest.mark.parametrize(
    ("build", "size", "parameters", "gmacs"),
    [(cifar_resnet50, 32, 23_705_252, 1.305), (imagenet_resnet50, 224, 25_557_032, 4.112)],
)
def test_published_sizes(build, size: int, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = build()
        assert parameter_count(model) == parameters
        assert macs(model, torch.empty(1, 3, size, size)) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_keys_and_shapes_are_those_of_torchvision() -> None:
    with torch.device("meta"):
        state = imagenet_resnet50().state_dict()
    assert len(state) == 320
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.num_batches_tracked": (),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.bias": (1024,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
        "fc.bias": (1000,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_stride_is_on_the_3x3_convolution() -> None:
    with torch.device("meta"):
        model = imagenet_resnet50()
    first = model.layer2[0]
    assert isinstance(first, Bottleneck)
    assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("build", "channels"), [(cifar_resnet50, 3), (cifar_resnet18, 3)])
def test_narrow_networks_train(build, channels: int) -> None:
    torch.manual_seed(0)
    model = build(7, width=0.1)
    x = torch.randn(2, channels, 32, 32)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "options", [{"stem": "vgg"}, {"width": 0.0}, {"layers": (1, 1)}], ids=["stem", "width", "stages"]
)
def test_options_that_cannot_be_used_are_refused(options: dict) -> None:
    layers = options.pop("layers", (1, 1, 1, 1))
    with pytest.raises(ConfigError):
        ResNet(Bottleneck, layers, num_classes=2, **options)
