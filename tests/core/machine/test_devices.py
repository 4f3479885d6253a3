"""Devices are found by name, with their connections; a name that is not known is answered with the closest one."""

import pytest

from lightning_conv.machine.devices import (
    DEVICES,
    GPUS,
    LINK_LATENCY,
    NETWORK_LATENCY,
    SUSTAINED_LINK,
    SUSTAINED_NETWORK,
    device_named,
)


@pytest.mark.parametrize("name", DEVICES)
def test_every_name_has_a_device_with_a_source(name):
    found = device_named(name.upper())
    assert found.name == name
    assert found.source
    assert min(found.flops, found.double_flops, found.memory, found.bandwidth, found.link, found.network) > 0


@pytest.mark.parametrize(("name", "word"), [("h10", "did you mean h100"), ("tpu", "known are cpu, a100, h100, h200")])
def test_an_unknown_name_is_answered_with_those_that_are_known(name, word):
    with pytest.raises(ValueError, match=f"device: '{name}' is not known; .*{word}"):
        device_named(name)


def test_ranks_beyond_a_node_communicate_over_the_network():
    h100 = GPUS["h100"]
    assert [h100.nodes(ranks) for ranks in (1, 8, 9, 1024)] == [1, 1, 2, 128]
    assert h100.direct(8) == (SUSTAINED_LINK * 450e9, LINK_LATENCY)
    assert h100.direct(9) == (SUSTAINED_NETWORK * 50e9, NETWORK_LATENCY)
