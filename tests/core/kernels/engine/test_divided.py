"""A kernel that is divided among 2 and 4 processes is that of one process; one that fails or lags is named, and none waits for ever."""

import time

import pytest
import torch
from on_ranks import run
from torch import nn
from torch.distributed.algorithms.join import Join

from lightning_conv import ntk_gram
from lightning_conv.machine.processes import Processes, ProcessesError

CASES = {
    "trace by samples": ({"outputs": "trace"}, "samples"),
    "trace by outputs": ({"outputs": "trace"}, "outputs"),
    "full": ({"outputs": "full"}, None),
    "sum": ({"outputs": "sum"}, None),
    "per layer": ({"outputs": "trace", "per_layer": True}, "outputs"),
    "per layer by samples": ({"outputs": "trace", "per_layer": True}, "samples"),
    "certified": ({"outputs": "sum", "precision": "certified"}, None),
    "projected": ({"outputs": "projected", "projections": 6}, None),
    "general": ({"outputs": "trace", "engine": "jacobian"}, None),
    "little memory": ({"outputs": "trace", "max_memory": 3e6}, "samples"),
    "true batch statistics": ({"outputs": "trace", "batch_norm": "batch"}, None),
}


class Words(nn.Module):
    """An embedding, whose factors are words, and a convolution, whose gradients are formed late."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 40, 3, stride=3)
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 7)

    def forward(self, words):
        return self.head(torch.relu(self.norm(self.conv(self.embedding(words).transpose(1, 2)))).mean(2))


class Tied(nn.Module):
    """A table of words that is the weight of the head as well."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, words):
        return torch.tanh(self.hidden(self.words(words))).matmul(self.words.weight.T).flatten(1)


def network():
    torch.manual_seed(0)
    return Words().eval(), torch.randint(0, 11, (13, 9))


