"""Add the compiled extension to the package of pyproject.toml; see build_backend/."""

from setuptools import setup
from singer_build.command import Build, BuildKernels, Distribution

setup(distclass=Distribution, cmdclass={"build": Build, "build_kernels": BuildKernels})
