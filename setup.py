"""The folder map: each root folder is a sub-package of `tamis` (see docs/decisions.md, 1)."""

from setuptools import find_packages, setup

FOLDERS = ["kernels", "capture", "passes", "lowering", "runtime"]
PACKAGES = {"tamis": "core", **{f"tamis.{folder}": folder for folder in FOLDERS}}
nested = {f"tamis.{f}.{p}": f"{f}/{p.replace('.', '/')}" for f in FOLDERS for p in find_packages(f)}

setup(
    packages=[*PACKAGES, *nested],
    package_dir={**PACKAGES, **nested},
    package_data={"tamis": ["py.typed"], "tamis.kernels.triton": ["tables/*.json"]},
)
