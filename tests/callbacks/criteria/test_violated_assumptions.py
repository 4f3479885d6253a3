"""ConvergenceCriteria: hypotheses that look fulfilled and are not are found, on the settings or on the step itself."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_conv.callbacks import ConvergenceCriteria, Probe
from lightning_conv.callbacks.run.deviation import step_departure


@pytest.fixture
def data() -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(12, 6), torch.randn(12, 1))


@pytest.fixture
def make(make_regression):
    def made(lr: float = 0.05, network: nn.Module | None = None, **options):
        torch.manual_seed(0)
        return make_regression(
            network or nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1)), lr=lr, **options
        )

    return made


def assumptions(callback: ConvergenceCriteria) -> list[str]:
    return [each.assumption for each in callback.violations]


def run(make_trainer, module, data, *, epochs=3, probe=None, loader=None, which="chatterjee", **options):
    criteria = ConvergenceCriteria(which, probe=probe, every_n_steps=1)
    make_trainer([criteria], max_epochs=epochs, **options).fit(module, loader or DataLoader(data, batch_size=len(data)))
    return criteria


def test_samples_given_by_hand_are_the_training_set_only_if_they_are(make_trainer, make, data):
    inputs, targets = data.tensors
    order = torch.randperm(12)
    for x, y, broken in (
        (inputs[order], targets[order], False),
        (inputs + 0.1, targets, True),
        (inputs, targets + 0.1, True),
        (inputs[[*range(11), 0]], targets[[*range(11), 0]], True),  # as many, one of them twice
        (torch.cat([inputs, inputs]), torch.cat([targets, targets]), True),
    ):
        criteria = run(make_trainer, make(), data, probe=Probe(inputs=x, targets=y), epochs=2)
        assert ("whole set" in assumptions(criteria)) is broken


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (lambda data: RandomSampler(data, replacement=True, num_samples=12), "with replacement"),
        (lambda data: WeightedRandomSampler([1.0] * 12, 12), "with replacement"),
        (lambda data: RandomSampler(data, num_samples=7), "draws 7 samples per epoch, of a training set of 12"),
        (RandomSampler, None),
        (lambda data: SubsetRandomSampler(range(12)), None),
    ],
)
def test_a_sampler_that_leaves_samples_out_is_no_full_batch(make_trainer, make, data, sampler, said):
    loader = DataLoader(data, batch_size=12, sampler=sampler(data))
    criteria = run(make_trainer, make(), data, loader=loader)
    assert assumptions(criteria) == ([] if said is None else ["full batch"])
    assert said is None or said in criteria.violations[0].reason


def test_half_precision_weights_are_said_to_round_every_step(make_trainer, make, data):
    criteria = run(make_trainer, make(), data, precision="bf16-true")
    assert "descent" in assumptions(criteria)
    assert "the weights are bfloat16" in criteria.violations[0].reason


def test_a_further_term_in_the_loss_is_no_function_of_the_outputs(make_trainer, make, data):
    module = make()
    module.training_step = lambda batch, batch_idx: (
        module.loss_fn(module(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in module.parameters())
    )
    criteria = run(make_trainer, module, data)
    assert "known loss" in assumptions(criteria)
    assert (
        "beside the outputs: a penalty on the weights, or a network that goes on after them"
        in criteria.violations[0].reason
    )
    assert {each.verdict for each in criteria.criteria} == {"not applicable"}


def test_a_further_term_in_the_gradient_is_seen_on_the_step(tmp_path, make_trainer, make, data):
    def penalised():
        module = make()

        def add(optimizer):
            for each in module.parameters():
                each.grad += 0.02 * each.detach()

        module.on_before_optimizer_step = add
        return module

    criteria = run(make_trainer, penalised(), data, epochs=2, checkpoint=True)
    assert assumptions(criteria) == ["descent"]
    assert "step 0 differs from -h grad f" in criteria.violations[0].reason
    assert {each.verdict for each in criteria.criteria} == {"not applicable"}
    # It stays known after a resumption without the term.
    resumed = ConvergenceCriteria("chatterjee", every_n_steps=1)
    make_trainer([resumed], max_epochs=4).fit(
        make(), DataLoader(data, batch_size=12), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert assumptions(resumed) == ["descent"]


class FunctionalDropout(nn.Module):
    """Randomness that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 1)

    def forward(self, x):
        return self.last(nn.functional.dropout(torch.tanh(self.first(x)), 0.2, self.training))


