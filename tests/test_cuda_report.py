"""The parts of tools/cuda_report.py that need neither nvcc nor the simulator."""

from __future__ import annotations

import re
import sys

import cuda_sim
import pytest

ROOT = cuda_sim.ROOT
if not (ROOT / "tools").exists():
    pytest.skip("not a source tree", allow_module_level=True)
sys.path.append(str(ROOT / "tools"))

import cuda_calls  # noqa: E402
import cuda_families  # noqa: E402
import cuda_occupancy  # noqa: E402
import cuda_report  # noqa: E402
import cuda_sass  # noqa: E402
from cuda_occupancy import A100, H100, Launch  # noqa: E402
from cuda_sass import Kernel  # noqa: E402

# A loop over heads (.L_x_1), with a product of its own, around the main loop (.L_x_2), which code behind the end
# rejoins (.L_x_5); then a loop of narrow tiles (.L_x_6).
SASS = """
	.section	.text._Z4loopv,"ax",@progbits
.text._Z4loopv:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/              @!P2 BRA `(.L_x_4) ;
.L_x_5:
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
.L_x_6:
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0090*/                   BRA P3, `(.L_x_6) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   MUFU.EX2 R3, R3 ;
        /*00c0*/                   BRA `(.L_x_5) ;
.L_x_7:
        /*00d0*/                   BRA `(.L_x_7);
"""


def test_main_loop() -> None:
    (sass,) = cuda_sass.read_sass(SASS).values()
    assert len(sass) == 14
    assert cuda_sass.loops(sass, "HMMA") == [range(2, 7), range(1, 8), range(8, 10)]
    loop = cuda_sass.main_loop(sass)
    assert loop == range(2, 7)
    assert cuda_sass.grouped(sass, loop) == {"HMMA": 2, "branches": 3}


def test_first_of_equal_loops_is_the_main_one() -> None:
    (sass,) = cuda_sass.read_sass(SASS.replace("HMMA.16816.F32.BF16 R4, R8, R12, R4", "NOP")).values()
    assert cuda_sass.main_loop(sass) == range(2, 7)


def test_loop_with_few_products_is_a_part_of_the_main_one() -> None:
    outside = "        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;\n"
    (sass,) = cuda_sass.read_sass(SASS.replace(".L_x_2:\n", 4 * outside + ".L_x_2:\n")).values()
    assert cuda_sass.main_loop(sass) == range(1, 12)  # 7 products, 2 of them in the inner loop


def test_kernel_without_products_has_no_main_loop() -> None:
    (sass,) = cuda_sass.read_sass(SASS.replace("HMMA", "FFMA")).values()
    assert cuda_sass.main_loop(sass) is None


@pytest.mark.parametrize(
    ("line", "group"),
    [
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "moves"),
        ("IMAD.WIDE R20, R35, c[0x0][0x218], R20", "addresses"),
        ("UIADD3 UR4, UR4, 0x1, URZ", "addresses"),
        ("LDGSTS.E.BYPASS.128 [R210+0x6800], [R22.64], P3", "copies"),
        ("LDGDEPBAR", "waits"),
        ("LDG.E R21, [R28.64]", "memory"),
        ("LDSM.16.MT88.4 R100, [R197+0x6000]", "fragments"),
        ("F2FP.BF16.PACK_AB R8, R9, R8", "conversions"),
        ("FSETP.NEU.AND P2, PT, R227.reuse, -INF , PT", "floats"),
        ("ISETP.GE.AND P3, PT, R226, R5, PT", "predicates"),
        ("HADD2.F32 R3, -RZ, R3.H0_H0", "conversions"),
        ("QUX R1", "unknown"),
    ],
)
def test_groups(line: str, group: str) -> None:
    (instruction,) = cuda_sass.instructions(f"        /*0010*/                   {line} ;\n")
    assert cuda_sass.group_of(instruction) == group


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("BRA `(.L_x_1)", True),
        ("@P0 BRA `(.L_x_1)", False),
        ("BRA !P3, `(.L_x_1)", False),
        ("BRA.DIV ~URZ, `(.L_x_1)", False),
        ("CALL.REL.NOINC `(.L_x_1)", False),
        ("EXIT", True),
        ("@!P1 EXIT", False),
        ("RET.REL.NODEC R4", True),
    ],
)
def test_what_is_run_next(line: str, ends: bool) -> None:
    (instruction,) = cuda_sass.instructions(f"        /*0010*/                   {line} ;\n")
    assert instruction.ends == ends


