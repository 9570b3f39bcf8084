"""The table of time by kernel class, from traces whose every interval is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.report import kernel_classes as classes
from nemo_bench.report import profile as step_profile
from nemo_bench.report.profile import StepProfile, from_dict, measure

from ..traces import ADAM, ADD, ALL_GATHER, COPY, GEMM, kernel, launched, mark, text, write

STEP = step_profile.STEP_MARK


def times(profile: StepProfile) -> dict[str, tuple[float, float, float]]:
    """Class -> counted microseconds, summed microseconds, kernels, of all steps together."""
    steps = len(profile.steps)
    return {
        each.name: (round(each.ms * 1e3 * steps, 6), round(each.total_ms * 1e3 * steps, 6), each.count * steps)
        for each in profile.classes
    }


def test_means_over_the_steps_and_nothing_of_what_lies_between(tmp_path: Path) -> None:
    events = [
        mark(f"{STEP}10", 0, 100),
        mark(f"{STEP}11", 200, 400),
        kernel(GEMM, 50, 60),
        kernel(GEMM, 120, 180),  # between the steps
        kernel(ADD, 190, 210),  # began before the step: its part of the time counts, in the step that it began in not
        kernel(GEMM, 300, 330),
    ]
    profile = measure(write(tmp_path / "t.json", events), 3)
    assert (profile.rank, profile.device, profile.steps) == (3, "NVIDIA H200", (10, 11))
    assert profile.step_ms == pytest.approx(0.150)
    assert times(profile) == {classes.GEMM: (40, 40, 2), classes.ELEMENTWISE: (10, 10, 0)}
    assert profile.idle_ms == pytest.approx((300 - 50) / 2 / 1e3)


def test_what_the_optimizer_launches_is_the_optimizers(tmp_path: Path) -> None:
    events = [
        mark(f"{STEP}3", 0, 100),
        mark(step_profile.OPTIMIZER_MARK, 50, 60),
        launched(1, 20),
        launched(2, 55),
        launched(3, 56),
        kernel(ADD, 60, 65, launch=1),  # queued before, though it ran after
        kernel(ADD, 65, 75, launch=2),
        kernel(ALL_GATHER, 75, 80, launch=3),  # of the parameters: communication all the same
        kernel(ADAM, 80, 90, launch=99),  # by its name, its launch being unknown
    ]
    assert times(measure(write(tmp_path / "t.json", events), 3)) == {
        classes.ELEMENTWISE: (5, 5, 1),
        classes.OPTIMIZER: (20, 20, 2),
        classes.COMMUNICATION: (5, 5, 1),
    }


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([GEMM, ADD, ALL_GATHER, COPY]), st.integers(0, 45), st.integers(1, 20)), min_size=1
    )
)
def test_every_instant_counts_once(tmp_path_factory: pytest.TempPathFactory, work: list[tuple[str, int, int]]) -> None:
    """Against counting microsecond by microsecond."""
    path = tmp_path_factory.mktemp("trace") / "t.json"
    kernels = [kernel(name, begin, begin + length, stream=at) for at, (name, begin, length) in enumerate(work)]
    profile = measure(write(path, [mark(f"{STEP}0", 5, 50), *kernels]), 3)
    order = list(classes.CLASSES)
    expected: dict[str | None, int] = {}
    communicating = 0
    for moment in range(5, 50):
        running = {classes.kernel_class(name) for name, begin, length in work if begin <= moment < begin + length}
        first = min(running, key=order.index) if running else None
        expected[first] = expected.get(first, 0) + 1
        communicating += classes.COMMUNICATION in running
    assert profile.idle_ms * 1e3 == pytest.approx(expected.pop(None, 0))
    assert profile.exposed_communication_ms * 1e3 == pytest.approx(expected.get(classes.COMMUNICATION, 0))
    assert {name: microseconds for name, (microseconds, _, _) in times(profile).items() if microseconds} == expected
    assert profile.communication_ms * 1e3 == pytest.approx(communicating)
    assert sum(each.ms for each in profile.classes) + profile.idle_ms == pytest.approx(profile.step_ms)


# Names that several patterns match, or that are like names of another class.
KERNELS = {
    classes.GEMM: [
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int>>>(X)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>(X)",
    ],
    classes.ATTENTION: [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>(X)",
        "void scaled_upper_triang_masked_softmax_warp_forward<__half>(X)",
    ],
    classes.NORMALISATION: ["triton_red_fused__to_copy_add_rms_norm_0"],
    classes.CAST: [
        "void transformer_engine::transpose::cast_transpose_general_kernel<16, 8, __nv_bfloat16>(X)",
        "void transformer_engine::delayed_scaling_recipe::amax_and_scale_update_impl::kernel_bulk(X)",
        "void transformer_engine::multi_tensor_swizzle_row_scaling_kernel<4, 32, 1>(X)",
        "void transformer_engine::HadamardAmaxTmaKernel<X, 16>(X)",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(X)>(int)",
    ],
    classes.ACTIVATION: ["void transformer_engine::gated_act_kernel<8, float, transformer_engine::Empty, &silu>(X)"],
    classes.ELEMENTWISE: ["void at::native::unrolled_elementwise_kernel<X, at::native::memory::LoadWithCast<1>>(int)"],
    classes.OPTIMIZER: ["void multi_tensor_apply_kernel<2, L2NormFunctor<float>, float*>(long)"],
    classes.COMMUNICATION: [
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void userbuffers_fp16_sum_inplace_gpu_rr_rs_oop<8>(X)",
        "consumer_kernel(void*, int)",
        "Memcpy PtoP (Device -> Device)",
    ],
    classes.MEMORY: ["Memset (Device)"],
    classes.OTHER: ["void somebodys_own_thing<3>(X)"],
}


@pytest.mark.parametrize(("expected", "names"), KERNELS.items())
def test_kernels_are_classified_by_name(expected: str, names: list[str]) -> None:
    assert {name: classes.kernel_class(name) for name in names} == dict.fromkeys(names, expected)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void somebodys_own_thing<(int)4>(int, float*)", "somebodys_own_thing<(int)4>"),  # in a class by no pattern
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<X, 2u>(X, int)", "CatArrayBatchedCopy<X, 2u>"),
        ("nvjet_" + "x" * 100, "nvjet_" + "x" * 71 + "..."),
    ],
)
def test_kernels_are_listed_by_short_names(tmp_path: Path, name: str, short: str) -> None:
    events = [mark(f"{STEP}1", 0, 100), kernel(name, 0, 10)]
    profile = measure(write(tmp_path / "t.json", events), 3)
    assert profile.classes[0].top[0].name == short
    assert from_dict(json.loads(json.dumps(asdict(profile)))) == profile


def test_a_trace_is_read_whatever_the_profiler_writes(tmp_path: Path) -> None:
    # The last name looks like the end of an event and the beginning of another.
    names = [GEMM, ADD, 'void at::native::elementwise_kernel<{lambda(int)#1}, {lambda(int)#2}, "}, {">(int)']
    kernels = [kernel(names[at % 3], 10 * at, 10 * at + 5) for at in range(300)]
    content = text([mark(f"{STEP}1", 0, 3000), *kernels]).encode().replace(b"nvjet", b"nvjet\xff", 1)
    content = content.replace(b'"context": 1', b'"context": inf', 5).replace(b'"context": 1', b'"context": ', 5)
    (tmp_path / "t.json").write_bytes(content)
    profile = measure(tmp_path / "t.json", 0)
    assert times(profile) == {classes.GEMM: (500, 500, 100), classes.ELEMENTWISE: (1000, 1000, 200)}


def test_a_trace_of_no_gpu_has_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no GPU kernels"):
        measure(write(tmp_path / "t.json", [mark(f"{STEP}1", 0, 1)]), 0)
