"""The digest that binds a cache to the teacher's weights."""

import pytest
import torch
from torch import nn

from singer.features.cache import weights_digest


def linear(seed=0):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def test_weights_digest_is_of_the_weights_alone():
    digest = weights_digest(linear())
    assert len(digest) == 64
    assert weights_digest(linear().eval().requires_grad_(False)) == digest
    strided = linear()
    strided[0].weight.data = strided[0].weight.data.T.contiguous().T
    assert weights_digest(strided) == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data[0, 0].add_(1e-6),
        lambda model: model[1].num_batches_tracked.add_(1),
        lambda model: setattr(
            model[1], "num_batches_tracked", model[1].num_batches_tracked.view(torch.float64)
        ),
        lambda model: model.add_module("2", nn.BatchNorm1d(1)),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.reshape(3, 4)),
        lambda model: setattr(model, "0", nn.Sequential(model[0])),
    ],
    ids=["value", "buffer", "dtype", "more", "shape", "name"],
)
def test_weights_digest_changes_with_the_weights(change):
    model = linear()
    change(model)
    assert weights_digest(model) != weights_digest(linear())


def test_weights_digest_does_not_depend_on_the_order_of_modules():
    a, b = linear(1), linear(2)
    first, second = nn.ModuleDict({"a": a, "b": b}), nn.ModuleDict()
    second.update([("b", b), ("a", a)])
    assert list(first.state_dict()) != list(second.state_dict())
    assert weights_digest(first) == weights_digest(second)


def test_weights_digest_refuses_what_is_no_tensor():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"step": 1}

    with pytest.raises(TypeError, match="_extra_state is a dict"):
        weights_digest(Odd(2, 2))
