"""Reading listings: loops, loads, products and spills in machine code that is written here by hand."""

import pytest

from sparc.codegen.triton.sass import (
    begins,
    copies,
    load_kinds,
    memory_width,
    parse_ptx,
    parse_sass,
    product_kinds,
    spilled_bytes,
)

# Two loops over tiles and over K within it, a loop that waits, one more after them, and the trap behind the end.
NESTED = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_3:
        /*0010*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R27+0x800], desc[UR14][R4.64] ;
        /*0030*/              @!P0 LDG.E.U16.CONSTANT R5, desc[UR14][R4.64] ;
.L_x_2:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   HGMMA.64x16x16.F32 R24, R4, gdesc[UR4], R24 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0090*/              @!P2 BRA `(.L_x_3) ;
.L_x_4:
        /*00a0*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*00b0*/                   MOV R9, R8 ;
        /*00c0*/                   MOV R9, R8 ;
        /*00d0*/                   MOV R9, R8 ;
        /*00e0*/                   MOV R9, R8 ;
        /*00f0*/                   MOV R9, R8 ;
        /*0100*/                   MOV R9, R8 ;
        /*0110*/               @P1 BRA `(.L_x_4) ;
        /*0120*/               @P1 BRA `(.L_x_5) ;
        /*0130*/                   STL.64 [R1], R2 ;
        /*0140*/                   LDL R2, [R1+0x8] ;
.L_x_5:
        /*0150*/                   EXIT ;
.L_x_6:
        /*0160*/                   BRA `(.L_x_6);
        /*0170*/                   NOP;
"""
PTX = """
.visible .entry kernel(.param .u64 x)
{
	ld.param.b64 	%rd1, [kernel_param_0];
$L__BB0_1:                              // a loop
	// begin inline asm
	mov.u64 %rd2, 0x0; @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	// end inline asm
	cp.async.cg.shared.global [ %r16 + 0 ], [ %rd4 + 0 ], 0x10, %r17;
	cp.async.commit_group;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%f1}, %rd3, 0, 1, 1, 0, 0;
	wgmma.wait_group.sync.aligned 0;
	@%p2 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_3;
$L__BB0_3:
	ret;
}
"""


def test_the_main_loop_is_the_innermost_that_multiplies() -> None:
    loop = parse_sass(NESTED).main_loop()
    assert " ".join(each.opcode.split(".")[0] for each in loop) == "LDGSTS LDG SYNCS BRA HGMMA WARPGROUP BRA"
    assert load_kinds(loop) == {"LDGSTS.128": 1, "LDG.16": 1}
    assert product_kinds(loop) == {"HGMMA": 1}


def test_loads_are_those_of_the_main_loop_or_all_where_it_has_none() -> None:
    assert parse_sass(NESTED).loads() == {"LDGSTS.128": 1, "LDG.16": 1}
    specialised = NESTED.replace("LDGSTS.E.BYPASS.LTC128B.128", "LDS.128").replace("LDG.E.U16.CONSTANT", "LDS.U16")
    assert parse_sass(specialised).loads() == {"LDG.64": 1, "LDG.128": 1}


def test_without_products_it_is_the_longest_that_loads() -> None:
    loop = parse_sass(NESTED.replace("HGMMA", "FADD")).main_loop()
    assert [each.opcode for each in loop] == ["LDG.E.128", *["MOV"] * 6, "BRA"]


def test_code_without_a_loop_has_no_main_loop() -> None:
    listing = parse_sass("        /*0000*/  LDG.E R2, [R2] ;\n        /*0010*/  @P1 BRA `(.L_x_1) ;\n.L_x_1:\n")
    assert len(listing.instructions) == 2
    assert listing.main_loop() == ()


def test_ptx_is_read_statement_by_statement() -> None:
    loop = parse_ptx(PTX).main_loop()
    assert [each.opcode for each in loop if each.is_load] == ["ld.global.v4.b32", "cp.async.cg.shared.global"]
    assert [each.opcode for each in loop if each.is_product] == ["wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16"]


def test_copies_are_told_by_loads_and_without_them_by_products() -> None:
    virtual = parse_ptx(PTX).main_loop()
    loop = parse_sass(NESTED).main_loop()
    assert copies(loop, virtual) == 1
    assert copies(loop * 4, virtual) == 4
    products = [each for each in loop if each.is_product]
    assert copies(products * 3, virtual) == 3
    assert copies((), virtual) == 1


def test_spills_are_the_bytes_to_and_from_local_memory() -> None:
    assert spilled_bytes(parse_sass(NESTED).instructions) == 8 + 4


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E", 4),
        ("LDG.E.U8", 1),
        ("LDG.E.S16.CONSTANT", 2),
        ("LDG.E.EF.64", 8),
        ("LDGSTS.E.BYPASS.LTC128B.64", 8),
        ("LDG.E.128", 16),
        ("LDG.E.ENL2.256", 32),
        ("UTMALDG.2D", 16),
    ],
)
def test_widths_are_read_from_the_modifiers(opcode: str, width: int) -> None:
    assert memory_width(opcode) == width


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32", {"HMMA": 1}),
        ("HMMA.SP.16832.F32", {"HMMA.SP": 1}),
        ("IMMA.16832.S8.S8", {"IMMA": 1}),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", {"QGMMA": 1}),
        ("UTCHMMA", {"UTCHMMA": 1}),
        ("HFMA2.MMA", {}),
    ],
)
def test_products_are_named_by_kind(opcode: str, kind: dict[str, int]) -> None:
    assert product_kinds(parse_sass(f"        /*0000*/  {opcode} R2, R2, R2, R2 ;").instructions) == kind


def test_an_opcode_begins_with_whole_parts() -> None:
    assert begins("I2F.U16", "I2F")
    assert begins("HMMA.SP", "HMMA.SP")
    assert not begins("I2FP.F32.S32", "I2F")
    assert not begins("HMMA", "HMMA.SP")
