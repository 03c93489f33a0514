# Everything is declared in pyproject.toml; this file is the place where the native ops of csrc/ will be built.
from setuptools import setup

setup()
