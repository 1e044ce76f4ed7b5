from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    flags: dict[str, str]
    torch: str
    cpu_isas_built: list[str]
    cpu_isas_supported: list[str]
    cpu_isa: str
    cpu_isa_warning: str
    cuda_architectures: list[str] | None
    cuda_reason: str

class Limits(TypedDict):
    threads: int
    fma_float32_gflops: float
    dot_bfloat16_gflops: float | None
    dot_int16_gflops: float | None
    copy_gbs: float
    read_gbs: float

class MachineLimits(TypedDict):
    cpu_isa: str
    one_thread: Limits
    all_threads: Limits

def build_info() -> BuildInfo: ...
def cache_bytes() -> int: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def measure_limits(seconds: float = ..., threads: int = ...) -> MachineLimits: ...
