"""What benchmarks.static.aot reads from machine code: loops, opcodes, and a kernel that is known to spill."""

from __future__ import annotations

from benchmarks.static.aot import Case, _loops, _opcodes, reports
from benchmarks.static.configs import faults

# Two loops, the inner one with products; a block that was moved behind the end branches back, and is no loop.
NVIDIA = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_9:
        /*00a0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/                   BRA `(.L_x_3) ;
"""
AMD = """
_kernel:
; %bb.0:
        s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
        global_load_dwordx4 v[0:3], v4, s[0:1]
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        s_cbranch_scc1 .LBB0_1
; %bb.2:
        global_load_dword v0, v4, s[0:1]
        s_endpgm
"""


def test_loops_are_those_that_come_back_to_their_head() -> None:
    inner, outer = sorted((body.splitlines() for body in _loops(NVIDIA)), key=len)
    assert [line.split()[1] for line in inner][:2] == ["LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16"]
    assert len(inner) == 4
    assert len(outer) == 6
    assert [len(body.splitlines()) for body in _loops(AMD)] == [3]
    assert _loops("        /*0000*/ EXIT ;") == []


def test_opcodes_are_counted_in_the_kernel_and_in_its_hot_loop() -> None:
    found = _opcodes(NVIDIA, "HGMMA|HMMA", r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128|UTMALDG")
    assert found == {
        "tensor_core": 2, "tensor_core_opcodes": "HMMA", "hot_loop_instructions": 4, "hot_loop_tensor_core": 2,
        "hot_loop_wide_loads": 1, "wide_loads": 2,
    }  # fmt: skip
    without = _opcodes(NVIDIA, "HGMMA", r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128")
    assert (without["hot_loop_instructions"], without["hot_loop_wide_loads"]) == (6, 2), "the outer loop"
    amd = _opcodes(AMD, r"v_mfma_\w*(?:bf16|f16)\w*", r"(?:global|buffer)_load_dwordx4")
    assert (amd["hot_loop_tensor_core"], amd["hot_loop_wide_loads"], amd["hot_loop_instructions"]) == (1, 1, 3)
    assert amd["tensor_core_opcodes"] == "v_mfma_f32_32x32x8_bf16_1k"


def test_a_kernel_with_too_large_tiles_is_refused() -> None:
    """The four products of the backward for 64 keys of 128 channels are more than the registers of four warps hold."""
    config = (("BLOCK_Q", 32), ("BLOCK_K", 64), ("num_warps", 4), ("num_stages", 2))
    [[report]] = reports([Case("ragged_attention", "grad_key_value", "default", "bfloat16", 128, 128, config)])
    assert [why.split()[0] for why in faults(report)] == ["stack", "spills"], report
