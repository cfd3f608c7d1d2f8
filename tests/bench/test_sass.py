# SPDX-License-Identifier: Apache-2.0
"""Loops and issued instructions are read from the text of machine code, without compiling anything."""

from __future__ import annotations

import pytest

from bench import sass
from bench.sass import Bound

# 5 instructions that are reached once, 3 of the outer loop, 4 of the inner; an endless loop behind the end, and padding
NESTED = """
.text._kernel:
        /*0000*/                   MOV R0, RZ ;
        /*0010*/                   ISETP.GE.AND P0, PT, R9, 0x1, PT ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0030*/                   MOV R1, RZ ;
.L_x_1:
        /*0040*/                   LDG.E R4, desc[UR4][R2.64+0x10] ;
        /*0050*/                   VIADD R1, R1, 0x80 ;
        /*0060*/                   ISETP.GE.AND P1, PT, R1.reuse, R8, PT ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   UIADD3 UR5, UR5, 0x10, URZ ;
        /*0090*/                   UISETP.GE.AND UP0, UPT, UR5, UR6, UPT ;
        /*00a0*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*00b0*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*00c0*/                   NOP ;
        /*00d0*/               @P2 EXIT ;
        /*00e0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   BRA `(.L_x_3);
        /*0110*/                   NOP;
.L_x_4:
"""
# counts down by four iterations in 64 bits, then one by one
COUNT_DOWN = """
.L_x_0:
        /*0000*/                   IADD3 R24, P1, R24, -0x4, RZ ;
        /*0010*/                   FADD R4, R4, R5 ;
        /*0020*/                   IADD3.X R26, R26, -0x1, RZ, P1, !PT ;
        /*0030*/                   ISETP.GT.U32.AND P1, PT, R24, 0x3, PT ;
        /*0040*/                   ISETP.GT.AND.EX P1, PT, R26, RZ, PT, P1 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   IADD3 R24, R24, 0xffffffff, RZ ;
        /*0070*/                   ISETP.NE.AND P0, PT, R24, RZ, PT ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""
# sm_80 leaves a loop by a call that never comes back; the slow path of a division does come back
CALLS = """
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x20, RZ ;
        /*0010*/               @P2 CALL.REL.NOINC `(.L_x_2) ;
        /*0020*/                   ISETP.GE.AND P0, PT, R1, c[0x0][0x168], PT ;
        /*0030*/               @P0 CALL.REL.NOINC `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   MUFU.RCP R4, R4 ;
        /*0070*/                   RET.REL.NODEC R2 `(_kernel) ;
"""


def test_nested_loops_are_counted_by_their_trips():
    found = sass.loops(NESTED)
    assert found == sass.Loop(6, 0, [sass.Loop(5, 16, [sass.Loop(4, 128, [])])])
    # 128 at a time where the source takes 32: four iterations in one
    assert sass.issued(found, [Bound(5, 16, (Bound(8, 32),))]) == 6 + 5 * (5 + 8 / 4 * 4)
    assert sass.issued(found, [Bound(5, 16, (Bound(8, 128),))]) == 6 + 5 * (5 + 8 * 4)
    assert sass.registers(NESTED) == 10


def test_a_loop_for_what_is_left_over_belongs_to_the_one_before():
    found = sass.loops(COUNT_DOWN)
    assert found == sass.Loop(1, 0, [sass.Loop(6, 4, []), sass.Loop(3, 1, [])])
    assert sass.issued(found, [Bound(10, 1)]) == 1 + 10 / 4 * 6 + 10 % 4 * 3
    assert sass.issued(found, [Bound(10, 1), Bound(7, 1)]) == 1 + 10 / 4 * 6 + 7 * 3


def test_a_call_is_a_way_out_where_nothing_comes_back():
    assert sass.loops(CALLS) == sass.Loop(1, 0, [sass.Loop(5, 32, [])])


def test_a_loop_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="^sass: loops are missing; expected at least 2, got 1"):
        sass.issued(sass.loops(NESTED), [Bound(5, 16), Bound(5, 16)])
    with pytest.raises(RuntimeError, match="^sass: the text has no instructions"):
        sass.loops("\n")
