"""Blocks per multiprocessor from registers, shared memory and threads; and FlashAttention-2's beside ours.

The limits are those of the CUDA programming guide. FlashAttention-2's block sizes are those that its launchers
(csrc/flash_attn/src/flash_fwd_launch_template.h, flash_bwd_launch_template.h, shared memory by kernel_traits.h) choose;
what its kernels need of registers is not published, so bounds are given.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor, and of the whole chip by its data sheet."""

    name: str
    architecture: str
    shared: int  # bytes a multiprocessor has
    bfloat16_flops: float  # dense, on tensor cores, a second
    bandwidth: float  # of the memory, bytes a second


A100 = Chip("A100", "sm_80", 164 * 1024, 312e12, 2.039e12)  # 80 GB SXM
H100 = Chip("H100", "sm_90", 228 * 1024, 989e12, 3.35e12)  # SXM
CHIPS = (A100, H100)

WARPS, BLOCKS, QUARTERS = 64, 32, 4  # of a multiprocessor: most warps and blocks, schedulers
QUARTER_REGISTERS = 16384
RESERVED = 1024  # bytes of shared memory of each block that the system takes
MOST_REGISTERS = 255  # of a thread


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


def resident_blocks(chip: Chip, registers: int, threads: int, shared: int) -> int:
    """As cuda_occupancy.h of the CUDA toolkit has it.

    A warp takes registers in portions of 256 out of its scheduler's; shared memory comes in portions of 128 bytes.
    """
    warps = -(-threads // 32)
    of_warp = max(round_up(registers * 32, 256), 256)
    by_registers = QUARTER_REGISTERS // of_warp * QUARTERS // warps
    return min(by_registers, WARPS // warps, chip.shared // (round_up(shared, 128) + RESERVED), BLOCKS)


# ---- FlashAttention-2 ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Flash:
    """A kernel of FlashAttention-2, in half precision."""

    head_dim: int
    queries: int  # of a block's tile
    keys: int
    warps: int
    shared: int
    accumulators: int  # registers of a thread that sums of products take

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    def blocks(self, chip: Chip) -> tuple[int, int]:
        """If a thread had the most registers there are, and if it had but its sums and one address."""
        least = resident_blocks(chip, MOST_REGISTERS, self.threads, self.shared)
        return least, resident_blocks(chip, self.accumulators + 2, self.threads, self.shared)


def flash_forward(head_dim: int, queries: int, keys: int, warps: int) -> Flash:
    """Queries, one tile of keys and one of values; sums of the output and the scores, maximum and sum of the rows."""
    shared = 2 * head_dim * (queries + 2 * keys)
    rows_of_thread = queries // (8 * warps)
    accumulators = queries * (head_dim + keys) // (32 * warps) + 2 * rows_of_thread
    return Flash(head_dim, queries, keys, warps, shared, accumulators)


def flash_backward(
    head_dim: int, queries: int, keys: int, *, values_in_registers: bool = False, two_stages: bool = True
) -> Flash:
    """Q twice (once: not `two_stages`) and dO; K, V and two tiles of scores, some of it in the room of V."""
    queries_and_grads = 2 * head_dim * queries * (3 if two_stages else 2)
    both = 2 * 2 * head_dim * keys
    scores = 2 * 2 * queries * keys
    rest = max(both, both // 2 + scores) if values_in_registers else both + scores
    # dK and dV throughout; S and dP at a time.
    accumulators = 2 * keys * (head_dim + queries) // 256
    return Flash(head_dim, queries, keys, 8, queries_and_grads + rest, accumulators)


def on_both(kernel: Flash) -> dict[str, Flash]:
    return {chip.name: kernel for chip in CHIPS}


# Without and, where it differs, with dropout.
FLASH_FORWARD = {
    32: on_both(flash_forward(32, 128, 128, 4)),
    64: on_both(flash_forward(64, 128, 128, 4)),
    96: on_both(flash_forward(96, 128, 64, 4)),
    128: on_both(flash_forward(128, 128, 64, 4)),
    256: {"A100": flash_forward(256, 128, 64, 8), "H100": flash_forward(256, 64, 64, 4)},
}
FLASH_FORWARD_DROPOUT = FLASH_FORWARD | {
    64: on_both(flash_forward(64, 128, 64, 4)),
    128: on_both(flash_forward(128, 128, 32, 4)),
}
FLASH_BACKWARD = {
    32: on_both(flash_backward(32, 128, 128, values_in_registers=True)),
    64: on_both(flash_backward(64, 128, 128)),
    96: on_both(flash_backward(96, 64, 128, values_in_registers=True)),
    128: on_both(flash_backward(128, 64, 128)),
    256: {"A100": flash_backward(256, 64, 64, two_stages=False), "H100": flash_backward(256, 64, 64)},
}
FLASH_BACKWARD_DROPOUT = FLASH_BACKWARD | {
    32: on_both(flash_backward(32, 128, 128)),
    96: on_both(flash_backward(96, 64, 128)),
}


# ---- ours beside it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """As the launcher starts a kernel."""

    threads: int
    shared: int  # static and dynamic, bytes


@dataclass(frozen=True)
class Comparison:
    """One of our kernels beside FlashAttention-2's on one chip."""

    chip: Chip
    registers: int
    launch: Launch
    flash: Flash

    @property
    def blocks(self) -> int:
        """Ours, of a multiprocessor."""
        return resident_blocks(self.chip, self.registers, self.launch.threads, self.launch.shared)

    @property
    def verdict(self) -> str:
        """Resident warps beside FlashAttention-2's, then blocks."""
        least, most = self.flash.blocks(self.chip)
        warps = self.blocks * self.launch.threads // 32
        if warps < least * self.flash.warps:
            return "fewer warps"
        if warps > most * self.flash.warps:
            return "more warps"
        if least != most:
            return "within its bounds"
        if self.blocks == least:
            return "equal"
        return f"equal warps in {'more' if self.blocks > least else 'fewer'} blocks"

    def cells(self) -> list[object]:
        """Ours and FlashAttention-2's."""
        least, most = self.flash.blocks(self.chip)
        blocks = str(least) if least == most else f"{least} to {most}"
        ours = f"{self.blocks} x {self.launch.threads // 32} ({self.registers}, {kib(self.launch.shared)} KiB)"
        tile = f"{self.flash.queries} x {self.flash.keys}"
        return [ours, f"{blocks} x {self.flash.warps} ({tile}, {kib(self.flash.shared)} KiB)"]


def kib(size: int) -> str:
    return f"{size / 1024:.2f}".rstrip("0").rstrip(".")


def comparison_row(registers: dict[str, int], launch: Launch, flash: dict[str, Flash]) -> list[object]:
    """Cells of one kernel: both chips, then the verdict. `registers`: by architecture."""
    found = [Comparison(chip, registers[chip.architecture], launch, flash[chip.name]) for chip in CHIPS]
    verdicts = [f"{c.chip.name}: {c.verdict}" for c in found]
    verdict = found[0].verdict if len({c.verdict for c in found}) == 1 else ", ".join(verdicts)
    return [*(cell for c in found for cell in c.cells()), verdict]