def test_counts() -> None:
    lines = ["LDG.E.128.CONSTANT R4, [R2.64]", "LDG.E.64 R4, [R2.64]", "STS.128 [R4], R8", "LDSM.16.M88.4 R24, [R205]"]
    sass = cuda_sass.instructions("".join(f"        /*0010*/  {line} ;\n" for line in lines))
    assert cuda_sass.counted(sass) == {"LDG.128": 1, "other": 1, "STS": 1, "LDSM": 1}


def test_ptxas() -> None:
    log = """[1/2] Building CUDA object a.cu.o
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 448 bytes cmem[0]
ptxas info    : Compile time = 60.703 ms
ptxas info    : Compiling entry function '_Z1av' for 'sm_100'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 0 barriers
"""
    assert cuda_sass.read_ptxas(log) == {
        ("_Z1av", "sm_80"): cuda_sass.Resources(255, 12, 1024),
        ("_Z1av", "sm_100"): cuda_sass.Resources(96, 0, 0),
    }


def test_names() -> None:
    space = "x_rope_cls::cuda::"
    name = (
        f"void {space}(anonymous namespace)::plain_kernel<__nv_bfloat16, ({space}(anonymous namespace)::Sum)2, (int)64>"
    )
    short = cuda_sass.shorten(f"{name}({space}Launch)", {"Sum": ["kQueries", "kKeys", "kValues"]})
    assert short == "plain_kernel<bf16, kValues, 64>"
    assert (Kernel(short).family, Kernel(short).arguments) == ("plain_kernel", ("bf16", "kValues", "64"))
    assert cuda_sass.enumerators()["MmaSum"] == ["kQueries", "kKeysValues", "kKeys", "kValues"]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "a100", "h100"),
    [  # by cuda_occupancy.h of CUDA 13.0
        (32, 256, 0, 8, 8),
        (33, 256, 0, 6, 6),
        (24, 160, 0, 12, 12),
        (192, 160, 0, 1, 1),
        (168, 128, 0, 3, 3),
        (169, 128, 0, 2, 2),
        (255, 256, 0, 1, 1),
        (255, 512, 0, 0, 0),
        (64, 1024, 0, 1, 1),
        (16, 32, 0, 32, 32),
        (32, 128, 49152, 3, 4),
        (128, 128, 65536, 2, 3),
        (32, 128, 16385, 9, 13),
        (16, 64, 164096, 1, 1),
    ],
)
def test_resident_blocks(registers: int, threads: int, shared: int, a100: int, h100: int) -> None:
    assert cuda_occupancy.resident_blocks(A100, registers, threads, shared) == a100
    assert cuda_occupancy.resident_blocks(H100, registers, threads, shared) == h100


def test_flash_shared_memory() -> None:
    """In KiB, as comments beside FlashAttention-2's launches say."""
    forward, backward = cuda_occupancy.FLASH_FORWARD, cuda_occupancy.FLASH_BACKWARD
    assert (forward[256]["A100"].shared, forward[256]["H100"].shared) == (128 * 1024, 96 * 1024)
    assert backward[32]["A100"].shared == 96 * 1024
    assert backward[96]["A100"].shared == 92 * 1024
    assert cuda_occupancy.FLASH_BACKWARD_DROPOUT[32]["A100"].shared == 104 * 1024
    assert cuda_occupancy.FLASH_BACKWARD_DROPOUT[96]["A100"].shared == 116 * 1024
    assert (backward[256]["A100"].shared, backward[256]["H100"].shared) == (144 * 1024, 176 * 1024)


@pytest.mark.parametrize(
    ("registers", "launch", "verdict"),
    [
        (250, Launch(128, 32768), "equal"),
        (128, Launch(128, 32768), "more warps"),
        (250, Launch(128, 131072), "fewer warps"),
        (250, Launch(256, 32768), "equal warps in fewer blocks"),
        (250, Launch(64, 32768), "equal warps in more blocks"),
    ],
)
def test_comparison(registers: int, launch: Launch, verdict: str) -> None:
    flash = cuda_occupancy.FLASH_FORWARD[64]["A100"]
    assert flash.blocks(A100) == (2, 2)
    assert cuda_occupancy.Comparison(A100, registers, launch, flash).verdict == verdict


