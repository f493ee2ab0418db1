"""What this machine gives: processors, memory, GPU, disk, locks, and what all that is enough for."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sdxl_sae_kit.amounts import human_bytes
from sdxl_sae_kit.artifacts import STORE_VARIABLE
from sdxl_sae_kit.health import Check

GB = 10**9
NOTEBOOKS_MEMORY = 3 * GB
"""What notebooks of the small model want, with room for JupyterLab."""
NOTEBOOKS_DISK = GB
"""The store of all notebooks at scale demo takes 0.3 GB."""
SDXL_DISK, SDXL_GPU, SDXL_CPU, SDXL_CPU_HALF = 7 * GB, 9 * GB, 16 * GB, 9 * GB
"""3.5 billion parameters in 2 bytes, on a CPU in 4 unless told otherwise, and room for one image at 512 px."""
SHARED_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "sshfs", "afs", "lustre", "gpfs", "beegfs", "ceph")
"""How the kinds of filesystems begin that several machines may have mounted, those of FUSE without `fuse.`."""
_ELSEWHERE = f"Choose a folder on a local disk with store= or the variable {STORE_VARIABLE}."


# Processors and memory ----------------------------------------------------------------------------------------------


def count_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity, or less where its control group says so."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        cpus = min(cpus, max(1, round(_share(folder) or cpus)))
    return cpus


def _share(folder: Path) -> float | None:
    """The processors' time that a control group may take, in processors; None where it has no limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # the other version's files, or "max", which is no limit
            continue
        return quota / period if quota > 0 else None  # -1 is no limit either
    return None


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: what the system has to give, or less where its control group says so."""
    left = [_left(folder) for folder in _control_groups(root, "memory")]
    return min([_free(root), *(n for n in left if n is not None)])


def _free(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # macOS, where all there is can be had back from caches
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _left(folder: Path) -> int | None:
    """What a control group's limit leaves; file caches are given back when memory is short."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(entries.get(cached, 0))
            return int((folder / limit).read_text()) - taken
        except (OSError, ValueError):  # the other version's files, or "max", which is no limit
            continue
    return None


def _control_groups(root: Path, controller: str) -> Sequence[Path]:
    """Folders of the control groups this process is in, of version 2 and of one controller of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for _, names, path in (line.split(":", 2) for line in lines):
        if not names or controller in names.split(","):
            mount = root / "sys/fs/cgroup" / (controller if names else "")
            inner = mount / path.lstrip("/")
            folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount)]
    return folders


def check_memory() -> Check:
    """Whether the notebooks' kernels would live."""
    free = available_memory()
    found = f"{human_bytes(free)} available"
    if free >= NOTEBOOKS_MEMORY:
        return Check("memory", "ok", found)
    remedy = f"Close other programs or kernels: with less than {human_bytes(NOTEBOOKS_MEMORY)} a kernel may be killed."
    return Check("memory", "warning", found, remedy)


def check_threads() -> Check:
    """Whether torch starts more threads than there are processors, which makes it wait for itself."""
    import torch

    threads, cpus = torch.get_num_threads(), count_cpus()
    found = f"torch uses {threads} of {cpus} available" if threads <= cpus else f"torch uses {threads}, {cpus} are had"
    if threads <= cpus:
        return Check("CPU threads", "ok", found)
    return Check("CPU threads", "warning", found, f"Set the variable OMP_NUM_THREADS={cpus} before Python starts.")


# GPU ----------------------------------------------------------------------------------------------------------------


def check_device(driver: Path = Path("/proc/driver/nvidia/version")) -> Check:
    """Which device the kit takes unless told otherwise, and whether it works."""
    import torch

    if count := torch.cuda.device_count():
        return _check_cuda(count)
    if torch.backends.mps.is_available():
        return Check("device", "ok", f"mps, torch {torch.__version__}")
    found = f"cpu, torch {torch.__version__}"
    if not driver.exists():
        return Check("device", "ok", found)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.split(",")[0].strip() in ("", "-1"):
        found = f"{found}, and CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU"
        return Check("device", "warning", found, "Unset the variable CUDA_VISIBLE_DEVICES to use a GPU.")
    why = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
    remedy = "Install PyPI's torch, which carries CUDA, or, if it does, update the NVIDIA driver."
    return Check("device", "warning", f"{found} {why} and sees no GPU, though there is an NVIDIA driver", remedy)


def _check_cuda(count: int) -> Check:
    import torch

    named = []
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        half = "with" if about.major >= 8 else "without"
        named.append(
            f"cuda:{index} {about.name}, {human_bytes(about.total_memory)}, compute capability "
            f"{about.major}.{about.minor}, {half} bfloat16"
        )
    found = f"{'; '.join(named)}; torch {torch.__version__}"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as cause:
        said = str(cause).splitlines()[0]
        remedy = 'Install a torch build for this GPU (pytorch.org lists them), or pass device="cpu".'
        return Check("device", "fails", f"{found}; it does not compute: {said}", remedy)
    return Check("device", "ok", found)


# Disk ---------------------------------------------------------------------------------------------------------------


