"""`ddpm-ema doctor`: does what a run does (allocates, reduces, writes, syncs, renames), and says what fails and what to do.

Exit code 0: fit to train, perhaps with warnings; 2: a check failed. Takes seconds, and some hundred MB of each GPU.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ddpm_ema.capabilities import cpp_compiler
from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DONE

MIB = 2**20
GIB = 2**30
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
CACHES = ("HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")
SLOW_MIB_PER_SECOND = 20


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was tried, how it went, and what to do about a problem."""

    level: Literal["ok", "warning", "failure"]
    subject: str
    text: str


ok = functools.partial(Finding, "ok")
warning = functools.partial(Finding, "warning")
failure = functools.partial(Finding, "failure")


def check_packages() -> Iterator[Finding]:
    """Versions of the required packages. A missing one of `train` is a failure, of `score` a warning."""
    found = [f"python {sys.version.split()[0]}"]
    missing: dict[str, list[str]] = {"train": [], "score": []}
    for line in importlib.metadata.requires("ddpm_ema") or ():
        name, extra = re.split(r"[^\w.-]", line)[0], re.search(r"extra == .(\w+)", line)
        needed_by = extra[1] if extra else "train"
        if name == "ddpm_ema" or needed_by not in missing:
            continue
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing[needed_by].append(name)
    yield ok("versions", ", ".join(found))
    for needed_by, report in (("train", failure), ("score", warning)):
        if names := ", ".join(missing[needed_by]):
            yield report("packages", f"not installed: {names}; pip install 'ddpm_ema[{needed_by}]'")


def check_device(wanted: str) -> Iterator[Finding]:
    """A matrix product on every device. CUDA that is present but unusable is a failure, not a silent run on CPU."""
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        yield from (_check_gpu(index) for index in range(torch.cuda.device_count()))
        return
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
    if wanted == "cuda" or (wanted == "auto" and driver):
        torch_is = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'}) sees no CUDA device"
        driver_is = "though a driver is loaded" if driver else "and no driver is loaded"
        yield failure("device", f"{torch_is}, {driver_is}; give the container its GPUs, or update the driver")
        return
    cores = f"{len(os.sched_getaffinity(0))} cores allowed, {torch.get_num_threads()} threads"
    yield ok("device", f"cpu, {cores}, {torch.backends.cpu.get_cpu_capability()}")


def _check_gpu(index: int) -> Finding:
    import torch

    gpu = torch.cuda.get_device_properties(index)
    ones = torch.ones(64, 64, device=f"cuda:{index}")
    free, total = torch.cuda.mem_get_info(index)
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    text = f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}, bf16 {torch.cuda.is_bf16_supported(including_emulation=False)}"
    if bool((ones @ ones != 64).any()):
        return failure(f"cuda:{index}", f"{text}: a product of ones is wrong; take this GPU out of service")
    return ok(f"cuda:{index}", text)


def check_communication() -> Iterator[Finding]:
    """An all-reduce in a group of one over gloo, and over NCCL with a GPU; the network interfaces that are set."""
    import torch
    import torch.distributed as dist

    yield from _check_interfaces()
    if not dist.is_available():
        yield failure("gloo", "this torch is built without torch.distributed: several processes cannot run")
        return
    yield _all_reduce("gloo", torch.device("cpu"))
    if torch.cuda.is_available() and dist.is_nccl_available():
        yield _all_reduce("nccl", torch.device("cuda", 0))
    else:
        yield ok("nccl", "built in, unused without a GPU" if dist.is_nccl_available() else "not built in")


def _all_reduce(backend: str, device: object) -> Finding:
    import torch
    import torch.distributed as dist

    version = ".".join(map(str, torch.cuda.nccl.version())) + ", " if backend == "nccl" else ""  # type: ignore[no-untyped-call]
    try:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
            ones = torch.ones(1024, device=device)  # type: ignore[call-overload]
            dist.all_reduce(ones)
            total = float(ones.sum())
            dist.destroy_process_group()
    except RuntimeError as error:
        hint = f"{backend.upper()}_SOCKET_IFNAME names the interface to use"
        return failure(backend, f"{version}all-reduce failed: {str(error).splitlines()[0]}; {hint}")
    report = ok if total == 1024 else failure
    return report(backend, f"{version}an all-reduce of 1024 ones in a group of one gives {total:g}")


