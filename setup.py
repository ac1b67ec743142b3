"""Metadata is in setup.cfg. Two source roots need a list of packages, which that file cannot hold."""

import setuptools

setuptools.setup(
    packages=setuptools.find_packages("lib") + setuptools.find_packages("kernels"),
    package_dir={"steelyard": "lib/steelyard", "steelyard_kernels": "kernels/steelyard_kernels"},
)
