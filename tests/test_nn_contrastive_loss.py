"""nn.ContrastiveLoss and nn.SigmoidContrastiveLoss."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import needs_gloo

import mmkernels as mmk


def test_the_modules_are_the_ops() -> None:
    x, y = torch.randn(9, 8), torch.randn(9, 8)
    labels = torch.arange(9) % 4
    a, b = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    criterion = mmk.nn.ContrastiveLoss(init_logit_scale=5.0, label_smoothing=0.1, normalize=True)
    expected = mmk.contrastive_loss(a, b, 5.0, labels=labels, label_smoothing=0.1)
    torch.testing.assert_close(criterion(x, y, labels), expected)
    expected = mmk.contrastive_loss(x, y, 1 / 0.07)
    torch.testing.assert_close(mmk.nn.ContrastiveLoss()(x, y), expected)
    pairwise = mmk.nn.SigmoidContrastiveLoss(normalize=True)
    torch.testing.assert_close(pairwise(x, y), mmk.sigmoid_contrastive_loss(a, b, 10.0, -10.0))
    for module in (criterion, pairwise):
        module(x, y).backward()
        assert all(p.grad is not None and p.grad.isfinite() for p in module.parameters())
        for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(same(x, y), module(x, y))
    assert list(criterion.state_dict()) == ["logit_scale"]
    assert list(pairwise.state_dict()) == ["logit_scale", "logit_bias"]


def test_the_scale_is_bounded_and_flat_beyond_the_bound() -> None:
    x, y = F.normalize(torch.randn(9, 8), dim=-1), F.normalize(torch.randn(9, 8), dim=-1)
    criterion = mmk.nn.ContrastiveLoss(max_logit_scale=20.0)
    with torch.no_grad():
        criterion.logit_scale.fill_(math.log(50.0))
    loss = criterion(x, y)
    torch.testing.assert_close(loss, mmk.contrastive_loss(x, y, 20.0))
    loss.backward()
    assert criterion.logit_scale.grad == 0
    criterion.reset_parameters()
    torch.testing.assert_close(criterion.logit_scale.detach(), torch.tensor(-math.log(0.07)))


class _Handle:
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("a process group cannot be copied")


@pytest.mark.parametrize("kind", [mmk.nn.ContrastiveLoss, mmk.nn.SigmoidContrastiveLoss])
def test_copies_share_the_process_group(kind: Any) -> None:
    criterion = kind(group=_Handle(), normalize=True)
    model = torch.nn.ModuleDict({"loss": criterion, "again": criterion})
    copied = copy.deepcopy(model)
    same = copied["loss"]
    assert same is copied["again"] and same.group is criterion.group and same.normalize
    assert same.logit_scale is not criterion.logit_scale and torch.equal(same.logit_scale, criterion.logit_scale)
    shallow = copy.copy(criterion)
    assert shallow.group is criterion.group and shallow.logit_scale is criterion.logit_scale
    with pytest.raises(ValueError, match=r"Loss: group: expected None or the default group .*; got another one"):
        pickle.dumps(criterion)


@needs_gloo
@pytest.mark.parametrize("kind", [mmk.nn.ContrastiveLoss, mmk.nn.SigmoidContrastiveLoss])
def test_a_pickle_has_the_default_group_of_the_program_that_loads_it(kind: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        criterion = kind(group=dist.group.WORLD, normalize=True)
        saved = pickle.dumps(torch.nn.ModuleList([criterion]))
        loaded = pickle.loads(saved)[0]
        assert loaded.group is dist.group.WORLD
        x, y = torch.randn(9, 8), torch.randn(9, 8)
        assert torch.equal(loaded(x, y), criterion(x, y))
        with pytest.raises(ValueError, match="got another one"):
            pickle.dumps(kind(group=dist.new_group([0])))
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="Loss: group: expected a default group, as the pickled module has"):
        pickle.loads(saved)


def test_representation_and_bad_arguments() -> None:
    assert repr(mmk.nn.ContrastiveLoss()) == "ContrastiveLoss(max_logit_scale=100, normalize=False)"
    assert repr(mmk.nn.SigmoidContrastiveLoss()) == "SigmoidContrastiveLoss(normalize=False)"
    with pytest.raises(ValueError, match="ContrastiveLoss: init_logit_scale: expected a finite number > 0; got 0"):
        mmk.nn.ContrastiveLoss(init_logit_scale=0.0)
    with pytest.raises(ValueError, match="ContrastiveLoss: label_smoothing: expected a number in 0 … 1; got 2"):
        mmk.nn.ContrastiveLoss(label_smoothing=2.0)
    with pytest.raises(TypeError, match="ContrastiveLoss: normalize: expected a bool; got int"):
        mmk.nn.ContrastiveLoss(normalize=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SigmoidContrastiveLoss: init_logit_bias: expected a number; got str"):
        mmk.nn.SigmoidContrastiveLoss(init_logit_bias="a")  # type: ignore[arg-type]