def check_disk(store: Path) -> Check:
    """Whether the notebooks' artifacts fit."""
    free = shutil.disk_usage(existing(store)).free
    found = f"{human_bytes(free)} free at {store}"
    if free >= NOTEBOOKS_DISK:
        return Check("disk", "ok", found)
    return Check("disk", "warning", found, f"Make room, or choose another folder with store= or {STORE_VARIABLE}.")


def check_store(store: Path, mounts: Path = Path("/proc/self/mountinfo")) -> Sequence[Check]:
    """Whether artifacts can be written there, keep other writers out, and hold HDF5."""
    try:
        with tempfile.TemporaryDirectory(prefix=".checked-", dir=existing(store)) as folder:
            kind = filesystem(store, mounts)
            return [
                Check("store", "ok", f"{store} can be written{f' ({kind})' if kind else ''}"),
                _check_locks(Path(folder), kind),
                _check_hdf5(Path(folder)),
            ]
    except OSError as cause:
        return [Check("store", "fails", f"{store} cannot be written ({cause.strerror})", _ELSEWHERE)]


def existing(path: Path) -> Path:
    """The nearest folder on the way to a path that is there already."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def filesystem(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of filesystem a path is on, such as ext4 or nfs4; empty where the system does not say."""
    try:
        lines = [line.split(" - ") for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    kinds = {Path(left.split()[4].replace("\\040", " ")): right.split()[0] for left, right in lines}
    return next((kinds[folder] for folder in (path, *path.parents) if folder in kinds), "")


def _check_locks(folder: Path, kind: str) -> Check:
    try:
        excluded = excludes(folder / "lock")
    except OSError as cause:
        return Check("locks", "fails", f"flock does not work on {kind or 'this disk'} ({cause.strerror})", _ELSEWHERE)
    if not excluded:
        remedy = f"Let one process at a time write to this store. {_ELSEWHERE}"
        return Check("locks", "warning", f"on {kind or 'this disk'} locks do not keep other writers out", remedy)
    if kind.removeprefix("fuse.").startswith(SHARED_FILESYSTEMS):
        found = f"on {kind} locks may not keep out other machines' writers: not where it is mounted with localflock"
        remedy = f"Let one machine at a time write to this store. {_ELSEWHERE}"
        return Check("locks", "warning", found, remedy)
    return Check("locks", "ok", "flock keeps a second writer out")


def excludes(file: Path) -> bool:
    """Whether a second lock of a file is refused while the first is held."""
    with open(file, "a") as first, open(file, "a") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _check_hdf5(folder: Path) -> Check:
    try:
        import h5py

        with h5py.File(folder / "written.h5", "w") as file:
            file.create_dataset("numbers", data=[1, 2, 3], chunks=(3,), fletcher32=True)
        with h5py.File(folder / "written.h5", "r") as file:
            same = file["numbers"][:].tolist() == [1, 2, 3]
    except (ImportError, OSError) as cause:
        remedy = "Install h5py again (pip install --force-reinstall h5py), and look whether the disk is full."
        return Check("HDF5", "fails", f"cannot be written and read: {str(cause).splitlines()[0]}", remedy)
    if (locking := os.environ.get("HDF5_USE_FILE_LOCKING", "")).upper() in ("FALSE", "0"):
        found = f"HDF5_USE_FILE_LOCKING={locking} lets a second writer in"
        return Check("HDF5", "warning", found, "Unset the variable HDF5_USE_FILE_LOCKING.")
    found = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}: what was written can be read"
    return Check("HDF5", "ok" if same else "fails", found, "" if same else "Replace the disk: it returns other data.")


# The real model -----------------------------------------------------------------------------------------------------


def check_real_model(hub: Path, offline: bool) -> Check:
    """Whether SDXL Turbo would load and draw here."""
    weights = hub / "models--stabilityai--sdxl-turbo"
    present = any(weights.glob("snapshots/*/unet/*.safetensors"))
    free = shutil.disk_usage(existing(hub)).free
    remedies = []
    if not present and offline:
        remedies.append("Unset HF_HUB_OFFLINE once, to download the weights.")
    if not present and free < SDXL_DISK:
        remedies.append(f"Set HF_HOME to a folder with {human_bytes(SDXL_DISK)} free for the weights.")
    device, room = _room()
    if room < (SDXL_CPU if device == "cpu" else SDXL_GPU):
        remedies.append(_make_room(device))
    where = f"weights in {hub}" if present else f"no weights yet; they take 7 GB, {human_bytes(free)} free at {hub}"
    found = f"{where}; {human_bytes(room)} of memory on {device}"
    return Check("stabilityai/sdxl-turbo", "warning" if remedies else "ok", found, " ".join(remedies))


def _room() -> tuple[str, int]:
    """The device a model would go to, and the memory it has left."""
    import torch

    if torch.cuda.device_count():
        return "cuda", int(torch.cuda.mem_get_info(0)[0])
    return "mps" if torch.backends.mps.is_available() else "cpu", available_memory()


def _make_room(device: str) -> str:
    if device == "cpu":
        return (
            f"Use a GPU with {human_bytes(SDXL_GPU)} free, or a machine with {human_bytes(SDXL_CPU)} of memory free "
            f'({human_bytes(SDXL_CPU_HALF)} with load_pipeline(…, dtype="bfloat16")).'
        )
    return f"Free memory of the GPU: float16 weights and one image want {human_bytes(SDXL_GPU)}."