def test_randomness_that_no_module_shows_is_seen_on_the_step(make_trainer, make, data):
    assert assumptions(run(make_trainer, make(network=FunctionalDropout()), data)) == ["descent"]


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_descent_to_the_level_of_rounding_is_still_descent(make_trainer, make, data, double):
    module = make(lr=0.3, network=nn.Linear(6, 1))
    inputs = torch.linalg.qr(data.tensors[0])[0] * 12**0.5
    if double:
        module, inputs = module.double(), inputs.double()
    reachable = TensorDataset(inputs, inputs.sum(1, keepdim=True) + 1)
    criteria = run(make_trainer, module, reachable, epochs=300)
    assert criteria.history[-1].loss < (1e-24 if double else 1e-11)
    assert assumptions(criteria) == []
    seen = [each.departure for each in criteria.history[:20]]
    assert max(seen) < (1e-10 if double else 1e-4)


def test_departure_is_that_of_the_definition():
    torch.manual_seed(0)
    before, gradient, extra = ({"w": torch.randn(4, 3, dtype=torch.float64)} for _ in range(3))
    moved = {"w": -0.1 * gradient["w"] + 0.01 * extra["w"]}
    departure, rounding = step_departure(moved, before, gradient, 0.1, lambda dtype: {"w": gradient["w"].to(dtype)})
    assert departure == pytest.approx(0.01 * float(extra["w"].norm()) / (0.1 * float(gradient["w"].norm())))
    assert rounding < 1e-5
    same, _ = step_departure({"w": -0.1 * gradient["w"]}, before, gradient, 0.1, lambda dtype: gradient)
    assert same < 1e-14
    # A gradient that is mostly rounding explains a large difference.
    noisy = {"w": gradient["w"].float()}
    _, explained = step_departure(moved, before, noisy, 0.1, lambda dtype: {"w": 1.5 * gradient["w"]})
    assert explained > 1


def sums(make_trainer, make_regression):
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.rand(32, 8).double(), torch.rand(32, 1).double())
    network = nn.Sequential(nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 1)).double()
    criteria = ConvergenceCriteria(["chatterjee", "oymak"], every_n_steps=1)
    module = make_regression(network, 0.002, nn.MSELoss(reduction="sum"))
    make_trainer([criteria], max_epochs=4).fit(module, DataLoader(data, batch_size=16))
    return {
        "violations": [str(each) for each in criteria.violations],
        "steps": [(s.step_size, s.departure, s.efficiency, s.moved) for s in criteria.history[:-1]],
        "oymak_step": next(c.measured for c in criteria.criteria if c.name == "oymak_step"),
        "path_length": criteria.history[-1].path_length,
    }


@pytest.mark.slow
def test_sums_that_two_processes_average_are_steps_of_half_the_rate(run_on_two_processes):
    for found in run_on_two_processes(sums):
        assert found["violations"] == []
        assert len(found["steps"]) == 4
        for step_size, departure, efficiency, _ in found["steps"]:
            assert step_size == 0.001  # the mean of two sums: half of the learning rate on their sum
            assert departure < 1e-10
            assert 0 < efficiency < 1.01
        assert found["oymak_step"] == pytest.approx(2 * 0.001, abs=1e-12)
        assert found["path_length"] == pytest.approx(sum(moved for *_, moved in found["steps"]), abs=1e-10)
