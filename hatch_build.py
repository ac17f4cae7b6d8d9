"""Compiles the native library into the wheel; where that cannot be done the wheel comes without it, and says so.

The system's C compiler does it ($CC is honoured), or, only where there is none, PyPI's ziglang.
"""

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src", "foredraft", "native")
ZIG = "ziglang>=0.14"


class NativeBuildHook(BuildHookInterface):
    def dependencies(self) -> list[str]:
        build = _build_script(Path(self.root))
        return [ZIG] if build.supported() and build.compiler() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = _build_script(Path(self.root))
        if not build.supported():
            self.app.display_warning("foredraft comes without its native library: it is for 64-bit Linux and macOS")
            return
        try:
            build.build(Path(self.root) / NATIVE)
        except build.BuildError as error:
            self.app.display_warning(f"foredraft comes without its native library, and runs on torch alone: {error}")
            return
        build_data["pure_python"] = False
        build_data["artifacts"].append(str(NATIVE / build.NAME))
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _build_script(root: Path) -> ModuleType:
    """build.py by its path: foredraft itself cannot be imported where it is being built."""
    spec = importlib.util.spec_from_file_location("build_native", root / NATIVE / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
