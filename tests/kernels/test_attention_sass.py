"""The reading of machine code: loops, and what is in them."""

from __future__ import annotations

import pytest
from attention_sass import Loop, Usage, innermost_loops, matrix_loops, read_usage

LISTING = """
        .section        .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @P0  BRA `(.L_x_2) ;
        /*0020*/                   STL [R1], R2 ;
.L_x_0:
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0050*/                   LDL R3, [R1+0x4] ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   STL [R1], R2 ;
        /*0090*/             @!UP0 BRA.U `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   WARPSYNC.ALL ;
.L_x_3:
        /*00b0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00c0*/               @P2 BRA P3, `(.L_x_3) ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
"""


def test_only_innermost_loops_count() -> None:
    assert innermost_loops(LISTING) == [
        Loop(begin=4, end=7, matrix=2, local=1),
        Loop(begin=11, end=12, matrix=0, local=0),
    ]


def test_the_number_of_loops_is_held_to() -> None:
    assert matrix_loops(LISTING, 1) == [Loop(4, 7, 2, 1)]
    with pytest.raises(ValueError, match="1 loops with matrix instructions, not 2"):
        matrix_loops(LISTING, 2)


def test_hopper_and_blackwell_have_matrix_instructions_too() -> None:
    for name in ("HGMMA.64x64x16.F32.BF16", "UTCHMMA"):
        listing = LISTING.replace("HMMA.16816.F32.BF16", name)
        assert matrix_loops(listing, 1)[0].matrix == 2


@pytest.mark.parametrize(
    ("listing", "what"),
    [
        ("", "no instruction"),
        (LISTING.replace("`(.L_x_1)", "`(.L_x_9)"), "no known label"),
    ],
)
def test_what_is_not_understood_is_an_error(listing: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        innermost_loops(listing)


def test_the_assembler_says_what_it_used() -> None:
    text = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
    0 bytes stack frame, 104 bytes spill stores, 108 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers"""
    assert read_usage(text) == Usage(168, 104, 108)
    assert read_usage(text).spilled == 212
    with pytest.raises(ValueError, match="0 times"):
        read_usage(text.replace("spill loads", ""))
