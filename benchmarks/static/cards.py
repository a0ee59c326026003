"""Public figures of the GPUs that the kernels are compiled for, and how many programs of a kernel one processor holds.

Nothing here was measured by us. "Processor" is a streaming multiprocessor (NVIDIA) or a compute unit (AMD).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Card:
    """One GPU.

    target              what Triton compiles for: (backend, architecture, threads of a warp)
    processors          number of processors
    ghz                 boost clock
    half_tflops         dense bfloat16 products with float32 sums, peak
    float32_tflops      float32 fused multiply-adds, peak
    terabytes_per_s     memory bandwidth, peak
    registers           32-bit registers of a processor, and the most that one thread may have
    max_warps           most resident warps of a processor
    shared              shared memory of a processor, the most that one program may have, and what each program costs
                        beyond its own (bytes)
    exp2_per_clock      exponentials that a processor does in a clock
    source              where the figures are from
    """

    name: str
    target: tuple[str, int | str, int]
    processors: int
    ghz: float
    half_tflops: float
    float32_tflops: float
    terabytes_per_s: float
    max_warps: int
    shared_of_processor: int
    shared_limit: int
    shared_overhead: int
    source: str
    registers: int = 65_536
    # Four units of 4 lanes on NVIDIA; a quarter of the rate of other vector operations, four units of 16, on AMD.
    exp2_per_clock: int = 16

    def clocks_of_half(self, flops: float) -> float:
        """Clocks of one processor for matrix products of bfloat16 or float16."""
        return flops * self.processors * self.ghz / (1e3 * self.half_tflops)

    def clocks_of_float32(self, flops: float) -> float:
        """Clocks of one processor for float32 operations; a multiply-add counts two."""
        return flops * self.processors * self.ghz / (1e3 * self.float32_tflops)


CARDS = {
    "sm_80": Card(
        name="A100 80GB SXM",
        target=("cuda", 80, 32),
        processors=108,
        ghz=1.41,
        half_tflops=312.0,
        float32_tflops=19.5,
        terabytes_per_s=2.039,
        max_warps=64,
        shared_of_processor=164 * KIB,
        shared_limit=163 * KIB,
        shared_overhead=KIB,
        source="NVIDIA A100 80GB datasheet; CUDA C++ programming guide, compute capability 8.0",
    ),
    "sm_90": Card(
        name="H100 SXM",
        target=("cuda", 90, 32),
        processors=132,
        ghz=1.83,
        half_tflops=989.4,
        float32_tflops=66.9,
        terabytes_per_s=3.35,
        max_warps=64,
        shared_of_processor=228 * KIB,
        shared_limit=227 * KIB,
        shared_overhead=KIB,
        source="NVIDIA H100 GPU architecture whitepaper; CUDA C++ programming guide, compute capability 9.0",
    ),
    "sm_100": Card(
        name="B200",
        target=("cuda", 100, 32),
        processors=148,
        ghz=1.85,
        half_tflops=2_250.0,
        float32_tflops=75.0,
        terabytes_per_s=8.0,
        max_warps=64,
        shared_of_processor=228 * KIB,
        shared_limit=227 * KIB,
        shared_overhead=KIB,
        source="NVIDIA DGX B200 datasheet, an eighth of it; CUDA C++ programming guide, compute capability 10.0",
    ),
    "gfx942": Card(
        name="MI300X",
        target=("hip", "gfx942", 64),
        processors=304,
        ghz=2.1,
        half_tflops=1_307.4,
        float32_tflops=163.4,
        terabytes_per_s=5.3,
        max_warps=32,
        shared_of_processor=64 * KIB,
        shared_limit=64 * KIB,
        shared_overhead=0,
        source="AMD Instinct MI300X datasheet; AMD CDNA 3 architecture whitepaper",
        registers=131_072,
    ),
    "gfx950": Card(
        name="MI355X",
        target=("hip", "gfx950", 64),
        processors=256,
        ghz=2.4,
        half_tflops=2_516.6,
        float32_tflops=157.3,
        terabytes_per_s=8.0,
        max_warps=32,
        shared_of_processor=160 * KIB,
        shared_limit=160 * KIB,
        shared_overhead=0,
        source="AMD Instinct MI355X datasheet; AMD CDNA 4 architecture whitepaper",
        registers=131_072,
    ),
    "default": Card(
        name="RTX 4090",
        target=("cuda", 89, 32),
        processors=128,
        ghz=2.52,
        half_tflops=165.2,
        float32_tflops=82.6,
        terabytes_per_s=1.008,
        max_warps=48,
        shared_of_processor=100 * KIB,
        shared_limit=99 * KIB,
        shared_overhead=KIB,
        source="NVIDIA Ada GPU architecture whitepaper; CUDA C++ programming guide, compute capability 8.9",
    ),
}


def resident_programs(card: Card, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> int:
    """How many programs of a kernel one processor holds at a time; 0 where not even one fits.

    Args:
        registers: of a thread, as compiled. shared: bytes of a program. tensor_memory: columns, of 512 (sm_100).
    """
    warp = card.target[2]
    granted = -(-max(registers, 1) // 8) * 8
    # Registers belong to the four schedulers of a processor, warps are dealt out to these.
    warps = 4 * min(card.registers // 4 // (granted * warp), card.max_warps // 4)
    bounds = [warps // num_warps, 32]
    if shared > card.shared_limit:
        return 0
    if shared:
        bounds.append(card.shared_of_processor // (shared + card.shared_overhead))
    if tensor_memory:
        bounds.append(512 // tensor_memory)
    return min(bounds)
