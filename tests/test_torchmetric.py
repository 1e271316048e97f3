"The kit's metrics as objects of torchmetrics: the same numbers, whatever the batches"
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.calibration.metrics import METRICS, unregister_metric, register_metric
from kdc_nb.experiments.torchmetric import TorchCalibrationMetric
from tests.conftest import made

Z, Y, _ = made(300)


def fed(metric, sizes=(100, 150, 50)):
    for x, y in zip(Z.split(list(sizes)), Y.split(list(sizes))): metric.update(x, y)
    return metric


@pytest.mark.parametrize("name", [*METRICS])
@pytest.mark.parametrize("from_logits", [True, False])
def test_it_is_what_evaluate_says(name, from_logits):
    metric = TorchCalibrationMetric(name, from_logits=from_logits)
    metric.update(Z if from_logits else Z.softmax(1), Y)
    expected = evaluate(Z, Y, metrics=[name], n_draws=2).raw[name].value
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9)
    assert metric.higher_is_better == METRICS[name].higher_is_better


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_batches_do_not_matter(sizes):
    rest = 300 - sum(sizes)
    assert fed(TorchCalibrationMetric("ace"), [*sizes, *[rest]*(rest > 0)]).compute() == fed(
        TorchCalibrationMetric("ace")).compute()


def test_it_is_copied_and_reset():
    metric = fed(TorchCalibrationMetric("ece", n_bins=7))
    value = metric.compute()
    assert copy.deepcopy(metric).compute() == value
    metric.reset()
    metric.update(Z[:50], Y[:50])
    assert metric.compute() != value


def test_what_was_given_may_be_written_over():
    metric, z, y = TorchCalibrationMetric("nll"), Z.clone(), Y.clone()
    metric.update(z, y)
    z.zero_(); y.zero_()
    assert metric.compute() == fed(TorchCalibrationMetric("nll"), [300]).compute()


def test_a_call_is_the_batchs_value_and_counts():
    metric, alone = TorchCalibrationMetric("nll"), TorchCalibrationMetric("nll")
    alone.update(Z[:100], Y[:100])
    assert metric(Z[:100], Y[:100]) == alone.compute()
    metric(Z[100:], Y[100:])
    assert float(metric.compute()) == pytest.approx(float(fed(TorchCalibrationMetric("nll")).compute()))


def test_a_metric_of_ones_own():
    register_metric("worst", label="worst", per_sample=METRICS["nll"].per_sample)
    assert fed(TorchCalibrationMetric("worst")).compute() == fed(TorchCalibrationMetric("nll")).compute()
    unregister_metric("worst")


@pytest.mark.parametrize("do, message", [
    (lambda: TorchCalibrationMetric("ecce"), "metric: got 'ecce'"),
    (lambda: TorchCalibrationMetric(n_bins=0), "n_bins: got 0"),
    (lambda: TorchCalibrationMetric().compute(), "compute: got no images"),
    (lambda: fed(TorchCalibrationMetric()).update(Z[:, :3], Y.clamp(max=2)), "preds: got shape"),
    (lambda: TorchCalibrationMetric().update(Z, Y + 9), "labels: got 9 to 13, expected 0 to 4"),
    (lambda: TorchCalibrationMetric(from_logits=False).update(Z, Y), "probs: got")])
def test_bad_input_is_told(do, message):
    with pytest.raises(ValueError, match=message): do()
