"""The probe is fixed, comes from the training data, and is taken without touching the run."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_conv import ntk_gram
from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceReport, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run.data.batch import take_inputs, take_targets
from lightning_conv.kernels.products.precision import PRECISIONS


class NoisyDigits(Dataset):
    """Augments with all three global generators, as real pipelines do."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        noise = torch.randn(64) * 0.01 + float(np.random.normal()) + random.random()  # noqa: NPY002
        return torch.full((64,), float(index)) + noise, index % 10


class Stream(IterableDataset):
    def __iter__(self):
        for _ in range(96):
            yield torch.randn(64), 1


def trained(make_trainer, make_module, data, monitor, **kwargs):
    trainer = make_trainer([monitor], max_steps=1, max_epochs=1, **kwargs)
    trainer.fit(make_module(), data)
    return trainer


def test_the_default_probe_is_128_samples_or_all_of_a_smaller_set(make_trainer, make_module, make_loader):
    monitor = LambdaMin()
    trained(make_trainer, make_module, make_loader(), monitor)
    assert monitor.probe.size == 128
    assert monitor.state_dict()["inputs"].shape == (96, 64)


def test_samples_are_rows_of_the_training_set_without_repeats(make_trainer, make_module, make_loader):
    data = make_loader()
    monitor = LambdaMin(probe=20)
    trained(make_trainer, make_module, data, monitor)
    rows = {tuple(row.tolist()) for row in data.dataset.tensors[0]}
    taken = [tuple(row.tolist()) for row in monitor.state_dict()["inputs"]]
    assert set(taken) <= rows
    assert len(set(taken)) == 20


def test_collecting_leaves_every_global_generator_where_it_was(make_trainer, make_module):
    def after(callbacks):
        trainer = make_trainer(callbacks, max_epochs=1, limit_train_batches=2)
        trainer.fit(make_module(), DataLoader(NoisyDigits(), batch_size=32, shuffle=True))
        return torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002

    plain, watched = after([]), after([LambdaMin(probe=16, every_n_steps=1)])
    assert torch.equal(plain[0], watched[0])
    assert np.array_equal(plain[1], watched[1])
    assert plain[2] == watched[2]


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(3, 2),
        (torch.ones(3, 2), torch.zeros(3)),
        [torch.ones(3, 2)],
        {"pixel_values": torch.ones(3, 2), "labels": torch.zeros(3)},
        {"image": torch.ones(3, 2)},
    ],
)
def test_usual_batches_are_recognised(batch):
    assert torch.equal(take_inputs(batch, None), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("batch", "named"), [({"foo": torch.ones(2)}, "'foo'"), ("text", "str"), ([], "list"), ([{}], "dict")]
)
def test_an_unknown_batch_is_described_and_input_fn_named(batch, named):
    with pytest.raises(MisconfigurationException, match=named) as error:
        take_inputs(batch, None)
    assert "input_fn" in str(error.value)


class Rows(IterableDataset):
    def __iter__(self):
        yield from zip(
            torch.randn(96, 64, generator=torch.Generator().manual_seed(4)), torch.arange(96) % 10, strict=True
        )


def test_of_an_iterable_data_set_the_first_batch_is_measured_before_the_first_step(make_trainer, make_module):
    loader, monitor = DataLoader(Rows(), batch_size=32), KernelStability(every_n_steps=1)
    watched, plain = make_module(), make_module()
    for module, callbacks in ((watched, [monitor]), (plain, [])):
        torch.manual_seed(0)
        make_trainer(callbacks, max_epochs=1).fit(module, loader)
    assert watched.losses == plain.losses
    inputs = next(iter(loader))[0]
    assert torch.equal(monitor.state_dict()["inputs"], inputs)
    expected = ntk_gram(make_module(), inputs, batch_norm="frozen").matrix
    assert torch.allclose(monitor.state_dict()["reference"]["matrix"], expected, rtol=1e-5)


def test_given_inputs_serve_where_the_data_set_has_no_random_access(make_trainer, make_module):
    inputs = torch.rand(12, 64)
    monitor = LambdaMin(probe=Probe(inputs=inputs))
    trained(make_trainer, make_module, DataLoader(Stream(), batch_size=32), monitor)
    assert torch.equal(monitor.state_dict()["inputs"], inputs)


def test_forward_fn_chooses_the_outputs_whose_kernel_is_meant(make_trainer, make_module, make_loader):
    whole, hidden = LambdaMin(probe=Probe(size=8)), LambdaMin(probe=Probe(size=8, forward_fn=lambda m, x: m.trunk(x)))
    trained(make_trainer, make_module, make_loader(), whole)
    trained(make_trainer, make_module, make_loader(), hidden)
    assert hidden.spectrum.lambda_max.value != pytest.approx(whole.spectrum.lambda_max.value, rel=1e-3)


@pytest.mark.parametrize("kwargs", [{"size": 1}, {"outputs": "logits"}, {"batch_norm": "train"}])
def test_a_bad_setting_is_named(kwargs):
    with pytest.raises(MisconfigurationException, match=next(iter(kwargs))):
        Probe(**kwargs)


