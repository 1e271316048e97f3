"Packaging: every value comes from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    packages=find_packages(include=["kdc_nb*"]),
    package_data={"kdc_nb": ["explorer.css", "explorer.js"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"text": cfg["text_requirements"].split(),
                    "parquet": cfg["parquet_requirements"].split(),
                    "dev": (cfg["dev_requirements"] + " " + cfg["text_requirements"]).split()},
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
                  "console_scripts": cfg["console_scripts"].split()},
)
