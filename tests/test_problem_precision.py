"""Second derivatives are never taken in half precision: not of models, of losses under autocast, or between steps."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import zoscope
from zoscope import SpecError
from zoscope.problem.core import measurable
from zoscope.runtime import without_autocast


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(20, 6, generator=generator).to(dtype), torch.randint(0, 3, (20,), generator=generator))]


def plain(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def under_autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trace_of(problem, **options):
    found = zoscope.bounds(problem, optimizers=("gd",), method="dense", device="cpu", **options)
    return found.curvature["hessian"].trace.value, {notice.code for notice in found.warnings}


REFERENCE = trace_of(zoscope.Problem(network(), data(), plain))[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_half_precision_model_has_the_curvature_of_its_copy(dtype):
    exact, _ = trace_of(zoscope.Problem(network(torch.bfloat16).float(), data(), plain))
    found, codes = trace_of(zoscope.Problem(network(torch.bfloat16), data(), plain), dtype=dtype)
    assert found == pytest.approx(exact, rel=1e-5)
    assert ("half-precision" if dtype == "bfloat16" else "upcast") in codes


def test_asking_for_half_precision_measures_in_float32_and_says_so():
    found, codes = trace_of(zoscope.Problem(network(), data(), plain), dtype="bfloat16")
    assert found == pytest.approx(REFERENCE, rel=1e-6)
    assert "half-precision" in codes


@pytest.mark.parametrize("measure", ["bounds", "spectrum", "moments"])
def test_a_loss_under_autocast_is_measured_without_it(measure):
    options = {"device": "cpu", "seed": 0}
    plainly = getattr(zoscope, measure)(zoscope.Problem(network(), data(), plain), **options)
    found = getattr(zoscope, measure)(zoscope.Problem(network(), data(), under_autocast), **options)
    key = "hessian"
    expected, value = (r.to_dict()["curvature"][key]["trace"]["value"] for r in (plainly, found))
    assert value == pytest.approx(expected, rel=1e-5)
    assert [notice.code for notice in found.warnings].count("autocast") == 1


def test_autocast_around_the_call_is_left_for_the_measurement():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, codes = trace_of(zoscope.Problem(network(), data(), plain))
        assert torch.is_autocast_enabled("cpu")
    assert found == pytest.approx(REFERENCE, rel=1e-6)
    assert "autocast" in codes


def test_autocast_works_again_afterwards():
    entered, context = torch.autocast.__enter__, torch.autocast("cpu", dtype=torch.bfloat16)
    with without_autocast(), context:
        assert not torch.is_autocast_enabled("cpu")
    with context:
        assert torch.is_autocast_enabled("cpu")
    assert torch.autocast.__enter__ is entered


def test_a_cast_inside_of_the_loss_is_refused():
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).to(torch.bfloat16), batch[1])

    with pytest.raises(SpecError, match=r"computes in bfloat16 .*first in to\(\)\), so .*--curvature forward"):
        trace_of(zoscope.Problem(network(), data(), loss))


def test_a_mask_in_half_precision_is_no_reason_to_refuse():
    def loss(model, batch):
        return plain(model, batch) * torch.ones((), dtype=torch.bfloat16)

    assert trace_of(zoscope.Problem(network(), data(), loss))[0] == pytest.approx(REFERENCE, rel=1e-6)


def test_a_copy_that_cannot_be_had_is_refused_with_the_reason():
    model = network(torch.bfloat16)
    model.source = (item for item in range(3))  # cannot be copied
    with pytest.raises(SpecError, match=r"cannot be copied to cpu in float32.*--curvature forward"):
        trace_of(zoscope.Problem(model, data(torch.bfloat16), plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", [plain, under_autocast])
def test_between_steps_the_measurement_follows_training(dtype, loss):
    problem = zoscope.Problem(network(), data(), loss)
    with (
        problem.prepare(device="cpu", dtype=dtype, trains=True) as training,
        measurable(problem, training, device="cpu") as measured,
    ):
        training.write(2 * training.read())
        with measured.at() as here:
            assert torch.equal(here.read(), training.read().float())
            assert here.loss(here.shards[0]).dtype == torch.float32
        with measured.at(torch.zeros(training.num_params)) as origin:
            assert origin.value() == pytest.approx(math.log(3), rel=1e-6)
        assert training.read().abs().sum() > 0
        assert training.dtype == getattr(torch, dtype)
    reference = network().to(getattr(torch, dtype)).float()
    assert all(torch.equal(a, b) for a, b in zip(network().parameters(), problem.model.parameters(), strict=True))
    assert reference is not problem.model


def test_a_run_in_half_precision_is_measured_in_float32():
    options = {
        "optimizer": "zo-gd",
        "lr": 1e-2,
        "steps": 4,
        "every": 2,
        "rtol": 1e-3,
        "method": "dense",
        "device": "cpu",
    }
    run = zoscope.track(zoscope.Problem(network(), data(), plain), dtype="bfloat16", **options)
    assert run.dtype == "bfloat16"
    assert {tensor.dtype for tensor in run.parameters.values()} == {torch.bfloat16}
    rounded = network(torch.bfloat16).float()
    assert run.records[0].trace == pytest.approx(
        trace_of(zoscope.Problem(rounded, data(torch.bfloat16), plain))[0], 1e-2
    )
    assert "half-precision" in {notice.code for notice in run.warnings}


def test_a_run_in_half_precision_can_be_resumed(tmp_path):
    problem = zoscope.Problem(network(), data(), plain)
    options = {"optimizer": "zo-gd", "lr": 1e-2, "steps": 6, "every": 2, "dtype": "bfloat16", "device": "cpu"}
    whole = zoscope.track(problem, **options)
    zoscope.track(problem, run=tmp_path / "run", max_seconds=1e-9, **options)
    resumed = zoscope.track(problem, run=tmp_path / "run", resume=True, **options)
    assert [record.trace for record in resumed.records] == [record.trace for record in whole.records]


@pytest.mark.parametrize("optimizer", ["zo-gd", "zo-adam", "gd"])
def test_a_probe_in_half_precision_has_the_threshold_of_float32(optimizer):
    options = {"optimizer": optimizer, "steps": 5, "replicas": 2, "device": "cpu", "ratios": (0.5,), "method": "dense"}
    expected = zoscope.probe(zoscope.Problem(network(), data(), plain), **options)
    found = zoscope.probe(zoscope.Problem(network(), data(), plain), dtype="bfloat16", **options)
    # The parameters are those of the runs, which bfloat16 has moved by 0.4 %.
    assert found.threshold.value == pytest.approx(expected.threshold.value, rel=0.05)
    assert found.dtype == "bfloat16"
    assert "half-precision" in {notice.code for notice in found.warnings}


def test_a_monitor_of_a_live_half_precision_model_measures_in_float32():
    model = network(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    problem = zoscope.Problem(model, data(torch.bfloat16), plain)
    for dtype in ("auto", "bfloat16"):
        monitor = zoscope.StabilityMonitor(problem, optimizer, every=1, dtype=dtype, device="cpu", method="dense")
        plain(model, data(torch.bfloat16)[0]).backward()
        optimizer.step()
        record = monitor.step()
        wide = zoscope.StabilityMonitor(
            zoscope.Problem(model.float(), data(), plain), "gd", every=1, device="cpu", method="dense"
        )
        wide.step(lr=1e-3)
        model.to(torch.bfloat16)
        assert record.precision == 0
        assert math.isfinite(record.trace)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "kind", [pruned, nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_networks_that_compute_their_weights_are_copied(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(nn.Linear(4, 5)), nn.Tanh(), kind(nn.Linear(5, 2))).eval()
    x = torch.randn(8, 4)
    model.seen = {"outputs": [model(x)]}  # a graph of an earlier pass, kept for some reason
    problem = zoscope.Problem.from_criterion(model, [(x, torch.randn(8, 2))], nn.MSELoss())
    single, double = (zoscope.bounds(problem, optimizers=["gd"], dtype=d, device="cpu") for d in ("float32", "float64"))
    assert double.dtype == "float64"
    traces = [result.curvature["hessian"].trace.value for result in (single, double)]
    assert traces[0] == pytest.approx(traces[1], rel=1e-3, abs=1e-3)


def test_expanded_parameters_are_refused_with_the_reason():
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 3).expand(2, 3))

        def forward(self, x):
            return x @ self.weight.T

    problem = zoscope.Problem.from_criterion(Expanded(), [(torch.ones(4, 3), torch.ones(4, 2))], nn.MSELoss())
    for curvature in ("hessian", "forward"):
        with pytest.raises(zoscope.SpecError, match=r"'weight' share memory \(it is expanded"):
            zoscope.bounds(problem, curvature=curvature, device="cpu")


class RoundedProduct(torch.autograd.Function):
    """As int8 layers multiply: rows of inputs are rounded, and gradients pass that by."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        unit = x.abs().amax(-1, keepdim=True) / 127
        return (x / unit).round() @ weight.T.float() * unit * scale

    @staticmethod
    def backward(ctx, slope):
        weight, scale = ctx.saved_tensors
        return (slope * scale) @ weight.float(), None, None


class Linear8bit(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        full = torch.randn(outputs, inputs)
        self.register_buffer("scale", full.abs().amax(1) / 127)
        rounded = (full / self.scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        return RoundedProduct.apply(x, self.weight, self.scale) + self.up(self.down(x))


def test_adapters_on_a_quantised_base_are_measured_by_forward_passes_alone():
    torch.manual_seed(0)
    model = nn.Sequential(Linear8bit(4, 6), nn.Tanh(), Linear8bit(6, 2))
    problem = zoscope.Problem.from_criterion(model, [(torch.randn(16, 4), torch.randn(16, 2))], nn.MSELoss())
    found = zoscope.bounds(problem, curvature="forward", device="cpu")
    assert found.problem.num_params == 4 * 2 + 2 * 6 + 6 * 2 + 2 * 2
    assert found.forward.trace.stderr > 0
    for curvature in ("hessian", "ggn"):
        with pytest.raises(SpecError, match=r"Linear8bit '0' are quantised \(int8\).*--curvature forward"):
            zoscope.bounds(problem, curvature=curvature, device="cpu")
