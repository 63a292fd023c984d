"""Package metadata: all of it stands in settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
conf = parser["DEFAULT"]
extras = {
    name: conf[f"{name}_requirements"].split()
    for name in ("figures", "tensorboard", "hub", "dev")
}

setup(
    name=conf["lib_name"],
    version=conf["version"],
    description=conf["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=conf["author"],
    license="Apache-2.0",
    keywords=conf["keywords"],
    url=conf["git_url"],
    packages=find_packages(include=[conf["lib_path"]]),
    package_data={conf["lib_path"]: ["*.txt"]},
    python_requires=f">={conf['min_python']}",
    install_requires=conf["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": conf["console_scripts"].split()},
    zip_safe=False,
)