def kernels(processes, by):
    """Return what ntk_gram gives in each case, divided or not."""
    model, words = network()
    others = torch.randint(0, 11, (9, 9), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        if by is not None:
            patch.setattr("lightning_conv.kernels.planning.division.BYTES_PER_FLOP", 1e9 if by == "samples" else 1e-9)
        found = {}
        for name, (options, way) in CASES.items():
            if way not in (None, by):
                continue
            gram = ntk_gram(model, words, processes=processes, **options)
            divided = "" if gram.plan.division is None else gram.plan.division.by
            floor = gram.floor + 2 * gram.jacobian_error * float(
                gram.matrix.trace()
            )  # passes of other batches round differently
            found[name] = (
                gram.matrix,
                floor,
                gram.layer_traces,
                gram.projection_error,
                dict(gram.layer_matrices),
                divided,
            )
        found["two sets"] = (ntk_gram(model, words, others, processes=processes).matrix,)
        torch.manual_seed(4)
        gram = ntk_gram(Tied(), words, outputs="projected", projections=4, processes=processes)
        found["tied"] = (gram.matrix,)
        targets = torch.randn(13, 7, generator=torch.Generator().manual_seed(2))
        found["cotangents"] = (ntk_gram(model, words, cotangents=targets, processes=processes).matrix,)
    return found


def divided_kernels(rank, world):
    processes = Processes(30)
    return {by: kernels(processes, by) for by in ("samples", "outputs")}


@pytest.mark.parametrize("world", [2, 4, 3])
def test_it_is_the_kernel_of_one_process(world, tmp_path):
    for found in run(world, divided_kernels, tmp_path):
        for by, of in found.items():
            expected = kernels(None, by)
            assert of.keys() == expected.keys()
            for name, (matrix, *rest) in of.items():
                truth, *others = expected[name]
                exact = name == "certified"
                error = (matrix - truth).norm() / truth.norm()
                assert error <= (1e-13 if exact else 1e-6), (by, name, float(error))
                if not rest:
                    continue
                floor, traces, spread, layers, divided = rest
                assert divided == ("" if name == "true batch statistics" else CASES[name][1] or divided), (by, name)
                assert (matrix - truth).norm() <= 2 * (floor + others[0]), (by, name)
                assert floor <= 1.5 * others[0] + 1e-12
                assert dict(traces) == pytest.approx(dict(others[1]), rel=1e-5)
                assert spread == pytest.approx(others[2], rel=1e-4)
                for layer, each in layers.items():
                    assert torch.allclose(each, others[3][layer], rtol=1e-5, atol=1e-7)


def one_fails(rank, world):
    model, words = network()
    processes = Processes(30)
    if rank == 1:
        model.forward = lambda words: 1 / 0
    said = []
    try:
        ntk_gram(model, words, processes=processes)
    except ZeroDivisionError as error:
        said.append(str(error))
    model, words = network()
    return said, ntk_gram(model, words, processes=processes).matrix.shape


def test_the_error_of_one_is_that_of_all_and_they_can_go_on(tmp_path):
    first, second = run(2, one_fails, tmp_path)
    assert first[0] == ["process 1: division by zero"]
    assert second[0] == ["division by zero"]
    assert first[1] == second[1] == (13, 13)


def one_lags(rank, world):
    model, words = network()
    processes = Processes(3)
    if rank == 1:
        time.sleep(8)
    begun, said = time.monotonic(), []
    for _ in range(2):
        try:
            ntk_gram(model, words, processes=processes)
        except ProcessesError as error:
            said.append(str(error))
    return said, time.monotonic() - begun


def test_one_that_lags_is_named_and_nobody_waits_for_ever(tmp_path):
    first, second = run(2, one_lags, tmp_path)
    said, seconds = first
    assert len(said) == 2
    assert "process 0 of 2: another process has not answered within 3 s" in said[0]
    assert "[ 1 ]" in said[0] or "rank 1" in said[0].lower() or "1" in said[0].split("(")[1]
    assert seconds < 20
    assert second is None or len(second[0]) == 2


def one_has_fewer_steps(rank, world):
    """Train under ``Join``, measuring at each step, where the first process has two steps more than the second one."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    processes, probe = Processes(3), torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    begun, traces, failed = time.monotonic(), [], 0
    with Join([ddp]):
        for step in range(3 if rank else 5):
            try:
                traces.append(float(ntk_gram(net, probe, processes=processes).matrix.trace()))
            except ProcessesError:
                failed += 1
            optimizer.zero_grad()
            ddp(torch.rand(4, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    return traces, failed, time.monotonic() - begun, net.weight.detach()


def test_under_join_a_process_with_more_steps_goes_on_without_the_kernel(tmp_path):
    first, second = run(2, one_has_fewer_steps, tmp_path)
    assert len(first[0]) == len(second[0]) == 3
    assert first[0] == second[0]
    assert (first[1], second[1]) == (2, 0)
    assert first[2] < 60
    assert torch.equal(first[3], second[3])


def one_ends(rank, world):
    model, words = network()
    processes = Processes(20)
    ntk_gram(model, words, processes=processes)
    if rank == 1:
        return "", 0.0  # the process ends
    begun = time.monotonic()
    with pytest.raises(ProcessesError) as said:
        ntk_gram(model, words, processes=processes)
    return str(said.value), time.monotonic() - begun


def test_one_that_has_ended_is_not_waited_for_for_ever(tmp_path):
    (said, seconds), _ = run(2, one_ends, tmp_path)
    assert "process 0 of 2: another process has not answered within 20 s or has ended" in said
    assert seconds < 60


def with_late_gradients(rank, world):
    """A convolution whose gradients are formed late, and the kernels of true batch statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(63, 2)
    ).double()
    images = torch.randn(9, 3, 5, 5, dtype=torch.float64)
    processes = Processes(30) if world > 1 else None
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_conv.kernels.planning.division.BYTES_PER_FLOP", 1e9)  # by samples
        for options in ({"outputs": "trace"}, {"outputs": "full"}, {"outputs": "sum", "per_layer": True}):
            gram = ntk_gram(net, images, processes=processes, **options)
            late = [each.formed_late for each in gram.plan.contributions]
            found.append((gram.matrix, gram.floor, dict(gram.layer_traces), dict(gram.layer_matrices), any(late)))
        for options in ({"outputs": "trace"}, {"outputs": "full", "per_layer": True}):
            gram = ntk_gram(net, images, processes=processes, batch_norm="batch", precision="certified", **options)
            found.append((gram.matrix, gram.floor, dict(gram.layer_traces), dict(gram.layer_matrices), False))
    return found


def test_late_gradients_are_divided_by_channels_and_coupled_ones_by_rows(tmp_path):
    expected = with_late_gradients(0, 1)
    assert any(late for *_, late in expected)
    for world in (2, 4):
        (folder := tmp_path / str(world)).mkdir()
        for found in run(world, with_late_gradients, folder):
            for (matrix, floor, traces, layers, _), (truth, bound, their_traces, their_layers, _) in zip(
                found, expected, strict=True
            ):
                assert (matrix - truth).norm() <= 1e-10 * truth.norm()
                assert floor <= 1.5 * bound
                assert traces == pytest.approx(their_traces, rel=1e-10)
                assert layers.keys() == their_layers.keys()
                for name, each in layers.items():
                    assert torch.allclose(each, their_layers[name], rtol=1e-10)
