"""The network of 2-D points, and labels that are weights."""

import pytest
import torch

from src.models import MLP, MLPConfig, UNet, UNetConfig
from tests.conftest import randomise


def test_an_mlp_starts_at_zero_and_sees_position_time_and_class() -> None:
    network = MLP(MLPConfig(kind="mlp", width=16, layers=2), num_classes=3)
    x, time = torch.randn(5, 2), torch.rand(5)
    assert network(x, time).shape == (5, 2) and not network(x, time).any()
    randomise(network, 0.3)
    out = network(x, time)
    for changed in (network(x + 0.1, time), network(x, time * 0.5), network(x, time, torch.tensor([0, 1, 2, 0, 1]))):
        assert (changed - out).abs().min() > 1e-4
    assert torch.equal(network(x, time, torch.full((5,), 3)), out), "the null class is what no label means"
    with pytest.raises(TypeError):
        network(x)


def test_labels_may_be_weights_that_blend_classes() -> None:
    small = UNetConfig(base_channels=8, channel_mult=(1,), blocks=1, attention=("none",), mid_attention="none", norm_groups=4)
    for network, x in (
        (MLP(MLPConfig(kind="mlp", width=16, layers=2), num_classes=2), torch.randn(3, 2)),
        (UNet(small, num_classes=2), torch.randn(3, 3, 8, 8)),
    ):
        randomise(network, 0.3)
        time, labels = torch.rand(3), torch.tensor([0, 1, 2])
        one_hot = torch.eye(3)[labels]
        torch.testing.assert_close(network(x, time, one_hot), network(x, time, labels), rtol=1e-5, atol=1e-5)
        table = network.label_embedding.weight
        half = network(x, time, torch.tensor([[0.5, 0.5, 0.0]] * 3))
        with torch.no_grad():
            table[0] = (table[0] + table[1]) / 2
        torch.testing.assert_close(half, network(x, time, torch.zeros(3, dtype=torch.long)), rtol=1e-5, atol=1e-5)
