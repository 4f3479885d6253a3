"""Networks whose samples take different ways: what the samples that are read do not reach is not lost."""

import pytest
import torch
from dense_kernels import assert_same
from kernels.networks import Again, AgainByRule, Called, Expert, Gated, sent_to_the_expert
from torch import nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.kernels.reading import anatomy, reach


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("kind", [Expert, Gated])
def test_an_expert_that_only_later_samples_reach_is_in_the_kernel(kind, engine, naive_gram, monkeypatch):
    monkeypatch.setattr(reach, "REACH_TARGET", 1)  # one sample at a time
    model, inputs = kind().double(), sent_to_the_expert(8, 3, 6)
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs, engine=engine)
        assert_same(gram.matrix, naive_gram(model, inputs, outputs), 1e-12)
        assert "expert" in gram.general
        assert gram.unused == ("nothing",)
    reason = next(c.kind for c in gram.plan.contributions if c.layer == "expert")
    assert reason == "the samples that were read do not reach it, others do"


def test_it_may_be_the_columns_that_reach_it(naive_gram):
    model, rows, columns = Expert().double(), sent_to_the_expert(5), sent_to_the_expert(6, 5)
    whole = naive_gram(model, torch.cat([rows, columns]), "trace")
    assert_same(ntk_gram(model, rows, columns).matrix, whole[:5, 5:], 1e-12)
    assert_same(ntk_gram(model, columns, rows).matrix, whole[5:, :5], 1e-12)
    assert ntk_gram(model, rows).unused == ("expert", "nothing")


def test_a_plan_of_samples_that_do_not_reach_it_serves_others_that_do(naive_gram):
    model, inputs = Expert().double(), sent_to_the_expert(6, 5)
    plan = plan_ntk(model, sent_to_the_expert(6))
    assert plan.reading.unused == ("expert", "nothing")
    gram = ntk_gram(model, inputs, plan=plan)
    assert_same(gram.matrix, naive_gram(model, inputs, "trace"), 1e-12)
    assert gram.general == ("expert",)


def test_where_one_sample_is_looked_at_the_second_is_not_forgotten(naive_gram, monkeypatch):
    monkeypatch.setattr(anatomy, "LARGE", 0)
    model, inputs = Expert().double(), sent_to_the_expert(5, 1)
    gram = ntk_gram(model, inputs)
    assert_same(gram.matrix, naive_gram(model, inputs, "trace"), 1e-12)
    assert gram.general == ("expert",)


def test_what_no_sample_reaches_is_told():
    model, inputs = Expert(), sent_to_the_expert(6).float()
    gram = ntk_gram(model, inputs)
    assert gram.unused == ("expert", "nothing")
    assert set(gram.structured) | set(gram.general) | set(gram.unused) == set(gram.parameters)
    assert "no sample reaches expert, nothing" in str(gram.plan)
    assert gram.facts()["unused"] == gram.unused
    assert "no sample reaches" not in str(plan_ntk(nn.Linear(4, 2), inputs))


def test_where_all_are_used_no_sample_is_passed_through_again(monkeypatch):
    monkeypatch.setattr(reach, "_reached", lambda *_: pytest.fail("a pass over the samples"))
    ntk_gram(nn.Linear(4, 2), sent_to_the_expert(6).float())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Again, r"model: shared\.weight had fewer uses on the first samples than on others"),
        (AgainByRule, r"model: shared\.bias, shared\.weight had fewer uses"),
        (Called, "model: called 2 layers on one batch and 1 on another"),
    ],
)
def test_more_uses_of_a_layer_with_a_rule_are_refused_and_the_general_engine_has_them(kind, message, naive_gram):
    model, inputs = kind().double(), sent_to_the_expert(6, 4)
    with pytest.raises(ValueError, match=f"{message}.*use engine='jacobian'"):
        ntk_gram(model, inputs)
    assert_same(ntk_gram(model, inputs, engine="jacobian").matrix, naive_gram(model, inputs, "trace"), 1e-12)
