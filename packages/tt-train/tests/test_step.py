"""The step against plain torch: the same update however the rows are split, clipped as torch clips, stopped at nan."""

import pytest
import torch

from tt_train import TrainingError
from tt_train.losses.cross_entropy import Summed
from tt_train.step import train_step


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))


def squares(model, batch):
    """A sum of squared errors over rows whose weight is not zero."""
    keep = batch["weight"] != 0
    error = (batch["x"] @ model.weight.T - batch["y"])[keep]
    return Summed(error.square().sum(), int(keep.sum()), int(keep.sum()), {"kept": keep.sum()})


def batch(rows=8):
    generator = torch.Generator().manual_seed(3)
    weight = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1.0])[:rows]
    return {
        "x": torch.randn(rows, 3, generator=generator),
        "y": torch.randn(rows, 2, generator=generator),
        "weight": weight,
    }


def split(rows, size):
    return [{key: value[start : start + size] for key, value in rows.items()} for start in range(0, 8, size)]


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_the_step_is_that_of_the_whole_batch(size, max_grad_norm):
    model, reference = Linear(), Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_step(model, split(batch(), size), squares, optimizer, max_grad_norm=max_grad_norm)
    total, count, *_ = squares(reference, batch())
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm or float("inf"))
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.weight, reference.weight, rtol=1e-6, atol=1e-7)
    assert result.loss == pytest.approx(float(total.detach() / count), rel=1e-6)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
    assert (result.tokens, result.outcome) == (5, "updated")
    assert model.weight.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_update_is_made_where_the_gradient_is_not_finite(value):
    model = Linear()
    before = model.weight.detach().clone()
    rows = batch()
    rows["x"][0, 0] = value
    result = train_step(model, [rows], squares, torch.optim.SGD(model.parameters(), lr=0.1))
    assert result.outcome == "not_finite"
    assert torch.equal(model.weight, before)
    assert result.first_nonfinite == "weight"


def test_rows_without_a_trained_item_change_nothing():
    model = Linear()
    rows = batch() | {"weight": torch.zeros(8)}
    result = train_step(model, [rows], squares, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (result.tokens, result.outcome) == (0, "empty")
    assert torch.equal(model.weight, Linear().weight)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_metrics_that_the_objective_names_are_means_over_all_that_it_counts(size):
    model = Linear()

    def counted(model, batch):
        part = squares(model, batch)
        return part._replace(metrics={"error": part.loss, "rows": torch.tensor(part.count)})

    result = train_step(model, split(batch(), size), counted, torch.optim.SGD(model.parameters(), lr=0.1))
    assert result.metrics == {"error": pytest.approx(result.loss, rel=1e-6), "rows": 1.0}


def test_an_objective_that_returns_something_else_is_refused():
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="the objective returned tuple; return tt_train.Summed"):
        train_step(model, [batch()], lambda model, batch: squares(model, batch)[:2], optimizer)


def test_an_objective_of_no_trained_parameter_is_refused():
    model, other = Linear(), Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="depends on no trained parameter"):
        train_step(model, [batch()], lambda _, batch: squares(other, batch), optimizer)