@pytest.mark.parametrize("kwargs", [{"every_n_steps": 0}, {"max_overhead": 0.0}, {"max_overhead": 2.0}])
def test_a_bad_schedule_is_named(kwargs):
    with pytest.raises(MisconfigurationException, match=next(iter(kwargs))):
        KernelStability(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"precision": "double"},
        {"outputs": "diagonal"},
        {"max_memory": 0},
        {"max_memory": -5},
        {"max_memory": float("nan")},
        {"max_memory": float("inf")},
        {"max_memory": "1 GB"},
        {"max_memory": True},
        {"projections": 1},
        {"projections": 2.5},
        {"projections": True},
        {"parameters": []},
        {"parameters": ""},
        {"parameters": [3]},
        {"targets": torch.zeros(3)},
    ],
)
def test_a_bad_setting_of_the_kernel_is_named(kwargs):
    with pytest.raises(MisconfigurationException, match=f"{next(iter(kwargs))}="):
        Probe(**kwargs)


def test_targets_need_as_many_rows_as_inputs():
    with pytest.raises(MisconfigurationException, match="targets="):
        Probe(inputs=torch.ones(4, 2), targets=torch.zeros(3))


def test_every_setting_makes_another_probe():
    function = torch.sum
    settings = [
        {},
        {"size": 7},
        {"seed": 1},
        {"outputs": "projected"},
        {"outputs": "projected", "projections": 2},
        {"batch_norm": "eval"},
        {"precision": "exact"},
        {"max_memory": 10**9},
        {"parameters": "a.*"},
        {"parameters": ["a.*", "b"]},
        {"input_fn": function},
        {"forward_fn": function},
        {"target_fn": function},
    ]
    assert len({Probe(**each).key for each in settings}) == len(settings)
    assert Probe(max_memory=1e9).key == Probe(max_memory=10**9).key
    assert Probe(parameters=["a", "b"]).key == Probe(parameters=("a", "b")).key


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fixed_precision_is_kept_to(make_trainer, make_module, make_loader, precision):
    trainer = trained(make_trainer, make_module, make_loader(), LambdaMin(probe=Probe(12, precision=precision)))
    assert trainer.callback_metrics["kernel/precision"] == PRECISIONS.index(precision)


@pytest.mark.parametrize("names", ["classifier.*", ["classifier.weight", "trunk.*.bias"], None, "requires_grad"])
def test_the_kernel_is_over_the_parameters_that_are_named(make_trainer, make_module, make_loader, names):
    monitor, module = LambdaMin(probe=Probe(12, parameters=names, batch_norm="eval"), every_n_steps=1), make_module()
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(module, make_loader())
    expected = ntk_gram(module, monitor.state_dict()["inputs"], parameters=names, precision="certified")
    assert tuple(monitor.state_dict()["parameters"]) == expected.parameters
    assert float(trainer.callback_metrics["kernel/trace"]) == pytest.approx(expected.trace, rel=1e-5)


def test_names_count_from_the_network_that_forward_fn_makes(make_trainer, make_module, make_loader):
    monitor = LambdaMin(probe=Probe(8, parameters="module.trunk.0.*", forward_fn=lambda m, x: m.trunk(x)))
    trained(make_trainer, make_module, make_loader(), monitor)
    assert monitor.state_dict()["parameters"] == ["module.trunk.0.weight", "module.trunk.0.bias"]


def test_names_that_match_nothing_are_reported_before_training(make_trainer, make_module, make_loader):
    module = make_module()
    with pytest.raises(MisconfigurationException, match=r"parameters: \['trunk.\*.wieght'\].*classifier.weight"):
        make_trainer([LambdaMin(probe=Probe(parameters=["classifier.*", "trunk.*.wieght"]))]).fit(module, make_loader())
    assert module.losses == []


def test_a_module_with_nothing_to_train_is_told_to_name_the_parameters(make_trainer, make_module, make_loader):
    class Idle(pl.Callback):
        """Freezes everything once the optimizer is there."""

        def on_train_start(self, trainer, pl_module):
            pl_module.requires_grad_(False)

    with pytest.raises(MisconfigurationException, match=r"no trainable parameter.*Probe\(parameters="):
        make_trainer([Idle(), LambdaMin()]).fit(make_module(), make_loader())


@pytest.mark.parametrize("bytes_allowed", [1000, 200_000])
def test_a_kernel_for_which_there_is_no_room_is_refused_with_numbers_and_cure(
    make_trainer, make_module, make_loader, bytes_allowed
):
    module = make_module()
    with pytest.raises(MisconfigurationException, match=r"no room.*max_memory.*[0-9] MiB.*Probe\(size=48\)"):
        make_trainer([LambdaMin(probe=Probe(96, max_memory=bytes_allowed))]).fit(module, make_loader())
    assert module.losses == []