def test_rows_with_a_verdict() -> None:
    rows: list[list[object]] = [
        ["a", 1, "equal"],
        ["b", 1, "A100: equal, H100: equal warps in fewer blocks"],
        ["c", 1, "equal warps in fewer blocks"],
    ]
    assert cuda_report.rows_with(rows, "fewer blocks") == ["b on H100", "c"]
    assert cuda_report.rows_with(rows, "fewer warps") == []


def test_instances_that_differ_in_types_share_a_row() -> None:
    kernels = [Kernel(f"a_kernel<{name}>") for name in ("fp16, 256", "bf16, 256", "bf16, 32", "float, 32")]
    kernels += [Kernel("b_kernel<float, float>"), Kernel("b_kernel<double, double>"), Kernel("order_kernel")]
    rows = cuda_report.joined((kernel, [1, 2] if "32" in kernel.name else [1, 3]) for kernel in kernels)
    assert rows == [
        ["`a_kernel<bf16/float, 32>`", 1, 2],
        ["`a_kernel<bf16/fp16, 256>`", 1, 3],
        ["`b_kernel<float, float>`", 1, 3],
        ["`b_kernel<double, double>`", 1, 3],
        ["`order_kernel`", 1, 3],
    ]


def test_every_kernel_has_a_reason() -> None:
    sources = (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu*")
    text = "\n".join(path.read_text() for path in sources)
    kernels = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text))
    assert kernels == set(cuda_families.FAMILIES)


def test_families() -> None:
    types = ("bf16", "fp16", "float", "double")
    kernels = [Kernel(f"simple_sums_kernel<{name}, {sums}>") for name in types for sums in (2, 1)]
    kernels += [Kernel(name) for name in cuda_families.FAMILIES if name != "simple_sums_kernel"]
    for kernel in kernels[8:]:
        kernel.name += f"<{', '.join('x' for _ in cuda_families.FAMILIES[kernel.name].reasons)}>"
    rows = {str(name).partition(":")[0]: (count, why) for name, count, why in cuda_families.family_rows(kernels)}
    count, why = rows["`simple_sums_kernel`"]
    assert count == 8
    assert str(why).startswith("bf16, fp16, float, double: type of the elements, all four<br>1, 2: sums at a time")
    with pytest.raises(AssertionError, match="new_kernel"):
        cuda_families.family_rows([*kernels, Kernel("new_kernel<float>")])


def test_least_work_is_that_of_the_products() -> None:
    """The estimate and the count of mma instructions must speak of the same products."""
    forward = cuda_calls.attention_work(1, 1, 1024, 64, backward=False)
    assert sum(work.flops for work in forward) == 4096 * cuda_calls.attention_call("rotate", 0, False).mma
    # The scores and their gradients are computed twice, for dQ and for dK and dV; at 256 channels the scores thrice.
    for head_dim, products in (64, 7), (256, 8):
        backward = cuda_calls.attention_work(1, 1, 1024, head_dim, backward=True)
        least = cuda_calls.attention_call("rotate", 0, True, head_dim).mma / 7
        assert sum(work.flops for work in backward) == 4096 * least * products
    assert cuda_calls.Work("a", 312e6, 1.0).time(312e12, 2e12) == pytest.approx(1.0)
    assert cuda_calls.Work("a", 0, 4e6).time(312e12, 2e12) == pytest.approx(2.0)


def test_page() -> None:
    page = "# Title\n<!-- a -->\n<!-- end -->\n<!-- b -->\nold\n<!-- end -->\nrest\n"
    filled = cuda_report.filled(cuda_report.filled(page, "a", "new\\1"), "b", "more")
    assert filled == "# Title\n<!-- a -->\nnew\\1\n<!-- end -->\n<!-- b -->\nmore\n<!-- end -->\nrest\n"
    with pytest.raises(AssertionError, match="one place for c, got 0"):
        cuda_report.filled(page, "c", "")
