"""The doctor says what is wrong, on machines that are made up, and of each finding what to do."""

import json
import re
import sys
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch
from bs4 import BeautifulSoup

import sdxl_sae_kit as kit
from sdxl_sae_kit import installation, machine, printing
from sdxl_sae_kit.health import Check, Diagnosis, look
from sdxl_sae_kit.tiny import WEIGHTS

ROOT = Path(__file__).parent.parent
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def files(tmp_path):
    """Writes files, named by path, into a made-up root."""

    def write(**contents):
        for name, text in contents.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def assert_says_what_to_do(check, *words):
    assert check.state != "ok" and check.found
    assert re.match(r"(Run|If wanted|[A-Z][a-z]+)\b", check.remedy) and len(check.remedy.split()) > 2
    for word in words:
        assert word in check.remedy + check.found, check


def test_whatever_this_machine_is_it_is_looked_at_whole(tmp_path):
    """The only test here that depends on the machine, so it asks for no state of any check."""
    diagnosis = kit.diagnose(tmp_path / "store")
    assert str(diagnosis).endswith(diagnosis.summary)
    assert all(check.remedy for check in diagnosis.checks if check.state != "ok")
    assert not list(tmp_path.iterdir()), "nothing is left behind, and no store is made"
    names = [check.name for check in diagnosis.checks]
    assert len(names) == len(set(names)) and {"Python", "packages", "device", "memory", "store"} <= set(names)


@pytest.fixture
def probes(monkeypatch):
    """Every check of a diagnosis, made up to be ok."""
    for module in (installation, machine):
        for name in (name for name in vars(module) if name.startswith("check_")):
            monkeypatch.setattr(module, name, lambda *_, name=name: Check(name, "ok", "made up"))


def test_a_diagnosis_is_healthy_unless_a_check_fails(probes, monkeypatch, tmp_path):
    assert kit.diagnose(tmp_path).healthy and {check.state for check in kit.diagnose(tmp_path).checks} == {"ok"}
    monkeypatch.setattr(machine, "check_memory", lambda: Check("memory", "warning", "little", "Close programs."))
    assert kit.diagnose(tmp_path).healthy and kit.diagnose(tmp_path).count("warning") == 1
    monkeypatch.setattr(installation, "check_packages", lambda: 1 / 0)
    assert not kit.diagnose(tmp_path).healthy and kit.diagnose(tmp_path).count("fails") == 1


def test_a_diagnosis_is_text_html_and_json():
    diagnosis = Diagnosis(
        (Check("one", "ok", "<b>"), Check("two", "fails", "&", "Do it."), Check("3", "warning", "x", "y"))
    )
    assert not diagnosis.healthy and Diagnosis(diagnosis.checks[:1]).healthy
    assert "→ Do it." in str(diagnosis) and str(diagnosis).endswith("3 checks: 1 ok, 1 with a warning, 1 failed.")
    told = json.loads(json.dumps(diagnosis.to_json()))
    assert told["healthy"] is False
    assert told["checks"][1] == {"name": "two", "state": "fails", "found": "&", "remedy": "Do it."}
    rows = BeautifulSoup(diagnosis._repr_html_(), "html.parser").select("tbody tr")
    assert [cell.get_text() for cell in rows[0].find_all("td")] == ["one", "ok", "<b>", ""]


def test_a_check_that_breaks_is_a_finding():
    [check] = look("torch", lambda: 1 / 0)
    assert_says_what_to_do(check, "ZeroDivisionError")
    assert (check.name, check.state) == ("torch", "fails")


# Processors and memory ----------------------------------------------------------------------------------------------

MEMINFO = "MemTotal: 16000000 kB\nMemFree: 100 kB\nMemAvailable: 8000000 kB\n"