def test_targets_come_from_the_same_samples_as_the_inputs(make_trainer, make_module, make_loader):
    data = make_loader()
    monitor = LambdaMin(probe=20)
    trained(make_trainer, make_module, data, monitor)
    labels = {tuple(x.tolist()): int(y) for x, y in zip(*data.dataset.tensors, strict=True)}
    state = monitor.state_dict()
    assert [labels[tuple(row.tolist())] for row in state["inputs"]] == state["targets"].tolist()


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.ones(3, 2), torch.zeros(3)), torch.zeros(3)),
        ({"image": torch.ones(3, 2), "labels": torch.zeros(3)}, torch.zeros(3)),
        ([torch.ones(3, 2)], None),
        ((torch.ones(3, 2), ["a", "b", "c"]), None),
        ({"image": torch.ones(3, 2)}, None),
        (torch.ones(3, 2), None),
    ],
)
def test_targets_of_usual_batches_are_recognised(batch, expected):
    found = take_targets(batch, None)
    assert found is None if expected is None else torch.equal(found, expected)
    assert torch.equal(take_targets(batch, lambda batch: torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("pattern", ["head.*", "head.weight", ["head.weight"]])
def test_a_tied_weight_is_found_by_each_of_its_names(pattern):
    class Tied(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.head.weight = self.trunk.weight

    names = Probe(parameters=pattern).parameter_names(Tied())
    assert names == ["trunk.weight", *(["head.bias"] if pattern == "head.*" else [])]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 1.5}, r"size=1\.5; a kernel needs at least 2 samples, as a whole number"),
        ({"size": True}, "size=True; a kernel needs at least 2 samples"),
        ({"forward_fn": "forward"}, "forward_fn='forward'; need a function"),
        ({"input_fn": 0}, "input_fn=0; need a function"),
        ({"target_fn": "y"}, "target_fn='y'; need a function"),
        ({"parameters": 3}, "parameters=3; need names or patterns"),
        ({"seed": 1.5}, r"seed: 1\.5 \(float\); need a whole number"),
        ({"inputs": "x"}, "inputs: expected a tensor, a tuple or a mapping of tensors, got str"),
        ({"inputs": torch.ones(4, 2).to_sparse()}, "inputs: tensor 0 is sparse_coo; need dense tensors"),
        ({"targets": torch.ones(4)}, r"targets=a tensor of shape \(4,\); need a tensor with one row for each"),
        ({"inputs": torch.ones(4, 2), "targets": [1, 2, 3, 4]}, r"targets=.*; need a tensor with one row for each"),
    ],
)
def test_wrong_types_are_refused_by_name_and_value(options, said):
    with pytest.raises(MisconfigurationException, match=f"Probe: {said}"):
        Probe(**options)


@pytest.mark.parametrize("probe", ["x", 1.5, True])
def test_a_monitor_refuses_what_is_no_probe(probe):
    with pytest.raises(
        MisconfigurationException, match=f"LambdaMin: probe={probe!r}; need a Probe, or a number of samples"
    ):
        LambdaMin(probe)


def test_a_loss_that_is_no_function_is_refused_before_training(make_trainer, make_module, make_loader):
    module = make_module()
    with pytest.raises(MisconfigurationException, match=r"LambdaMin: loss_fn: 'mse' \(str\) cannot be called; need"):
        make_trainer([LambdaMin(32, loss_fn="mse")], max_epochs=1).fit(module, make_loader())
    assert module.losses == []


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ConvergenceReport(folder=3), r"ConvergenceReport: folder: 3 \(int\); need a path"),
        (lambda: ConvergenceReport(name=3), r"ConvergenceReport: name: 3 \(int\); need the name of the files"),
        (lambda: ConvergenceReport(html="no"), r"ConvergenceReport: html: 'no' \(str\); need True or False"),
        (lambda: ConvergenceCriteria(radius="x"), r"radius: 'x' \(str\); need a finite number above 0, or None"),
    ],
)
def test_settings_of_another_type(made, message):
    with pytest.raises(MisconfigurationException, match=message):
        made()


@pytest.mark.parametrize("change", ["data", "in place", "statistics"])
def test_what_was_computed_is_not_used_at_other_weights(make_trainer, make_module, make_loader, change):
    """Another callback may write to weights or statistics between two of ours, in ways that count no version."""
    kept = []

    class Look(LambdaMin):
        def record(self, trainer, gram, spectrum, step):
            kept.append(self._kernel.moment().outputs.clone())
            weight, statistics = trainer.lightning_module.classifier.weight, trainer.lightning_module.norm.running_mean
            with torch.no_grad():
                if change == "data":
                    weight.data = 2 * weight.data
                elif change == "in place":
                    weight.mul_(2)
                else:
                    statistics.add_(1)
            kept.append(self._kernel.moment().outputs.clone())
            return super().record(trainer, gram, spectrum, step)

    module = make_module()
    module.norm = torch.nn.BatchNorm1d(120)
    module.forward = lambda x: module.classifier(module.norm(module.trunk(x)))
    probe = Probe(32, batch_norm="eval")
    make_trainer([Look(probe, every_n_steps=100)], max_epochs=1, max_steps=1).fit(module, make_loader())
    assert not torch.allclose(kept[0], kept[1])
