"""For installers that do not read pyproject.toml, which holds everything."""

from setuptools import setup

setup()