def test_memory_is_what_the_system_has_or_its_control_group_leaves(files):
    assert machine.available_memory(files(proc__meminfo=MEMINFO)) == 8_000_000 * 1024
    group = "sys__fs__cgroup__memory_DOT_"
    root = files(proc__self__cgroup="0::/\n", **{group + "max": "max\n", group + "current": "5", group + "stat": ""})
    assert machine.available_memory(root) == 8_000_000 * 1024
    files(**{group + "max": "3000", group + "current": "2500", group + "stat": "anon 7\ninactive_file 400\n"})
    assert machine.available_memory(root) == 3000 - 2500 + 400


def test_the_tightest_of_nested_control_groups_counts(files):
    inner, outer = "sys__fs__cgroup__a__b__memory_DOT_", "sys__fs__cgroup__a__memory_DOT_"
    for folder, limit in ((inner, "9000"), (outer, "700")):
        files(**{folder + "max": limit, folder + "current": "100", folder + "stat": ""})
    assert machine.available_memory(files(proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")) == 600


def test_control_groups_of_version_1_are_read_too(files):
    group = "sys__fs__cgroup__memory__memory_DOT_"
    files(
        **{group + "limit_in_bytes": "3000", group + "usage_in_bytes": "2500", group + "stat": "total_inactive_file 1"}
    )
    root = files(proc__meminfo=MEMINFO, proc__self__cgroup="4:cpu,cpuacct:/x\n3:memory:/docker/abc\n")
    assert machine.available_memory(root) == 501


def test_processors_are_those_of_the_control_group(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    root = files(proc__self__cgroup="0::/\n", sys__fs__cgroup__cpu_DOT_max="max 100000\n")
    assert machine.count_cpus(root) == 8
    files(sys__fs__cgroup__cpu_DOT_max="250000 100000\n")
    assert machine.count_cpus(root) == 2


def test_processors_are_those_of_a_control_group_of_version_1(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    group = "sys__fs__cgroup__cpu__docker__cpu_DOT_cfs_"
    files(proc__self__cgroup="4:cpu,cpuacct:/docker\n")
    root = files(**{group + "quota_us": "-1\n", group + "period_us": "100000\n"})
    assert machine.count_cpus(root) == 8
    files(**{group + "quota_us": "300000\n"})
    assert machine.count_cpus(root) == 3


def test_little_memory_and_many_threads_are_warned_of(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    assert_says_what_to_do(machine.check_memory(), "1 GB", "kernel")
    monkeypatch.setattr(machine, "count_cpus", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert_says_what_to_do(machine.check_threads(), "64", "OMP_NUM_THREADS=2")


# GPU ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 8 GB that is made up."""
    about = namedtuple("About", "name total_memory major minor")("GeForce", 8 * 10**9, 7, 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (6 * 10**9, 8 * 10**9))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_gpu_is_named_and_tried(gpu, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(n))
    check = machine.check_device()
    assert check.state == "ok"
    assert "cuda:0 GeForce, 8 GB, compute capability 7.5, without bfloat16" in check.found

    def refuse(n, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", refuse)
    assert machine.check_device().state == "fails"
    assert_says_what_to_do(machine.check_device(), "no kernel image", 'device="cpu"')


def test_a_driver_without_a_gpu_that_torch_sees_is_warned_of(no_gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "version"
    assert machine.check_device(driver).state == "ok"
    driver.write_text("NVRM")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_says_what_to_do(machine.check_device(driver), "without CUDA", "Install PyPI's torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert_says_what_to_do(machine.check_device(driver), "CUDA 13.0", "update the NVIDIA driver")


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0"])
def test_gpus_that_are_hidden_are_no_reason_to_install_torch_again(no_gpu, tmp_path, monkeypatch, hidden):
    driver = tmp_path / "version"
    driver.write_text("NVRM")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check = machine.check_device(driver)
    assert_says_what_to_do(check, f"CUDA_VISIBLE_DEVICES={hidden!r}", "Unset")
    assert "Install" not in check.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert_says_what_to_do(machine.check_device(driver), "sees no GPU", "Install PyPI's torch")


# Disk ---------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_warned_of(tmp_path, monkeypatch):
    assert machine.existing(tmp_path / "a" / "b") == tmp_path
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 5_000_000))
    assert_says_what_to_do(machine.check_disk(tmp_path / "a"), "5 MB", "store=")


def test_a_store_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryDirectory", refuse)
    [check] = machine.check_store(tmp_path)
    assert check.state == "fails"
    assert_says_what_to_do(check, str(tmp_path), "Read-only file system", "SDXL_SAE_KIT_STORE")


def test_the_filesystem_is_that_of_the_innermost_mount(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 0:50 / /home rw shared:2 - nfs4 server:/home rw\n"
        "31 30 8:2 / /home/my\\040disk rw - xfs /dev/sdb rw\n"
    )
    kinds = {path: machine.filesystem(Path(path), mounts) for path in ("/tmp/x", "/home/me/store", "/home/my disk/x")}
    assert list(kinds.values()) == ["ext4", "nfs4", "xfs"]
    assert machine.filesystem(tmp_path, tmp_path / "none") == ""


def test_locks_that_do_not_hold_are_told_of(tmp_path, monkeypatch):
    assert machine.excludes(tmp_path / "lock")
    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 0:50 / / rw - nfs4 server:/ rw\n")
    assert_says_what_to_do(machine.check_store(tmp_path, mounts)[1], "nfs4", "one machine at a time")
    monkeypatch.setattr(machine.fcntl, "flock", lambda *_: None)
    assert_says_what_to_do(machine.check_store(tmp_path)[1], "one process at a time")

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(machine.fcntl, "flock", refuse)
    assert machine.check_store(tmp_path)[1].state == "fails"
    assert_says_what_to_do(machine.check_store(tmp_path)[1], "No locks available", "local disk")


@pytest.mark.parametrize("kind", ["lustre", "gpfs", "beegfs", "ceph", "fuse.ceph-fuse", "fuse.sshfs", "smb3", "nfs"])
def test_locks_of_filesystems_that_machines_share_are_not_trusted(tmp_path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:50 / / rw - {kind} server:/ rw,localflock\n")
    assert_says_what_to_do(machine.check_store(tmp_path, mounts)[1], kind, "localflock", "one machine at a time")
    mounts.write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    assert machine.check_store(tmp_path, mounts)[1].state == "ok"


def test_hdf5_that_is_not_there_or_does_not_lock_is_told_of(tmp_path, monkeypatch):
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    assert machine.check_store(tmp_path)[2].state == "ok"
    for off in ("FALSE", "0"):
        monkeypatch.setenv("HDF5_USE_FILE_LOCKING", off)
        assert_says_what_to_do(machine.check_store(tmp_path)[2], f"HDF5_USE_FILE_LOCKING={off}", "Unset the variable")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert machine.check_store(tmp_path)[2].state == "fails"
    assert_says_what_to_do(machine.check_store(tmp_path)[2], "pip install --force-reinstall h5py")


# The real model -----------------------------------------------------------------------------------------------------


def test_sdxl_wants_weights_and_memory(tmp_path, no_gpu, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    assert machine.check_real_model(tmp_path / "hub", offline=False).state == "ok"
    assert_says_what_to_do(machine.check_real_model(tmp_path, offline=True), "HF_HUB_OFFLINE")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    assert_says_what_to_do(machine.check_real_model(tmp_path, offline=False), "HF_HOME", "7 GB")
    weights = tmp_path / "models--stabilityai--sdxl-turbo" / "snapshots" / "71153311" / "unet"
    weights.mkdir(parents=True)
    (weights / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert machine.check_real_model(tmp_path, offline=True).state == "ok"
    monkeypatch.setattr(machine, "available_memory", lambda: 8 * 10**9)
    assert_says_what_to_do(machine.check_real_model(tmp_path, offline=True), "8 GB of memory on cpu", "bfloat16")


def test_sdxl_wants_a_gpu_that_is_large_enough(gpu, tmp_path):
    assert_says_what_to_do(machine.check_real_model(tmp_path, offline=False), "6 GB of memory on cuda", "9 GB")


# Installation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Says what is installed instead: versions by name (None: not there), and what the kit requires."""

    def pretend(versions, requires):
        def version(name):
            if versions.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(installation.metadata, "version", version)
        monkeypatch.setattr(installation.metadata, "requires", lambda name: requires.get(name))

    return pretend


def test_packages_that_are_missing_or_out_of_bounds_fail(installed):
    needs = {"sdxl-sae-kit": ["h5py<4,>=3.14", "numpy<3,>=2", "pillow>=11", "umap-learn>=0.5; extra == 'umap'"]}
    installed({"h5py": None, "numpy": "1.26.4", "pillow": "12.0"}, needs)
    check = installation.check_packages()
    assert check.state == "fails" and "pillow" not in check.found + check.remedy
    assert_says_what_to_do(check, "nothing found", "1.26.4 found", "-m pip install 'h5py<4,>=3.14' 'numpy<3,>=2'")
    installed({"h5py": "3.16", "numpy": "2.1", "pillow": "11"}, needs)
    assert installation.check_packages().state == "ok"


def test_an_extra_is_optional_but_not_of_any_version(installed):
    needs = {"sdxl-sae-kit": ["torch>=2", "umap-learn<1,>=0.5.7; extra == 'umap'"]}
    states = {}
    for found in (None, "0.5.12", "0.4"):
        installed({"umap-learn": found}, needs)
        [states[found]] = [check for check in installation.check_extras() if check.name == "extra umap"]
    assert [check.state for check in states.values()] == ["ok", "ok", "warning"]
    assert "pip install 'sdxl-sae-kit[umap]'" in states[None].remedy
    assert_says_what_to_do(states["0.4"], "0.4 found", "pip install 'umap-learn<1,>=0.5.7'")


def test_every_extra_says_what_it_gives():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert installation.EXTRAS.keys() == project["optional-dependencies"].keys()


def test_another_python_fails(monkeypatch):
    monkeypatch.setattr(installation.platform, "python_version", lambda: "3.10.12")
    assert_says_what_to_do(installation.check_python(), "3.10.12", ">=3.11")


VERSION_OF_A_WHEEL = """__version__ = '0.28.0{}'
git_version = '7a13ad0f89167089eb7d4cb4d6d7b4a6a4ed8d35'
from torchvision.extension import _check_cuda_version
if _check_cuda_version() > 0:
    cuda = _check_cuda_version()
"""


@pytest.mark.parametrize(
    ("tag", "torch_cuda", "wants", "state"),
    [
        ("+cpu", None, "2.13.0", "ok"),
        ("+cu130", "13.0", "2.13.0", "ok"),
        ("+cu130", None, "2.13.0", "fails"),
        ("+cu130", "12.8", "2.13.0", "fails"),
        ("+cpu", "13.0", "2.13.0", "fails"),
        ("+cpu", None, "2.12.0", "fails"),
        ("", "13.0", "2.13.0", "ok"),
        ("a0+1a2b3c4", "13.0", "2.13.0", "ok"),  # built from sources: that is a commit
    ],
)
@pytest.mark.parametrize("written", ["in the file", "in the distribution"])
def test_a_torchvision_of_another_torch_fails(installed, monkeypatch, tmp_path, tag, torch_cuda, wants, state, written):
    in_file, in_distribution = (tag, "") if written == "in the file" else ("", tag)
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (package / "version.py").write_text(VERSION_OF_A_WHEEL.format(in_file))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    installed({"torchvision": f"0.28.0{in_distribution}", "torch": "2.13.0"}, {"torchvision": [f"torch=={wants}"]})
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    [check] = installation.check_torchvision()
    assert check.state == state
    if state == "fails":
        assert_says_what_to_do(check, "pip uninstall torchvision")


def test_no_torchvision_is_nothing_to_tell(installed):
    installed({}, {})
    assert installation.check_torchvision() == []


def test_weights_are_listed_whole_and_a_changed_byte_is_noticed(tmp_path):
    listed = {line.split("  ")[1] for line in (WEIGHTS / "SHA256SUMS").read_text().splitlines()}
    there = {str(path.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*") if path.is_file()}
    assert listed == there - {"SHA256SUMS"}
    assert installation.check_weights().state == "ok"
    content = b"intact"
    (tmp_path / "a").write_bytes(content)
    digest = "1f8fb8b8e2a4f6ba4e6ae0ec0a3e17ac8dd5b4fc3fe6ff14b1ebb8a4d3a4a5d1"
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  a\n{digest}  b\n")
    check = installation.check_weights(tmp_path)
    assert check.state == "fails"
    assert_says_what_to_do(check, "a, b", "from where it came", "--force-reinstall --no-deps", "git restore")
    assert "--no-deps sdxl-sae-kit" not in check.remedy, "which asks an index, where not every kit came from"


# JupyterLab ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def jupyter(monkeypatch, tmp_path):
    """Folders of JupyterLab that are made up: settings and extensions."""
    import jupyter_core.paths

    monkeypatch.setattr(jupyter_core.paths, "jupyter_path", lambda *parts: [str(tmp_path.joinpath("share", *parts))])
    monkeypatch.setattr(jupyter_core.paths, "jupyter_config_path", lambda: [str(tmp_path / "etc")])
    return tmp_path


def test_jupyterlab_without_its_widget_extensions_fails(jupyter):
    check = installation.check_jupyterlab()
    assert check.state == "fails"
    assert_says_what_to_do(check, "anywidget, @jupyter-widgets/jupyterlab-manager", "pip install --force-reinstall")
    install_widgets(jupyter)
    assert installation.check_jupyterlab().state == "ok"


def install_widgets(jupyter):
    for name in installation.WIDGETS:
        folder = jupyter / "share" / "labextensions" / name
        folder.mkdir(parents=True)
        (folder / "package.json").write_text("{}")


def disable(jupyter, listed):
    config = jupyter / "etc" / "labconfig" / "page_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        (
            {"disabledExtensions": {"anywidget": True, "other": True, "@jupyter-widgets/x": False}},
            ["anywidget", "other"],
        ),
        ({"disabledExtensions": ["anywidget:plugin"]}, ["anywidget:plugin"]),
        ([], []),
    ],
)
def test_a_disabled_extension_is_found(jupyter, listed, found):
    disable(jupyter, listed)
    assert installation.disabled([jupyter / "etc", jupyter / "nowhere"]) == found


@pytest.mark.parametrize(
    ("name", "state"), [("anywidget", "fails"), ("anywidget:plugin", "warning"), ("another:plugin", "ok")]
)
def test_widgets_are_not_drawn_with_the_extension_off_but_may_be_with_one_plugin_off(jupyter, name, state):
    install_widgets(jupyter)
    disable(jupyter, {"disabledExtensions": {name: True}})
    check = installation.check_jupyterlab()
    assert check.state == state
    if state != "ok":
        assert_says_what_to_do(check, f"with {name} disabled", f"jupyter labextension enable {name}")


@pytest.mark.parametrize(
    ("starts", "state"),
    [("python", "ok"), (sys.executable, "ok"), ("/opt/another/bin/python3", "warning")],
)
def test_the_kernel_that_notebooks_ask_for_is_this_python(tmp_path, monkeypatch, starts, state):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {
        "argv": [starts, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "P",
        "language": "python",
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    check = installation.check_kernel()
    assert check.state == state
    if state != "ok":
        assert_says_what_to_do(check, starts, "ipykernel install --user --name sdxl-sae-kit")


def test_a_browser_is_the_one_that_would_print_and_is_missed_in_words(monkeypatch):
    monkeypatch.setattr(installation, "find_browser", lambda: "/bin/msedge")
    assert installation.check_browser().found == "/bin/msedge"
    monkeypatch.undo()
    monkeypatch.setattr(printing.shutil, "which", lambda name: None)
    monkeypatch.setattr(printing, "MAC", ())
    check = installation.check_browser()
    assert (check.state, check.found) == ("ok", "none") and "Install Chromium" in check.remedy