def _check_interfaces() -> Iterator[Finding]:
    present = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted.startswith("^"):  # NCCL: all but these
            continue
        exact = variable.startswith("GLOO") or wanted.startswith("=")  # otherwise NCCL takes prefixes
        names = [name.lstrip("=") for name in wanted.split(",") if name]
        gone = [n for n in names if not any(have == n or (not exact and have.startswith(n)) for have in present)]
        if gone:
            yield failure(variable, f"names {', '.join(gone)}, but there are {', '.join(present)}; use one of these")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        hint = "several nodes then need GLOO_SOCKET_IFNAME, or the name in /etc/hosts"
        yield warning("host name", f"{socket.gethostname()!r} does not resolve; {hint}")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """NCCL exchanges data through /dev/shm, which has 64 MiB in a container by default."""
    try:
        usage = shutil.disk_usage(path)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * MIB)
            file.flush()
    except OSError as error:
        yield failure("shared memory", f"{path} cannot be written: {error.strerror}; mount a tmpfs there")
        return
    text = f"{path}: {usage.free / MIB:,.0f} of {usage.total / MIB:,.0f} MiB free"
    hint = "several GPUs want 1 GiB (--shm-size 1g, or an emptyDir in memory)"
    yield warning("shared memory", f"{text}; {hint}") if usage.free < GIB else ok("shared memory", text)


def check_compiler() -> Iterator[Finding]:
    """torch.compile needs a C++ compiler on CPU; on CUDA, Triton needs a C compiler and Python's headers."""
    compiler = cpp_compiler() or ""
    lacking = [] if compiler else ["C++ compiler"]
    lacking += [] if Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h"]
    hint = "keep training.compile and evaluation.compile off, or install g++ and python3-dev"
    yield warning("compiler", f"no {' and '.join(lacking)}: {hint}") if lacking else ok("compiler", compiler)


def check_output(folder: Path, megabytes: int = 64) -> Iterator[Finding]:
    """Writes, syncs and renames as a checkpoint does; measures MiB/s to stable storage."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            partial, whole = Path(scratch, "partial"), Path(scratch, "whole")
            chunk = os.urandom(MIB)
            start = time.perf_counter()
            with partial.open("wb") as file:
                for _ in range(megabytes):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(whole)
            speed = megabytes / (time.perf_counter() - start)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        hint = "choose another --output-dir, or give the folder to this user"
        yield failure("output folder", f"user {os.getuid()} cannot write {folder}: {error.strerror}; {hint}")
        return
    text = f"{folder}: {speed:,.0f} MiB/s written and synced, {free / GIB:,.1f} GiB free"
    hints = ["slow: save less often (checkpoints.every)"] if speed < SLOW_MIB_PER_SECOND else []
    hints += ["a run keeps at least two checkpoints, each with all averages"] if free < GIB else []
    yield warning("output folder", "; ".join([text, *hints])) if hints else ok("output folder", text)


def check_caches() -> Iterator[Finding]:
    """The cache folders of libraries must be writable by this user; says whether downloads are off."""
    folders = {name: os.environ[name] for name in CACHES if os.environ.get(name)} or {"HOME": str(Path.home())}
    bad = [f"{name}={folder}" for name, folder in folders.items() if not _writable(Path(folder))]
    refusal = f"user {os.getuid()} cannot write {', '.join(bad)}; point them at a writable folder"
    yield failure("caches", refusal) if bad else ok("caches", ", ".join(sorted(set(folders.values()))))
    off = [name for name in OFFLINE_SWITCHES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    yield ok("downloads", f"off ({', '.join(off)})" if off else "allowed; HF_HUB_OFFLINE=1 switches them off")


def _writable(folder: Path) -> bool:
    """Whether a file can be made in the folder, or in its nearest existing parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def examine(output_dir: Path, device: str = "auto") -> Iterator[Finding]:
    """Runs every check. An unexpected error in one is a failure of that check; the others still run."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": check_packages,
        "device": lambda: check_device(device),
        "communication": check_communication,
        "shared memory": check_shared_memory,
        "compiler": check_compiler,
        "caches": check_caches,
        "output folder": lambda: check_output(output_dir),
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # a broken driver raises anything
            yield failure(subject, f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    parser = argparse.ArgumentParser("ddpm-ema doctor", description="Checks whether this machine or image can train.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="folder of the runs; made if missing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: fail without one")
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    findings = list(examine(options.output_dir, options.device))
    bad = {"failure", "warning"} if options.strict else {"failure"}
    problems = sum(finding.level in bad for finding in findings)
    if options.json:
        print(json.dumps({"fit": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:<8} {finding.subject}: {finding.text}")
        print(f"not fit to train: {problems} of {len(findings)} findings are bad" if problems else "fit to train")
    return EXIT_BAD_INPUT if problems else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
