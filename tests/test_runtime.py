"""Devices, generators, switches, memory."""

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zoscope import UsageError, runtime

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")


def test_auto_is_cuda_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert runtime.resolve_device("auto").type == expected
    assert runtime.resolve_device(torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "mps", "cpu:0"])
def test_unknown_devices_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        runtime.resolve_device(name)


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_device_names_the_remedy(name: str) -> None:
    with pytest.raises(UsageError, match=rf"--device {name} was asked for.*--device cpu"):
        runtime.resolve_device(name)


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_index_that_does_not_exist_is_a_usage_error() -> None:
    assert runtime.resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UsageError, match="cuda:99 does not exist"):
        runtime.resolve_device("cuda:99")


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float64, torch.float64),
        ("auto", torch.bfloat16, torch.float32),
        ("auto", torch.float16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_auto_dtype_is_the_models_own_but_never_half(name: Any, own: torch.dtype, expected: torch.dtype) -> None:
    assert runtime.resolve_dtype(name, nn.Linear(2, 2, dtype=own)) == expected


def test_unknown_dtypes_are_usage_errors() -> None:
    for name in ("double", "int8", torch.int32):
        with pytest.raises(UsageError, match=r"--dtype .* is not known"):
            runtime.resolve_dtype(name, nn.Linear(2, 2))


def test_spawned_generators_are_reproducible_and_distinct() -> None:
    first, again, other = (runtime.spawn_generators(seed, 3, "cpu") for seed in (0, 0, 1))
    draws = [[torch.rand(4, generator=g).tolist() for g in generators] for generators in (first, again, other)]
    assert draws[0] == draws[1]
    assert len({tuple(row) for row in draws[0] + draws[2]}) == 6


def test_spawning_more_generators_keeps_the_first_ones() -> None:
    two, five = runtime.spawn_generators(7, 2), runtime.spawn_generators(7, 5)
    assert [g.initial_seed() for g in two] == [g.initial_seed() for g in five[:2]]


def switches() -> dict[str, Any]:
    b: Any = torch.backends

    def older(read: Any) -> Any:
        try:
            return read()
        except RuntimeError:
            return "inconsistent"

    return {
        "precision": [
            op.fp32_precision for op in (b, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)
        ],
        "older": [older(torch.get_float32_matmul_precision), older(lambda: b.cudnn.allow_tf32)],
        "cudnn": b.cudnn.enabled,
        "sdpa": [b.cuda.flash_sdp_enabled(), b.cuda.mem_efficient_sdp_enabled(), b.cuda.math_sdp_enabled()],
        "mha": b.mha.get_fastpath_enabled(),
    }


def set_nothing() -> None:
    pass


def set_high() -> None:
    torch.set_float32_matmul_precision("high")


def set_medium() -> None:
    torch.set_float32_matmul_precision("medium")


def set_cudnn_off() -> None:
    torch.backends.cudnn.allow_tf32 = False


def set_conv_alone() -> None:
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = "ieee"


@pytest.fixture
def default_switches() -> Any:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    backends: Any = torch.backends
    backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("change", [set_nothing, set_high, set_medium, set_cudnn_off, set_conv_alone])
def test_switches_are_set_inside_and_restored_after(default_switches: None, change: Any) -> None:
    change()
    before = switches()
    with contextlib.suppress(KeyError), runtime.second_order_mode(nn.LSTM(2, 2)):
        inside = switches()
        assert inside["precision"][1:] == ["ieee"] * 5
        assert inside["older"] == ["highest", False]
        assert inside["sdpa"] == [False, False, True]
        assert not inside["mha"]
        assert inside["cudnn"]
        raise KeyError  # an error inside must not leave a switch behind
    assert switches() == before


def test_cudnn_is_off_inside_recurrent_layers_only() -> None:
    seen = []

    class Watching(nn.LSTM):
        def forward(self, *args: Any) -> Any:  # type: ignore[override]
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(*args)

    model = nn.Sequential(Watching(2, 2))
    with runtime.second_order_mode(model):
        model(torch.zeros(3, 2))
        seen.append(torch.backends.cudnn.enabled)
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 5))
        seen.append(torch.backends.cudnn.enabled)
    model(torch.zeros(3, 2))
    assert seen == [False, True, False, True, True]


@pytest.mark.gpu
@needs_cuda
def test_matrix_products_are_exact_to_float32_inside(default_switches: None) -> None:
    set_high()
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).cuda()
    exact = a.double() @ a.double()
    with runtime.second_order_mode(nn.Linear(1, 1)):
        error = ((a @ a).double() - exact).norm() / exact.norm()
    assert error < 1e-6


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error: BaseException, expected: bool) -> None:
    assert runtime.is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert runtime.is_out_of_memory(caught.value)


def test_available_memory_is_a_sane_number_of_bytes() -> None:
    assert 2**20 < runtime.available_memory("cpu") < 2**50


def test_the_fingerprint_of_generators_tells_a_draw() -> None:
    for draw in (torch.rand, np.random.rand, lambda n: random.random()):
        with runtime.preserved_rng():
            before = runtime.rng_fingerprint()
            assert runtime.rng_fingerprint() == before
            draw(1)
            assert runtime.rng_fingerprint() != before


def test_small_problems_run_on_one_thread_and_give_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with runtime.threads_for(1000):
            assert torch.get_num_threads() == 1
        with runtime.threads_for(10**9):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
