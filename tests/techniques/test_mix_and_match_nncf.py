"""Mix-and-Match's masks as NNCF's hooks."""

from __future__ import annotations

import pytest
import torch

from sigmab_plugin.errors import ModelError

from .mix_and_match_models import IMAGES, SmallResNet

nncf = pytest.importorskip("nncf")
pytest.importorskip("nncf.torch.function_hook.pruning.magnitude.modules")


def test_hooks_mask_the_weights_and_strip_makes_them_permanent() -> None:
    from nncf.parameters import StripFormat

    from sigmab_plugin.hosts.nncf_masks import apply_masks

    model = SmallResNet().eval()
    masks = {
        name: torch.rand_like(model.get_parameter(name)) > 0.6
        for name in ("layer3.conv2.weight", "fc.weight")
    }
    inputs = torch.randn(IMAGES)
    hooked = apply_masks(model, masks)
    expected = SmallResNet().eval()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, mask in masks.items():
            expected.get_parameter(name).mul_(mask)
        assert torch.equal(hooked(inputs), expected(inputs))
        assert not torch.equal(hooked(inputs), model(inputs))
    stripped = nncf.strip(hooked, example_input=inputs, strip_format=StripFormat.IN_PLACE)
    assert torch.equal(stripped.fc.weight, expected.fc.weight)
    with pytest.raises(ModelError, match="another model"):
        apply_masks(model, {"fc.bias2": torch.ones(4, dtype=torch.bool)})
