"""What this machine is: the table of the first lesson, and whether bfloat16 pays off."""

import platform

import psutil
import torch
import transformers


def native_bfloat16(device: torch.device | str) -> bool:
    """Return whether `device` computes in bfloat16 itself.

    Elsewhere it is emulated: right, but slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu":
        able = torch.cpu.get_capabilities()
        return able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return False


def gpu_name() -> str | None:
    """Return the GPUs and their memory in words, or None on a machine without."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return f"{torch.cuda.device_count()} x {gpu.name}, {_gigabytes(gpu.total_memory)}"
    if torch.backends.mps.is_available():
        return "Apple, memory shared with the processor"
    return None


def hardware_table() -> list[tuple[str, str]]:
    """Return (name, value) rows that say what computes here, and nothing about whose it is."""
    processor = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    native = " and ".join(device for device in devices if native_bfloat16(device))
    return [
        ("System", f"{platform.system()} {platform.machine()}"),
        ("Processor", f"{processor}, {cores} cores"),
        ("Memory", _gigabytes(psutil.virtual_memory().total)),
        ("GPU", gpu_name() or "none"),
        ("Native bfloat16", native or "no, so float32 is faster"),
        ("Python", platform.python_version()),
        ("PyTorch", torch.__version__),
        ("Transformers", transformers.__version__),
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.0f} GB"
