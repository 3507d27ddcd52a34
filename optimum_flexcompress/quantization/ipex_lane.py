"""Whether Intel Extension for PyTorch (IPEX) can be used here, said before it is imported.

IPEX ended with release 2.8, whose kernels were built for torch 2.8. Imported beside another torch it prints to the
terminal and fails in its own version check, so versions are compared first.
"""

from __future__ import annotations

from importlib import metadata
from types import ModuleType

from ..errors import FlexCompressError


PACKAGE = "intel-extension-for-pytorch"
TORCH_VERSION, IPEX_VERSION = "2.8.0", "2.8.0"
_INSTALL = (
    f"IPEX needs an environment of its own: make one with `pip install torch=={TORCH_VERSION} "
    f"{PACKAGE}=={IPEX_VERSION} optimum-flexcompress`"
)


def check_ipex() -> None:
    """Raises [`FlexCompressError`] unless IPEX and the torch that it was built for are installed."""
    torch_version = metadata.version("torch")
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise FlexCompressError(f"{PACKAGE} is not installed beside torch {torch_version}: {_INSTALL}.") from None
    if _minor(version) != _minor(torch_version):
        raise FlexCompressError(f"{PACKAGE} {version} does not run with torch {torch_version}: {_INSTALL}.")


def load_ipex() -> ModuleType:
    """Imports IPEX, which also turns on its fusions of TorchScript graphs.

    Raises:
        FlexCompressError: As for [`check_ipex`].
    """
    check_ipex()
    import intel_extension_for_pytorch

    return intel_extension_for_pytorch


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
